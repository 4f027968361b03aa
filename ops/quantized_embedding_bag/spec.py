"""QuantizedEmbeddingBag: EmbeddingBag over quantized values of 8 or 4 bits, with a scale per row.

Row ``r`` of the table is one of ::

    codes[r] * scale[r]
    (codes[r] - zero_point[r]) * scale[r]
    codes[r] * scale[r] + bias[r]

and everything else is as in `..embedding_bag.spec`, max_norm and padding_idx too. Arithmetic is in float32; the
output and per_sample_weights have the dtype of ``scale``, float32 or float16, and so have ``zero_point`` and ``bias``.

=============== =================================== =====================================================
codes           int8, uint8                         [V, D]
codes           int4, uint4, packed two in a uint8  [V, (D + 1) // 2], the first value in the low half of
                                                    the first byte; every row begins at a byte of its own
scale           T: float32, float16                 [V]
zero_point      T; or                               [V]
bias            T                                   [V]
=============== =================================== =====================================================

(An ONNX tensor of INT4 would be the same bytes where D is even. Gather does not take one, ONNX Runtime has them from
1.20 on, and a library that registers an operator with them breaks every session of older releases.)

The operator has a name per combination of inputs: ``QuantizedEmbeddingBag``, with ``ZeroPoint`` or ``Bias``, with
``2D``, with ``Weighted``, in this order. Its attributes are EmbeddingBag's and

============= ==== ================================== =======================================================
attribute     type values                             meaning
============= ==== ================================== =======================================================
codes_type    INT  3 int8, 2 uint8, 22 int4, 21 uint4 what the quantized values are, by TensorProto's numbers
embedding_dim INT  >= 0                               D, which packed values do not tell
============= ==== ================================== =======================================================
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ..attributes import Choice, Integer, attribute
from ..embedding_bag import spec as embedding_bag
from ..variants import BaseVariant, Dims, Value, bag_values

DOMAIN, VERSION = embedding_bag.DOMAIN, embedding_bag.VERSION


class CodesType(NamedTuple):
    """A type of quantized values."""

    name: str
    onnx_type: int  #: TensorProto.DataType
    bits: int
    lowest: int
    highest: int

    @property
    def dtype(self) -> np.dtype:
        """The dtype of one value an element, as callers have them."""
        return np.dtype(getattr(ml_dtypes, self.name) if self.bits == 4 else self.name)

    @property
    def stored(self) -> np.dtype:
        """The dtype that the graph and the kernels hold them in."""
        return np.dtype(np.uint8) if self.bits == 4 else np.dtype(self.name)

    def stored_columns(self, dim: int) -> int:
        """How many elements of `stored` a row of ``dim`` values takes."""
        return (dim + 1) // 2 if self.bits == 4 else dim


CODES_TYPES: Mapping[str, CodesType] = {
    t.name: t
    for t in (
        CodesType("int8", 3, 8, -128, 127),
        CodesType("uint8", 2, 8, 0, 255),
        CodesType("int4", 22, 4, -8, 7),
        CodesType("uint4", 21, 4, 0, 15),
    )
}
SCALE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16))
SECOND_NUMBERS = ("zero_point", "bias")


@dataclasses.dataclass(frozen=True)
class Variant(BaseVariant):
    """One operator name: which inputs it takes, in order."""

    name: str
    second: str | None  #: "zero_point", "bias" or None
    two_d: bool
    weighted: bool
    table = "codes"
    typed_by = "scale"

    @property
    def inputs(self) -> tuple[str, ...]:
        return (
            "codes",
            "scale",
            *(() if self.second is None else (self.second,)),
            "indices",
            *(() if self.two_d else ("offsets",)),
            *(("per_sample_weights",) if self.weighted else ()),
        )

    def values(self, attributes: Attributes, shapes: Mapping[str, Sequence[int]]) -> dict[str, Value]:
        kind, dim = attributes.codes, attributes.embedding_dim
        num_rows, columns = shapes.get("codes", ("num_rows", kind.stored_columns(dim)))
        return {
            "codes": Value("quantized", (num_rows, columns), kind.stored),
            **{name: Value("row_number", (num_rows,)) for name in ("scale", *SECOND_NUMBERS)},
            **bag_values(two_d=self.two_d, include_last_offset=attributes.include_last_offset),
            "output": Value("bags", ("num_bags", dim)),
        }


def _name(second: str | None, two_d: bool, weighted: bool) -> str:
    suffix = {None: "", "zero_point": "ZeroPoint", "bias": "Bias"}[second]
    return "QuantizedEmbeddingBag" + suffix + ("2D" if two_d else "") + ("Weighted" if weighted else "")


#: The closed set of operator names.
VARIANTS: Mapping[str, Variant] = {
    _name(*key): Variant(_name(*key), *key)
    for key in itertools.product((None, *SECOND_NUMBERS), (False, True), (False, True))
}


def variant(*, second: str | None, two_d: bool, weighted: bool) -> Variant:
    """The operator name for a combination of inputs."""
    return VARIANTS[_name(second, two_d, weighted)]


@dataclasses.dataclass(frozen=True)
class Attributes(embedding_bag.Attributes):
    """The parameters of a bag over quantized values, checked. See `..embedding_bag.spec.Attributes`."""

    codes_type: str = attribute(
        Choice({t.name: t.onnx_type for t in CODES_TYPES.values()}),
        "int8",
        "what the quantized values are, by TensorProto's numbers",
        by_caller=False,
        required=True,
    )
    embedding_dim: int = attribute(Integer(), 0, "D, which packed values do not tell", by_caller=False, required=True)

    @property
    def codes(self) -> CodesType:
        return CODES_TYPES[self.codes_type]

    def as_table(self, dtype: str, shape: Dims | None) -> tuple[str, Dims | None]:
        return self.codes_type, None if shape is None else (*shape[:1], self.embedding_dim)


def pack(codes: np.ndarray) -> np.ndarray:
    """Quantized values [V, D] of int8, uint8, int4 or uint4 as they are stored: [V, D], or uint8 [V, (D + 1) // 2].

    Raises:
        TypeError: another dtype.
        ValueError: another rank.
    """
    kind = codes_type(codes)
    return as_stored(codes if kind.bits == 8 else codes.astype(np.int8), kind)


def as_stored(codes: np.ndarray, kind: CodesType) -> np.ndarray:
    """As `pack`, of values [V, D] in int8 or uint8, those of 4 bits in int8 too."""
    if kind.bits == 8:
        return np.ascontiguousarray(codes)
    nibbles = codes.view(np.uint8) & 15
    if codes.shape[1] % 2:
        nibbles = np.concatenate([nibbles, np.zeros((len(codes), 1), np.uint8)], axis=1)
    return np.ascontiguousarray(nibbles[:, ::2] | nibbles[:, 1::2] << 4)


def unpack(stored: np.ndarray, kind: CodesType, dim: int) -> np.ndarray:
    """The inverse of `pack`: the values [V, dim], int8 or uint8 for those of 4 bits too."""
    if kind.bits == 8:
        return stored
    nibbles = np.stack([stored & 15, stored >> 4], axis=2).reshape(len(stored), -1)[:, :dim]
    if kind.lowest < 0:
        return (nibbles.view(np.int8) ^ 8) - np.int8(8)
    return nibbles


def codes_type(codes: np.ndarray) -> CodesType:
    """The type of the quantized values [V, D] in an array, by its dtype."""
    for kind in CODES_TYPES.values():
        if codes.dtype == kind.dtype:
            if codes.ndim != 2:
                raise ValueError(f"codes has shape {list(codes.shape)}, expected [V, D]")
            return kind
    raise TypeError(f"codes has dtype {codes.dtype}, expected int8, uint8, int4 or uint4")


def check_row_numbers(name: str, values: np.ndarray, num_rows: int, dtype: np.dtype | None = None) -> None:
    """Raise unless scale, zero_point or bias is one number of T a row; ``dtype``: that of scale."""
    if values.dtype not in SCALE_DTYPES:
        raise TypeError(f"{name} has dtype {values.dtype}, expected float32 or float16")
    if dtype is not None and values.dtype != dtype:
        raise TypeError(f"{name} has dtype {values.dtype}, scale has {dtype}: they must be equal")
    if values.shape != (num_rows,):
        raise ValueError(f"{name} has shape {list(values.shape)}, expected [{num_rows}], one number a row of codes")
