"""A quantized table: what `quantized_embedding_bag` pools and the builder puts into a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..embedding_bag import spec as embedding_bag
from . import reference, spec

_AT_ONCE = 1 << 16  # elements: float64 work space that stays in the caches of a core
#: Quantized values times scale are added up in float32. Beyond half its range a row's span could leave it.
LARGEST = float(np.finfo(np.float32).max) / 2


class RowLosses(NamedTuple):
    """What rows lost, each float64 [n]."""

    squares: np.ndarray  #: the sum of the squares of a row
    lost: np.ndarray  #: that of its differences from what is kept of it
    furthest: np.ndarray  #: the largest of these, without sign


class SmallerRows(NamedTuple):
    """Rows in a smaller type."""

    values: np.ndarray  #: as stored
    scale: np.ndarray | None  #: float32 [n], of quantized values
    bias: np.ndarray | None  #: likewise, of unsigned ones
    losses: RowLosses | None = None  #: where they were counted


class QuantizedRows(NamedTuple):
    """Quantized rows, and what they mean."""

    smaller: SmallerRows
    meant: np.ndarray  #: float64 [n, D]


def _nothing(rows: np.ndarray, kind: spec.CodesType) -> SmallerRows | None:
    return None


#: Quantizes as many of the first rows as it takes, with the bytes that `quantize_rows` gives them; None: it takes none.
#: It stops at a row that is not finite, or has an element beyond `LARGEST`. `lucid_onnx.native` puts its kernel here.
native_rows: Callable[[np.ndarray, spec.CodesType], SmallerRows | None] = _nothing


def extremes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest element of each row [n, D], float64 [n]; NaN of a row with NaN, 0 for D = 0."""
    if rows.shape[1] == 0:
        return np.zeros(len(rows)), np.zeros(len(rows))
    # NumPy's argmax over short rows takes a third of the time of its max.
    at = rows.argmin(axis=1, keepdims=True), rows.argmax(axis=1, keepdims=True)
    low, high = (np.take_along_axis(rows, k, axis=1)[:, 0].astype(np.float64) for k in at)
    return low, high


def quantize_rows(rows: np.ndarray, low: np.ndarray, high: np.ndarray, kind: spec.CodesType) -> QuantizedRows:
    """Codes for finite rows, float64 [n, D], whose `extremes` are given: see `QuantizedTable.quantize`."""
    if kind.lowest < 0:
        bias, shift = None, np.zeros((len(rows), 1))
    else:
        bias = low.astype(np.float32) + np.float32(0)  # a zero without a sign
        shift = bias.astype(np.float64)[:, None]
        low, high = low - shift[:, 0], high - shift[:, 0]
    scale = (np.maximum(np.abs(low), np.abs(high)) / kind.highest).astype(np.float32)
    scale[scale == 0] = 1  # a row of equal numbers: its quantized values are 0
    step = scale.astype(np.float64)[:, None]
    numbers = rows / step if bias is None else (rows - shift) / step
    np.rint(numbers, out=numbers)
    numbers.clip(kind.lowest, kind.highest, out=numbers)
    codes = spec.as_stored(numbers.astype(kind.stored if kind.bits == 8 else np.int8), kind)
    numbers *= step
    if bias is not None:
        numbers += shift
    return QuantizedRows(SmallerRows(codes, scale, bias), numbers)


def _quantized(rows: np.ndarray, begin: int, kind: spec.CodesType) -> SmallerRows:
    """Rows [n, D] from ``begin`` on.

    Raises:
        ValueError: a NaN or infinity among them, with its place.
    """
    low, high = extremes(rows)
    with np.errstate(over="ignore", invalid="ignore"):
        spans = high - low
    if not np.isfinite(spans).all():
        wrong = np.argwhere(~np.isfinite(rows))
        if len(wrong):
            r, d = (int(i) for i in wrong[0])
            raise ValueError(f"weight[{begin + r}, {d}] = {rows[r, d]} has no code")
    return quantize_rows(rows, low, high, kind).smaller


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedTable:
    """Codes with a scale per row, and a zero_point, a bias or neither: see `.spec`.

    `QuantizedTable.of` makes one from arrays, `QuantizedTable.quantize` from a table of floats,
    `QuantizedTable.from_torch_prepacked` from rows that torch or FBGEMM packed.
    """

    codes: np.ndarray  #: as stored: [V, D], or uint8 [V, (D + 1) // 2] of 4-bit values
    codes_type: str  #: "int8", "uint8", "int4" or "uint4"
    embedding_dim: int  #: D
    scale: np.ndarray  #: [V], float32 or float16
    zero_point: np.ndarray | None = None  #: [V], of scale's dtype
    bias: np.ndarray | None = None  #: [V], of scale's dtype

    def __post_init__(self) -> None:
        if self.codes_type not in spec.CODES_TYPES:
            raise ValueError(f"codes_type = {self.codes_type!r} is not one of {', '.join(spec.CODES_TYPES)}")
        kind = spec.CODES_TYPES[self.codes_type]
        if self.codes.dtype != kind.stored:
            raise TypeError(f"codes has dtype {self.codes.dtype}, {kind.name} codes are stored as {kind.stored}")
        if self.codes.ndim != 2 or self.codes.shape[1] != kind.stored_columns(self.embedding_dim):
            raise ValueError(
                f"codes has shape {list(self.codes.shape)}, expected [V, {kind.stored_columns(self.embedding_dim)}] "
                f"for embedding_dim = {self.embedding_dim} of {kind.name}"
            )
        if self.zero_point is not None and self.bias is not None:
            raise ValueError("zero_point and bias are given, and one excludes the other")
        spec.check_row_numbers("scale", self.scale, len(self.codes))
        for name in spec.SECOND_NUMBERS:
            if getattr(self, name) is not None:
                spec.check_row_numbers(name, getattr(self, name), len(self.codes), self.scale.dtype)

    @classmethod
    def of(
        cls,
        codes: npt.ArrayLike,
        scale: npt.ArrayLike,
        *,
        zero_point: npt.ArrayLike | None = None,
        bias: npt.ArrayLike | None = None,
    ) -> QuantizedTable:
        """From quantized values [V, D] of int8, uint8, int4 or uint4 (ml_dtypes), one an element.

        Raises:
            TypeError: a dtype that is none of these, or a scale that is not float32 or float16.
            ValueError: a shape that does not fit, or both zero_point and bias.
        """
        table = np.asarray(codes)
        kind = spec.codes_type(table)
        numbers = [None if n is None else np.asarray(n) for n in (zero_point, bias)]
        return cls(spec.pack(table), kind.name, table.shape[1], np.asarray(scale), *numbers)

    @classmethod
    def quantize(cls, weight: npt.ArrayLike, dtype: str = "int8") -> QuantizedTable:
        """From floats [V, D], row by row, each row's extremes at the ends of the range of quantized values.

        Signed values are symmetric, ``weight ~ codes * scale`` with ``scale = max|row| / 127`` (7 of int4), as Lucid
        and most runtimes have them. Unsigned ones have a bias, ``weight ~ codes * scale + bias`` with
        ``bias = min(row)`` and ``scale = (max(row) - min(row)) / 255`` (15 of uint4), as FBGEMM and PyTorch have
        them. No element is further off than half a scale, but for rounding.

        Raises:
            TypeError: a table that is not float32, float16, bfloat16 or float64.
            ValueError: an unknown ``dtype``, a table that is not [V, D], or a NaN or infinity in it, with its place.
        """
        if dtype not in spec.CODES_TYPES:
            raise ValueError(f"dtype = {dtype!r} is not one of {', '.join(spec.CODES_TYPES)}")
        table = np.asarray(weight)
        embedding_bag.check_table(table)
        kind = spec.CODES_TYPES[dtype]
        num_rows, dim = table.shape
        codes = np.empty((num_rows, kind.stored_columns(dim)), kind.stored)
        scale = np.empty(num_rows, np.float32)
        bias = None if kind.lowest < 0 else np.empty(num_rows, np.float32)
        step = max(1, _AT_ONCE // max(dim, 1))
        begin = 0
        while begin < num_rows:
            found = native_rows(table[begin : begin + 16 * step], kind)
            if found is None or not len(found.values):
                found = _quantized(table[begin : begin + step].astype(np.float64), begin, kind)
            part = slice(begin, begin + len(found.values))
            codes[part], scale[part] = found.values, found.scale
            if bias is not None:
                bias[part] = found.bias
            begin = part.stop
        return cls(codes, kind.name, dim, scale, bias=bias)

    @classmethod
    def from_torch_prepacked(cls, packed: npt.ArrayLike, dtype: str) -> QuantizedTable:
        """From what ``torch.ops.quantized.embedding_bag_byte_prepack`` and ``_4bit_prepack`` make of a table [V, D].

        Each row of ``packed`` is its quantized values, then its scale, then its bias: for dtype "uint8" D of them and
        two float32, uint8 [V, D + 8]; for "uint4" D / 2 bytes of them and two float16, uint8 [V, D / 2 + 4]. The
        float16 numbers become float32, which is exact. FBGEMM's fused rows are the same.

        Raises:
            TypeError: ``packed`` is not uint8.
            ValueError: an unknown ``dtype``, a shape that has no room for scale and bias, or a scale or bias that is
                not finite, with its row.
        """
        if dtype not in ("uint8", "uint4"):
            raise ValueError(f"dtype = {dtype!r} is not one of uint8, uint4, which torch packs")
        rows = np.asarray(packed)
        kind = spec.CODES_TYPES[dtype]
        number = np.dtype("<f4" if kind.bits == 8 else "<f2")
        if rows.dtype != np.uint8:
            raise TypeError(f"packed has dtype {rows.dtype}, expected uint8")
        width = 2 * number.itemsize
        if rows.ndim != 2 or rows.shape[1] < width:
            raise ValueError(
                f"packed has shape {list(rows.shape)}, expected [V, codes + {width}]: scale and bias of {dtype} rows "
                f"take {width} bytes"
            )
        columns = rows.shape[1] - width
        numbers = np.ascontiguousarray(rows[:, columns:]).view(number).astype(np.float32)
        wrong = np.argwhere(~np.isfinite(numbers))
        if len(wrong):
            r, which = (int(k) for k in wrong[0])
            raise ValueError(f"packed[{r}] has the {('scale', 'bias')[which]} {numbers[r, which]}; is it {dtype}?")
        scale, bias = (np.ascontiguousarray(n) for n in numbers.T)
        codes = np.ascontiguousarray(rows[:, :columns])
        return cls(codes, dtype, columns * 8 // kind.bits, scale, bias=bias)

    @property
    def shape(self) -> tuple[int, int]:
        """[V, D]."""
        return len(self.codes), self.embedding_dim

    @property
    def nbytes(self) -> int:
        """The bytes that the quantized values, the scales and the rest take."""
        return sum(a.nbytes for a in (self.codes, self.scale, self.zero_point, self.bias) if a is not None)

    @property
    def second(self) -> str | None:
        """Which of zero_point and bias there is."""
        return "zero_point" if self.zero_point is not None else "bias" if self.bias is not None else None

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The arrays by the operator's input names."""
        arrays = {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point, "bias": self.bias}
        return {name: array for name, array in arrays.items() if array is not None}

    def dequantize(self) -> np.ndarray:
        """The rows that it stands for, float64 [V, D]."""
        codes = spec.unpack(self.codes, spec.CODES_TYPES[self.codes_type], self.embedding_dim)
        return reference.dequantize(codes, self.scale, self.zero_point, self.bias)
