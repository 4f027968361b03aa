"""What each operator of the ``ai.lucid`` domain means.

One folder per operator: ``spec`` (equation, inputs, attributes, errors), ``reference`` (NumPy),
``lowering`` (standard ONNX) and ``cases`` (named examples that every backend must agree on).
Nothing in here knows a runtime, and nothing in here imports from the tools above it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import embedding_bag, embedding_bag_collection, embedding_bag_grad, quantized_embedding_bag

#: Every operator, by the folder's name. A new operator is one folder and one line here.
OPERATORS = {
    "embedding_bag": embedding_bag,
    "quantized_embedding_bag": quantized_embedding_bag,
    "embedding_bag_grad": embedding_bag_grad,
    "embedding_bag_collection": embedding_bag_collection,
}
#: The operator that a node of the domain is of, by the node's op_type.
OPERATOR_OF = {name: operator for operator in OPERATORS.values() for name in operator.spec.VARIANTS}


def variant(name: str, attributes: Mapping[str, Any]) -> Any:
    """The Variant of a node, by its op_type and its attributes, which tell the number of a collection's inputs.

    Raises:
        ValueError: the attributes do not tell.
    """
    return OPERATOR_OF[name].spec.VARIANTS[name].of(attributes)
