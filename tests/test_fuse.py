"""Fusing and lowering: what torch exported computes what torch computes, and what only looks like a bag stays."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import lucid_onnx
from lucid_onnx import cli
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops.embedding_bag import cases as named
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.quantized_embedding_bag import cases as quantized

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from lucid_onnx.rewrite import picture  # needs onnx-ir

LOOPS = {"Loop", "Scan", "SequenceInsert", "SequenceEmpty", "ConcatFromSequence"}


def nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Every node of the graph and its subgraphs."""

    def within(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
        for node in graph.node:
            yield node
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    yield from within(attribute.g)

    return list(within(model.graph))


def bags(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in nodes(model) if n.domain == spec.DOMAIN]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def results(model: onnx.ModelProto, feed: dict[str, np.ndarray], **kwargs: Any) -> list[np.ndarray]:
    return lucid_onnx.InferenceSession(model, **kwargs).run(None, feed)


def has_library() -> bool:
    try:
        lucid_onnx.get_library_path()
    except FileNotFoundError:
        return False
    return True


def expressions_of(model: onnx.ModelProto) -> dict[str, tuple[onnx.ModelProto, bool]]:
    """The ways to run a portable model: without the library, in standard form, and with the library."""
    ways = {"portable": (model, False), "standard": (lucid_onnx.lower(model), False)}
    return {**ways, "native": (model, True)} if has_library() else ways


def interface(model: onnx.ModelProto) -> tuple[list[bytes], list[bytes]]:
    """Inputs and outputs with their types and dimensions."""
    graph = model.graph
    return [v.SerializeToString() for v in graph.input], [v.SerializeToString() for v in graph.output]


# ---- What torch exports.


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
    **{f"{mode}-{opset}": ({"mode": mode}, FLAT, opset) for mode in spec.MODES for opset in (11, 13, 16, 17, 18)},
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
    **{mode: ({"mode": mode}, FLAT, True) for mode in spec.MODES},
    **{f"{mode}-plain": ({"mode": mode}, FLAT, False) for mode in spec.MODES},
    **{f"{mode}-padded": ({"mode": mode, "padding_idx": 2}, FLAT, True) for mode in spec.MODES},
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


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Export]:
    """An export by torch.onnx.export(dynamo=False), made when first asked for."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    folder, made = tmp_path_factory.mktemp("legacy"), {}

    def get(name: str) -> Export:
        if name not in made:
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
            made[name] = Export(path, module, tuple(feed))
        return made[name]

    return get


@pytest.fixture(scope="module")
def dynamo(tmp_path_factory: pytest.TempPathFactory, translations: None) -> Callable[[str], Export]:
    """An export by torch.onnx.export(dynamo=True), made when first asked for."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    folder, made = tmp_path_factory.mktemp("dynamo"), {}

    def get(name: str) -> Export:
        if name not in made:
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
            made[name] = Export(path, module, tuple(feed))
        return made[name]

    return get


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
    import torch

    arguments = [torch.from_numpy(call[n]) if n in call else None for n in ("i", "o", "w")]
    module = export.module
    kept = module.bag.weight.detach().clone()  # max_norm changes the table
    with torch.no_grad():
        result = module(*arguments).numpy()
        module.bag.weight.copy_(kept)
    return np.asarray(result)


def check_export(export: Export, keywords: dict[str, Any], feed: dict[str, np.ndarray]) -> None:
    """The export fuses to one bag, which is what torch is, on every size and in every form."""
    before = export.path.read_bytes()
    fused = export.path.with_suffix(".fused.onnx")
    report = lucid_onnx.fuse(export.path, fused)
    original = onnx.load(export.path)
    assert LOOPS & {n.op_type for n in nodes(original)}
    assert report.unfused == ()
    assert len(report.fused) == 1
    (bag,) = bags(report.model)
    two_d, weighted = feed["i"].ndim == 2, "w" in feed
    assert bag.op_type == spec.variant(two_d=two_d, weighted=weighted).name == report.fused[0].op
    assert not LOOPS & {n.op_type for n in nodes(report.model)}
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
    ways = expressions_of(onnx.load(fused))
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


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_exports_are_bags(legacy: Callable[[str], Export], name: str) -> None:
    check_export(legacy(name), *LEGACY[name][:2])


@pytest.mark.parametrize("name", DYNAMO)
def test_dynamo_exports_are_bags(dynamo: Callable[[str], Export], name: str) -> None:
    check_export(dynamo(name), *DYNAMO[name][:2])


@pytest.mark.parametrize("exporter", ["legacy", "dynamo"])
@pytest.mark.parametrize("name", ["sum", "mean", "max"])
def test_the_original_gives_the_same_where_it_gives_torchs(
    request: pytest.FixtureRequest, exporter: str, name: str
) -> None:
    """On the sizes that it was exported with; the Loop of a legacy export fails or gives NaN on empty bags."""
    export = request.getfixturevalue(exporter)(name if exporter == "dynamo" else f"{name}-17")
    expected = results(onnx.load(export.path), FLAT, native=False)[0]
    np.testing.assert_allclose(results(lucid_onnx.fuse(export.path).model, FLAT)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["last-sum", "last-mean", "last-max-padded"])
def test_the_last_offset_ends_the_last_bag(dynamo: Callable[[str], Export], name: str) -> None:
    """Indices behind it belong to no bag. The export, and torch itself, take some of them for the last bag's."""
    keywords = DYNAMO[name][0]
    report = lucid_onnx.fuse(dynamo(name).path)
    feed = {"i": np.array([1, 2, 4, 5, 4, 3, 2, 9]), "o": np.array([0, 3, 5])}
    table = dynamo(name).module.bag.weight.detach().numpy()
    expected = lucid_onnx.reference.embedding_bag(feed["i"], table, feed["o"], **keywords)
    for way, native in expressions_of(report.model).values():
        np.testing.assert_allclose(results(way, feed, native=native)[0], expected, rtol=1e-5, atol=1e-6)


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
        for way, native in expressions_of(report.model).values():
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


# ---- What only looks like a torch export.


def loop_body(model: onnx.ModelProto) -> onnx.GraphProto:
    return next(a.g for n in model.graph.node if n.op_type == "Loop" for a in n.attribute if a.name == "body")


def first(graph: onnx.GraphProto, op_type: str, index: int = 0) -> onnx.NodeProto:
    return [n for n in graph.node if n.op_type == op_type][index]


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def constant_of(model: onnx.ModelProto, name: str, value: list[int]) -> None:
    """Give the constant that is called ``name`` another value."""
    for node in nodes(model):
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
    "other reduction": (smallest, ""),
    "other slice": (other_slice, "where such a bag has Slice"),
    "every other": (every_other, "Slice"),
    "one bag less": (one_bag_less, "Sub 'fewer' where such a bag has Gather"),
    "negated": (negated, "a Loop that gathers rows and reduces them"),
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


def changed_numbers(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The model once for each integer constant and integer attribute in it, with that one changed."""

    def tensors(found: onnx.ModelProto) -> list[onnx.TensorProto]:
        constants = [a.t for n in nodes(found) for a in n.attribute if a.HasField("t")]
        return [
            t for t in (*found.graph.initializer, *constants) if t.data_type in (TensorProto.INT64, TensorProto.BOOL)
        ]

    def numbers(found: onnx.ModelProto) -> list[onnx.AttributeProto]:
        kinds = (onnx.AttributeProto.INT, onnx.AttributeProto.INTS)
        return [a for n in nodes(found) for a in n.attribute if a.type in kinds and (a.ints or a.HasField("i"))]

    for k, tensor in enumerate(tensors(model)):
        value = numpy_helper.to_array(tensor)
        for other in (~value,) if value.dtype == np.bool_ else (value + 1, value - 1):
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            tensors(copy)[k].CopyFrom(numpy_helper.from_array(np.asarray(other), tensor.name))
            yield f"tensor {k}: {value} to {other}", copy
    for k in range(len(numbers(model))):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        attribute = numbers(copy)[k]
        if attribute.type == onnx.AttributeProto.INT:
            attribute.i += 1
        else:
            attribute.ints[0] += 1
        yield f"attribute {k}: {attribute.name}", copy


@pytest.mark.parametrize(
    ("exporter", "name"),
    [
        *(("legacy", n) for n in ("sum-11", "mean-17", "weights-17", "last-sum")),
        *(("dynamo", n) for n in ("sum", "mean-plain", "weights-padded", "matrix-mean", "norm")),
    ],
)
def test_a_changed_number_is_seen(request: pytest.FixtureRequest, exporter: str, name: str) -> None:
    """With any one number changed a graph is no bag, or is one that gives the same as the changed graph.

    Both know indices behind the last offset, where it is said to end the last bag: what they do with them is theirs.
    """
    export = request.getfixturevalue(exporter)(name)
    feed = (LEGACY if exporter == "legacy" else DYNAMO)[name][1]
    changed = fused = 0
    for what, model in changed_numbers(onnx.load(export.path)):
        changed += 1
        report = None
        with contextlib.suppress(ValueError):  # onnx.checker refuses some, and so do we
            report = lucid_onnx.fuse(model)
        if report is None or not report.fused:
            continue
        fused += 1
        if report.fused[0].include_last_offset and name == "mean-plain":
            continue
        expected = None  # where the changed graph does not run; onnxruntime crashes on some
        with contextlib.suppress(Exception):
            expected = ReferenceEvaluator(model).run(None, feed)[0]
        if expected is not None:
            found = results(report.model, feed, native=False)[0]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=what)
    assert changed >= 15
    assert fused < changed / 2


def test_padded_exports_of_older_releases_are_bags(dynamo: Callable[[str], Export]) -> None:
    """Before 2.13 torch compared an index with padding_idx as it is, and 2.6 wrote an axis as a number."""
    export = dynamo("sum-padded")
    model = onnx.load(export.path)
    constants = {n.output[0]: n.attribute[0].t for n in nodes(model) if n.op_type == "Constant"}
    constants |= {t.name: t for t in model.graph.initializer}
    axes = [n.input[1] for n in nodes(model) if n.op_type == "Unsqueeze"]
    assert axes
    for name in set(axes):
        assert list(constants[name].dims) == [1]
        del constants[name].dims[:]
    (keeps,) = [n for n in nodes(model) if n.op_type == "Equal" and _maker(model, n.input[0]).op_type == "If"]
    branch = next(a.g for a in _maker(model, keeps.input[0]).attribute if a.name == "else_branch")
    (made,) = branch.node  # an Identity of the index
    assert made.op_type == "Identity"
    keeps.input[0] = made.input[0]
    report = lucid_onnx.fuse(model)
    assert [(f.pattern, f.padding_idx) for f in report.fused] == [("torch dynamo export", 2)]
    assert report.unfused == ()
    before = lucid_onnx.InferenceSession(model, native=False)
    after = lucid_onnx.InferenceSession(report.model, native=has_library())
    for call in variations(FLAT, {}):
        np.testing.assert_allclose(after.run(None, call)[0], before.run(None, call)[0], rtol=1e-5, atol=1e-5)


def _maker(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next((n for n in nodes(model) if name in n.output), onnx.NodeProto())


def test_weights_that_are_not_one_are_weights(dynamo: Callable[[str], Export]) -> None:
    """The exporter writes weights of one where there are none."""
    model = onnx.load(dynamo("sum").path)
    ones = next(t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and list(t.dims) == [1])
    ones.CopyFrom(numpy_helper.from_array(np.array([2], np.float32), ones.name))
    report = lucid_onnx.fuse(model)
    assert [f.op for f in report.fused] == ["EmbeddingBagWeighted"]
    same_as_before(model, report, FLAT)


def test_what_a_bag_does_not_take_stays(legacy: Callable[[str], Export]) -> None:
    """Indices whose number of dimensions nobody knows; a table of integers."""
    model = onnx.load(legacy("sum-17").path)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    (unfused,) = lucid_onnx.fuse(model).unfused
    assert unfused.reason == "the indices have an unknown number of dimensions, expected one"
    model = onnx.load(legacy("sum-17").path)
    table = numpy_helper.to_array(model.graph.initializer[0]).astype(np.int32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, model.graph.initializer[0].name))
    (unfused,) = lucid_onnx.fuse(model).unfused
    assert unfused.reason == "the table has type int32, expected float32, float16, bfloat16 or float64"


# ---- The standard form.


OPSETS = (16, 18, min(spec.MAX_OPSET, onnx.defs.onnx_opset_version()))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("constant", [False, True])
def test_what_was_lowered_comes_back(opset: int, constant: bool) -> None:
    """Named cases, with another opset and kind of table in each turn; more than half of them, some of every sort."""
    turn = OPSETS.index(opset) * 2 + constant
    for case in list(named.all_cases().values())[turn::11]:
        expected = case_model(case, "native", opset, constant=constant)
        report = lucid_onnx.fuse(case_model(case, "standard", opset, constant=constant), form="native")
        assert [n.op_type for n in report.model.graph.node] == [n.op_type for n in expected.graph.node], case.name
        found, wanted = report.model.graph.node[0], expected.graph.node[0]
        assert found.op_type == wanted.op_type
        assert attributes(found) == attributes(wanted), case.name
        assert list(found.input) == list(wanted.input)
        assert interface(report.model) == interface(expected)
        assert report.unfused == ()


def test_codes_that_were_lowered_come_back() -> None:
    """Every thirteenth named case, of each kind of codes, in an opset and with a table of its turn."""
    for k, case in enumerate(list(quantized.all_cases().values())[::13]):
        opset, constant = OPSETS[k % 3], k % 2 == 0
        expected = case_model(case, "native", opset, constant=constant)
        report = lucid_onnx.fuse(case_model(case, "standard", opset, constant=constant), form="native")
        (found,), (wanted,) = report.model.graph.node, expected.graph.node
        assert (found.op_type, list(found.input)) == (wanted.op_type, list(wanted.input)), case.name
        assert attributes(found) == attributes(wanted), case.name
        assert interface(report.model) == interface(expected)
        assert report.unfused == ()
        (fused,) = report.fused
        assert (fused.pattern, fused.table) == ("quantized standard form", "codes")
        assert (fused.table_dtype, fused.table_shape[1]) == (case.attributes.codes_type, case.table.shape[1])
        held = sum(a.nbytes for n, a in case.inputs.items() if n in ("codes", "scale", "zero_point", "bias"))
        assert fused.table_bytes == (held if constant else None)


def test_a_quantised_model_is_lowered_and_fused_to_itself() -> None:
    nodes = [
        lucid_onnx.make_node("t", "i", "o", "a", mode="max", padding_idx=1, name="first"),
        lucid_onnx.make_node("t", "i", "o", "b", mode="mean", max_norm=0.1, norm_type=3.0),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info(n, TensorProto.INT32, [d]) for n, d in (("i", "n"), ("o", "b"))],
        [info(n, TensorProto.FLOAT, ["b", 13]) for n in "ab"],
        [numpy_helper.from_array(np.random.default_rng(0).standard_normal((20, 13)).astype(np.float32), "t")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    for dtype in ("int8", "uint4"):
        small = lucid_onnx.quantize(model, dtype=dtype).model
        back = lucid_onnx.fuse(lucid_onnx.lower(small), form="native").model
        assert [attributes(n) for n in bags(back)] == [attributes(n) for n in bags(small)]
        assert [(n.op_type, n.input, n.output) for n in bags(back)] == [
            (n.op_type, n.input, n.output) for n in bags(small)
        ]
        assert back.graph.initializer == small.graph.initializer


def test_changed_codes_stay() -> None:
    table = lucid_onnx.QuantizedTable.quantize(np.eye(3, 5, dtype=np.float32), "int4")
    standard = lucid_onnx.build_quantized_model(table, mode="sum", form="standard")
    assert len(lucid_onnx.fuse(standard).fused) == 1
    swaps = {"Add": "Sub", "Sub": "Add", "Floor": "Ceil", "Mul": "Div"}
    places = [k for k, node in enumerate(standard.graph.node) if node.op_type in swaps]
    assert len(places) > 30
    for k in places[::12]:
        model = onnx.ModelProto()
        model.CopyFrom(standard)
        model.graph.node[k].op_type = swaps[model.graph.node[k].op_type]
        assert bags(lucid_onnx.fuse(model).model) == [], f"{k}: {standard.graph.node[k].op_type}"


def test_two_bags_of_a_lowered_graph_come_back() -> None:
    graph = helper.make_graph(
        [
            lucid_onnx.make_node("t", "i", "o", "a", mode="max", padding_idx=1, name="first"),
            lucid_onnx.make_node("t", "i", "o", "b", mode="mean", max_norm=0.1, norm_type=3.0),
            helper.make_node("Add", ["a", "b"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info(n, TensorProto.INT32, [d]) for n, d in (("i", "n"), ("o", "b"))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3])],
        [numpy_helper.from_array(np.eye(3, dtype=np.float32), "t")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    portable = lucid_onnx.to_form(model, "portable")
    standard = lucid_onnx.lower(portable)
    assert bags(standard) == []
    back = lucid_onnx.fuse(standard).model
    assert [attributes(n) for n in bags(back)] == [attributes(n) for n in bags(portable)]
    assert [(list(n.input), list(n.output)) for n in bags(back)] == [
        (list(n.input), list(n.output)) for n in bags(portable)
    ]


def test_a_changed_standard_form_stays() -> None:
    standard = lucid_onnx.build_model(np.eye(3, dtype=np.float32), mode="sum", form="standard")
    swaps = {"Add": "Sub", "Sub": "Add", "Max": "Min", "Min": "Max", "Greater": "Less", "LessOrEqual": "Less"}
    swaps |= {"ReduceSum": "ReduceMax", "ReduceMax": "ReduceMin"}
    places = [k for k, node in enumerate(standard.graph.node) if node.op_type in swaps]
    assert len(places) > 30
    for k in places[::8]:
        model = onnx.ModelProto()
        model.CopyFrom(standard)
        model.graph.node[k].op_type = swaps[model.graph.node[k].op_type]
        assert bags(lucid_onnx.fuse(model).model) == [], f"{k}: {standard.graph.node[k].op_type}"


V, D = 10, 4


class Small:
    """A graph of a few nodes over a table [10, 4], and indices ``i``."""

    def __init__(self, *, shape: tuple[Any, ...] = ("b", 5), opset: int = 18) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.table = np.random.default_rng(0).standard_normal((V, D)).astype(np.float32)
        self.initializers: dict[str, np.ndarray] = {}
        self.inputs = {"i": (TensorProto.INT64, shape)}
        self.opset = opset

    def __call__(self, op_type: str, *inputs: str | np.ndarray, **attributes: Any) -> str:
        names = []
        for given in inputs:
            name = given if isinstance(given, str) else f"c{len(self.initializers)}"
            if not isinstance(given, str):
                self.initializers[name] = given
            names.append(name)
        self.nodes.append(helper.make_node(op_type, names, [f"v{len(self.nodes)}"], **attributes))
        return self.nodes[-1].output[0]

    def model(self, output: str, rank: int = 2) -> onnx.ModelProto:
        dims = ["b", D] if rank == 2 else ["b", 1, D]
        graph = helper.make_graph(
            self.nodes,
            "small",
            [helper.make_tensor_value_info(n, t, s) for n, (t, s) in self.inputs.items()],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, dims)],
            [numpy_helper.from_array(a, n) for n, a in {"table": self.table, **self.initializers}.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def reduced(self, rows: str, op: str = "ReduceSum", axis: int = 1, keepdims: int = 0) -> str:
        if op == "ReduceSum" or self.opset >= 18:
            return self(op, rows, np.array([axis]), keepdims=keepdims)
        return self(op, rows, axes=[axis], keepdims=keepdims)

    def kept(self, padding: int) -> str:
        """[B, L, 1], float: 0 where the index is ``padding``, else 1."""
        equal = self("Not", self("Equal", "i", np.array(padding)))
        return self("Unsqueeze", self("Cast", equal, to=TensorProto.FLOAT), np.array([-1]))


def same_as_before(model: onnx.ModelProto, report: Any, feed: dict[str, np.ndarray]) -> None:
    expected = results(model, feed, native=False)[0]
    for way, native in expressions_of(report.model).values():
        np.testing.assert_allclose(results(way, feed, native=native)[0], expected, rtol=1e-5, atol=1e-6)


# ---- One bag after another.


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


# ---- Bags in functions.


def in_function(op: str = "ReduceSum", *, other: np.ndarray | None = None, opset: int = 18) -> onnx.ModelProto:
    """A function with a Gather and a reduction, called by the graph and by another function."""
    table = np.random.default_rng(0).standard_normal((V, D)).astype(np.float32)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    axes = helper.make_node("Constant", [], ["axes"], value_ints=[1])
    inner = [helper.make_node("Gather", ["t", "i"], ["r"]), axes]
    inner.append(helper.make_node(op, ["r", "axes"], ["y"], keepdims=0))
    outer = [helper.make_node("Pool", ["t", "i"], ["y"], domain="mine"), helper.make_node("Relu", ["y"], ["z"])]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Outer", ["u", "i"], ["b"], domain="mine"),
            helper.make_node("Pool", ["table", "i"], ["a"], domain="mine"),
        ],
        "g",
        [info("i", TensorProto.INT64, ["b", 3])],
        [info("a", TensorProto.FLOAT, ["b", D]), info("b", TensorProto.FLOAT, ["b", None])],
        # The function's own name of its table is that of something else in the graph.
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(-table[:, :2] if other is None else other, "u"),
            numpy_helper.from_array(np.zeros((2, 2)), "t"),
        ],
    )
    functions = [
        helper.make_function("mine", "Outer", ["t", "i"], ["z"], outer, imports),
        helper.make_function("mine", "Pool", ["t", "i"], ["y"], inner, imports[:1]),
    ]
    return helper.make_model(
        graph, functions=functions, opset_imports=[helper.make_opsetid("", 18), imports[1]], ir_version=8
    )


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMax"])
def test_bags_in_functions(op: str) -> None:
    """Once in the function, whose tables are of one type but not of one shape; the length of the bags is 3 to all."""
    model = in_function(op)
    report = lucid_onnx.fuse(model)
    (fused,) = report.fused
    assert fused.where == "node 'y' (" + op + ") in function 'Pool'"
    assert (fused.op, fused.table, fused.table_shape) == ("EmbeddingBag2D", "t", (V, None))
    (pool,) = [f for f in report.model.functions if f.name == "Pool"]
    assert [n.op_type for n in pool.node] == ["EmbeddingBag2D"]
    assert [n.op_type for n in report.model.graph.node] == ["Outer", "Pool"]
    assert attributes(pool.node[0])["stash_type"] == TensorProto.FLOAT
    onnx.checker.check_model(report.model, full_check=True)
    feed = {"i": np.array([[1, 2, 3], [9, 9, 0]])}
    expected = results(model, feed, native=False)
    for way, native in expressions_of(report.model).values():
        for found, e in zip(results(way, feed, native=native), expected, strict=True):
            np.testing.assert_allclose(found, e, rtol=1e-5, atol=1e-6)


def test_functions_whose_calls_differ_keep_their_nodes() -> None:
    """One call has a table of doubles, another one of floats; and a function of another opset is not searched."""
    table = np.ones((V, 2))
    for model in (in_function(other=table), in_function(opset=19)):
        model.graph.output[1].type.tensor_type.elem_type = TensorProto.DOUBLE if model.functions[0] else 1
        assert lucid_onnx.fuse(model).fused == ()


# ---- Gather and a reduction.


@pytest.mark.parametrize("opset", [13, 18])  # axes as attributes, and as inputs
@pytest.mark.parametrize("axis", [1, -2])
@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceMax"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_gather_and_a_reduction_is_a_bag(op: str, axis: int, opset: int, keepdims: int) -> None:
    g = Small(opset=opset)
    model = g.model(g.reduced(g("Gather", "table", "i"), op, axis, keepdims), 2 + keepdims)
    report = lucid_onnx.fuse(model)
    assert [f.op for f in report.fused] == ["EmbeddingBag2D"]
    assert interface(report.model) == interface(model)
    same_as_before(model, report, {"i": np.random.default_rng(1).integers(0, V, (7, 5))})
    if op != "ReduceMax":
        return
    assert spec.Attributes.from_onnx(attributes(bags(report.model)[0])) == spec.Attributes("max")


def test_a_sum_over_no_columns_is_zeros_to_both() -> None:
    g = Small(shape=("b", "l"))
    model = g.model(g.reduced(g("Gather", "table", "i")))
    report = lucid_onnx.fuse(model)
    assert len(report.fused) == 1
    for shape in ((3, 0), (0, 3), (0, 0), (2, 2)):
        same_as_before(model, report, {"i": np.zeros(shape, np.int64)})


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax"])
@pytest.mark.parametrize("length", ["l", None, 0])
def test_a_length_that_may_be_zero_needs_a_word(op: str, length: Any) -> None:
    g = Small(shape=("b", length))
    model = g.model(g.reduced(g("Gather", "table", "i"), op))
    report = lucid_onnx.fuse(model)
    assert report.fused == ()
    (unfused,) = report.unfused
    known = "unknown" if length is None else repr(length)
    assert unfused.reason.startswith(f"the length of the bags is {known}: a {'mean' if op == 'ReduceMean' else 'max'}")
    assert "assume_nonempty" in unfused.reason
    if length != 0:
        report = lucid_onnx.fuse(model, assume_nonempty=True)
        assert len(report.fused) == 1
        same_as_before(model, report, {"i": np.array([[1, 2, 3]])})


@pytest.mark.parametrize("order", [0, 1])
def test_a_weight_per_index(order: int) -> None:
    g = Small()
    g.inputs["w"] = (TensorProto.FLOAT, ("b", 5))
    factors = g("Unsqueeze", "w", np.array([2]))
    rows = g("Gather", "table", "i")
    model = g.model(g.reduced(g("Mul", *((rows, factors) if order else (factors, rows)))))
    report = lucid_onnx.fuse(model)
    assert [f.op for f in report.fused] == ["EmbeddingBag2DWeighted"]
    rng = np.random.default_rng(1)
    feed = {"i": rng.integers(0, V, (7, 5)), "w": rng.standard_normal((7, 5)).astype(np.float32)}
    same_as_before(model, report, feed)


@pytest.mark.parametrize("finite", [True, False])
def test_a_mask_multiplies(finite: bool) -> None:
    """Zero times the padded row is skipping it only if that row is finite; else the mask becomes the weights."""
    g = Small()
    if not finite:
        g.table[3, 1] = np.inf
    model = g.model(g.reduced(g("Mul", g("Gather", "table", "i"), g.kept(3))))
    report = lucid_onnx.fuse(model)
    (fused,) = report.fused
    assert (fused.op, fused.padding_idx) == (("EmbeddingBag2D", 3) if finite else ("EmbeddingBag2DWeighted", None))
    feed = {"i": np.array([[1, 3, 3, 2, 0], [3, 3, 3, 3, 3], [0, 1, 2, 4, 5]])}
    same_as_before(model, report, feed)
    assert np.isnan(results(report.model, feed)[0]).any() != finite


@pytest.mark.parametrize("count", ["Max", "Max of others", "Clip"])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("selects", [False, True])
def test_a_masked_mean_is_a_mean(count: str, keepdims: int, selects: bool) -> None:
    """Over the number of rows that are left, and at least 1 or next to nothing, so that no row at all gives zeros."""
    g = Small(shape=("b", "l"))
    rows, kept = g("Gather", "table", "i"), g.kept(3)
    if selects:
        g.table[3, 1] = np.nan
        mask = g("Unsqueeze", g("Equal", "i", np.array(3)), np.array([-1]))
        rows = g("Where", mask, np.zeros((), np.float32), rows)
    else:
        rows = g("Mul", rows, kept)
    number = g.reduced(kept, keepdims=keepdims)
    if count == "Clip":
        number = g("Clip", number, np.array(1e-9, np.float32))
    elif count == "Max":
        number = g("Max", number, np.array(1, np.float32))
    else:
        number = g("Max", np.array([0.5], np.float32), number)
    model = g.model(g("Div", g.reduced(rows, keepdims=keepdims), number), 2 + keepdims)
    report = lucid_onnx.fuse(model)
    (fused,) = report.fused
    assert (fused.op, fused.mode, fused.padding_idx) == ("EmbeddingBag2D", "mean", 3)
    assert not {"Div", "Gather", "Mul", "Where"} & {n.op_type for n in report.model.graph.node}
    for indices in ([[1, 3, 3, 2, 0], [3, 3, 3, 3, 3], [0, 1, 2, 4, 5]], [[], []]):
        same_as_before(model, report, {"i": np.array(indices, np.int64)})


@pytest.mark.parametrize("what", ["least", "mask", "number", "infinite", "none"])
def test_what_is_no_masked_mean_stays_a_division(what: str) -> None:
    g = Small()
    if what == "infinite":
        g.table[3, 1] = np.inf
    number = g.reduced(g.kept(4 if what == "mask" else 3))
    if what == "number":
        number = g("Cast", g("Shape", "i", start=1), to=TensorProto.FLOAT)
    if what != "none":
        number = g("Max", number, np.array(2 if what == "least" else 1, np.float32))
    rows = g("Mul", g("Gather", "table", "i"), g.kept(3))
    model = g.model(g("Div", g.reduced(rows), number))
    report = lucid_onnx.fuse(model)
    assert [f.mode for f in report.fused] == ["sum"]
    assert "Div" in [n.op_type for n in report.model.graph.node]
    same_as_before(model, report, {"i": np.array([[1, 3, 3, 2, 0], [0, 1, 2, 4, 3]])})


@pytest.mark.parametrize("finite", [True, False])
def test_the_padded_row_of_an_external_table_is_looked_at(finite: bool, tmp_path: Path) -> None:
    g = Small()
    g.table = np.random.default_rng(0).standard_normal((5000, D)).astype(np.float32)
    g.table[3, 1] = 1.0 if finite else np.inf
    model = g.model(g.reduced(g("Mul", g("Gather", "table", "i"), g.kept(3))))
    lucid_onnx.save(model, tmp_path / "m.onnx", external_data=True)
    (fused,) = lucid_onnx.fuse(tmp_path / "m.onnx").fused
    assert (fused.op, fused.padding_idx) == (("EmbeddingBag2D", 3) if finite else ("EmbeddingBag2DWeighted", None))
    (tmp_path / "m.onnx.data").unlink()
    (fused,) = lucid_onnx.fuse(tmp_path / "m.onnx").fused
    assert fused.op == "EmbeddingBag2DWeighted"


@pytest.mark.parametrize("negated", [False, True])
def test_where_selects(negated: bool) -> None:
    """A Where is the bag's own way to skip, also over rows that are infinite."""
    g = Small()
    g.table[3, 1] = np.nan
    equal, rows, zero = g("Equal", "i", np.array(3)), g("Gather", "table", "i"), np.zeros((), np.float32)
    condition = g("Unsqueeze", g("Not", equal) if negated else equal, np.array([-1]))
    model = g.model(g.reduced(g("Where", condition, *((rows, zero) if negated else (zero, rows)))))
    report = lucid_onnx.fuse(model)
    (fused,) = report.fused
    assert (fused.op, fused.padding_idx) == ("EmbeddingBag2D", 3)
    same_as_before(model, report, {"i": np.array([[1, 3, 3, 2, 0], [3, 3, 3, 3, 3], [0, 1, 2, 4, 5]])})


@pytest.mark.parametrize("kind", ["sum", "mean", "max", "mask", "where", "masked mean", "weights"])
def test_a_changed_number_of_a_reduction_is_seen(kind: str) -> None:
    """As for exports: what is fused gives what the changed graph gives."""
    g = Small(shape=("b", 4))
    rows, kept = g("Gather", "table", "i"), g.kept(3)
    if kind in ("mask", "masked mean"):
        rows = g("Mul", rows, kept)
    elif kind == "where":
        mask = g("Unsqueeze", g("Equal", "i", np.array(3)), np.array([-1]))
        rows = g("Where", mask, np.zeros((1, 1, 1), np.float32), rows)
    elif kind == "weights":
        g.inputs["w"] = (TensorProto.FLOAT, ("b", 4))
        rows = g("Mul", g("Unsqueeze", "w", np.array([2])), rows)
    output = g.reduced(rows, {"mean": "ReduceMean", "max": "ReduceMax"}.get(kind, "ReduceSum"))
    if kind == "masked mean":
        output = g("Div", output, g("Max", g.reduced(kept), np.array(1, np.float32)))
    model = g.model(output)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "any"  # another axis, another size
    assert len(lucid_onnx.fuse(model).fused) == 1
    # As many bags as indices in a bag as columns in a row, so that no wrong axis is told by its size alone.
    rng = np.random.default_rng(5)
    feed = {"i": np.array([[1, 3, 3, 2], [3, 3, 3, 3], [0, 1, 2, 4], [2, 3, 2, 4]])}
    feed |= {"w": rng.standard_normal((4, 4)).astype(np.float32)} if kind == "weights" else {}
    fused = 0
    for what, changed in changed_numbers(model):
        report, expected = None, None
        with contextlib.suppress(ValueError):  # onnx.checker refuses some, and so do we
            report = lucid_onnx.fuse(changed)
        with contextlib.suppress(Exception):  # where the changed graph does not run
            expected = ReferenceEvaluator(changed).run(None, feed)[0]
        if report is not None and report.fused and expected is not None:
            fused += 1
            found = results(report.model, feed, native=False)[0]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=what)
    assert fused > 0


def test_look_alikes_of_gather_and_reduction_stay() -> None:
    def other_axis(g: Small) -> str:
        return g.reduced(g("Gather", "table", "i"), axis=2)

    def two_axes(g: Small) -> str:
        return g("ReduceSum", g("Gather", "table", "i"), np.array([1, 2]), keepdims=0)

    def other_gather(g: Small) -> str:
        return g.reduced(g("Gather", "table", "i", axis=1))

    def factor_per_column(g: Small) -> str:
        return g.reduced(g("Mul", g("Gather", "table", "i"), np.ones(D, np.float32)))

    def broadcast_factors(g: Small) -> str:
        g.inputs["w"] = (TensorProto.FLOAT, (1, 5))
        return g.reduced(g("Mul", g("Gather", "table", "i"), g("Unsqueeze", "w", np.array([2]))))

    def factors_of_another_name(g: Small) -> str:
        g.inputs["w"] = (TensorProto.FLOAT, ("c", 5))
        return g.reduced(g("Mul", g("Gather", "table", "i"), g("Unsqueeze", "w", np.array([2]))))

    def weighted_mean(g: Small) -> str:
        g.inputs["w"] = (TensorProto.FLOAT, ("b", 5))
        return g.reduced(g("Mul", g("Gather", "table", "i"), g("Unsqueeze", "w", np.array([2]))), "ReduceMean")

    def masked_max(g: Small) -> str:
        mask = g("Unsqueeze", g("Equal", "i", np.array(3)), np.array([-1]))
        low = np.array(-np.inf, np.float32)
        return g.reduced(g("Where", mask, low, g("Gather", "table", "i")), "ReduceMax")

    def where_by_order(g: Small) -> str:
        mask = g("Unsqueeze", g("Less", "i", np.array(3)), np.array([-1]))
        return g.reduced(g("Where", mask, np.zeros((), np.float32), g("Gather", "table", "i")))

    def where_not_zero(g: Small) -> str:
        mask = g("Unsqueeze", g("Equal", "i", np.array(3)), np.array([-1]))
        return g.reduced(g("Where", mask, np.ones((), np.float32), g("Gather", "table", "i")))

    def from_the_end(g: Small) -> str:  # as tf2onnx has holes in a grid, which a row of zeros stands behind
        holes = helper.make_tensor("value", TensorProto.INT64, [1], [-1])
        grid = g("ConstantOfShape", g("Shape", "i"), value=holes)
        return g.reduced(g("Gather", "table", g("Where", g("Less", "i", np.array(3)), "i", grid)))

    reasons = {
        from_the_end: "numbers below zero by construction",
        other_axis: "axes [2], not over the rows",
        two_axes: "axes [1, 2], not over the rows",
        other_gather: "",
        factor_per_column: "something else than a number for each index",
        broadcast_factors: "whose shape is not known to be that of the indices",
        factors_of_another_name: "whose shape is not known to be that of the indices",
        weighted_mean: "is not a mean of rows",
        masked_max: "is not a max of rows",
        where_by_order: "by something else than one index",
        where_not_zero: "by something else than one index",
    }
    for write, why in reasons.items():
        g = Small()
        report = lucid_onnx.fuse(g.model(write(g)))
        assert report.fused == (), write.__name__
        assert [why in u.reason for u in report.unfused] == ([True] if why else []), (write.__name__, report.unfused)


def test_a_second_output_has_a_type_of_its_own() -> None:
    """TopK's indices are int64 whatever its values are; a Cast of them is no Cast for nothing."""
    g = Small()
    g.nodes.append(helper.make_node("TopK", ["s", "k"], ["values", "places"]))
    g.initializers["k"] = np.array([5])
    g.inputs = {"s": (TensorProto.FLOAT, ("b", 10))}
    factors = g("Unsqueeze", g("Cast", "places", to=TensorProto.FLOAT), np.array([-1]))
    model = g.model(g.reduced(g("Mul", g("Gather", "table", "places"), factors)))
    report = lucid_onnx.fuse(model)
    assert [f.op for f in report.fused] == ["EmbeddingBag2DWeighted"]
    same_as_before(model, report, {"s": np.random.default_rng(0).standard_normal((3, 10)).astype(np.float32)})


def test_constant_indices_below_zero_stay() -> None:
    g = Small()
    g.inputs.clear()
    model = g.model(g.reduced(g("Gather", "table", np.array([[1, -1]]))))
    assert lucid_onnx.fuse(model).fused == ()


def test_a_bag_in_a_branch() -> None:
    g = Small()
    inner = g.reduced(g("Gather", "table", "i"))
    branch = helper.make_graph(
        list(g.nodes), "then", [], [helper.make_tensor_value_info(inner, TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Expand", ["zero", "shape"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)],
    )
    g.initializers |= {"zero": np.zeros((), np.float32), "shape": np.array([1, D])}
    g.inputs["c"] = (TensorProto.BOOL, ())
    g.nodes = [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other)]
    model = g.model("y")
    report = lucid_onnx.fuse(model)
    assert len(report.fused) == 1
    assert len(bags(report.model)) == 1
    for c in (True, False):
        same_as_before(model, report, {"i": np.array([[1, 2, 3, 4, 5]]), "c": np.array(c)})


def test_a_bag_in_a_loop() -> None:
    """What a loop carries is what its body says it is."""
    g = Small()
    rows = g.reduced(g("Gather", "table", "k"))
    g("Identity", "c")
    body = helper.make_graph(
        list(g.nodes),
        "body",
        [
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("k", TensorProto.INT64, ["b", 5]),
        ],
        [
            helper.make_tensor_value_info(g.nodes[-1].output[0], TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", TensorProto.INT64, ["b", 5]),
            helper.make_tensor_value_info(rows, TensorProto.FLOAT, ["b", D]),
        ],
    )
    g.initializers |= {"one": np.array(1), "times": np.array(3)}
    body.node.append(helper.make_node("Add", ["k", "one"], ["more"]))
    g.nodes = [helper.make_node("Loop", ["times", "", "i"], ["last", "y"], body=body)]
    model = g.model("y", rank=3)
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "t"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "b"
    report = lucid_onnx.fuse(model)
    assert [f.op for f in report.fused] == ["EmbeddingBag2D"]
    assert len(bags(report.model)) == 1
    same_as_before(model, report, {"i": np.array([[1, 2, 3, 4, 5], [0, 0, 0, 0, 7]])})


def test_a_used_intermediate_stays_beside_the_bag() -> None:
    g = Small()
    rows = g("Gather", "table", "i")
    output = g.reduced(rows)
    model = g.model(output)
    model.graph.output.append(helper.make_tensor_value_info(rows, TensorProto.FLOAT, ["b", 5, D]))
    report = lucid_onnx.fuse(model)
    assert sorted(n.op_type for n in report.model.graph.node) == ["EmbeddingBag2D", "Gather"]
    feed = {"i": np.array([[1, 2, 3, 4, 5]])}
    for found, expected in zip(results(report.model, feed), results(model, feed, native=False), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


# ---- ATen nodes.


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
    assert (fused.mode, fused.padding_idx, fused.include_last_offset) == (spec.MODES[mode], 2, True)
    assert {i.domain for i in report.model.opset_import} >= {"", spec.DOMAIN}
    feed = {"i": np.array([1, 2, 4, 2, 9]), "o": np.array([0, 3, 3, 5])}
    expected = lucid_onnx.reference.embedding_bag(
        feed["i"],
        np.arange(40, dtype=np.float32).reshape(10, 4),
        feed["o"],
        mode=spec.MODES[mode],
        padding_idx=2,
        include_last_offset=True,
    )
    for way, native in expressions_of(report.model).values():
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


# ---- Forms, files, failures.


@pytest.fixture
def lowered(tmp_path: Path) -> Path:
    """A model in standard form whose table of 80,000 bytes is external."""
    table = np.random.default_rng(0).standard_normal((1000, 20)).astype(np.float32)
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    lucid_onnx.save(lucid_onnx.build_model(table, mode="sum", form="standard"), path, external_data=True)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    return path


FEED = {"indices": np.array([1, 999, 5, 5]), "offsets": np.array([0, 1, 1])}


def ran(path: Path) -> np.ndarray:
    return lucid_onnx.InferenceSession(path, native=False).run(None, FEED)[0]


@pytest.mark.parametrize("form", ["portable", "standard", "native"])
def test_forms(form: Any) -> None:
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32), form="standard")
    fused = lucid_onnx.fuse(model, form=form)
    assert len(fused.fused) == 1
    assert len(fused.model.functions) == (form == "portable")
    assert (spec.DOMAIN in {i.domain for i in fused.model.opset_import}) == (form != "standard")
    again = lucid_onnx.lower(fused.model, form=form)
    assert len(bags(again)) == (form != "standard")


def test_lower_leaves_no_trace(tmp_path: Path) -> None:
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32))
    lucid_onnx.lower(model, tmp_path / "standard.onnx")
    assert b"ai.lucid" not in (tmp_path / "standard.onnx").read_bytes()
    assert len(bags(model)) == 1


def test_external_data_stays_where_it_is(lowered: Path) -> None:
    data = lowered.with_name("model.onnx.data")
    before, expected = (data.stat().st_ino, data.stat().st_mtime_ns, data.read_bytes()), ran(lowered)
    report = lucid_onnx.fuse(lowered, lowered.with_name("fused.onnx"))
    (tensor,) = report.model.graph.initializer
    assert not tensor.raw_data
    lucid_onnx.lower(lowered.with_name("fused.onnx"), lowered)  # over its own source
    assert sorted(p.name for p in lowered.parent.iterdir()) == ["fused.onnx", "model.onnx", "model.onnx.data"]
    assert (data.stat().st_ino, data.stat().st_mtime_ns, data.read_bytes()) == before
    for path in (lowered, lowered.with_name("fused.onnx")):
        np.testing.assert_array_equal(ran(path), expected)


def test_external_data_goes_along_to_another_folder(lowered: Path, tmp_path: Path) -> None:
    expected = ran(lowered)
    (tmp_path / "out").mkdir()
    lucid_onnx.fuse(lowered, tmp_path / "out" / "fused.onnx")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["fused.onnx", "fused.onnx.data"]
    shutil.rmtree(lowered.parent)
    np.testing.assert_array_equal(ran(tmp_path / "out" / "fused.onnx"), expected)


def test_failures_leave_nothing_behind(lowered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "fused.onnx").write_bytes(b"before")
    data = lowered.with_name("model.onnx.data")

    def full(source: Any, target: Any, length: int) -> None:
        target.write(source.read(100))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", full)
        with pytest.raises(OSError, match="No space left"):
            lucid_onnx.fuse(lowered, out / "fused.onnx")
    with pytest.raises(ValueError, match=r"fused\.onnx\.data|external data"):
        lucid_onnx.fuse(lowered, data)
    model = onnx.load(lowered, load_external_data=False)
    with pytest.raises(ValueError, match="initializer 'weight' is external data that was not loaded: give the path"):
        lucid_onnx.fuse(model, out / "fused.onnx")
    data.rename(data.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError, match=r"initializer 'weight' has its data there"):
        lucid_onnx.lower(lowered, out / "fused.onnx")
    for location in ("../model.onnx.data", "/etc/passwd", ""):
        next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = location
        lowered.write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match=r"initializer 'weight' has its data at .* outside of the model's folder"):
            lucid_onnx.lower(lowered, out / "fused.onnx")
    assert [(p.name, p.read_bytes()) for p in out.iterdir()] == [("fused.onnx", b"before")]


def test_bad_arguments(tmp_path: Path) -> None:
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32))
    with pytest.raises(ValueError, match="form = 'zip' is not one of 'portable', 'standard', 'native'"):
        lucid_onnx.fuse(model, form="zip")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        lucid_onnx.fuse(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    for call in (lucid_onnx.fuse, lucid_onnx.lower):
        with pytest.raises(ValueError, match=r"text\.onnx: not an ONNX model"):
            call(tmp_path / "text.onnx")
        with pytest.raises(ValueError, match="the model: not an ONNX model: it has no graph or no opset"):
            call(onnx.ModelProto())
    model.training_info.add()
    with pytest.raises(ValueError, match="has training_info, which a rewrite would lose"):
        lucid_onnx.fuse(model)


def test_a_model_that_was_wrong_before_is_refused(legacy: Callable[[str], Export]) -> None:
    model = onnx.load(legacy("sum-17").path)
    model.graph.node.append(helper.make_node("Relu", ["nowhere"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n"]))
    with pytest.raises(ValueError, match=r"the model, before any change, does not pass onnx\.checker: .*nowhere"):
        lucid_onnx.fuse(model)


def test_an_old_model_with_functions_is_refused(legacy: Callable[[str], Export]) -> None:
    model = onnx.load(legacy("sum-11").path)
    model.functions.append(
        helper.make_function(
            "f", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 11)]
        )
    )
    with pytest.raises(ValueError, match=r"opset 11 and has functions, which onnx\.version_converter drops"):
        lucid_onnx.fuse(model)


def test_nothing_to_fuse_changes_nothing(tmp_path: Path) -> None:
    g = Small(opset=9)
    model = g.model(g("Relu", "i"))
    report = lucid_onnx.fuse(model, tmp_path / "same.onnx")
    assert (report.fused, report.unfused, report.model) == ((), (), model)
    assert onnx.load(tmp_path / "same.onnx") == model


@pytest.mark.large
def test_a_huge_table_is_not_loaded(tmp_path: Path) -> None:
    """6 GiB of external data, a hole in the file system: fused in under 500 MB of memory, and not copied."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc/self/status to read the memory from")
    rows = 6 * 2**30 // 256
    model = lucid_onnx.build_model(np.zeros((4, 64), np.float32), mode="sum", form="standard")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.dims[0], tensor.data_location = rows, TensorProto.EXTERNAL
    for key, value in (("location", "table.bin"), ("offset", "0"), ("length", str(rows * 256))):
        tensor.external_data.add(key=key, value=value)
    with (tmp_path / "table.bin").open("wb") as file:
        file.truncate(rows * 256)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    # Not ru_maxrss, which a process has from the one that started it.
    script = (
        "import re, lucid_onnx\n"
        "report = lucid_onnx.fuse('model.onnx', 'fused.onnx')\n"
        "print(len(report.fused), re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    count, kibibytes = map(int, done.stdout.split())
    assert count == 1
    assert kibibytes < 500_000
    assert (tmp_path / "table.bin").stat().st_blocks * 512 < 2**20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fused.onnx", "model.onnx", "table.bin"]


def test_a_full_disk_leaves_nothing_and_a_copy_is_not_loaded(tmp_path: Path) -> None:
    """A table of 256 MiB goes to another folder, in pieces; where files must be smaller, nothing appears there."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc/self/status to read the memory from")
    model = lucid_onnx.build_model(np.zeros((4, 64), np.float32), mode="sum", form="standard")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.dims[0], tensor.data_location = 2**20, TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="table.bin")
    table = tmp_path / "table.bin"
    with table.open("wb") as file:
        file.truncate(2**28)
        file.seek(2**27 - 1)
        file.write(b"a row")
    before = table.stat()
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    script = (
        "import os, re, resource, signal, lucid_onnx\n"
        "os.mkdir('out')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as on a disk that is full\n"
        "limits = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, limits[1]))\n"
        "for call in (lucid_onnx.fuse, lucid_onnx.lower):\n"
        "    try:\n        call('model.onnx', 'out/x.onnx')\n"
        "    except OSError as error:\n        print(error.errno, os.listdir('out'))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, limits)\n"
        "lucid_onnx.fuse('model.onnx', 'out/fused.onnx')\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *refused, kibibytes = done.stdout.splitlines()
    assert refused == ["27 []"] * 2  # EFBIG
    assert int(kibibytes) < 300_000
    after = table.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["fused.onnx", "fused.onnx.data"]
    with (tmp_path / "out" / "fused.onnx.data").open("rb") as copy:
        assert copy.seek(2**27 - 1) + len(copy.read(5) + copy.read()) == 2**28
        copy.seek(2**27 - 1)
        assert copy.read(6) == b"a row\0"


# ---- The command line.


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in arguments])
        return (code, *capfd.readouterr())

    return call


def test_commands(lowered: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lowered.parent)
    expected = ran(lowered)
    code, out, err = run("inspect", "model.onnx")
    assert (code, err) == (0, "")
    assert "would fuse" in out
    assert "standard form" in out
    code, out, err = run("inspect", "model.onnx", "--json")
    assert [f["op"] for f in json.loads(out)["fused"]] == ["EmbeddingBag"]
    code, out, err = run("fuse", "model.onnx", "-o", "fused.onnx", "--report", "report.json")
    assert (code, err) == (0, "")
    assert out.startswith("wrote fused.onnx (")
    report = json.loads(Path("report.json").read_text())
    assert report["unfused"] == []
    assert report["fused"][0]["table_shape"] == [1000, 20]
    assert report["fused"][0]["table_bytes"] == 80_000
    code, out, err = run("inspect", "fused.onnx")
    assert "EmbeddingBag" in out
    assert "nothing to fuse" in out
    code, out, err = run("lower", "fused.onnx", "-o", "again.onnx")
    assert (code, err) == (0, "")
    assert "standard form" in out
    np.testing.assert_array_equal(ran(Path("again.onnx")), expected)


def test_inspect_draws_what_would_become_of_bags(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bags alike are drawn once; an axis that is put back is drawn with its bag; a look-alike is told with why."""
    g = Small(shape=("b", 5))
    for name in ("one", "two & <more>"):
        g.initializers[name] = np.ones((V, D), np.float32)
        g.reduced(g("Gather", name, "i"), keepdims=1)
    g("Sum", "v1", "v3")
    g.reduced(g("Gather", "table", "i"), axis=2)
    model = g.model("v4", 3)
    model.graph.output.append(helper.make_tensor_value_info("v6", TensorProto.FLOAT, ["b", 5]))
    for initializer in model.graph.initializer:
        initializer.name = initializer.name.replace("one", "a" * 50)
    model.graph.node[0].input[0] = "a" * 50
    monkeypatch.chdir(tmp_path)
    onnx.save(model, "m.onnx")
    code, out, err = run("inspect", "m.onnx", "--svg", "m.svg")
    assert (code, err, out.splitlines()[-1]) == (0, "", "wrote m.svg")
    code, out, _ = run("inspect", "m.onnx", "--svg", "again.svg", "--json")
    assert len(json.loads(out)["fused"]) == 2
    assert Path("again.svg").read_bytes() == Path("m.svg").read_bytes()
    root = ElementTree.parse("m.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not [e for e in root.iter() for key in e.attrib if key.endswith("href")]
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:2] == ["m.onnx", "2 bags to fuse; left as it is: 1"]
    assert "2 times: Gather and reduction, sum, node 'v1' (ReduceSum)" in texts
    assert [t for t in texts if t in ("Gather", "ReduceSum", "EmbeddingBag2D", "Unsqueeze", "Sum")] == [
        *("Gather", "ReduceSum", "EmbeddingBag2D", "Unsqueeze")
    ]
    assert {"before: 2 nodes", "after: 2 nodes", "aaaaaaaaaaaaaaaa…aaaaaaaaaaaaaaaaa"} <= set(texts)
    assert "ReduceSum goes over axes [2], not over the rows of a bag, axis 1" in texts
    # Nothing stands outside of the picture, or on top of something else.
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes = [{k: float(e.attrib[k]) for k in ("x", "y", "width", "height")} for e in root if "rx" in e.attrib]
    assert len(boxes) == 4 + 2 * 2  # nodes, and what they read, before and after
    for k, a in enumerate(boxes):
        assert a["x"] >= 0
        assert a["x"] + a["width"] <= width
        assert a["y"] + a["height"] <= height
        for b in boxes[:k]:
            across = a["x"] < b["x"] + b["width"] and b["x"] < a["x"] + a["width"]
            assert not (across and a["y"] < b["y"] + b["height"] and b["y"] < a["y"] + a["height"])


def test_pictures_of_loops_and_of_nothing(legacy: Callable[[str], Export]) -> None:
    model = onnx.load(legacy("sum-17").path)
    drawn = picture.draw(model, lucid_onnx.fuse(model), "loop & more")
    texts = [e.text for e in ElementTree.fromstring(drawn).iter() if e.tag.endswith("text")]
    assert texts[0] == "loop & more"
    assert texts.index("Loop") < texts.index("EmbeddingBag")
    inside = [n.op_type for n in loop_body(model).node if n.op_type != "Constant"]
    assert set(inside) <= set(texts)
    report = lucid_onnx.fuse(lucid_onnx.build_model(np.eye(3, dtype=np.float32)))
    assert "nothing to fuse" in picture.draw(report.model, report, "m")
    within = in_function()
    assert "it is inside of a branch or a function" in picture.draw(within, lucid_onnx.fuse(within), "f")


def test_inspect_says_why_not(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    g = Small(shape=("b", "l"))
    onnx.save(g.model(g.reduced(g("Gather", "table", "i"), "ReduceMean")), tmp_path / "m.onnx")
    code, out, _ = run("inspect", tmp_path / "m.onnx")
    assert code == 0
    assert "the length of the bags is 'l'" in " ".join(out.split())
    code, out, _ = run("fuse", tmp_path / "m.onnx", "-o", tmp_path / "f.onnx", "--assume-nonempty")
    assert code == 0
    assert len(bags(onnx.load(tmp_path / "f.onnx"))) == 1


def test_mistakes_are_one_line(
    lowered: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lowered.parent)
    Path("text.onnx").write_text("no model")
    Path("folder").mkdir()
    onnx.save(onnx.load("model.onnx"), "old.onnx")
    mistakes = {
        ("fuse", "none.onnx", "-o", "x.onnx"): "none.onnx: no such file",
        ("lower", "none.onnx", "-o", "x.onnx"): "none.onnx: no such file",
        ("inspect", "none.onnx"): "none.onnx: no such file",
        ("inspect", "folder"): "folder: is a directory",
        ("inspect", "model.onnx", "--svg", "no/m.svg"): "--svg no/m.svg: there is no directory no",
        ("inspect", "model.onnx", "--svg", "model.onnx"): "--svg model.onnx: is the model itself",
        ("fuse", "text.onnx", "-o", "x.onnx"): "text.onnx: not an ONNX model: ",
        ("lower", "text.onnx", "-o", "x.onnx"): "text.onnx: not an ONNX model: ",
        ("inspect", "text.onnx"): "text.onnx: not an ONNX model: ",
        ("fuse", "model.onnx", "-o", "folder"): "--output folder: is a directory",
        ("fuse", "model.onnx", "-o", "no/x.onnx"): "--output no/x.onnx: there is no directory no",
        ("lower", "model.onnx", "-o", "no/x.onnx"): "--output no/x.onnx: there is no directory no",
        ("fuse", "model.onnx", "-o", "x.onnx", "--form", "zip"): "form = 'zip' is not one of",
        ("lower", "model.onnx", "-o", "x.onnx", "--form", "zip"): "form = 'zip' is not one of",
        ("fuse", "model.onnx", "-o", "x.onnx", "--report", "no/r.json"): "--report no/r.json: there is no directory no",
        ("fuse", "model.onnx", "-o", "x.onnx", "--report", "x.onnx"): "--report x.onnx: is the model to write",
        ("fuse", "model.onnx", "-o", "model.onnx.data"): "model.onnx: model.onnx.data is the external data",
        ("fuse", "model.onnx"): "Missing option '--output'",
    }
    before = sorted(Path().rglob("*"))
    for arguments, message in mistakes.items():
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.count("\n") == 1, err
        assert err.startswith(f"lucid-onnx: error: {message}"), (arguments, err)
        assert sorted(Path().rglob("*")) == before
    Path("model.onnx.data").unlink()
    code, _, err = run("fuse", "model.onnx", "-o", "x.onnx")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("lucid-onnx: error: model.onnx.data: initializer 'weight' has its data there")


def test_without_onnx_ir(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['onnx_ir'] = None\n"
        "import lucid_onnx\n"
        "try:\n    lucid_onnx.fuse\n"
        "except ImportError as error:\n    print(error)\n"
        "from lucid_onnx import cli\n"
        "sys.exit(cli.main(['inspect', 'x.onnx']))"
    )
    (tmp_path / "x.onnx").touch()
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    message = "lucid_onnx rewrites models with onnx-ir, which is not installed: pip install 'lucid-onnx[rewrite]'"
    assert done.stdout.strip() == message
    assert (done.returncode, done.stderr.strip()) == (2, f"lucid-onnx: error: {message}")
