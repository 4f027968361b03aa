"""Tables that a DequantizeLinear makes of integers: bags over quantized tables."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from lucid_onnx.ops import quantized_embedding_bag
from lucid_onnx.rewrite.expressions import Expression, constant, from_array, number
from lucid_onnx.rewrite.normal_form import make

from .bag import SCALES, Bag, QuantizedBag

_CODES_TYPES = {ir.DataType.INT8: "int8", ir.DataType.UINT8: "uint8"}
#: Those that are stored otherwise here, two in a byte of a row: a table of them is written anew.
_SMALL_TYPES = {ir.DataType.INT4: "int4", ir.DataType.UINT4: "uint4"}


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
    codes_type = None if codes is None or codes.type is None else {**_CODES_TYPES, **_SMALL_TYPES}.get(codes.type)
    if codes is None or scale is None or codes_type is None or scale.type not in SCALES:
        return bag
    if dims is None or len(dims) != 2 or not isinstance(dims[0], int) or not isinstance(dims[1], int):
        return bag
    if table.attributes.get("block_size") or not _is_for_rows(scale, zero_point, dims[0], table.attributes["axis"]):
        return bag
    if codes.type in _SMALL_TYPES:
        packed = _packed(codes)
        if packed is None:
            return bag
        codes = packed
    second = None
    is_zero = zero_point is not None and zero_point.array is not None and not zero_point.array.astype(np.int64).any()
    if zero_point is not None and not is_zero:
        numbers = make("Cast", zero_point, to=int(scale.type or ir.DataType.FLOAT))
        second = ("zero_point", _for_each_row(numbers, dims[0]))
    fields = {f.name: getattr(bag.attributes, f.name) for f in dataclasses.fields(bag.attributes)}
    meaning = quantized_embedding_bag.spec.Attributes(**fields, codes_type=codes_type, embedding_dim=dims[1])
    whole = {f.name: getattr(bag, f.name) for f in dataclasses.fields(bag)}
    whole |= {"weight": _for_each_row(scale, dims[0]), "attributes": meaning}
    return QuantizedBag(**whole, codes=codes, second=second)


def _packed(codes: Expression) -> Expression | None:
    """Values of 4 bits that the model holds itself, two in a byte of their row; None for others."""
    array, value = codes.array, codes.value
    if array is None and value is not None and value.is_initializer() and not value.is_graph_input():
        tensor = value.const_value
        array = None if tensor is None or isinstance(tensor, ir.ExternalTensor) else tensor.numpy()
    return None if array is None else from_array(quantized_embedding_bag.spec.pack(array))


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
