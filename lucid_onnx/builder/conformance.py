"""The named cases as models: what the conformance suite and every comparison of runtimes start from."""

from __future__ import annotations

import onnx

from lucid_onnx.ops import embedding_bag_collection, embedding_bag_grad, quantized_embedding_bag
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag.cases import Case
from lucid_onnx.ops.variants import TABLE_ROLES, BaseVariant

from .models import op_model

#: A named case of any operator.
AnyCase = (
    Case | quantized_embedding_bag.cases.Case | embedding_bag_grad.cases.Case | embedding_bag_collection.cases.Case
)


def case_model(
    case: AnyCase,
    form: str,
    opset: int = spec.DEFAULT_OPSET,
    *,
    constant: bool = False,
) -> onnx.ModelProto:
    """The model of a case, in "portable", "standard" or "native" form.

    All of `Case.inputs` are its inputs, but with ``constant`` the tables are initializers.
    """
    op: BaseVariant = case.op
    values = op.values(case.attributes, {})
    return op_model(
        op,
        case.attributes,
        {name: array.dtype for name, array in case.inputs.items()},
        constants={n: array for n, array in case.inputs.items() if constant and values[n].role in TABLE_ROLES},
        form=form,
        opset=opset,
    )
