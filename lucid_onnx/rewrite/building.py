"""A model of one bag from a table that may be larger than memory, and may become smaller on its way into the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx

from lucid_onnx.builder import Form, Streamed, as_dtype, op_model, streamed
from lucid_onnx.ops import quantized_embedding_bag
from lucid_onnx.ops.attributes import takes
from lucid_onnx.ops.embedding_bag import spec

from . import tables

if TYPE_CHECKING:
    from typing import Unpack


class StreamedModel(NamedTuple):
    """A model whose tables have no data yet, what `save` writes of them, and what they lose by it."""

    model: onnx.ModelProto
    tables: Mapping[str, Streamed]
    errors: tables.RowErrors | None  #: counted while the tables are written; None if they stay as they are


@takes(spec.Attributes)
def stream_model(
    weight: np.ndarray,
    dtype: str | None = None,
    *,
    two_d: bool,
    per_sample_weights: bool,
    index_dtype: str,
    form: Form,
    opset: int,
    **attributes: Unpack[spec.Keywords],
) -> StreamedModel:
    """As `lucid_onnx.build_model` of a table [V, D], and as `quantize` of that with a ``dtype``.

    Args:
        weight: the table; mapped from a file, it is read in parts.
        dtype: "int8", "uint8", "int4", "uint4", "float16" or "bfloat16"; None keeps the table's.
        **attributes: those of `lucid_onnx.embedding_bag`.
        two_d, per_sample_weights, index_dtype, form, opset: as in `lucid_onnx.build_model`.

    Raises:
        TypeError, ValueError: as `lucid_onnx.build_model`; or the table has that dtype already. A number that the new
            type cannot hold is a ValueError when its part is written.
    """
    spec.check_table(weight)
    given = spec.Attributes(**attributes)
    given.check(weighted=per_sample_weights, num_rows=len(weight))
    if dtype == str(weight.dtype):
        raise ValueError(f"dtype = {dtype!r}, but the table is {dtype} already")
    index = as_dtype("index_dtype", index_dtype)
    dtypes = {"indices": index, "offsets": index}
    kind = quantized_embedding_bag.spec.CODES_TYPES.get(dtype or "")
    num_rows, dim = weight.shape
    if kind is None:
        kept = weight.dtype if dtype is None else tables.HALVES[dtype]
        op = spec.variant(two_d=two_d, weighted=per_sample_weights)
        constants = {"weight": _stub(kept, weight.shape)}
        model = op_model(op, given, {**dtypes, "weight": kept}, constants=constants, form=form, opset=opset, fill=False)
    else:
        signed = kind.lowest < 0
        meaning = quantized_embedding_bag.spec
        new_op = meaning.variant(second=None if signed else "bias", two_d=two_d, weighted=per_sample_weights)
        numbers = ("scale",) if signed else ("scale", "bias")
        constants = {"codes": _stub(kind.stored, (num_rows, kind.stored_columns(dim)))}
        constants |= {name: _stub(np.dtype(np.float32), (num_rows,)) for name in numbers}
        codes = meaning.Attributes(**attributes, codes_type=kind.name, embedding_dim=dim)
        dtypes["scale"] = np.dtype(np.float32)
        model = op_model(new_op, codes, dtypes, constants=constants, form=form, opset=opset, fill=False)
    if dtype is None:
        return StreamedModel(model, {"weight": streamed(weight)}, None)
    smaller = tables.Smaller(tables.rows_of(weight), dtype)
    numbers_of_rows = {name: np.empty(num_rows, np.float32) for name in constants if name in ("scale", "bias")}

    def values() -> Iterator[memoryview]:
        try:
            for begin, part in smaller:
                for name, array in numbers_of_rows.items():
                    array[begin : begin + len(part.values)] = part.scale if name == "scale" else part.bias
                yield np.ascontiguousarray(part.values).reshape(-1).view(np.uint8).data
        except tables.Unfit as unfit:
            raise ValueError(f"the table cannot be {dtype}: {unfit}") from None

    first = next(iter(constants))  # which is written before the numbers of its rows are
    streams = {first: Streamed(constants[first].nbytes, values)}
    streams |= {name: streamed(array) for name, array in numbers_of_rows.items()}
    return StreamedModel(model, streams, smaller.errors)


def _stub(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """An array of that type and shape which takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)
