"""Fusing what torch.onnx.export(dynamo=True) writes for fixed sizes: it computes conditions, bounds and ones itself."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

import lucid_onnx
from lucid_testing.graphs import nodes
from lucid_testing.models import bags, changed_numbers, results, same_as_before

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

#: Of each bag: the module's arguments, the inputs that it takes, and the operator that it must become.
KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    **{mode: ({"mode": mode}, ("ids", "starts"), "EmbeddingBag") for mode in ("sum", "mean", "max")},
    "padded": ({"mode": "mean", "padding_idx": 2}, ("ids", "starts"), "EmbeddingBag"),
    "last": ({"mode": "sum", "include_last_offset": True}, ("ids", "ends"), "EmbeddingBag"),
    "last padded": ({"mode": "max", "padding_idx": 2, "include_last_offset": True}, ("ids", "ends"), "EmbeddingBag"),
    "weighted": ({"mode": "sum"}, ("ids", "starts", "scores"), "EmbeddingBagWeighted"),
    "weighted padded": ({"mode": "sum", "padding_idx": 4}, ("ids", "starts", "scores"), "EmbeddingBagWeighted"),
    "norm": ({"mode": "mean", "max_norm": 1.5}, ("ids", "starts"), "EmbeddingBag"),
    "half": ({"mode": "sum", "dtype": torch.float16}, ("ids", "starts"), "EmbeddingBag"),
}
MATRICES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "rows": ({"mode": "mean"}, ("matrix",), "EmbeddingBag2D"),
    "rows padded": ({"mode": "sum", "padding_idx": 2}, ("matrix",), "EmbeddingBag2D"),
    "rows weighted": ({"mode": "sum"}, ("matrix", "", "grades"), "EmbeddingBag2DWeighted"),
}
FEEDS: dict[str, Any] = {
    "ids": torch.tensor([1, 2, 4, 5, 4, 3, 2, 9]),
    "starts": torch.tensor([0, 3, 5]),
    "ends": torch.tensor([0, 3, 5, 8]),
    "scores": torch.linspace(-1, 1, 8),
    "matrix": torch.tensor([[1, 2, 4, 5], [4, 3, 2, 9]]),
    "grades": torch.linspace(-1, 1, 8).view(2, 4),
}


class Bags(torch.nn.Module):  # type: ignore[misc]
    """A bag of each kind, over tables of their own."""

    def __init__(self, kinds: dict[str, tuple[dict[str, Any], tuple[str, ...], str]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kinds = kinds
        self.bags = torch.nn.ModuleList(torch.nn.EmbeddingBag(10, 4, **k) for k, _, _ in kinds.values())

    def forward(
        self,
        ids: Any = None,
        starts: Any = None,
        ends: Any = None,
        scores: Any = None,
        matrix: Any = None,
        grades: Any = None,
    ) -> Any:
        given = {"ids": ids, "starts": starts, "ends": ends, "scores": scores, "matrix": matrix, "grades": grades}
        return tuple(
            bag(*(given.get(name) for name in names))
            for bag, (_, names, _) in zip(self.bags, self.kinds.values(), strict=True)
        )


def _export(module: Any, path: Path, feeds: dict[str, Any], dynamic: str = "", **keywords: Any) -> Path:
    axes = {n: {0: torch.export.Dim.DYNAMIC} if n in dynamic.split() else None for n in feeds}
    torch.onnx.export(
        *(module, (), str(path)),
        kwargs=feeds,
        dynamo=True,
        input_names=list(feeds),
        dynamic_shapes=axes if dynamic else None,
        verbose=False,
        **keywords,
    )
    return path


def _eager(module: Any, feeds: dict[str, Any]) -> list[np.ndarray]:
    kept = [p.detach().clone() for p in module.parameters()]  # max_norm changes the table
    with torch.no_grad():
        found = module(**feeds)
        for parameter, before in zip(module.parameters(), kept, strict=True):
            parameter.copy_(before)
    return [f.numpy() for f in (found if isinstance(found, tuple) else (found,))]


def _check(report: Any, module: Any, feeds: dict[str, Any], labels: Any) -> None:
    found = results(report.model, {n: t.numpy() for n, t in feeds.items()}, native=False)
    for label, a, b in zip(labels, found, _eager(module, feeds), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=4e-3 if b.dtype == np.float16 else 1e-5, atol=1e-5, err_msg=label)


@pytest.mark.parametrize("dynamic", ["", "starts ends", "ids scores"])
def test_bags_of_fixed_sizes_are_bags(tmp_path: Path, dynamic: str) -> None:
    kinds = (
        {**KINDS, **MATRICES} if not dynamic else {n: KINDS[n] for n in ("mean", "padded", "last", "weighted", "norm")}
    )
    feeds = {n: t for n, t in FEEDS.items() if not dynamic or n not in ("matrix", "grades")}
    module = Bags(kinds).eval()
    report = lucid_onnx.fuse(_export(module, tmp_path / "m.onnx", feeds, dynamic, optimize=dynamic != "ids scores"))
    assert report.unfused == ()
    assert sorted(f.op for f in report.fused) == sorted(op for _, _, op in kinds.values())
    assert not {"Loop", "SequenceEmpty"} & {n.op_type for n in nodes(report.model.graph)}
    _check(report, module, feeds, kinds)
    if dynamic == "starts ends":
        other = {**feeds, "starts": torch.tensor([0, 1, 1, 4, 8]), "ends": torch.tensor([0, 0, 8])}
        _check(report, module, other, kinds)


class Held(torch.nn.Module):  # type: ignore[misc]
    """Offsets and weights that the module holds, or computes from sizes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(10, 4, mode="sum")
        self.padded = torch.nn.EmbeddingBag(10, 4, mode="mean", padding_idx=2)
        self.register_buffer("starts", FEEDS["starts"])
        self.register_buffer("scores", FEEDS["scores"])

    def forward(self, ids: Any, starts: Any, matrix: Any) -> Any:
        flat, lines = matrix.flatten(), torch.arange(matrix.shape[0]) * matrix.shape[1]
        return (
            self.bag(ids, self.starts),
            self.padded(ids, self.starts),
            self.bag(ids, starts, self.scores),
            self.padded(ids, torch.zeros(1, dtype=torch.int64)),
            self.bag(flat, lines),
            self.padded(flat, lines),
        )


def test_offsets_and_weights_may_be_held(tmp_path: Path) -> None:
    feeds = {n: FEEDS[n] for n in ("ids", "starts", "matrix")}
    module = Held().eval()
    report = lucid_onnx.fuse(_export(module, tmp_path / "m.onnx", feeds))
    assert len(report.fused) == 6
    assert report.unfused == ()
    assert sum(f.op == "EmbeddingBagWeighted" for f in report.fused) == 1
    _check(report, module, feeds, range(6))


def test_ones_may_be_many_and_external(tmp_path: Path) -> None:
    """More than are looked into as a constant, and in another file."""
    feeds = {"ids": torch.arange(70_000) % 10, "offs": torch.arange(0, 70_000, 7)}
    module = torch.nn.EmbeddingBag(10, 4, mode="mean").eval()
    named = {"input": feeds["ids"], "offsets": feeds["offs"]}
    path = _export(module, tmp_path / "m.onnx", named)
    report = lucid_onnx.fuse(path, tmp_path / "fused.onnx")
    assert [f.op for f in report.fused] == ["EmbeddingBag"]
    session = lucid_onnx.InferenceSession(tmp_path / "fused.onnx", native=False)
    found = session.run(None, {n: t.numpy() for n, t in named.items()})[0]
    np.testing.assert_allclose(found, _eager(module, named)[0], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    module = Bags({"mean": KINDS["mean"]}).eval()
    feeds = {n: FEEDS[n] for n in ("ids", "starts")}
    return onnx.load(_export(module, tmp_path_factory.mktemp("static") / "m.onnx", feeds))


@pytest.fixture(scope="module")
def summed(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    feeds = {n: FEEDS[n] for n in ("ids", "starts")}
    return onnx.load(_export(Bags({"sum": KINDS["sum"]}).eval(), tmp_path_factory.mktemp("summed") / "m.onnx", feeds))


FLAT = {n: FEEDS[n].numpy() for n in ("ids", "starts")}


@pytest.mark.parametrize("what", ["a two", "weights", "one row"])
def test_ones_that_are_not_one_for_each_row(summed: onnx.ModelProto, what: str) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(summed)
    (ones,) = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and list(t.dims) == [8, 1]]
    column = {
        "a two": np.array([[1]] * 7 + [[2]], np.float32),
        "weights": np.linspace(-1, 1, 8, dtype=np.float32)[:, None],
        "one row": np.ones((1, 1), np.float32),
    }[what]
    del model.graph.value_info[:]  # which says how many there were
    ones.CopyFrom(numpy_helper.from_array(column, ones.name))
    report = lucid_onnx.fuse(model)
    assert [n.op_type for n in bags(report.model)] == ([] if what == "one row" else ["EmbeddingBagWeighted"])
    same_as_before(model, report, FLAT)


def test_a_changed_number_of_a_fixed_size_is_seen(static: onnx.ModelProto) -> None:
    """With any one number changed, a graph stays, or is fused to a bag that gives what the changed graph gives."""
    changed = stayed = 0
    for what, model in changed_numbers(static):
        changed += 1
        report = None
        with contextlib.suppress(ValueError):  # onnx.checker rejects some, and so does fuse
            report = lucid_onnx.fuse(model)
        if report is None or not report.fused:
            stayed += 1
            continue
        expected = None  # where the changed graph does not run; onnxruntime crashes on some
        with contextlib.suppress(Exception):
            expected = ReferenceEvaluator(model).run(None, FLAT)[0]
        if expected is not None:
            np.testing.assert_allclose(results(report.model, FLAT)[0], expected, rtol=1e-5, atol=1e-6, err_msg=what)
    assert changed > 10
    assert stayed > changed // 2


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("rows", "a Loop that pools rows of 'bags.0.weight', but Relu 'changed' changes them between"),
        ("reduction", "by ReduceMin"),
    ],
)
def test_a_loop_of_no_exporter_says_why(static: onnx.ModelProto, what: str, reason: str) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(static)
    if what == "rows":
        gather = next(n for n in model.graph.node if n.op_type == "Gather")
        at = list(model.graph.node).index(gather)
        for node in nodes(model.graph):
            for k, name in enumerate(node.input):
                if name == gather.output[0]:
                    node.input[k] = "changed"
        model.graph.node.insert(at + 1, onnx.helper.make_node("Relu", [gather.output[0]], ["changed"]))
    else:
        for node in nodes(model.graph):
            if node.op_type.startswith("Reduce"):
                node.op_type = "ReduceMin"
    report = lucid_onnx.fuse(model)
    assert bags(report.model) == []
    (unfused,) = report.unfused
    assert unfused.pattern == "Loop"
    assert reason in unfused.reason
