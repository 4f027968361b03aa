"""A model of one bag from a table that may be larger than memory, and becomes smaller on its way into the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx

from lucid_onnx.builder import Form, Streamed, as_dtype, build_light_model, op_model, streamed
from lucid_onnx.ops import quantized_embedding_bag
from lucid_onnx.ops.attributes import takes
from lucid_onnx.ops.embedding_bag import spec

from . import tables

if TYPE_CHECKING:
    from typing import Unpack


class SmallerModel(NamedTuple):
    """A model whose tables have no data yet, what `save` writes of them, and what they lose by it."""

    model: onnx.ModelProto
    tables: Mapping[str, Streamed]
    errors: tables.RowErrors  #: counted while the tables are written


@takes(spec.Attributes)
def build_smaller(
    weight: np.ndarray,
    dtype: str,
    *,
    two_d: bool,
    per_sample_weights: bool,
    index_dtype: str,
    form: Form,
    opset: int,
    **attributes: Unpack[spec.Keywords],
) -> SmallerModel:
    """What `quantize` makes of `lucid_onnx.build_model` of a table [V, D].

    Args:
        weight: the table; mapped from a file, it is read in parts.
        dtype: "int8", "uint8", "int4", "uint4", "float16" or "bfloat16".
        **attributes: those of `lucid_onnx.embedding_bag`.
        two_d, per_sample_weights, index_dtype, form, opset: as in `lucid_onnx.build_model`.

    Raises:
        TypeError, ValueError: as `lucid_onnx.build_model`; or the table has that dtype already. A number that the new
            type cannot hold is a ValueError when its part is written.
    """
    spec.check_table(weight)
    if dtype == str(weight.dtype):
        raise ValueError(f"dtype = {dtype!r}, but the table is {dtype} already")
    num_rows, dim = weight.shape
    kind = quantized_embedding_bag.spec.CODES_TYPES.get(dtype)
    numbers: dict[str, np.ndarray] = {}
    if kind is None:
        model = build_light_model(
            (num_rows, dim),
            tables.HALVES[dtype],
            two_d=two_d,
            per_sample_weights=per_sample_weights,
            index_dtype=index_dtype,
            form=form,
            opset=opset,
            **attributes,
        )
    else:
        meaning = quantized_embedding_bag.spec
        codes = meaning.Attributes(**attributes, codes_type=kind.name, embedding_dim=dim)
        codes.check(weighted=per_sample_weights, num_rows=num_rows)
        names = ("scale",) if kind.lowest < 0 else ("scale", "bias")
        numbers = {name: np.empty(num_rows, np.float32) for name in names}
        op = meaning.variant(second=None if kind.lowest < 0 else "bias", two_d=two_d, weighted=per_sample_weights)
        index = as_dtype("index_dtype", index_dtype)
        model = op_model(
            op,
            codes,
            {"scale": np.dtype(np.float32), "indices": index, "offsets": index},
            constants={
                "codes": np.broadcast_to(np.zeros((), kind.stored), (num_rows, kind.stored_columns(dim))),
                **numbers,
            },
            form=form,
            opset=opset,
            fill=False,
        )
    smaller = tables.Smaller(tables.rows_of(weight), dtype)

    def values() -> Iterator[memoryview]:
        try:
            for begin, part in smaller:
                for name, array in numbers.items():
                    array[begin : begin + len(part.values)] = part.scale if name == "scale" else part.bias
                yield np.ascontiguousarray(part.values).reshape(-1).view(np.uint8).data
        except tables.Unfit as unfit:
            raise ValueError(f"the table cannot be {dtype}: {unfit}") from None

    table = model.graph.initializer[0]  # which is written before the numbers of its rows are
    width = 2 * dim if kind is None else kind.stored_columns(dim)
    streams = {table.name: Streamed(num_rows * width, values)}
    streams |= {name: streamed(array) for name, array in numbers.items()}
    return SmallerModel(model, streams, smaller.errors)
