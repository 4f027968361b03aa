"""Tables as they are read, rounded and written, in parts: they may be larger than memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lucid_onnx import native
from lucid_onnx.builder import CODES_TYPES, TABLE_TYPES, ExternalData, file_region, is_external
from lucid_onnx.ops import quantized_embedding_bag
from lucid_onnx.ops.embedding_bag.spec import BFLOAT16
from lucid_onnx.ops.quantized_embedding_bag.table import LARGEST, RowLosses, SmallerRows, extremes, quantize_rows

#: Elements that NumPy works on at a time: a handful of float64 arrays of this size stays in the caches of a core, which
#: is worth a factor of four.
ELEMENTS_AT_ONCE = 2**16
#: Elements that are read at a time.
_READ_AT_ONCE = 2**18
#: The floats of 16 bits.
HALVES = {"float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
#: External data begins on a page, and is not worth a page below this.
_ALIGNMENT = 4096
_CHUNK = 2**24


# ---- Where tables come from, and where they go.


class Rows(NamedTuple):
    """The rows [V, D] of a table, to be read in parts."""

    shape: tuple[int, int]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]  #: rows from, to

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Store:
    """A file of external data that grows; what was written last can be taken back."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self.file, self.location = file, location
        self.end = 0

    def reserve(self, nbytes: int) -> int:
        """The offset of ``nbytes`` more."""
        offset = -(-self.end // _ALIGNMENT) * _ALIGNMENT
        self.end = offset + nbytes
        return offset

    def finish(self) -> None:
        """Cut off what was taken back."""
        self.file.truncate(self.end)

    def point_at(self, tensor: onnx.TensorProto, offset: int, nbytes: int) -> None:
        """Make the data of a tensor what is at ``offset`` of this file."""
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (("location", self.location), ("offset", offset), ("length", nbytes)):
            tensor.external_data.add(key=key, value=str(value))


class Column:
    """A new initializer of a row of numbers (or one number) per row of the table, written in parts.

    Args:
        store: where its data goes; None keeps it in memory, and so does next to no data.
    """

    def __init__(self, name: str, dtype: np.dtype, dims: tuple[int, ...], store: Store | None) -> None:
        self._tensor = TensorProto(name=name, data_type={**TABLE_TYPES, **CODES_TYPES}[dtype], dims=dims)
        self.nbytes = math.prod(dims) * dtype.itemsize
        self._row_bytes = math.prod(dims[1:]) * dtype.itemsize
        self._store = store if self.nbytes >= _ALIGNMENT else None
        self._offset = 0 if self._store is None else self._store.reserve(self.nbytes)
        self._array = np.empty(dims if self._store is None else 0, dtype)

    def write(self, begin: int, values: np.ndarray) -> None:
        """The values of rows from ``begin`` on."""
        if self._store is None:
            self._array[begin : begin + len(values)] = values
        else:
            self._store.file.seek(self._offset + begin * self._row_bytes)
            self._store.file.write(np.ascontiguousarray(values).view(np.uint8).data)

    def tensor(self) -> onnx.TensorProto:
        """The initializer."""
        if self._store is None:
            self._tensor.raw_data = self._array.tobytes()
        else:
            self._store.point_at(self._tensor, self._offset, self.nbytes)
        return self._tensor


@contextlib.contextmanager
def opened(tensor: onnx.TensorProto, data: ExternalData | None) -> Iterator[Rows]:
    """The rows of an initializer [V, D] of floats."""
    rows, columns = tensor.dims
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if not is_external(tensor):
        array = numpy_helper.to_array(tensor)
        yield Rows((rows, columns), array.dtype, lambda begin, end: array[begin:end])
        return
    assert data is not None
    width = columns * dtype.itemsize
    path, offset, _ = data.region(tensor)
    with path.open("rb") as file:

        def read(begin: int, end: int) -> np.ndarray:
            file.seek(offset + begin * width)
            part = file.read((end - begin) * width)
            if len(part) != (end - begin) * width:
                raise OSError(5, f"the file ends before the data of initializer {tensor.name!r}", str(path))
            return np.frombuffer(part, dtype).reshape(end - begin, columns)

        yield Rows((rows, columns), dtype, read)


def rows_of(table: np.ndarray) -> Rows:
    """The rows of a table [V, D]. Those of a file that is mapped are read from it, as `streamed` does."""
    region = file_region(table)
    if region is None or not table.size:
        return Rows(table.shape, table.dtype, lambda begin, end: table[begin:end])
    path, offset = region
    width = table.shape[1] * table.dtype.itemsize

    def read(begin: int, end: int) -> np.ndarray:
        part = np.fromfile(path, table.dtype, (end - begin) * table.shape[1], offset=offset + begin * width)
        if len(part) != (end - begin) * table.shape[1]:
            raise OSError(5, "the file ends before its table", str(path))
        return part.reshape(end - begin, table.shape[1])

    return Rows(table.shape, table.dtype, read)


def copy_external(tensor: onnx.TensorProto, data: ExternalData, store: Store) -> None:
    """Copy the external data of a tensor that stays what it is."""
    path, offset, length = data.region(tensor)
    target = store.reserve(length)
    store.file.seek(target)
    with path.open("rb") as file:
        file.seek(offset)
        for begin in range(0, length, _CHUNK):
            store.file.write(file.read(min(_CHUNK, length - begin)))
    store.point_at(tensor, target, length)


# ---- The rows.


class Unfit(Exception):  # noqa: N818  # not an error: the table is left as it is
    """Why a table cannot be written in the new type."""


#: Squares above this have as many digits as others.
_SMALLEST_SQUARE = 1e-280


def _squares(rows: np.ndarray) -> np.ndarray:
    return np.einsum("rd,rd->r", rows, rows)


def _careful_error(rows: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """The error of each row, with no square out of range. What is not finite lost nothing, in ``lost`` too."""
    finite = np.isfinite(rows)
    lost[~finite] = 0
    whole = np.where(finite, rows, 0)
    size = np.abs(whole).max(axis=1, initial=0, keepdims=True)
    size[size == 0] = 1
    length = np.sqrt(_squares(whole / size))
    return np.sqrt(_squares(lost / size)) / np.where(length > 0, length, 1)  # type: ignore[no-any-return]


def _errors(squares: np.ndarray, lost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The error of each row by `RowLosses`, and the rows that have another: 0 if they are zeros, `_careful_error` else.

    These have infinity and NaN, or what is no number any more when it is squared.
    """
    odd = np.flatnonzero(~((squares > _SMALLEST_SQUARE) & (squares + lost < np.inf)))
    with np.errstate(divide="ignore"):
        error = np.sqrt(lost / squares)
    error[odd] = 0
    return error, odd


class RowErrors:
    """What rows lost by rounding, part by part.

    Attributes:
        largest, worst: the largest error of a row, relative to its length, and which row has it.
        difference: the largest difference of an element.
    """

    def __init__(self) -> None:
        self.largest, self.difference = 0.0, 0.0
        self.worst: int | None = None
        self._sum, self._count = 0.0, 0

    def add(self, begin: int, rows: np.ndarray, kept: np.ndarray) -> None:
        """Both float64 [n, D]; ``kept`` is used up."""
        with np.errstate(invalid="ignore", over="ignore"):
            lost = np.subtract(rows, kept, out=kept)
            squares, lost_squares = _squares(rows), _squares(lost)
            error, odd = _errors(squares, lost_squares)
        if len(odd):
            odd = odd[rows[odd].any(axis=1)]
            error[odd] = _careful_error(rows[odd], part := lost[odd])
            lost[odd] = part
        self._add(begin, error, max(float(lost.max(initial=0)), -float(lost.min(initial=0))))

    def add_losses(
        self, begin: int, rows: np.ndarray, losses: RowLosses, kept: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        """What finite rows [n, D] lost; ``kept`` gives what is kept of float64 rows, likewise."""
        with np.errstate(invalid="ignore", over="ignore"):
            error, odd = _errors(losses.squares, losses.lost)
        odd = odd[rows[odd].any(axis=1)]
        if len(odd):
            again = rows[odd].astype(np.float64)
            error[odd] = _careful_error(again, again - kept(again))
        self._add(begin, error, float(losses.furthest.max(initial=0)))

    def _add(self, begin: int, error: np.ndarray, difference: float) -> None:
        self._sum += float(error.sum())
        self._count += len(error)
        self.difference = max(self.difference, difference)
        if len(error) and error.max() > self.largest:
            self.largest, self.worst = float(error.max()), begin + int(error.argmax())

    @property
    def mean(self) -> float:
        """Over all rows; 0 if there are none."""
        return self._sum / self._count if self._count else 0.0


def _parts(rows: Rows) -> Iterator[tuple[int, np.ndarray]]:
    """The rows in parts, with where each begins."""
    num_rows, dim = rows.shape
    step = max(1, _READ_AT_ONCE // max(dim, 1))
    for begin in range(0, num_rows, step):
        yield begin, rows.read(begin, min(begin + step, num_rows))


def _place(mask: np.ndarray, begin: int) -> str:
    """The place of the first true element, as it is written."""
    r, d = (int(k) for k in np.argwhere(mask)[0])
    return f"[{begin + r}, {d}]"


#: Rows that NumPy made smaller, with them and what is kept of them in float64.
_ByNumpy = tuple[SmallerRows, np.ndarray, np.ndarray]


class Smaller:
    """The rows of a table in a smaller type, part by part: iterate over it once.

    Attributes:
        errors: what was lost by the parts that are done.

    Raises:
        Unfit, in the loop: an element cannot be written in the new type.
    """

    def __init__(self, rows: Rows, dtype: str, tick: Callable[[int], None] = lambda count: None) -> None:
        self._rows, self._tick = rows, tick
        self.errors = RowErrors()
        self._kind = HALVES[dtype] if dtype in HALVES else quantized_embedding_bag.spec.CODES_TYPES[dtype]

    def __iter__(self) -> Iterator[tuple[int, SmallerRows]]:
        """The parts, with the row that each begins with."""
        step = max(1, ELEMENTS_AT_ONCE // max(self._rows.shape[1], 1))
        for begin, read in _parts(self._rows):
            part = read
            while len(part):
                found = self._native(part)
                if found is not None and len(found.values):
                    assert found.losses is not None
                    done = part[: len(found.values)]
                    self.errors.add_losses(begin, done, found.losses, lambda again: self._by_numpy(again, 0)[2])
                else:
                    found, wide, kept = self._by_numpy(part[:step], begin)
                    self.errors.add(begin, wide, kept)
                yield begin, found
                begin, part = begin + len(found.values), part[len(found.values) :]
            self._tick(read.nbytes)

    def _native(self, part: np.ndarray) -> SmallerRows | None:
        if isinstance(self._kind, np.dtype):
            return native.round_rows(part, self._kind)
        return native.quantize_rows(part, self._kind)

    def _by_numpy(self, part: np.ndarray, begin: int) -> _ByNumpy:
        if isinstance(self._kind, np.dtype):
            return _rounded(part, begin, self._kind)
        return _quantized(part, begin, self._kind)


def _quantized(part: np.ndarray, begin: int, kind: quantized_embedding_bag.spec.CodesType) -> _ByNumpy:
    # The extremes of a row are those of its floats, and found sooner there; NumPy has no fast ones of 16 bits.
    low, high = extremes(part if part.dtype.itemsize > 2 else part.astype(np.float32))
    wide = part.astype(np.float64)
    largest = np.maximum(np.abs(low), np.abs(high)).max(initial=0)
    if not largest <= LARGEST:
        for wrong, why in (
            (~np.isfinite(wide), "which has no quantized value"),
            (np.abs(wide) > LARGEST, "which is beyond what quantized values times a float32 scale can be"),
        ):
            if wrong.any():
                raise Unfit(f"its element {_place(wrong, begin)} is {wide[wrong][0]}, {why}")
    found = quantize_rows(wide, low, high, kind)
    return found.smaller, wide, found.meant


def _rounded(part: np.ndarray, begin: int, dtype: np.dtype) -> _ByNumpy:
    with np.errstate(over="ignore"):
        rounded = part.astype(dtype)
    wide, kept = part.astype(np.float64), rounded.astype(np.float64)
    beyond = np.isinf(kept) & np.isfinite(wide)
    if beyond.any():
        raise Unfit(f"its element {_place(beyond, begin)} is {wide[beyond][0]}, which is beyond {dtype}")
    return SmallerRows(rounded, None, None), wide, kept


def write_smaller(smaller: Smaller, columns: Mapping[str, Column]) -> RowErrors:
    """Write rows into the ``columns`` "codes", "scale" and, of unsigned values, "bias"; or "weight" of 16-bit floats.

    Raises:
        Unfit: as `Smaller`.
    """
    for begin, part in smaller:
        for column, array in zip(columns.values(), part[:3], strict=False):
            assert array is not None
            column.write(begin, array)
    return smaller.errors
