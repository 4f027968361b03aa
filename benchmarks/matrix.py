"""Indices [B, L] in standard operators: python benchmarks/matrix.py [--rows 1000000 --dim 64 --threads 1 2]

A matrix of rows ("pieces", the default of `lucid_onnx.lower`) against blocks, which releases before wrote, in ONNX
Runtime without our library, turn by turn in one process. Ratios are the blocks' time over the matrix's. With --cpu
times are of the processors, which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np

import lucid_onnx
from common import options
from interleave import compare

BATCHES = 7  #: of indices, coprime to the number of sides
SHAPES = ((1, 5), (16, 3), (128, 10), (2047, 16), (2048, 20), (8192, 2), (64, 500), (1, 5000), (1, 100_000))
KINDS: dict[str, dict[str, Any]] = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "max": {"mode": "max"},
    "padding": {"mode": "sum", "padding_idx": 0},
    "weights": {"mode": "sum", "per_sample_weights": True},
    "clipped": {"mode": "sum", "max_norm": 7.0},
    "int8": {"mode": "sum"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--cpu", action="store_true")
    a = parser.parse_args()
    clock = time.process_time if a.cpu else time.perf_counter
    random = np.random.default_rng(0)
    table = random.standard_normal((a.rows, a.dim), dtype=np.float32)
    for threads in a.threads:
        for kind in a.kinds:
            if kind == "int8":
                codes = lucid_onnx.QuantizedTable.quantize(table)
                model = lucid_onnx.build_quantized_model(codes, two_d=True, **KINDS[kind])
            else:
                model = lucid_onnx.build_model(table, two_d=True, **KINDS[kind])
            sides: dict[str, Any] = {}
            for way in ("blocks", "pieces"):
                lowered = lucid_onnx.lower(model, ragged=way)  # type: ignore[arg-type]
                sides[way] = lucid_onnx.InferenceSession(lowered, native=False, session_options=options(threads))
            for shape in SHAPES:
                feeds = [{"indices": random.integers(0, a.rows, shape)} for _ in range(BATCHES)]
                if kind == "weights":
                    for feed in feeds:
                        feed["per_sample_weights"] = random.standard_normal(shape, dtype=np.float32)
                if kind == "padding":
                    for feed in feeds:
                        feed["indices"][random.random(shape) < 0.1] = 0

                def side(way: str, sides: Any = sides, feeds: Any = feeds) -> Any:
                    return lambda batch: sides[way].run(None, feeds[batch])[0]

                tolerance = 1e-2 if shape[1] > 1000 else 1e-4
                turns = a.turns if np.prod(shape) > 1000 else 5 * a.turns
                calls = {way: side(way) for way in sides}
                found = compare(calls, batches=BATCHES, turns=turns, tolerance=tolerance, clock=clock)
                print(f"{kind:8s} {threads} threads {shape[0]:5d} x {shape[1]:<6d} {found['pieces']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
