"""Fusing bags that are written out one after another, as torch's oldest exports are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_testing.models import D, Small, V, results, same_as_before
from lucid_testing.torch_exports import ENDS, FACTORS, INDICES, STARTS, Export, eager, prepared

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def unrolled(
    bounds: Any = "o",
    *,
    op: str = "ReduceSum",
    bags: int = 3,
    weighted: bool = False,
    keepdims: int = 0,
    sizes: tuple[Any, Any] = (8, 3),
    end: int | None = 2**63 - 1,
    change: Callable[[int, list[str]], None] | None = None,
) -> onnx.ModelProto:
    """Bags over a table [10, 4], each of nodes of its own; ``bounds``: numbers, or those of the input ``o``."""
    g = Small(shape=sizes[:1], opset=17)
    g.inputs["o"] = (TensorProto.INT64, sizes[1:])
    if weighted:
        g.inputs["w"] = (TensorProto.FLOAT, sizes[:1])
    if bounds == "o" and end is not None:
        bounds = g("Concat", "o", np.array([end]), axis=0)
    elif bounds == "o":
        bounds = g("Identity", "o")
    parts = []
    for k in range(bags):
        if isinstance(bounds, str):
            at = [g("Unsqueeze", g("Gather", bounds, np.array(i)), np.array([0])) for i in (k, k + 1)]
        else:
            at = [np.array([n]) for n in bounds[k]]
        operands = ["table", "i"]
        if change is not None:
            change(k, operands)
        rows = g("Gather", operands[0], g("Slice", operands[1], *at, np.array([0])))
        if weighted:
            rows = g("Mul", rows, g("Unsqueeze", g("Slice", "w", *at, np.array([0])), np.array([1])))
        reduced = g.reduced(rows, op, 0, keepdims)
        parts.append(reduced if keepdims else g("Unsqueeze", reduced, np.array([0])))
    model = g.model(g("Concat", *parts, axis=0))
    if not isinstance(bounds, str):
        del model.graph.input[1]
    return model


UNROLLED: dict[str, tuple[dict[str, Any], bool]] = {
    **{op: ({"op": op}, False) for op in ("ReduceSum", "ReduceMean", "ReduceMax")},
    "weights": ({"weighted": True}, False),
    "kept axes": ({"keepdims": 1}, False),
    "with their end": ({"end": None, "bags": 2}, True),
    "numbers": ({"bounds": [(0, 3), (3, 5), (5, 8)], "op": "ReduceMean"}, True),
    "numbers that leave some": ({"bounds": [(0, 3), (3, 3)], "bags": 2}, True),
}


@pytest.mark.parametrize("name", UNROLLED)
def test_bags_that_are_written_out_are_one(name: str) -> None:
    arguments, last = UNROLLED[name]
    model = unrolled(**arguments)
    report = lucid_onnx.fuse(model)
    (fused,) = report.fused
    op = spec.variant(two_d=False, weighted="weighted" in arguments).name
    assert (fused.op, fused.pattern, fused.include_last_offset) == (op, "unrolled bags", last)
    assert report.unfused == ()
    assert [n.op_type for n in report.model.graph.node if n.op_type != "Constant"] == [op]
    feed = {"i": INDICES, "o": STARTS, "w": FACTORS}
    names = {v.name for v in model.graph.input}
    same_as_before(model, report, {n: a for n, a in feed.items() if n in names})
    if arguments.get("op", "ReduceSum") == "ReduceSum" and "o" in names:  # empty ones too
        same_as_before(model, report, {n: feed[n] if n != "o" else np.array([0, 0, 8]) for n in names})


def test_what_only_looks_like_bags_one_after_another_stays() -> None:
    def another_table(k: int, operands: list[str]) -> None:
        if k == 1:
            operands[0] = "other"

    other = unrolled(change=another_table)
    other.graph.initializer.append(numpy_helper.from_array(np.ones((V, D), np.float32), "other"))
    order = unrolled()
    order.graph.node[-1].input[:] = reversed(order.graph.node[-1].input)
    mixed = unrolled()
    node = [n for n in mixed.graph.node if n.op_type == "ReduceSum"][1]
    node.op_type = "ReduceMean"
    del node.input[1:]
    node.attribute.append(helper.make_attribute("axes", [0]))
    stay = {
        "it has the constant [[1., 1., 1., 1.]": other,
        "where such a bag has": order,
        "it has ReduceMean": mixed,
        "it has 3 bags, which takes 3 offsets, and their number is 'bags'": unrolled(sizes=(8, "bags")),
        "it has 2 bags, which takes 2 offsets, and their number is 3": unrolled(bags=2),
        "its first bag begins at 1, not at 0": unrolled([(1, 3), (3, 5), (5, 8)]),
        "bag 0 ends at 3, and bag 1 begins at 4": unrolled([(0, 3), (4, 5), (5, 8)]),
        "bag 1 goes from 3 to 3, and its mean is not a row of zeros": unrolled(
            [(0, 3), (3, 3), (3, 8)], op="ReduceMean"
        ),
        "its bags end at 9, and the number of indices is 8": unrolled([(0, 3), (3, 5), (5, 9)]),
        "its bags end at 8, and the number of indices is 'n'": unrolled([(0, 3), (3, 5), (5, 8)], sizes=("n", 3)),
    }
    for why, model in stay.items():
        report = lucid_onnx.fuse(model)
        assert (report.fused, report.model) == ((), model), why
        assert [u.pattern for u in report.unfused] == ["unrolled bags"], why
        assert why in report.unfused[0].reason, report.unfused


@pytest.mark.parametrize("name", ["sum", "mean", "weights", "last"])
def test_torchs_oldest_exports_are_bags(name: str, tmp_path: Path) -> None:
    """At opset 10 torch writes out as many bags as there were offsets; the model is raised to an opset of bags."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    keywords: dict[str, Any] = {"mode": "mean" if name == "mean" else "sum", "include_last_offset": name == "last"}
    feed = {"i": INDICES, "o": ENDS if name == "last" else STARTS, **({"w": FACTORS} if name == "weights" else {})}
    module, arguments = prepared(keywords, feed)
    path = tmp_path / "old.onnx"
    axes = {n: {0: "n"} for n in feed if n != "o"}
    torch.onnx.export(
        module, arguments, str(path), dynamo=False, opset_version=10, input_names=list(feed), dynamic_axes=axes
    )
    report = lucid_onnx.fuse(path)
    assert [f.pattern for f in report.fused] == ["unrolled bags"]
    assert [n.op_type for n in report.model.graph.node] == [report.fused[0].op]
    export = Export(path, module, tuple(feed))
    calls = [feed, {**feed, "o": np.array([0, 0, 8, 8])[: len(feed["o"])]}]
    for call in calls:
        np.testing.assert_allclose(results(report.model, call)[0], eager(export, call), rtol=1e-5, atol=1e-6)
