"""Ragged bags in standard operators: python benchmarks/ragged.py [--rows 100000 --dim 64 --threads 1 2]

`lucid_onnx.lower` in blocks, padded to the longest bag and in a loop, in ONNX Runtime without our library, over bags
of one length, of many lengths, and with one long bag; and the size of each graph. Ratios are the blocks' time over the
others'.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

import lucid_onnx
from common import options
from interleave import compare

BATCHES = 7  #: of indices, coprime to the number of sides


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    a = parser.parse_args()
    random = np.random.default_rng(0)
    table = random.standard_normal((a.rows, a.dim), dtype=np.float32)
    model = lucid_onnx.build_model(table, mode="sum")
    shapes = {
        "16 bags of 3": [3] * 16,
        "128 bags of 10": [10] * 128,
        "2048 bags of 20": [20] * 2048,
        "8192 bags of 2": [2] * 8192,
        "512 bags of 0 to 40": random.integers(0, 41, 512).tolist(),
        "512 bags of 20, one of 1500": [20] * 512 + [1500],
    }
    for threads in a.threads:
        for name, lengths in shapes.items():
            ways = {
                "blocks": lucid_onnx.lower(model),
                "padded": lucid_onnx.lower(model, ragged="padded", longest_bag=max(lengths)),
                "loop": lucid_onnx.lower(model, ragged="loop"),
            }
            sizes = {way: lowered.ByteSize() - table.nbytes for way, lowered in ways.items()}
            sessions = {
                way: lucid_onnx.InferenceSession(lowered, native=False, session_options=options(threads))
                for way, lowered in ways.items()
            }
            offsets = np.cumsum([0, *lengths[:-1]])
            feeds = [{"indices": random.integers(0, a.rows, sum(lengths)), "offsets": offsets} for _ in range(BATCHES)]

            def side(way: str, sessions: object = sessions, feeds: object = feeds) -> object:
                return lambda batch: sessions[way].run(None, feeds[batch])[0]  # type: ignore[index]

            print(f"{name}, {threads} threads")
            timings = compare({way: side(way) for way in ways}, batches=BATCHES, turns=a.turns)  # type: ignore[misc]
            for way, timing in timings.items():
                print(f"  {way:8s} {sizes[way] / 1024:5.1f} KB {timing}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
