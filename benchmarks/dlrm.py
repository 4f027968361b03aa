"""A whole ranker: python benchmarks/dlrm.py [--batch 128 2048 --layers small mlperf --json FILE]

models/networks.py's DLRM in torch, as torch's two exporters write it, and those two files after `lucid_onnx.fuse` with
our library: a node for each bag, and, merged, one node for all. The shape is MLPerf's: 13 numbers, 26 tables of rows
of 128 with Criteo's cardinalities, capped at --rows (40,000: 0.23 GB, which no cache holds), and bags as long as those
of MLPerf's multi-hot data set. Layers are MLPerf's (bottom 512-256-128, top 1024-1024-512-256-1) or small ones, with
which bags take most of the time. Indices are uniform, and fresh in every call.

Ratios are torch's time over the others'; "speed-up" is an export's time over that of its fused or merged file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort

import lucid_onnx
from common import options, quiet_torch
from interleave import compare

#: The length of a bag, by table, in MLPerf's multi-hot data set.
LENGTHS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
LAYERS = {"small": ((64, 32), (128, 64)), "mlperf": ((512, 256), (1024, 1024, 512, 256))}
BATCHES = 5  #: of inputs, which are large here; coprime to the number of sides, which is 7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000, help="the most rows of a table")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--layers", choices=LAYERS, nargs="+", default=list(LAYERS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    a = parser.parse_args()
    quiet_torch()
    warnings.simplefilter("ignore")  # torch's, about its own exporters
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))
    import networks

    network, measured = networks.NETWORKS["dlrm"], []
    print(f"{platform.processor() or platform.machine()}, onnxruntime {ort.__version__}, torch {torch.__version__}")
    for layers in a.layers:
        torch.manual_seed(0)
        bottom, top = LAYERS[layers]
        rows = [min(n, a.rows) for n in networks.CRITEO]
        module = networks.DLRM(rows, a.dim, bottom, top).eval()
        with tempfile.TemporaryDirectory() as folder:
            paths = {}
            for exporter in ("dynamo", "legacy"):
                path = paths[exporter] = Path(folder) / f"{exporter}.onnx"
                networks.export("dlrm", module, exporter, path)
                report = lucid_onnx.fuse(path, fused := path.with_name(f"{exporter}_fused.onnx"))
                if len(report.fused) != len(rows) or report.unfused:
                    raise SystemExit(f"{exporter}: {len(report.fused)} bags were fused, expected {len(rows)}: {report}")
                paths[f"{exporter}, fused"] = fused
                lucid_onnx.fuse(path, merged := path.with_name(f"{exporter}_merged.onnx"), merge_tables=True)
                paths[f"{exporter}, merged"] = merged
            for threads in a.threads:
                torch.set_num_threads(threads)
                sessions = {
                    name: lucid_onnx.InferenceSession(path, native="," in name, session_options=options(threads))
                    for name, path in paths.items()
                }
                for batch in a.batch:
                    feeds = [_feed(rows, batch, np.random.default_rng(k)) for k in range(BATCHES)]
                    timings = compare(
                        _sides(module, sessions, network, feeds), batches=BATCHES, turns=a.turns, tolerance=1e-4
                    )
                    print(f"{layers} layers, batch {batch}, {threads} threads; ratio: torch's time over the others'")
                    for name, timing in timings.items():
                        print(f"  {name:24s} {timing}")
                    for exporter, way in itertools.product(("dynamo", "legacy"), ("fused", "merged")):
                        faster = timings[exporter].median / timings[f"{exporter}, {way}"].median
                        print(f"  speed-up of {exporter}, {way:10s} {faster:8.1f}x", flush=True)
                    setting = {"layers": layers, "batch": batch, "threads": threads}
                    measured += [
                        {**setting, "side": name, "milliseconds": timing.median * 1e3, "ratio": timing.ratio}
                        for name, timing in timings.items()
                    ]
    if a.json is not None:
        a.json.write_text(json.dumps({"rows": a.rows, "dim": a.dim, "turns": a.turns, "measured": measured}, indent=1))
    return 0


def _feed(rows: list[int], batch: int, random: np.random.Generator) -> list[np.ndarray]:
    """dense [batch, 13], offsets [26, batch], and the indices of each table."""
    dense = random.standard_normal((batch, 13)).astype(np.float32)
    offsets = np.stack([np.arange(batch) * length for length in LENGTHS])
    return [dense, offsets, *(random.integers(0, n, batch * k) for n, k in zip(rows, LENGTHS, strict=True))]


def _sides(
    module: object, sessions: dict[str, ort.InferenceSession], network: object, feeds: list[list[np.ndarray]]
) -> dict[str, Callable[[int], np.ndarray]]:
    import torch

    tensors = [[torch.from_numpy(array) for array in feed] for feed in feeds]
    named = [dict(zip(network.inputs, feed, strict=True)) for feed in feeds]  # type: ignore[attr-defined]

    def eager(batch: int) -> np.ndarray:
        with torch.inference_mode():
            return module(*tensors[batch]).numpy()  # type: ignore[operator,no-any-return]

    def running(session: ort.InferenceSession) -> Callable[[int], np.ndarray]:
        return lambda batch: session.run(None, named[batch])[0]  # type: ignore[no-any-return]

    return {"torch eager": eager, **{name: running(session) for name, session in sessions.items()}}


if __name__ == "__main__":
    sys.exit(main())
