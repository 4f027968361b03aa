"""Fusing what torch.onnx.export(dynamo=False) wrote: it computes what torch does, and look-alikes stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_testing.graphs import nodes
from lucid_testing.models import first, interface, loop_body, results, same_as_before, set_attribute, ways_to_run
from lucid_testing.torch_exports import FLAT, LEGACY, Export, check_export, eager, prepared

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_exports_are_bags(legacy: Callable[[str], Export], name: str) -> None:
    check_export(legacy(name), *LEGACY[name][:2])


def test_an_export_with_fixed_sizes_is_a_bag(tmp_path: Path) -> None:
    """Without dynamic axes the exporter computes what it can, and so do we."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for name in ("sum-17", "last-mean", "matrix-mean", "matrix-weights"):
        keywords, feed, _ = LEGACY[name]
        module, arguments = prepared(keywords, feed)
        path = tmp_path / "fixed.onnx"
        torch.onnx.export(module, arguments, str(path), dynamo=False, opset_version=17, input_names=list(feed))
        report = lucid_onnx.fuse(path)
        assert [n.domain for n in report.model.graph.node if n.op_type != "Constant"] == [spec.DOMAIN], name
        expected = eager(Export(path, module, tuple(feed)), feed)
        np.testing.assert_allclose(results(report.model, feed)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_model_keeps_everything_else(tmp_path: Path) -> None:
    """Two bags over one table in a larger model: only their nodes go."""
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = torch.nn.EmbeddingBag(10, 4, mode="mean")
            self.top = torch.nn.Linear(8, 3)

        def forward(self, a: Any, s: Any, b: Any) -> Any:
            return torch.relu(self.top(torch.cat([self.bag(a + 1, s), self.bag(b)], 1))), a.max()

    module, path = Model().eval(), tmp_path / "model.onnx"
    a, s, b = torch.tensor([1, 2, 4]), torch.tensor([0, 1]), torch.tensor([[3, 3, 1], [0, 1, 2]])
    names = {"input_names": ["a", "s", "b"], "output_names": ["y", "largest"]}
    axes = {"a": {0: "n"}, "s": {0: "bags"}, "b": {0: "bags", 1: "length"}, "y": {0: "bags"}}
    for opset in (12, 17):
        torch.onnx.export(module, (a, s, b), str(path), dynamo=False, opset_version=opset, dynamic_axes=axes, **names)
        model = onnx.load(path)
        model.metadata_props.add(key="vocabulary", value="words.txt")
        model.graph.doc_string, model.producer_name = "a graph", "somebody"
        report = lucid_onnx.fuse(model)
        assert [f.op for f in report.fused] == ["EmbeddingBag", "EmbeddingBag2D"]
        assert {f.table for f in report.fused} == {"bag.weight"}
        assert interface(report.model) == interface(model)
        assert report.model.metadata_props == model.metadata_props
        assert (report.model.graph.doc_string, report.model.producer_name) == ("a graph", "somebody")
        assert {t.name for t in model.graph.initializer} == {t.name for t in report.model.graph.initializer}
        opsets = {i.domain: i.version for i in report.model.opset_import}
        assert opsets == {"": 18 if opset == 12 else opset, spec.DOMAIN: spec.VERSION}
        onnx.checker.check_model(report.model, full_check=True)
        feed = {"a": np.array([3, 1, 2, 7, 7]), "s": np.array([0, 2, 2]), "b": np.array([[1], [2], [9]])}
        with torch.no_grad():
            expected = module(*(torch.from_numpy(v) for v in feed.values()))
        for way, native in ways_to_run(report.model).values():
            for found, e in zip(results(way, feed, native=native), expected, strict=True):
                np.testing.assert_allclose(found, e.numpy(), rtol=1e-5, atol=1e-6)


def test_a_slice_of_everything_is_no_other_way_to_write_it(legacy: Callable[[str], Export]) -> None:
    """As exporters write the starts of the bags that do not take it away themselves."""
    model = onnx.load(legacy("mean-17").path)
    slices, body = first(model.graph, "Slice"), loop_body(model)
    zero = helper.make_node("Constant", [], ["zero"], value_ints=[0])
    whole = helper.make_node("Slice", [slices.input[0], "zero", *slices.input[2:]], ["starts"])
    place = list(model.graph.node).index(slices)
    model.graph.node.insert(place + 1, zero)
    model.graph.node.insert(place + 2, whole)
    starts = first(body, "Gather", 0)
    starts.input[0] = "starts"
    onnx.checker.check_model(model, full_check=True)
    report = lucid_onnx.fuse(model)
    assert [f.mode for f in report.fused] == ["mean"]
    same_as_before(model, report, FLAT)


def constant_of(model: onnx.ModelProto, name: str, value: list[int]) -> None:
    """Give the constant that is called ``name`` another value."""
    for node in nodes(model.graph):
        if name in node.output:
            set_attribute(node, "value", numpy_helper.from_array(np.array(value)))
            return
    raise AssertionError(name)


def kept_axis(model: onnx.ModelProto) -> None:
    set_attribute(first(loop_body(model), "ReduceSum"), "keepdims", 1)


def smallest(model: onnx.ModelProto) -> None:
    node = first(loop_body(model), "ReduceSum")
    node.op_type = "ReduceProd"
    del node.input[1:]
    set_attribute(node, "axes", [0])


def other_slice(model: onnx.ModelProto) -> None:
    constant_of(model, first(model.graph, "Slice").input[1], [0])


def every_other(model: onnx.ModelProto) -> None:
    constant_of(model, first(model.graph, "Slice").input[4], [2])


def one_bag_less(model: onnx.ModelProto) -> None:
    shape = first(model.graph, "Shape", 1)
    shape.attribute.append(helper.make_attribute("start", 0))
    loop = first(model.graph, "Loop")
    minus = helper.make_node("Sub", [loop.input[0], "one"], ["fewer"])
    one = helper.make_node("Constant", [], ["one"], value_int=1)
    loop.input[0] = "fewer"
    model.graph.node.insert(len(model.graph.node) - 1, one)
    model.graph.node.insert(len(model.graph.node) - 1, minus)


def negated(model: onnx.ModelProto) -> None:
    body = loop_body(model)
    gather = first(body, "Gather", 2)
    body.node.append(helper.make_node("Neg", [gather.output[0]], ["negated"]))
    reduce = first(body, "ReduceSum")
    reduce.input[0] = "negated"
    body.node.append(reduce)
    body.node.remove(reduce)


def ends_early(model: onnx.ModelProto) -> None:
    """The loop's condition becomes false after the first bag."""
    body = loop_body(model)
    body.node.append(helper.make_node("Not", [body.output[0].name], ["stop"]))
    body.output[0].name = "stop"


LEGACY_LOOK_ALIKES: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "keepdims": (kept_axis, "keepdims=1"),
    "other reduction": (smallest, "by ReduceProd("),
    "other slice": (other_slice, "where such a bag has Slice"),
    "every other": (every_other, "Slice"),
    "one bag less": (one_bag_less, "Sub 'fewer' where such a bag has Gather"),
    "negated": (negated, "but Neg 'negated' changes them between the Gather and the ReduceSum"),
    "ends early": (ends_early, "the constant"),
}


@pytest.mark.parametrize("name", LEGACY_LOOK_ALIKES)
def test_look_alikes_of_legacy_exports_stay(legacy: Callable[[str], Export], name: str) -> None:
    change, why = LEGACY_LOOK_ALIKES[name]
    model = onnx.load(legacy("sum-17").path)
    assert len(lucid_onnx.fuse(model).fused) == 1
    change(model)
    assert model.SerializeToString() != onnx.load(legacy("sum-17").path).SerializeToString()
    report = lucid_onnx.fuse(model)
    assert report.fused == ()
    assert report.model == model
    assert [u.where for u in report.unfused] == (["node '/bag/Loop' (Loop)"] if why else [])
    assert all(why in u.reason for u in report.unfused), report.unfused


def test_what_a_bag_does_not_take_stays(legacy: Callable[[str], Export]) -> None:
    """Indices of an unknown number of dimensions; a table of integers."""
    model = onnx.load(legacy("sum-17").path)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    (unfused,) = lucid_onnx.fuse(model).unfused
    assert unfused.reason == "the indices have an unknown number of dimensions, expected one"
    model = onnx.load(legacy("sum-17").path)
    table = numpy_helper.to_array(model.graph.initializer[0]).astype(np.int32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, model.graph.initializer[0].name))
    (unfused,) = lucid_onnx.fuse(model).unfused
    assert unfused.reason == "the table has type int32, expected float32, float16, bfloat16 or float64"
