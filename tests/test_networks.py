"""Whole networks: eager torch, both of its exporters with `fuse` behind, and our export say the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_testing.kernels import library_path

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))

import networks  # noqa: E402  # a script beside the package

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),  # torch's own, from its own code
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"),
]

BAGS = {"dlrm": 26, "text_classifier": 1, "two_tower": 2}
#: Lengths of bags of users and of items: as exported, none as exported, empty ones at each end, only empty ones,
#: a long one, and no bags at all.
CALLS = [
    networks.EXAMPLE,
    ((1, 5, 2), (4, 4, 1, 1, 2)),
    ((0, 3, 0, 0, 7, 1, 0), (0, 2, 0)),
    ((0, 0), (0,)),
    ((300,), (1,)),
    ((), ()),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, translations: None) -> Callable[[str, str], tuple[Any, Path]]:
    """A network's module, and its file by an exporter, made when first asked for."""
    folder = tmp_path_factory.mktemp("networks")
    held: dict[str, Any] = {}

    def get(name: str, exporter: str) -> tuple[Any, Path]:
        if name not in held:
            held[name] = networks.made(name)[1]
        path = folder / f"{name}_{exporter}.onnx"
        if not path.exists():
            networks.export(name, held[name], exporter, path)
        return held[name], path

    return get


def models(path: Path, exporter: str, bags: int) -> Iterator[tuple[str, onnx.ModelProto, bool]]:
    """What is run of a file, and whether with the library."""
    if exporter == "lucid":
        model = onnx.load(path)
    else:
        report = lucid_onnx.fuse(path)
        assert (len(report.fused), report.unfused) == (bags, ())
        model = report.model
    assert [n.domain for n in model.graph.node].count(spec.DOMAIN) == bags
    assert not {"Loop", "Scan", "SequenceInsert"} & {n.op_type for n in model.graph.node}
    onnx.checker.check_model(model, full_check=True)
    # A session of 26 bags in standard operators takes seconds: each way to run once, however the file was made.
    if bags < 26 or exporter != "legacy" or library_path() is None:
        yield "portable", model, False
    if library_path() is not None and (bags < 26 or exporter != "dynamo"):
        yield "native", model, True
    if exporter == "lucid":
        yield "standard", lucid_onnx.lower(model), False


@pytest.mark.parametrize("exporter", ["legacy", "dynamo", "lucid"])
@pytest.mark.parametrize("name", BAGS)
def test_networks(files: Callable[[str, str], tuple[Any, Path]], name: str, exporter: str) -> None:
    network = networks.NETWORKS[name]
    module, path = files(name, exporter)
    assert path.stat().st_size < 5 * 2**20
    sessions = {w: lucid_onnx.InferenceSession(m, native=n) for w, m, n in models(path, exporter, BAGS[name])}
    for lengths in CALLS:
        arguments = network.arguments(module, *lengths)
        with torch.no_grad():
            expected = module(*arguments).numpy()
        feed = dict(zip(network.inputs, (a.numpy() for a in arguments), strict=True))
        for way, session in sessions.items():
            (found,) = session.run([network.output], feed)
            assert found.shape == expected.shape
            # float32 through matrix products of up to a few hundred terms of magnitude 1, in other orders.
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5, err_msg=f"{way} {lengths}")
    if name == "text_classifier":
        text = module.features("Bags of words know no order, bags of n-grams a little of it")
        assert len(text) == 13 + 12 + len("bagsofwordsknownoorder,bagsofn-gramsalittleofit")
        assert max(text) < module.words + module.buckets
        feed = {"indices": np.array(text), "offsets": np.array([0])}
        with torch.no_grad():
            expected = module(torch.tensor(text), torch.tensor([0])).numpy()
        np.testing.assert_allclose(sessions["portable"].run(None, feed)[0], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("exporter", ["legacy", "lucid"])
@pytest.mark.skipif(library_path() is None, reason="there is no native library")
def test_tables_of_a_ranker_are_merged(files: Callable[[str, str], tuple[Any, Path]], exporter: str) -> None:
    """A stack of 26 bags and of another value: one node, a reshape and what was there; the same click to the bit."""
    module, path = files("dlrm", exporter)
    bags = lucid_onnx.fuse(path).model
    report = lucid_onnx.fuse(path, merge_tables=True)
    assert ([len(m.tables) for m in report.merged], report.unmerged) == ([26], ())
    assert [n.op_type for n in report.model.graph.node if n.domain == spec.DOMAIN] == ["EmbeddingBagCollection"]
    onnx.checker.check_model(report.model, full_check=True)
    sessions = [lucid_onnx.InferenceSession(m) for m in (bags, report.model)]
    for lengths in CALLS:
        arguments = networks.NETWORKS["dlrm"].arguments(module, *lengths)
        feed = dict(zip(networks.NETWORKS["dlrm"].inputs, (a.numpy() for a in arguments), strict=True))
        expected, got = (session.run(None, feed)[0] for session in sessions)
        assert got.tobytes() == expected.tobytes()


def test_tables_of_a_ranker_are_quantised(files: Callable[[str, str], tuple[Any, Path]], tmp_path: Path) -> None:
    """26 tables at once; those of two or three rows are not worth it. The click's probability hardly moves."""
    module, path = files("dlrm", "lucid")
    output = tmp_path / "small.onnx"
    report = lucid_onnx.quantize(path, output, dtype="uint8", min_bytes=1024)
    assert len(report.quantized) + len(report.unquantized) == 26
    small = [rows for rows in networks.ROWS if rows * 16 * 4 < 1024]
    assert len(report.unquantized) == len(small)
    assert all(0 < q.largest_row_error < 0.01 for q in report.quantized)
    arguments = networks.NETWORKS["dlrm"].arguments(module, *CALLS[2])
    feed = dict(zip(networks.NETWORKS["dlrm"].inputs, (a.numpy() for a in arguments), strict=True))
    whole, quantised = (
        lucid_onnx.InferenceSession(p, native=library_path() is not None).run(None, feed)[0] for p in (path, output)
    )
    assert np.abs(whole - quantised).max() < 1e-2
    assert (whole != quantised).any()
