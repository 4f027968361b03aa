"""The named cases as models: what the conformance suite and every comparison of runtimes start from."""

from __future__ import annotations

import onnx

from .builder import bag_model
from .ops.embedding_bag import spec
from .ops.embedding_bag.cases import Case


def case_model(case: Case, form: str, opset: int = spec.DEFAULT_OPSET, *, constant: bool = False) -> onnx.ModelProto:
    """The model of a case, in "portable", "standard" or "native" form.

    All of `Case.inputs` are its inputs, but with ``constant`` the table is an initializer.
    """
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
