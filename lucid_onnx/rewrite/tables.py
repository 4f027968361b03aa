"""Tables as they are read, rounded and written, in parts: they may be larger than memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lucid_onnx.builder import CODES_TYPES, TABLE_TYPES, ExternalData, is_external
from lucid_onnx.ops import quantized_embedding_bag
from lucid_onnx.ops.quantized_embedding_bag.table import extremes, quantize_rows

#: Elements that are worked on at a time: a handful of float64 arrays of this size stays in the caches of a core, which
#: is worth a factor of four.
ELEMENTS_AT_ONCE = 2**16
#: External data begins on a page, and is not worth a page below this.
_ALIGNMENT = 4096
_CHUNK = 2**24
#: Quantized values times scale are added up in float32. Beyond half its range a row's span could leave it.
_LARGEST = float(np.finfo(np.float32).max) / 2


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
            # Infinity and NaN, and what is not a number any more when it is squared.
            odd = np.flatnonzero(~((squares > _SMALLEST_SQUARE) & (squares + lost_squares < np.inf)))
            error = np.sqrt(lost_squares / squares)
        if len(odd):
            zeros = ~rows[odd].any(axis=1)  # which lost nothing, and are many in some tables
            error[odd[zeros]] = 0
            odd = odd[~zeros]
        if len(odd):
            error[odd] = _careful_error(rows[odd], part := lost[odd])
            lost[odd] = part
        self._sum += float(error.sum())
        self._count += len(error)
        self.difference = max(self.difference, float(lost.max(initial=0)), -float(lost.min(initial=0)))
        if len(error) and error.max() > self.largest:
            self.largest, self.worst = float(error.max()), begin + int(error.argmax())

    @property
    def mean(self) -> float:
        """Over all rows; 0 if there are none."""
        return self._sum / self._count if self._count else 0.0


def _parts(rows: Rows) -> Iterator[tuple[int, np.ndarray]]:
    """The rows in parts, with where each begins."""
    num_rows, dim = rows.shape
    step = max(1, ELEMENTS_AT_ONCE // max(dim, 1))
    for begin in range(0, num_rows, step):
        yield begin, rows.read(begin, min(begin + step, num_rows))


def _place(mask: np.ndarray, begin: int) -> str:
    """The place of the first true element, as it is written."""
    r, d = (int(k) for k in np.argwhere(mask)[0])
    return f"[{begin + r}, {d}]"


def write_quantized(rows: Rows, kind: str, columns: Mapping[str, Column], tick: Callable[[int], None]) -> RowErrors:
    """Write the rows as quantized values, "codes", with their "scale" and, where ``columns`` has it, their "bias".

    Raises:
        Unfit: an element has no quantized value.
    """
    lost, codes_type = RowErrors(), quantized_embedding_bag.spec.CODES_TYPES[kind]
    for begin, part in _parts(rows):
        # The extremes of a row are those of its floats, and found sooner there; NumPy has no fast ones of 16 bits.
        low, high = extremes(part if part.dtype.itemsize > 2 else part.astype(np.float32))
        wide = part.astype(np.float64)
        largest = np.maximum(np.abs(low), np.abs(high)).max(initial=0)
        if not largest <= _LARGEST:
            for wrong, why in (
                (~np.isfinite(wide), "which has no quantized value"),
                (np.abs(wide) > _LARGEST, "which is beyond what quantized values times a float32 scale can be"),
            ):
                if wrong.any():
                    raise Unfit(f"its element {_place(wrong, begin)} is {wide[wrong][0]}, {why}")
        found = quantize_rows(wide, low, high, codes_type)
        for name, array in (("codes", found.codes), ("scale", found.scale), ("bias", found.bias)):
            if array is not None:
                columns[name].write(begin, array)
        lost.add(begin, wide, found.meant)
        tick(part.nbytes)
    return lost


def write_rounded(rows: Rows, dtype: np.dtype, column: Column, tick: Callable[[int], None]) -> RowErrors:
    """Write the rows in a float type of 16 bits.

    Raises:
        Unfit: an element is beyond its range.
    """
    lost = RowErrors()
    for begin, part in _parts(rows):
        with np.errstate(over="ignore"):
            rounded = part.astype(dtype)
        wide, kept = part.astype(np.float64), rounded.astype(np.float64)
        beyond = np.isinf(kept) & np.isfinite(wide)
        if beyond.any():
            raise Unfit(f"its element {_place(beyond, begin)} is {wide[beyond][0]}, which is beyond {dtype}")
        column.write(begin, rounded)
        lost.add(begin, wide, kept)
        tick(part.nbytes)
    return lost
