"""Tables that a DequantizeLinear makes of integers: bags over quantized tables."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from lucid_onnx.ops import quantized_embedding_bag
from lucid_onnx.rewrite.expressions import Expression, constant, number
from lucid_onnx.rewrite.normal_form import make

from .bag import SCALES, Bag, QuantizedBag

_CODES_TYPES = {ir.DataType.INT8: "int8", ir.DataType.UINT8: "uint8"}


def over_codes(bag: Bag) -> Bag:
    """The bag over the quantized values that its table is made of; another bag as it is.

    onnxruntime.quantization writes ``DequantizeLinear(Gather(codes, indices), scale, zero_point)``, of which the normal
    form is the same as of ``Gather(DequantizeLinear(codes, scale, zero_point), indices)``.

    1. One scale and zero_point for the whole table: the node takes one for each row.
    2. Axis 0: one for each row already.
    """
    table = bag.weight
    if table.op != "DequantizeLinear" or len(table.inputs) not in (2, 3) or isinstance(bag, QuantizedBag):
        return bag
    codes, scale, zero_point = (*table.inputs, None)[:3]
    dims = None if codes is None else codes.dims
    if codes is None or scale is None or codes.type not in _CODES_TYPES or scale.type not in SCALES:
        return bag
    if dims is None or len(dims) != 2 or not isinstance(dims[0], int) or not isinstance(dims[1], int):
        return bag
    if table.attributes.get("block_size") or not _is_for_rows(scale, zero_point, dims[0], table.attributes["axis"]):
        return bag
    second = None
    if zero_point is not None and not (zero_point.array is not None and not zero_point.array.any()):
        numbers = make("Cast", zero_point, to=int(scale.type or ir.DataType.FLOAT))
        second = ("zero_point", _for_each_row(numbers, dims[0]))
    fields = {f.name: getattr(bag.attributes, f.name) for f in dataclasses.fields(bag.attributes)}
    meaning = quantized_embedding_bag.spec.Attributes(
        **fields, codes_type=_CODES_TYPES[codes.type], embedding_dim=dims[1]
    )
    whole = {f.name: getattr(bag, f.name) for f in dataclasses.fields(bag)}
    whole |= {"weight": _for_each_row(scale, dims[0]), "attributes": meaning}
    return QuantizedBag(**whole, codes=codes, second=second)


def _is_for_rows(scale: Expression, zero_point: Expression | None, rows: int, axis: int) -> bool:
    """Whether there is one scale for the table, or one for each row; and as many zero_points."""
    for e in (scale, scale if zero_point is None else zero_point):
        if e.dims is None or e.dims != scale.dims:
            return False
    return scale.dims in ((), (1,)) or (scale.dims == (rows,) and axis in (0, -2))


def _for_each_row(numbers: Expression, rows: int) -> Expression:
    """[V] of one number, or of V numbers."""
    if numbers.dims == (rows,):
        return numbers
    if number(numbers) is None:
        return make("Expand", numbers, constant([rows]))
    # Not folded: a runtime can do it, and the file is small.
    return Expression("Expand", (numbers, constant([rows])), dtype=numbers.dtype, shape=(rows,), attributes={})
