"""Fusing ATen nodes of older exports."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_testing.models import results, set_attribute, ways_to_run

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def aten_model(domain: str, extra: list[np.ndarray | str], outputs: int = 4, **attributes: Any) -> onnx.ModelProto:
    names, initializers = ["table", "i", "o"], {"table": np.arange(40, dtype=np.float32).reshape(10, 4)}
    for k, given in enumerate(extra):
        names.append(given if isinstance(given, str) else f"c{k}")
        if not isinstance(given, str):
            initializers[f"c{k}"] = given
    node = helper.make_node(
        "ATen", names, ["y", "b", "c", "d"][:outputs], domain=domain, operator="embedding_bag", **attributes
    )
    graph = helper.make_graph(
        [node],
        "aten",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("o", TensorProto.INT64, ["b"]),
            *([helper.make_tensor_value_info("w", TensorProto.FLOAT, ["n"])] if "w" in names else []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 4])],
        [numpy_helper.from_array(a, n) for n, a in initializers.items()],
    )
    imports = [helper.make_opsetid("", 14), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


@pytest.mark.parametrize("domain", ["org.pytorch.aten", "aten"])
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("as_inputs", [False, True])
def test_aten_nodes_are_bags(domain: str, mode: int, as_inputs: bool) -> None:
    settings = {"scale_grad_by_freq": 0, "mode": mode, "sparse": 0, "include_last_offset": 1, "padding_idx": 2}
    if as_inputs:
        values = [np.array(False), np.array(mode), np.array(False), "", np.array(True), np.array(2)]
        model = aten_model(domain, values)
    else:
        model = aten_model(domain, [], **settings)
    report = lucid_onnx.fuse(model)
    (fused,) = report.fused
    assert (fused.mode, fused.padding_idx, fused.include_last_offset) == (spec.ATEN_MODES[mode], 2, True)
    assert {i.domain for i in report.model.opset_import} >= {"", spec.DOMAIN}
    feed = {"i": np.array([1, 2, 4, 2, 9]), "o": np.array([0, 3, 3, 5])}
    expected = lucid_onnx.reference.embedding_bag(
        feed["i"],
        np.arange(40, dtype=np.float32).reshape(10, 4),
        feed["o"],
        mode=spec.ATEN_MODES[mode],
        padding_idx=2,
        include_last_offset=True,
    )
    for way, native in ways_to_run(report.model).values():
        np.testing.assert_allclose(results(way, feed, native=native)[0], expected, rtol=1e-6)


def test_aten_weights_and_no_padding() -> None:
    values = [np.array(False), np.array(0), np.array(False), "w", np.array(False), np.array(-1)]
    report = lucid_onnx.fuse(aten_model("org.pytorch.aten", values, outputs=1))
    (fused,) = report.fused
    assert (fused.op, fused.padding_idx, fused.include_last_offset) == ("EmbeddingBagWeighted", None, False)


def test_aten_nodes_that_are_no_bags_stay() -> None:
    used = aten_model("aten", [])
    used.graph.output.append(helper.make_tensor_value_info("b", TensorProto.INT64, None))
    other = aten_model("aten", [])
    set_attribute(other.graph.node[0], "operator", "embedding")
    mode = aten_model("aten", [np.array(False), "w", np.array(False)])
    reasons = [
        (used, "its output 'b' is used"),
        (other, None),
        (mode, "its mode is not constant"),
        (aten_model("aten", [], mode=3), "its mode is 3, expected 0 (sum), 1 (mean) or 2 (max)"),
        (aten_model("aten", [], padding_idx=-2), "its padding_idx is -2"),
        (aten_model("aten", [], padding_idx=10), "padding_idx = 10 is outside [-10, 10)"),
        (aten_model("aten", [], mode=1.5), "its mode is 1.5, expected an integer"),
    ]
    for model, why in reasons:
        report = lucid_onnx.fuse(model)
        assert report.fused == ()
        assert report.model == model
        assert [why in u.reason for u in report.unfused] == ([] if why is None else [True]), report.unfused
