"""The expected outputs of a whole model: bags by our NumPy reference, everything else by onnx.reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from lucid_onnx.builder import to_form
from lucid_onnx.ops import (
    OPERATOR_OF,
    embedding_bag,
    embedding_bag_collection,
    embedding_bag_grad,
    quantized_embedding_bag,
    variant,
)
from lucid_onnx.ops.embedding_bag import spec


class _Bag(OpRun):
    op_domain = spec.DOMAIN

    def _run(self, *inputs: np.ndarray, **_: Any) -> tuple[np.ndarray, ...]:
        node = self.onnx_node
        operator = OPERATOR_OF[node.op_type]
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        op = variant(node.op_type, given)
        attributes = operator.spec.Attributes.from_onnx(given)
        arrays = dict(zip(op.inputs, inputs, strict=True))
        if operator is embedding_bag_collection:
            return (embedding_bag_collection.reference.pooled(op, arrays, attributes),)
        keywords = attributes.keywords
        if operator is embedding_bag:
            return (embedding_bag.reference.embedding_bag(arrays.pop("indices"), **arrays, **keywords),)
        if operator is embedding_bag_grad:
            keywords["sparse"] = op.sparse
            gradient, indices = arrays.pop("grad_output"), arrays.pop("indices")
            return embedding_bag_grad.reference.embedding_bag_grad(gradient, indices, **arrays, **keywords)
        kind = attributes.codes
        codes = quantized_embedding_bag.spec.unpack(arrays.pop("codes"), kind, attributes.embedding_dim)
        pool = quantized_embedding_bag.reference.quantized_embedding_bag
        return (pool(arrays.pop("indices"), codes.astype(kind.dtype), **arrays, **keywords),)


_OPS = [type(name, (_Bag,), {}) for name in OPERATOR_OF]


def outputs(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a model of any form.

    Raises:
        Exception: whatever onnx.reference raises over an operator that it lacks.
    """
    native = to_form(model, "native") if any(i.domain == spec.DOMAIN for i in model.opset_import) else model
    with np.errstate(all="ignore"):
        return [np.asarray(o) for o in ReferenceEvaluator(native, new_ops=_OPS).run(None, dict(inputs))]
