"""Tables in parts, and in files where they are large: no more of one is in memory than is worked on."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator

import numpy as np

from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.quantized_embedding_bag import spec as quantized
from lucid_onnx.ops.quantized_embedding_bag.table import LARGEST, QuantizedTable

#: Larger arrays are put into files, which have no name and are gone with the array.
_IN_MEMORY = 2**28
#: Elements that are converted at a time, which the caches of a core hold.
_AT_ONCE = 2**16


def new_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array to be written."""
    if math.prod(shape) * dtype.itemsize <= _IN_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="lucid-onnx-") as file:
        return np.asarray(np.memmap(file, dtype, "w+", shape=shape))


def float_dtype(name: str) -> np.dtype:
    """A float dtype by its name."""
    return spec.BFLOAT16 if name == "bfloat16" else np.dtype(name)


def parts(table: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of a table in parts, with where each begins."""
    step = max(1, _AT_ONCE // max(table.shape[1], 1))
    for begin in range(0, len(table), step):
        yield begin, table[begin : begin + step]


def converted(table: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A table of another dtype, row after row in native byte order; the table itself if it is that.

    Raises:
        ValueError: an element is beyond the range of ``dtype``.
    """
    if table.dtype == dtype and table.dtype.isnative and table.flags.c_contiguous:
        return table
    result = new_array(table.shape, dtype)
    for begin, part in parts(table):
        with np.errstate(over="ignore"):
            rounded = part.astype(dtype)
        if dtype.itemsize < table.dtype.itemsize or dtype.itemsize == 2:
            beyond = np.isinf(rounded.astype(np.float64)) & np.isfinite(part.astype(np.float64))
            if beyond.any():
                raise ValueError(f"the table's element {_place(beyond, begin)} is {part[beyond][0]}, beyond {dtype}")
        result[begin : begin + len(part)] = rounded
    return result


def quantize(table: np.ndarray, kind: quantized.CodesType) -> dict[str, np.ndarray]:
    """A table as quantized values: its "codes", "scale" and, if they are unsigned, "bias"; see `QuantizedTable`.

    Raises:
        ValueError: an element has no quantized value.
    """
    rows = len(table)
    result = {"codes": new_array((rows, kind.stored_columns(table.shape[1])), kind.stored)}
    for name in ("scale", "bias")[: 1 if kind.lowest < 0 else 2]:
        result[name] = new_array((rows,), np.dtype(np.float32))
    for begin, part in parts(table):
        floats = _floats(part)
        wrong = ~(np.abs(floats.astype(np.float64)) <= LARGEST)
        if wrong.any():
            raise ValueError(
                f"the table's element {_place(wrong, begin)} is {floats[wrong][0]}, which has no {kind.name} value"
            )
        found = QuantizedTable.quantize(floats, kind.name)
        for name, array in result.items():
            array[begin : begin + len(part)] = getattr(found, name)
    return result


def meant(table: np.ndarray, kind: quantized.CodesType) -> np.ndarray:
    """The rows that `quantize` makes of finite ones, [n, D] of floats."""
    return QuantizedTable.quantize(_floats(table), kind.name).dequantize()


def _floats(table: np.ndarray) -> np.ndarray:
    """A table whose elements may be int8, as floats."""
    return table.astype(np.float32) if table.dtype == np.int8 else np.ascontiguousarray(table)


def checked(table: np.ndarray, name: str) -> np.ndarray:
    """A table of floats, [V, D].

    Raises:
        TypeError, ValueError: it is of another dtype or shape.
    """
    if table.dtype.newbyteorder("=") not in spec.TABLE_DTYPES:
        raise TypeError(f"{name} has dtype {table.dtype}, expected float32, float16, bfloat16 or float64")
    if table.ndim != 2:
        raise ValueError(f"{name} has shape {list(table.shape)}, expected [V, D]")
    return table


def _place(mask: np.ndarray, begin: int) -> str:
    r, d = (int(k) for k in np.argwhere(mask)[0])
    return f"[{begin + r}, {d}]"
