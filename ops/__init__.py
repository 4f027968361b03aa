"""What each operator of the ``ai.lucid`` domain means.

One folder per operator: ``spec`` (equation, inputs, attributes, refusals), ``reference`` (NumPy),
``lowering`` (standard ONNX) and ``cases`` (named examples that every backend must agree on).
Nothing in here knows a runtime, and nothing in here imports from the tools above it.
"""

from . import embedding_bag, embedding_bag_grad, quantized_embedding_bag

#: Every operator, by the folder's name. A new operator is one folder and one line here.
OPERATORS = {
    "embedding_bag": embedding_bag,
    "quantized_embedding_bag": quantized_embedding_bag,
    "embedding_bag_grad": embedding_bag_grad,
}
#: The operator that a node of the domain is of, by the node's op_type.
OPERATOR_OF = {name: operator for operator in OPERATORS.values() for name in operator.spec.VARIANTS}
