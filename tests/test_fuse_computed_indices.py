"""Fusing bags whose indices, offsets and weights the model computes, as both of torch's exporters write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_testing.models import results, same_as_before

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

V = 64
REMAP = torch.from_numpy(np.random.default_rng(5).integers(0, V, 1000))
EDGES = torch.arange(0, 1000, 20)

#: What becomes of ids in [0, 1000).
CHANGES: dict[str, Callable[[Any], Any]] = {
    "modulo": lambda i: i % V,
    "fmod": lambda i: torch.fmod(i, V),
    "floor": lambda i: i // 20,
    "truncate": lambda i: torch.div(i, 20, rounding_mode="trunc"),
    "where": lambda i: torch.where(i < V, i, 0),
    "remap": lambda i: REMAP[i],
    "take": lambda i: torch.take(REMAP, i),
    "and": lambda i: i & 63,
    "shift": lambda i: i >> 4,
    "minimum": lambda i: torch.minimum(i, torch.tensor(V - 1)),
    "clamp": lambda i: i.clamp(0, V - 1),
    "clamp from above": lambda i: i.clamp(max=V - 1),
    "as int32": lambda i: (i % V).int(),
    "through int32": lambda i: (i.int() % V).long(),
    "hash": lambda i: (i * 7 + 3) % V,
    "masked_fill": lambda i: i.masked_fill(i >= V, 0),
    "from bool": lambda i: (i > 3).long(),
    "through float": lambda i: (i.float() / 20).floor().long(),
    "view": lambda i: (i.view(1, -1) % V).view(-1),
    "bucketize": lambda i: torch.bucketize(i, EDGES),
}


class Changed(torch.nn.Module):  # type: ignore[misc]
    """A bag for each change of the ids, all over one table."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(V, 4, **keywords)

    def forward(self, ids: Any, offsets: Any) -> Any:
        return tuple(self.bag(change(ids), offsets) for change in CHANGES.values())


def _exported(module: Any, path: Path, feed: dict[str, Any], axes: dict[str, dict[int, str]], dynamo: bool) -> Path:
    keywords: dict[str, Any] = {"dynamic_axes": axes, "opset_version": 18}
    if dynamo:
        keywords = {"dynamic_shapes": tuple(axes.values()), "verbose": False}
    torch.onnx.export(*(module, tuple(feed.values()), str(path)), dynamo=dynamo, input_names=list(feed), **keywords)
    return path


@pytest.mark.parametrize(("dynamo", "mode"), [(False, "sum"), (True, "mean")])
def test_indices_may_be_computed(tmp_path: Path, dynamo: bool, mode: str) -> None:
    module = Changed(mode=mode, padding_idx=2 if dynamo else None).eval()
    example = {"i": torch.arange(9) * 70, "o": torch.tensor([0, 2, 5])}
    axes = {"i": {0: "ids"}, "o": {0: "bags"}}
    report = lucid_onnx.fuse(_exported(module, tmp_path / "m.onnx", example, axes, dynamo))
    assert len(report.fused) == len(CHANGES)
    assert report.unfused == ()
    feed = {"i": torch.arange(17) * 61 % 1000, "o": torch.tensor([0, 3, 3, 9])}
    found = results(report.model, {name: tensor.numpy() for name, tensor in feed.items()})
    with torch.no_grad():
        expected = module(**dict(zip(("ids", "offsets"), feed.values(), strict=True)))
    for name, a, b in zip(CHANGES, found, expected, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


class Lengths(torch.nn.Module):  # type: ignore[misc]
    """A bag whose offsets and weights are computed too."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(V, 4, mode="sum")

    def forward(self, ids: Any, lengths: Any, scores: Any) -> Any:
        offsets = torch.cumsum(lengths, 0) - lengths
        return self.bag(ids % V, offsets, torch.where(scores > 0, scores * 2, 0.0))


@pytest.mark.parametrize("dynamo", [False, True])
def test_offsets_and_weights_may_be_computed(tmp_path: Path, dynamo: bool) -> None:
    module = Lengths().eval()
    example = {"i": torch.arange(9), "l": torch.tensor([2, 3, 4]), "w": torch.linspace(-1, 1, 9)}
    axes = {"i": {0: "ids"}, "l": {0: "bags"}, "w": {0: "ids"}}
    report = lucid_onnx.fuse(_exported(module, tmp_path / "m.onnx", example, axes, dynamo))
    assert [f.op for f in report.fused] == ["EmbeddingBagWeighted"]
    feed = {"i": torch.arange(17) * 61, "l": torch.tensor([3, 0, 6, 8]), "w": torch.linspace(-2, 3, 17)}
    (found,) = results(report.model, {name: tensor.numpy() for name, tensor in feed.items()})
    with torch.no_grad():
        np.testing.assert_allclose(found, module(*feed.values()).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("op", "other"),
    [("Mod", [V]), ("Add", [[[1]]]), ("Min", [[5], [6]]), ("Where", None), ("BitwiseAnd", [63]), ("GatherND", None)],
)
def test_ranks_follow_where_a_model_declares_none(op: str, other: Any) -> None:
    """A Gather and a ReduceSum over what an operator makes of ids [B, L]; an Add makes [1, B, L], pooled over B.

    They stand in a function, whose values no shape inference declares.
    """
    constants = {"axis": np.array([1]), "last": np.array([2])}
    if op == "Where":
        constants["other"] = np.array(1)
        made = [helper.make_node("Less", ["i", "other"], ["c"]), helper.make_node(op, ["c", "i", "other"], ["at"])]
    elif op == "GatherND":
        constants["other"] = np.arange(V)[::-1].copy()
        made = [helper.make_node("Unsqueeze", ["i", "last"], ["c"]), helper.make_node(op, ["other", "c"], ["at"])]
    else:
        constants["other"] = np.array(other)
        made = [helper.make_node(op, ["i", "other"], ["at"])]
    body = [
        *(helper.make_node("Constant", [], [n], value=numpy_helper.from_array(a)) for n, a in constants.items()),
        *made,
        helper.make_node("Gather", ["t", "at"], ["rows"]),
        helper.make_node("ReduceSum", ["rows", "axis"], ["y"], keepdims=0),
    ]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    graph = helper.make_graph(
        [helper.make_node("pool", ["table", "i"], ["pooled"], domain="local")],
        "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, ["B", "L"])],
        [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["B"] + (op == "Add") * ["L"] + [4])],
        [numpy_helper.from_array(np.random.default_rng(0).standard_normal((2 * V, 4)).astype(np.float32), "table")],
    )
    pool = helper.make_function("local", "pool", ["t", "i"], ["y"], body, imports[:1])
    model = helper.make_model(graph, opset_imports=imports, functions=[pool], ir_version=8)
    report = lucid_onnx.fuse(model)
    assert [f.op for f in report.fused] == ["EmbeddingBag2D"]
    feed = {"i": np.random.default_rng(1).integers(0, V, (2, 3))}
    same_as_before(model, report, feed)
