"""Tensors of .safetensors files, mapped one by one: a length (8 bytes), that many bytes of JSON, then the data.

safetensors' own NumPy interface copies, and lacks bfloat16 in some versions.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lucid_onnx.ops.embedding_bag import spec

#: The float dtypes of a table, by safetensors' names.
FLOATS: Mapping[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": spec.BFLOAT16,
    "F64": np.dtype("<f8"),
}
#: The integer dtypes of quantized values and zero points.
INTEGERS: Mapping[str, np.dtype] = {
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_MOST_DIMS = 64  # NumPy's own limit
_MOST_DIGITS = 18
#: What a message has room for.
_MOST_NAMED, _LONGEST_NAME = 20, 100


def names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the tensors of a file, in its order.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a .safetensors file.
    """
    return list(_header(path)[0])


def read(path: str | os.PathLike[str], name: str, dtypes: Mapping[str, np.dtype] = FLOATS) -> np.ndarray:
    """One tensor of a file, mapped and not copied, in native byte order. Reads only that tensor.

    Args:
        dtypes: the allowed dtypes, by safetensors' names.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a .safetensors file, it has no such tensor, or one of another dtype.
    """
    path = os.fspath(path)
    header, start, size = _header(path)
    if name not in header:
        raise ValueError(f"{path}: no tensor {_shown(name)}; it has: {named(header)}")
    match header[name]:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if (
            len(shape) <= _MOST_DIMS and all(_is_size(n) for n in shape) and _is_integer(begin) and _is_integer(end)
        ):
            pass
        case _:
            raise ValueError(f"{_broken(path)}tensor {_shown(name)} is described by {reprlib.repr(header[name])}")
    if dtype not in dtypes:
        raise ValueError(f"{path}: tensor {_shown(name)} has dtype {dtype[:20]}, expected one of {', '.join(dtypes)}")
    count = math.prod(shape)  # 64 numbers of at most 18 digits
    if not 0 <= begin <= end <= size - start or end - begin != count * dtypes[dtype].itemsize:
        raise ValueError(
            f"{_broken(path)}tensor {_shown(name)}, {dtype} {shape}, lies at {begin} to {end} of {size - start} bytes "
            "of data"
        )
    if count == 0:
        return np.empty(shape, dtypes[dtype].newbyteorder("="))
    data = np.memmap(path, np.uint8, "r", start + begin, (end - begin,))
    array = np.asarray(data).view(dtypes[dtype]).reshape(shape)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int, int]:
    """The entry of each tensor, where the data begins, and the size of the file."""
    path = os.fspath(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"{_broken(path)}a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        header = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{_broken(path)}its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{_broken(path)}its header is not a JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length, size


def named(names: Iterable[str]) -> str:
    """Names of tensors for a message, the first of them if there are many."""
    first = [_shown(name)[1:].removesuffix("'") for name in itertools.islice(names, _MOST_NAMED + 1)]
    return ", ".join(first if len(first) <= _MOST_NAMED else [*first[:_MOST_NAMED], "..."]) or "none"


def _shown(name: str) -> str:
    """A name for a message, in quotes; the beginning of a long one."""
    return repr(name) if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]!r}..."


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_integer(value) and value >= 0


def _integer(text: str) -> int:
    """An integer that a file could be as long as; a longer one takes time that grows with its square."""
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _broken(path: str) -> str:
    return f"{path}: broken .safetensors file: "
