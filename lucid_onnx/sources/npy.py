"""Arrays of .npy files, mapped."""

from __future__ import annotations

import os
import tokenize
import warnings

import numpy as np

from lucid_onnx.ops.embedding_bag import spec

#: What NumPy raises over a broken .npy file. It reads the header with ast.literal_eval, to which 8 KB of signs or
#: brackets are too deep (RecursionError, MemoryError); the array itself is mapped.
_BROKEN: tuple[type[Exception], ...] = (ValueError, TypeError, OverflowError, EOFError, SyntaxError)
_BROKEN += (tokenize.TokenError, RecursionError, MemoryError)
MAGIC = b"\x93NUMPY"
#: numpy.save writes ml_dtypes.bfloat16 as raw items of two bytes.
_RAW_BFLOAT16 = np.dtype("V2")


def read(path: str | os.PathLike[str], expected: str = "file") -> np.ndarray:
    """The array of a .npy file, mapped and in native byte order; raw items of two bytes are bfloat16.

    Args:
        expected: what a message says that the file is not.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a .npy file of numbers.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path}: not a .npy {expected}")
    try:
        with warnings.catch_warnings():
            # About old headers, and about sizes that overflow, which are an error anyway.
            warnings.simplefilter("ignore")
            array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except _BROKEN as error:
        raise ValueError(f"{path}: cannot be read as an array of numbers: {error}") from error
    if array.dtype == _RAW_BFLOAT16:
        array = array.view(spec.BFLOAT16)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
