"""Messages between the comparison and its workers: a JSON header and raw arrays, length first.

A frame is ``LXP1``, the header's length (4 bytes, little-endian), the header in UTF-8, and the blobs whose lengths
the header lists under "sizes". Nothing in a frame is ever executed. ``javascript/wire.mjs`` implements the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

MAGIC = b"LXP1"
_LARGEST_HEADER, _LARGEST_BLOB = 1 << 26, 1 << 33
_DTYPES = {
    name: np.dtype(name)
    for name in (
        *("float16", "float32", "float64", "bool"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    )
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


class BrokenFrameError(Exception):
    """What was read is not a frame."""


def send(stream: BinaryIO, header: Mapping[str, Any], blobs: Sequence[bytes | memoryview] = ()) -> None:
    """Write one frame."""
    text = json.dumps({**header, "sizes": [len(b) for b in blobs]}).encode()
    stream.write(MAGIC + len(text).to_bytes(4, "little") + text)
    for blob in blobs:
        stream.write(blob)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], list[bytes]] | None:
    """Read one frame; None at the end of the stream.

    Raises:
        BrokenFrameError: the stream holds something else, or ends within a frame.
    """
    start = stream.read(8)
    if not start:
        return None
    if len(start) != 8 or start[:4] != MAGIC:
        raise BrokenFrameError(f"expected a frame, found {start!r}")
    length = int.from_bytes(start[4:], "little")
    if length > _LARGEST_HEADER:
        raise BrokenFrameError(f"a header of {length} bytes")
    try:
        header = json.loads(_exactly(stream, length))
        sizes = header["sizes"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenFrameError(f"an invalid header: {error}") from error
    if not isinstance(sizes, list) or not all(isinstance(s, int) and 0 <= s <= _LARGEST_BLOB for s in sizes):
        raise BrokenFrameError(f"sizes = {sizes!r}")
    return header, [_exactly(stream, size) for size in sizes]


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise BrokenFrameError(f"the stream ended after {len(data)} of {size} bytes")
    return data


def describe(arrays: Mapping[str, np.ndarray]) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Named arrays as JSON and blobs."""
    described, blobs = [], []
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES:
            raise TypeError(f"{name} has dtype {array.dtype}, which a frame cannot carry")
        described.append({"name": name, "dtype": array.dtype.name, "shape": list(array.shape)})
        blobs.append(array.tobytes())
    return described, blobs


def arrays(described: Any, blobs: Sequence[bytes]) -> dict[str, np.ndarray]:
    """The inverse of `describe`.

    Raises:
        BrokenFrameError: the description and the blobs do not match.
    """
    if not isinstance(described, list) or len(described) != len(blobs):
        raise BrokenFrameError(f"{len(blobs)} blobs for {described!r}")
    found = {}
    for entry, blob in zip(described, blobs, strict=True):
        try:
            array = np.frombuffer(blob, _DTYPES[entry["dtype"]]).reshape([int(d) for d in entry["shape"]])
            found[str(entry["name"])] = array
        except (KeyError, TypeError, ValueError) as error:
            raise BrokenFrameError(f"{entry!r} over {len(blob)} bytes: {error}") from error
    return found
