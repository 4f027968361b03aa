"""The cost of each mode relative to a sum: python benchmarks/modes.py [--rows 1000000 --dim 64 --bags 2048 --length 20]

The same indices as a sum, a mean, a maximum, with per_sample_weights, with padding_idx (one index in twenty), with
both, with max_norm, and what torch has not: sqrtn, weighted means, and one index in twenty that is -1. Every side is
checked against torch, or NumPy, first; then they take turns, with io-binding, over one constant table. Each line has
the sum's time over the mode's, and torch's over ours in that mode.
"""

from __future__ import annotations

import platform
import sys
from typing import Any

import numpy as np
import onnxruntime as ort

import lucid_onnx
from common import BATCHES, binding, options, quiet_torch, shape_parser
from interleave import compare

PADDING = 7
MODES: dict[str, dict[str, Any]] = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "weights": {"mode": "sum", "per_sample_weights": True},
    "padding": {"mode": "sum", "padding_idx": PADDING},
    "weights, padding": {"mode": "sum", "per_sample_weights": True, "padding_idx": PADDING},
    "mean, padding": {"mode": "mean", "padding_idx": PADDING},
    "max": {"mode": "max"},
    "max_norm": {"mode": "sum", "max_norm": 7.0},
    "sqrtn": {"mode": "sqrtn"},
    "may skip": {"mode": "sum", "negative": "skip"},
    "skip": {"mode": "sum", "negative": "skip"},
    "mean by count": {"mode": "mean", "per_sample_weights": True, "divisor": "count"},
    "mean by weights": {"mode": "mean", "per_sample_weights": True, "divisor": "weights"},
    "sqrtn by weights": {"mode": "sqrtn", "per_sample_weights": True, "divisor": "weights"},
}


def main() -> int:
    parser = shape_parser(__doc__)
    a = parser.parse_args()
    quiet_torch()
    import torch

    random = np.random.default_rng(0)
    table = random.standard_normal((a.rows, a.dim), dtype=np.float32)
    size = a.bags * a.length
    offsets = np.arange(a.bags) * a.length
    weights = random.random(size, dtype=np.float32) + np.float32(0.1)
    feeds = []
    for _ in range(BATCHES):
        indices = random.integers(0, a.rows, size)
        indices[random.integers(0, size, size // 20)] = PADDING
        feeds.append({"indices": indices, "offsets": offsets})
    print(
        f"V={a.rows} D={a.dim} B={a.bags} L={a.length} float32, {a.turns} turns; "
        f"{platform.processor() or platform.machine()}, onnxruntime {ort.__version__}, torch {torch.__version__}"
    )
    for threads in a.threads:
        torch.set_num_threads(threads)
        sides = {}
        for name, settings in MODES.items():
            given = feeds
            if name == "skip":
                given = [
                    {**feed, "indices": np.where(feed["indices"] == PADDING, -1, feed["indices"])} for feed in feeds
                ]
            sides[name] = _ours(table, settings, given, weights, threads)
            if settings["mode"] == "sqrtn" or {"negative", "divisor"}.intersection(settings):
                expected = _numpys(table, settings, given[0]["indices"].reshape(a.bags, a.length), weights)
            else:
                sides[f"torch {name}"] = _theirs(table, settings, feeds, weights)
                expected = sides[f"torch {name}"](0)
            # Sums of twenty normal numbers in two orders of additions.
            np.testing.assert_allclose(sides[name](0), expected, rtol=1e-4, atol=1e-4, err_msg=name)
        count = BATCHES if BATCHES % len(sides) else BATCHES - 1
        timings = compare(sides, batches=count, turns=a.turns, unchecked=[n for n in sides if n != "sum"])
        print(f"{threads} threads; the sum's time over the mode's; torch's time over ours")
        for name in MODES:
            theirs = timings.get(f"torch {name}")
            torch_ratio = f"{theirs.median / timings[name].median:6.2f}x" if theirs else ""
            print(f"  {name:18s} {timings[name]}   {torch_ratio}")
    return 0


def _ours(table: np.ndarray, settings: dict[str, Any], feeds: list[Any], weights: np.ndarray, threads: int) -> Any:
    model = lucid_onnx.build_model(table, **settings)
    session = lucid_onnx.InferenceSession(model, session_options=options(threads))
    if settings.get("per_sample_weights"):
        feeds = [{**feed, "per_sample_weights": weights} for feed in feeds]
    return binding(session, feeds, (len(feeds[0]["offsets"]), table.shape[1]))


def _numpys(table: np.ndarray, settings: dict[str, Any], indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Bags of one length: indices [B, L]."""
    used = (indices >= 0).astype(np.float32)
    by = used * weights.reshape(indices.shape) if settings.get("per_sample_weights") else used
    sums = np.einsum("bl,bld->bd", by, table[indices])
    total = used.sum(axis=1)
    if settings.get("divisor") == "weights":
        total = (by if settings["mode"] == "mean" else by * by).sum(axis=1)
    divisor = {"sum": np.ones_like(total), "mean": total, "sqrtn": np.sqrt(total)}[settings["mode"]]
    return np.asarray(sums / divisor[:, None])


def _theirs(table: np.ndarray, settings: dict[str, Any], feeds: list[Any], weights: np.ndarray) -> Any:
    import torch

    weight = torch.from_numpy(table)
    if "max_norm" in settings:
        weight = weight.clone()  # torch clips the rows of its table in place
    tensors = [(torch.from_numpy(f["indices"]), torch.from_numpy(f["offsets"])) for f in feeds]
    more = {k: v for k, v in settings.items() if k != "per_sample_weights"}
    if settings.get("per_sample_weights"):
        more["per_sample_weights"] = torch.from_numpy(weights)

    def call(batch: int) -> np.ndarray:
        indices, offsets = tensors[batch]
        with torch.inference_mode():
            return torch.nn.functional.embedding_bag(indices, weight, offsets, **more).numpy()  # type: ignore[no-any-return]

    return call


if __name__ == "__main__":
    sys.exit(main())
