"""The named cases as models: what the conformance suite and every comparison of runtimes start from."""

from __future__ import annotations

import onnx

from lucid_onnx.ops import embedding_bag_collection, embedding_bag_grad, quantized_embedding_bag
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag.cases import Case

from .models import bag_model, collection_model, quantized_bag_model

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

    All of `Case.inputs` are its inputs, but with ``constant`` the table is an initializer.
    """
    if isinstance(case, embedding_bag_collection.cases.Case):
        return collection_model(
            case.op,
            case.attributes,
            tables=[table.weight for table in case.tables] if constant else [],
            table_dtype=case.tables[0].weight.dtype,
            index_dtypes={name: array.dtype for name, array in case.inputs.items()},
            form=form,
            opset=opset,
        )
    if isinstance(case, quantized_embedding_bag.cases.Case):
        table = ("codes", "scale", "zero_point", "bias")
        return quantized_bag_model(
            case.op,
            case.attributes,
            table={name: case.inputs[name] for name in case.op.inputs if constant and name in table},
            scale_dtype=case.scale.dtype,
            index_dtype=case.indices.dtype,
            offsets_dtype=case.indices.dtype if case.offsets is None else case.offsets.dtype,
            form=form,
            opset=opset,
        )
    return bag_model(
        case.op,
        case.attributes,
        table=case.weight if constant else None,
        table_dtype=case.weight.dtype,
        index_dtype=case.indices.dtype,
        offsets_dtype=case.indices.dtype if case.offsets is None else case.offsets.dtype,
        form=form,
        opset=opset,
    )
