"""The native library where no ONNX Runtime is: where it lies, and the kernels that Python calls in it.

Without it everything here has a way in NumPy, with the same bytes.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import sys

import numpy as np

from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.quantized_embedding_bag import table as tables
from lucid_onnx.ops.quantized_embedding_bag.spec import CODES_TYPES, CodesType
from lucid_onnx.ops.quantized_embedding_bag.table import QuantizedTable, RowLosses, SmallerRows

__all__ = ["QuantizedTable", "get_library_path", "quantize_rows", "round_rows"]

_NAME = {"win32": "lucid_onnx_ops.dll", "darwin": "liblucid_onnx_ops.dylib"}.get(sys.platform, "liblucid_onnx_ops.so")
#: The library's numbers of dtypes: `DType` in cpp_ops/base/types.h.
_DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, spec.BFLOAT16: 2, np.dtype(np.float64): 3}
_CODES = {"int8": 4, "uint8": 5, "int4": 6, "uint4": 7}


def get_library_path() -> str:
    """The path of the native library, for ``RegisterCustomOpsLibrary`` of any language's ONNX Runtime.

    Raises:
        FileNotFoundError: the native library is not installed.
    """
    # importlib.resources and not __file__: in an editable install the library is not beside the sources.
    path = importlib.resources.files("lucid_onnx") / "lib" / _NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: lucid_onnx was installed without its native library")
    return str(path)


class _Arguments(ctypes.Structure):
    """`QuantizeArgs` of cpp_ops/quantize/args.h."""

    _fields_ = (
        ("size_bytes", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("squares", ctypes.c_void_p),
        ("lost", ctypes.c_void_p),
        ("furthest", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("limit", ctypes.c_double),
        ("dtype", ctypes.c_int32),
        ("output_dtype", ctypes.c_int32),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library; None where it is not installed."""
    try:
        path = get_library_path()
    except FileNotFoundError:
        return None
    library = ctypes.CDLL(path)
    library.lucid_quantize_rows.argtypes = (ctypes.POINTER(_Arguments),)
    library.lucid_quantize_rows.restype = ctypes.c_int64
    return library


def quantize_rows(rows: np.ndarray, kind: CodesType) -> SmallerRows | None:
    """As many of the first rows [n, D] as the kernel takes, quantized; None without the library."""
    signed = kind.lowest < 0
    scale = np.empty(len(rows), np.float32)
    bias = None if signed else np.empty(len(rows), np.float32)
    codes = np.empty((len(rows), kind.stored_columns(rows.shape[1])), kind.stored)
    return _called(rows, codes, _CODES[kind.name], scale, bias)


def round_rows(rows: np.ndarray, dtype: np.dtype) -> SmallerRows | None:
    """As many of the first rows [n, D] as the kernel takes, in a float type of 16 bits; None without the library."""
    if rows.dtype == np.float64:  # NumPy rounds them once, by way of float32 they would be rounded twice
        return None
    return _called(rows, np.empty(rows.shape, dtype), _DTYPES[dtype], None, None)


def _called(
    rows: np.ndarray, output: np.ndarray, output_dtype: int, scale: np.ndarray | None, bias: np.ndarray | None
) -> SmallerRows | None:
    library = _library()
    if library is None:
        return None
    rows = np.require(rows, rows.dtype.newbyteorder("="), "C")
    squares, lost, furthest = (np.empty(len(rows)) for _ in range(3))

    def address(array: np.ndarray | None) -> int | None:
        return None if array is None or array.size == 0 else array.ctypes.data

    arguments = _Arguments(
        ctypes.sizeof(_Arguments),
        *map(address, (rows, output, scale, bias, squares, lost, furthest)),
        *rows.shape,
        tables.LARGEST,
        _DTYPES[rows.dtype],
        output_dtype,
    )
    done = library.lucid_quantize_rows(arguments)
    if done < 0:
        raise RuntimeError(f"the native library does not take rows of {rows.dtype} [{len(rows)}, {rows.shape[1]}]")
    return SmallerRows(
        output[:done],
        None if scale is None else scale[:done],
        None if bias is None else bias[:done],
        RowLosses(squares[:done], lost[:done], furthest[:done]),
    )


assert set(_CODES) == set(CODES_TYPES)
tables.native_rows = quantize_rows
