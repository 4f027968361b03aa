"""Fusing what torch.onnx.export(dynamo=True) wrote: it computes what torch does, and look-alikes stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import lucid_onnx
from lucid_testing.graphs import nodes
from lucid_testing.kernels import library_path
from lucid_testing.models import bags, first, loop_body, results, same_as_before, ways_to_run
from lucid_testing.torch_exports import DYNAMO, FLAT, Export, check_export, variations

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.mark.parametrize("name", DYNAMO)
def test_dynamo_exports_are_bags(dynamo: Callable[[str], Export], name: str) -> None:
    check_export(dynamo(name), *DYNAMO[name][:2])


@pytest.mark.parametrize("name", ["last-sum", "last-mean", "last-max-padded"])
def test_the_last_offset_ends_the_last_bag(dynamo: Callable[[str], Export], name: str) -> None:
    """Indices behind it belong to no bag. The export, and torch itself, take some of them for the last bag's."""
    keywords = DYNAMO[name][0]
    report = lucid_onnx.fuse(dynamo(name).path)
    feed = {"i": np.array([1, 2, 4, 5, 4, 3, 2, 9]), "o": np.array([0, 3, 5])}
    table = dynamo(name).module.bag.weight.detach().numpy()
    expected = lucid_onnx.reference.embedding_bag(feed["i"], table, feed["o"], **keywords)
    for way, native in ways_to_run(report.model).values():
        np.testing.assert_allclose(results(way, feed, native=native)[0], expected, rtol=1e-5, atol=1e-6)


def test_look_alikes_of_dynamo_exports_stay(dynamo: Callable[[str], Export]) -> None:
    def ones_for_empty(model: onnx.ModelProto) -> None:
        then = next(
            a.g
            for n in loop_body(model).node
            if n.op_type == "If"
            for a in n.attribute
            if a.name == "then_branch" and len(a.g.initializer)
        )
        then.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((1, 4), np.float32), then.initializer[0].name))

    def another_end(model: onnx.ModelProto) -> None:
        first(loop_body(model), "Slice", 1).input[1] = first(loop_body(model), "Slice", 0).input[1]

    for change, why in ((ones_for_empty, "[[1., 1., 1., 1.]]"), (another_end, "slice_index")):
        model = onnx.load(dynamo("sum").path)
        change(model)
        report = lucid_onnx.fuse(model)
        assert bags(report.model) == [], change.__name__
        assert len(report.unfused) == 1
        assert why in report.unfused[0].reason


def test_padded_exports_of_older_releases_are_bags(dynamo: Callable[[str], Export]) -> None:
    """Before 2.13 torch compared an index with padding_idx as it is, and 2.6 wrote an axis as a number."""
    export = dynamo("sum-padded")
    model = onnx.load(export.path)
    constants = {n.output[0]: n.attribute[0].t for n in nodes(model.graph) if n.op_type == "Constant"}
    constants |= {t.name: t for t in model.graph.initializer}
    axes = [n.input[1] for n in nodes(model.graph) if n.op_type == "Unsqueeze"]
    assert axes
    for name in set(axes):
        assert list(constants[name].dims) == [1]
        del constants[name].dims[:]
    (keeps,) = [n for n in nodes(model.graph) if n.op_type == "Equal" and _maker(model, n.input[0]).op_type == "If"]
    branch = next(a.g for a in _maker(model, keeps.input[0]).attribute if a.name == "else_branch")
    (made,) = branch.node  # an Identity of the index
    assert made.op_type == "Identity"
    keeps.input[0] = made.input[0]
    report = lucid_onnx.fuse(model)
    assert [(f.pattern, f.padding_idx) for f in report.fused] == [("torch dynamo export", 2)]
    assert report.unfused == ()
    before = lucid_onnx.InferenceSession(model, native=False)
    after = lucid_onnx.InferenceSession(report.model, native=library_path() is not None)
    for call in variations(FLAT, {}):
        np.testing.assert_allclose(after.run(None, call)[0], before.run(None, call)[0], rtol=1e-5, atol=1e-5)


def _maker(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next((n for n in nodes(model.graph) if name in n.output), onnx.NodeProto())


def test_weights_that_are_not_one_are_weights(dynamo: Callable[[str], Export]) -> None:
    """The exporter writes weights of one where there are none."""
    model = onnx.load(dynamo("sum").path)
    ones = next(t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and list(t.dims) == [1])
    ones.CopyFrom(numpy_helper.from_array(np.array([2], np.float32), ones.name))
    report = lucid_onnx.fuse(model)
    assert [f.op for f in report.fused] == ["EmbeddingBagWeighted"]
    same_as_before(model, report, FLAT)
