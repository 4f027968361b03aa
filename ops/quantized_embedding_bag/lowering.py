"""QuantizedEmbeddingBag in standard ONNX: `..embedding_bag.lowering` over rows that are decoded as they are read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from ..embedding_bag.lowering import Table, pool
from ..emit import Emitter, forms
from . import spec

_INT = onnx.AttributeProto.INT
_NIBBLES = tuple(t.onnx_type for t in spec.CODES_TYPES.values() if t.bits == 4)
_INT4 = spec.CODES_TYPES["int4"].onnx_type


def expand(e: Emitter, op: spec.Variant, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Write the operator's nodes into ``e``."""
    named = dict(zip(op.inputs, inputs, strict=True))
    codes, scale = named["codes"], named["scale"]
    e.part("num_columns")
    dim = e.Unsqueeze(e.attribute("embedding_dim", _INT), [0])

    def number(e: Emitter, values: str, index: str) -> str:
        """One number a row, as a column beside it."""
        return e.Unsqueeze(e.cast_to_attribute(e.Gather(values, index), "stash_type"), [-1])

    def rows(e: Emitter, index: str) -> str:
        stored = e.Gather(codes, index)
        values = e.select(
            lambda a: a["codes_type"] in _NIBBLES,
            lambda: e.GreaterOrEqual(e.attribute("codes_type", _INT), min(_NIBBLES)),
            lambda b: _unpacked(b, stored, dim),
            lambda b: b.cast_to_attribute(stored, "stash_type"),
        )
        if op.second == "zero_point":
            values = e.Sub(values, number(e, named["zero_point"], index))
        values = e.Mul(values, number(e, scale, index))
        if op.second == "bias":
            values = e.Add(values, number(e, named["bias"], index))
        return values

    e.part("num_rows")
    pool(e, op, inputs, outputs[0], Table(e.Shape(codes, start=0, end=1), dim, rows, scale))


def _unpacked(e: Emitter, stored: str, dim: str) -> str:
    """Bytes [C, M, P] as the values [C, M, D] that are in their halves. In float, where every runtime can count."""
    number = lambda value: e.cast_to_attribute(e.constant(np.float32(value)), "stash_type")  # noqa: E731
    byte = e.cast_to_attribute(stored, "stash_type")  # exact: at most 255
    high = e.Floor(e.Mul(byte, number(1 / 16)))
    low = e.Sub(byte, e.Mul(high, number(16)))
    pairs = e.Concat(e.Unsqueeze(low, [-1]), e.Unsqueeze(high, [-1]), axis=-1)  # [C, M, P, 2]
    halves = e.Mul(e.Shape(stored, start=2), 2)
    nibbles = e.Reshape(pairs, e.Concat(e.Shape(stored, end=2), halves, axis=0), allowzero=1)
    nibbles = e.Slice(nibbles, [0], dim, [2])
    # Two's complement: 8 to 15 are -8 to -1.
    signed = e.Equal(e.attribute("codes_type", _INT), _INT4)
    wrap = e.Where(signed, number(16), number(0))
    return str(e.Sub(nibbles, e.Mul(wrap, e.Floor(e.Mul(nibbles, number(1 / 8))))))


function, nodes = forms(spec, expand)
