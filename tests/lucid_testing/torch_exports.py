"""Bags that torch's two exporters wrote, and what `lucid_onnx.fuse` must make of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_testing.graphs import nodes
from lucid_testing.models import attributes, bags, interface, ways_to_run


class Export(NamedTuple):
    """An exported module: its file, the eager module, and the names of what it takes, in order."""

    path: Path
    module: Any
    inputs: tuple[str, ...]


def bag_module(**keywords: Any) -> Any:
    """A module of one bag over a table [10, 4] whose rows are known."""
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Bag(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            dtype = keywords.pop("dtype", torch.float32)
            table = np.random.default_rng(3).standard_normal((10, 4))
            self.bag = torch.nn.EmbeddingBag(10, 4, **keywords, dtype=dtype)
            self.bag.weight.data = torch.from_numpy(table).to(dtype)

        def forward(self, i: Any, o: Any = None, w: Any = None) -> Any:
            return self.bag(i, o, per_sample_weights=w)

    return Bag().eval()


INDICES = np.array([1, 2, 4, 5, 4, 3, 2, 9])
STARTS, ENDS = np.array([0, 3, 5]), np.array([0, 3, 5, 8])
FACTORS = np.linspace(-1, 1, 8, dtype=np.float32)
FLAT = {"i": INDICES, "o": STARTS}
#: What is exported: the module's arguments, what it is called with, and the exporters' settings.
LEGACY: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], int]] = {
    **{f"{mode}-{opset}": ({"mode": mode}, FLAT, opset) for mode in spec.ATEN_MODES for opset in (11, 13, 16, 17, 18)},
    "weights-11": ({"mode": "sum"}, {**FLAT, "w": FACTORS}, 11),
    "weights-17": ({"mode": "sum"}, {**FLAT, "w": FACTORS}, 17),
    "last-sum": ({"mode": "sum", "include_last_offset": True}, {"i": INDICES, "o": ENDS}, 17),
    "last-mean": ({"mode": "mean", "include_last_offset": True}, {"i": INDICES, "o": ENDS}, 13),
    "matrix-mean": ({"mode": "mean"}, {"i": INDICES.reshape(2, 4)}, 17),
    "matrix-weights": ({"mode": "sum"}, {"i": INDICES.reshape(2, 4), "w": FACTORS.reshape(2, 4)}, 17),
    "matrix-max-11": ({"mode": "max"}, {"i": INDICES.reshape(2, 4)}, 11),
    "half": ({"mode": "sum", "dtype": "float16"}, FLAT, 17),
    "double": ({"mode": "mean", "dtype": "float64"}, FLAT, 17),
    "int32": ({"mode": "max"}, {"i": INDICES.astype(np.int32), "o": STARTS.astype(np.int32)}, 17),
}
DYNAMO: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], bool]] = {
    **{mode: ({"mode": mode}, FLAT, True) for mode in spec.ATEN_MODES},
    **{f"{mode}-plain": ({"mode": mode}, FLAT, False) for mode in spec.ATEN_MODES},
    **{f"{mode}-padded": ({"mode": mode, "padding_idx": 2}, FLAT, True) for mode in spec.ATEN_MODES},
    "mean-padded-plain": ({"mode": "mean", "padding_idx": -1}, FLAT, False),
    "weights": ({"mode": "sum"}, {**FLAT, "w": FACTORS}, True),
    "weights-padded": ({"mode": "sum", "padding_idx": 4}, {**FLAT, "w": FACTORS}, True),
    "last-sum": ({"mode": "sum", "include_last_offset": True}, {"i": INDICES, "o": ENDS}, True),
    "last-mean": ({"mode": "mean", "include_last_offset": True}, {"i": INDICES, "o": ENDS}, False),
    "last-max-padded": (
        {"mode": "max", "include_last_offset": True, "padding_idx": 2},
        {"i": INDICES, "o": ENDS},
        True,
    ),
    "matrix-mean": ({"mode": "mean"}, {"i": INDICES.reshape(2, 4)}, True),
    "matrix-weights": ({"mode": "sum"}, {"i": INDICES.reshape(2, 4), "w": FACTORS.reshape(2, 4)}, True),
    "norm": ({"mode": "mean", "max_norm": 1.5}, FLAT, True),
    "norm-1-padded": ({"mode": "sum", "max_norm": 1.5, "norm_type": 1.0, "padding_idx": 2}, FLAT, True),
    "matrix-norm": ({"mode": "mean", "max_norm": 1.5}, {"i": INDICES.reshape(2, 4)}, True),
    "half": ({"mode": "sum", "dtype": "float16"}, FLAT, True),
    "double": ({"mode": "max", "dtype": "float64"}, FLAT, True),
}


def prepared(keywords: dict[str, Any], feed: dict[str, np.ndarray]) -> tuple[Any, tuple[Any, ...]]:
    """The module, and its arguments as tensors."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    keywords = dict(keywords)
    if "dtype" in keywords:
        keywords["dtype"] = getattr(torch, keywords["dtype"])
    arguments = tuple(torch.from_numpy(feed[n]) if n in feed else None for n in ("i", "o", "w"))
    while arguments[-1] is None:
        arguments = arguments[:-1]
    return bag_module(**keywords), arguments


def export_legacy(name: str, folder: Path) -> Export:
    """The export ``LEGACY[name]`` by torch.onnx.export(dynamo=False)."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    keywords, feed, opset = LEGACY[name]
    module, arguments = prepared(keywords, feed)
    path = folder / f"{name}.onnx"
    axes = {n: {k: f"{n}{k}" for k in range(a.ndim)} for n, a in feed.items()}
    torch.onnx.export(
        *(module, arguments, str(path)),
        dynamo=False,
        opset_version=opset,
        input_names=list(feed),
        output_names=["pooled"],
        dynamic_axes={**axes, "pooled": {0: "bags"}},
    )
    return Export(path, module, tuple(feed))


def export_dynamo(name: str, folder: Path) -> Export:
    """The export ``DYNAMO[name]`` by torch.onnx.export(dynamo=True)."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    keywords, feed, optimize = DYNAMO[name]
    module, arguments = prepared(keywords, feed)
    path = folder / f"{name}.onnx"
    dims = [None if a is None else dict.fromkeys(range(a.dim()), torch.export.Dim.DYNAMIC) for a in arguments]
    torch.onnx.export(
        *(module, arguments, str(path)),
        dynamo=True,
        input_names=list(feed),
        output_names=["pooled"],
        optimize=optimize,
        dynamic_shapes=tuple(dims),
        verbose=False,
    )
    return Export(path, module, tuple(feed))


def variations(feed: dict[str, np.ndarray], keywords: dict[str, Any]) -> Iterator[dict[str, np.ndarray]]:
    """Calls of other sizes than the exported one: longer, with empty bags at each end, without indices."""
    rng = np.random.default_rng(7)
    itype = feed["i"].dtype
    if "o" not in feed:
        for shape in ((2, 4), (5, 1), (1, 33)):
            call = {"i": rng.integers(0, 10, shape, itype)}
            yield {**call, "w": rng.standard_normal(shape).astype(np.float32)} if "w" in feed else call
        return
    for lengths in ([3, 2, 3], [1], [0, 5, 0, 0, 40, 1, 0], [0, 0], [200]):
        starts = np.cumsum([0, *lengths]).astype(itype)
        n = int(starts[-1])
        call = {"i": rng.integers(0, 10, n, itype), "o": starts if keywords.get("include_last_offset") else starts[:-1]}
        yield {**call, "w": rng.standard_normal(n).astype(np.float32)} if "w" in feed else call


def eager(export: Export, call: dict[str, np.ndarray]) -> np.ndarray:
    """What torch itself computes for a call."""
    import torch

    arguments = [torch.from_numpy(call[n]) if n in call else None for n in ("i", "o", "w")]
    module = export.module
    kept = module.bag.weight.detach().clone()  # max_norm changes the table
    with torch.no_grad():
        result = module(*arguments).numpy()
        module.bag.weight.copy_(kept)
    return np.asarray(result)


LOOPS = {"Loop", "Scan", "SequenceInsert", "SequenceEmpty", "ConcatFromSequence"}


def check_export(export: Export, keywords: dict[str, Any], feed: dict[str, np.ndarray]) -> None:
    """The export fuses to one bag, which is what torch is, on every size and in every form."""
    before = export.path.read_bytes()
    fused = export.path.with_suffix(".fused.onnx")
    report = lucid_onnx.fuse(export.path, fused)
    original = onnx.load(export.path)
    assert LOOPS & {n.op_type for n in nodes(original.graph)}
    assert report.unfused == ()
    assert len(report.fused) == 1
    (bag,) = bags(report.model)
    two_d, weighted = feed["i"].ndim == 2, "w" in feed
    assert bag.op_type == spec.variant(two_d=two_d, weighted=weighted).name == report.fused[0].op
    assert not LOOPS & {n.op_type for n in nodes(report.model.graph)}
    casts = 1 if feed["i"].dtype == np.int32 else 0  # of the offsets, which the exporter wants as int64
    assert [n.op_type for n in report.model.graph.node] == casts * ["Cast"] + [bag.op_type]
    found = spec.Attributes.from_onnx(attributes(bag))
    padding_idx = keywords.get("padding_idx")
    assert found == spec.Attributes(
        mode=keywords["mode"],
        padding_idx=None if padding_idx is None else padding_idx % 10,
        max_norm=keywords.get("max_norm"),
        norm_type=keywords.get("norm_type", 2.0),
        include_last_offset=keywords.get("include_last_offset", False),
    )
    assert interface(report.model) == interface(original)
    assert [t.name for t in report.model.graph.initializer] == [bag.input[0]]
    assert export.path.read_bytes() == before
    # float32 sums of up to 200 rows of about 1, in another order; float16 is rounded once by a bag, and by torch
    # at more places.
    tolerance = {"float16": 4e-3, "float64": 1e-12}.get(keywords.get("dtype", ""), 1e-5)
    ways = ways_to_run(onnx.load(fused))
    # All become the same few nodes, whose body and what they are lowered to need no session for each export.
    if not export.path.stem.endswith("-17"):
        del ways["standard"]
        if "native" in ways and not export.path.stem.endswith("-plain"):
            del ways["portable"]
    sessions = {way: lucid_onnx.InferenceSession(m, native=native) for way, (m, native) in ways.items()}
    for k, call in enumerate(variations(feed, keywords)):
        expected = eager(export, call)
        assert expected.size
        for way, session in sessions.items():
            (pooled,) = session.run(None, call)
            assert pooled.dtype == expected.dtype
            np.testing.assert_allclose(pooled, expected, rtol=tolerance, atol=20 * tolerance, err_msg=f"{way} {k}")
    if not two_d:
        nothing = {"i": feed["i"][:0], "o": feed["o"][:1] if found.include_last_offset else feed["o"][:0]}
        nothing |= {"w": feed["w"][:0]} if weighted else {}
        for session in sessions.values():
            assert session.run(None, nothing)[0].shape == (0, 4)
