"""How fast a table becomes smaller: python benchmarks/tables.py [--rows 100000 --dim 64 --turns 7]

What `quantize` and `build --dtype` do with the rows of a table, but for its file: quantize or round them, and count
what they lose. The native kernel and NumPy take turns over the same rows of float32, on one thread. Both write the same
bytes, which is checked first. GB of float32 a second of CPU time, the best turn of each.
"""

from __future__ import annotations

import argparse
import time
from typing import Any
from unittest import mock

import numpy as np

from lucid_onnx import native
from lucid_onnx.rewrite.quantization import DTYPES
from lucid_onnx.rewrite.tables import Rows, Smaller


def smaller(rows: np.ndarray, dtype: str) -> list[bytes]:
    table = Rows(rows.shape, rows.dtype, lambda begin, end: rows[begin:end])
    return [part.values.tobytes() for _, part in Smaller(table, dtype)]


def without_library() -> Any:
    nothing = lambda rows, kind: None  # noqa: E731
    return mock.patch.multiple(native, quantize_rows=nothing, round_rows=nothing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 100_000), ("dim", 64), ("turns", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    native.get_library_path()  # raises if it is not installed
    rows = np.random.default_rng(0).standard_normal((a.rows, a.dim)).astype(np.float32)
    print(f"{a.rows} x {a.dim} float32, {a.turns} turns: GB/s\n{'':<10}{'kernel':>8}{'NumPy':>8}")
    for dtype in DTYPES:
        ours = b"".join(smaller(rows, dtype))
        with without_library():
            if b"".join(smaller(rows, dtype)) != ours:
                raise SystemExit(f"{dtype}: other bytes")
        best = [float("inf")] * 2
        for _ in range(a.turns):
            start = time.process_time()
            smaller(rows, dtype)
            best[0] = min(best[0], time.process_time() - start)
            with without_library():
                start = time.process_time()
                smaller(rows, dtype)
                best[1] = min(best[1], time.process_time() - start)
        print(f"{dtype:<10}" + "".join(f"{rows.nbytes / seconds / 1e9:8.2f}" for seconds in best))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
