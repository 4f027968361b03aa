"""Names of axes that exporters were told wrongly: what ragged bags read gets names of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_testing.models import results

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

ROWS = (20, 30, 40)
FORMS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "portable": lambda m: lucid_onnx.to_form(m, "portable"),
    "standard": lambda m: lucid_onnx.to_form(m, "standard"),
    "native": lambda m: lucid_onnx.to_form(m, "native"),
    "lowered": lucid_onnx.lower,
    "padded": lambda m: lucid_onnx.lower(m, ragged="padded", longest_bag=400),
}


def _axes(model: onnx.ModelProto) -> dict[str, list[Any]]:
    return {
        v.name: [
            d.dim_param or (d.dim_value if d.HasField("dim_value") else None) for d in v.type.tensor_type.shape.dim
        ]
        for v in (*model.graph.input, *model.graph.output)
    }


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[Path, Any]]:
    """A model as facebookresearch/dlrm writes it with --save-onnx: every axis that may vary is "batch_size"."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    folder = tmp_path_factory.mktemp("dlrm")

    class Dlrm(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.bags = torch.nn.ModuleList(torch.nn.EmbeddingBag(n, 8, mode="sum") for n in ROWS)
            self.bottom, self.top = torch.nn.Linear(5, 8), torch.nn.Linear(8 * 4, 1)

        def forward(self, dense: Any, offsets: Any, indices: Any) -> Any:
            pooled = [bag(indices[k], offsets[k]) for k, bag in enumerate(self.bags)]
            return torch.sigmoid(self.top(torch.cat([torch.relu(self.bottom(dense)), *pooled], 1)))

    def export(stacked: bool) -> tuple[Path, Any]:
        torch.manual_seed(0)
        module, path = Dlrm().eval(), folder / f"{stacked}.onnx"
        offsets, indices = [torch.tensor([0, 2, 4, 7])] * 3, [torch.arange(9)] * 3
        given = (torch.stack(offsets), torch.stack(indices)) if stacked else (offsets, indices)
        numbers = [""] if stacked else [f"_{k}" for k in range(3)]
        names = ["dense_x", *(f"{stem}{n}" for stem in ("offsets", "indices") for n in numbers)]
        axes = {n: {1 if stacked and n != "dense_x" else 0: "batch_size"} for n in names}
        if not path.exists():
            torch.onnx.export(
                *(module, (torch.randn(4, 5), *given), str(path)),
                dynamo=False,
                opset_version=17,
                input_names=names,
                output_names=["pred"],
                dynamic_axes={**axes, "pred": {0: "batch_size"}},
            )
        return path, module

    return export


@pytest.mark.parametrize("stacked", [False, True])
def test_a_dlrm_runs_in_every_form(exports: Callable[[bool], tuple[Path, Any]], stacked: bool) -> None:
    import torch

    path, module = exports(stacked)
    report = lucid_onnx.fuse(path)
    assert len(report.fused) == 3
    indices = ["num_indices"] if stacked else [f"num_indices_{k}" for k in range(3)]
    for name, form in FORMS.items():
        axes = _axes(form(report.model))
        assert axes["dense_x"] == ["batch_size", 5]
        assert axes["pred"] == ["batch_size", 1]
        assert [axes[n][-1] for n in axes if n.startswith("offsets")] == ["batch_size"] * len(indices)
        assert [axes[n][-1] for n in axes if n.startswith("indices")] == indices, name
    rng = np.random.default_rng(0)
    models = {**{n: f(report.model) for n, f in FORMS.items() if n != "native"}}
    sessions = {n: lucid_onnx.InferenceSession(m, native=False) for n, m in models.items()}
    sessions["merged"] = lucid_onnx.InferenceSession(lucid_onnx.fuse(path, merge_tables=True).model, native=False)
    for bags, count in ((4, 9), (7, 50), (3, 3), (7, 50), (20, 5)):
        lengths = [count] * 3 if stacked else [count, count + 60, max(count - 40, 1)]
        starts = [np.sort(np.r_[0, rng.integers(0, n + 1, bags - 1)]) for n in lengths]
        ids = [rng.integers(0, 20, n) for n in lengths]
        dense = rng.standard_normal((bags, 5)).astype(np.float32)
        feed = {f"offsets_{k}": s for k, s in enumerate(starts)} | {f"indices_{k}": i for k, i in enumerate(ids)}
        if stacked:
            feed = {"offsets": np.stack(starts), "indices": np.stack(ids)}
        with torch.no_grad():
            expected = module(torch.from_numpy(dense), *([torch.from_numpy(a) for a in x] for x in (starts, ids)))
        for name, session in sessions.items():
            (found,) = session.run(None, {"dense_x": dense, **feed})
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


TABLE = np.random.default_rng(1).standard_normal((10, 4)).astype(np.float32)


def _model(nodes: list[onnx.NodeProto], axes: dict[str, list[Any]], **extra: Any) -> onnx.ModelProto:
    """A model over a table; what begins with "w" is float."""
    infos = {
        n: helper.make_tensor_value_info(n, TensorProto.FLOAT if n[0] in "wx" else TensorProto.INT64, dims)
        for n, dims in axes.items()
    }
    graph = helper.make_graph(
        nodes,
        "g",
        list(infos.values()),
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, None]) for n in nodes[-1].output],
        [numpy_helper.from_array(TABLE, "table"), numpy_helper.from_array(np.array(7), "seven")],
        **extra,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_weights_keep_the_name_of_their_indices() -> None:
    bag = lucid_onnx.make_node("table", "i", "o", "y", per_sample_weights="w", mode="sum")
    model = _model([bag], {"i": ["n"], "o": ["n"], "w": ["n"]})
    assert _axes(lucid_onnx.to_form(model, "portable"))["i"] == ["num_i"]
    assert _axes(lucid_onnx.to_form(model, "portable"))["w"] == ["num_i"]
    assert _axes(model)["i"] == ["n"]


def test_true_names_stay() -> None:
    bag = lucid_onnx.make_node("table", "i", "o", "y", per_sample_weights="w", mode="sum")
    axes: dict[str, list[Any]] = {"i": ["words"], "o": ["bags"], "w": ["words"]}
    found = _axes(lucid_onnx.to_form(_model([bag], axes), "standard"))
    assert {n: found[n] for n in axes} == axes
    rows = lucid_onnx.make_node("table", "i", output="y", mode="sum")
    axes = {"i": ["b", "b"]}  # nothing that is ragged
    assert _axes(lucid_onnx.to_form(_model([rows], axes), "standard"))["i"] == ["b", "b"]
    fixed = _model([bag], {"i": [4], "o": [4], "w": [4]})
    assert _axes(lucid_onnx.to_form(fixed, "standard"))["i"] == [4]


def test_indices_that_two_bags_read_have_one_name() -> None:
    nodes = [lucid_onnx.make_node("table", "i", f"o{k}", f"y{k}", mode="sum") for k in range(2)]
    nodes.append(helper.make_node("Concat", ["y0", "y1"], ["y"], axis=1))
    model = _model(nodes, {"i": ["b"], "o0": ["b"], "o1": ["b"]})
    assert _axes(lucid_onnx.to_form(model, "portable"))["i"] == ["num_i"]


def test_computed_indices_are_followed_to_the_inputs() -> None:
    """Through arithmetic, and with another name where num_i is taken; what was declared on the way is forgotten."""
    nodes = [
        helper.make_node("Mod", ["i", "seven"], ["m"]),
        lucid_onnx.make_node("table", "m", "o", "y", mode="sum"),
    ]
    declared = [helper.make_tensor_value_info("m", TensorProto.INT64, ["b"])]
    model = _model(nodes, {"i": ["b"], "o": ["b"], "x": ["num_i", "b"]}, value_info=declared)
    found = lucid_onnx.to_form(model, "portable")
    assert _axes(found)["i"] == ["num_i_1"]
    assert _axes(found)["x"] == ["num_i", "b"]
    assert "m" not in [v.name for v in found.graph.value_info]
    feed = {"i": np.arange(20), "o": np.array([0, 3, 3]), "x": np.zeros((2, 3), np.float32)}
    expected = lucid_onnx.reference.embedding_bag(feed["i"] % 7, TABLE, feed["o"], mode="sum")
    np.testing.assert_allclose(results(found, feed, native=False)[0], expected, rtol=1e-5, atol=1e-5)


def test_every_operator_of_ragged_bags() -> None:
    """Collections, quantized tables, gradients."""
    quantized = lucid_onnx.quantize(lucid_onnx.build_model(TABLE, mode="sum"), min_bytes=0).model
    for model in (
        quantized,
        lucid_onnx.build_grad_model(TABLE),
        lucid_onnx.build_collection_model([TABLE, TABLE], mode="sum"),
        lucid_onnx.build_collection_model([TABLE, TABLE], mode="sum", layout="packed", include_last_offset=True),
    ):
        for value in model.graph.input:
            if value.name.startswith(("indices", "offsets")):
                value.type.tensor_type.shape.dim[0].dim_param = "b"
        axes = _axes(lucid_onnx.to_form(model, "portable"))
        for name in axes:
            if name.startswith("indices"):
                assert axes[name] == [f"num_{name}"]
            elif name.startswith("offsets"):
                assert axes[name] == ["b"]
