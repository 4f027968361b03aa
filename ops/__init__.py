"""What each operator of the ``ai.lucid`` domain means.

One folder per operator: ``spec`` (equation, inputs, attributes, refusals), ``reference`` (NumPy),
``lowering`` (standard ONNX) and ``cases`` (named examples that every backend must agree on).
Nothing in here knows a runtime, and nothing in here imports from the tools above it.
"""

from . import embedding_bag, quantized_embedding_bag

#: Every operator, by the folder's name. A new operator is one folder and one line here.
OPERATORS = {"embedding_bag": embedding_bag, "quantized_embedding_bag": quantized_embedding_bag}
