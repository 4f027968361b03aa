"""Files of ours that other tools have touched: renamed, inlined, converted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
import onnx.inliner
import onnx.version_converter
import pytest

import lucid_onnx
from lucid_onnx.builder import functions, renamed
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops.embedding_bag import cases as named
from lucid_onnx.ops.quantized_embedding_bag import cases as quantized
from lucid_testing.kernels import library_path
from lucid_testing.models import attributes, bags, results, swapped_operators

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((300, 16)).astype(np.float32)
FLAT = {"indices": np.array([1, 2, 3, 3]), "offsets": np.array([0, 2])}


def _bag(**keywords: Any) -> onnx.ModelProto:
    return lucid_onnx.build_model(TABLE, **keywords)


def _padded() -> onnx.ModelProto:
    return lucid_onnx.lower(_bag(mode="sum"), form="portable", ragged="padded", longest_bag=64)


#: Models of one node, and the operator's name.
MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "bag": (lambda: _bag(mode="max", padding_idx=3), "EmbeddingBag"),
    "rows": (lambda: _bag(mode="sum", two_d=True, per_sample_weights=True), "EmbeddingBag2DWeighted"),
    "oldest opset": (lambda: _bag(mode="sum", opset=16), "EmbeddingBag"),
    "in a loop": (lambda: lucid_onnx.lower(_bag(mode="mean"), form="portable", ragged="loop"), "EmbeddingBag"),
    "padded": (_padded, "EmbeddingBag"),
    "quantized": (lambda: lucid_onnx.quantize(_bag(mode="sum"), min_bytes=0).model, "QuantizedEmbeddingBag"),
    "gradient": (lambda: lucid_onnx.build_grad_model(TABLE), "EmbeddingBagGrad"),
    "collection": (lambda: lucid_onnx.build_collection_model([TABLE, TABLE], mode="mean"), "EmbeddingBagCollection"),
    "packed": (
        lambda: lucid_onnx.build_collection_model([TABLE] * 3, mode="sum", layout="packed", include_last_offset=True),
        "EmbeddingBagCollection",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_functions_are_recognised_by_what_they_compute(name: str) -> None:
    build, op = MODELS[name]
    original = build()
    model = onnx.compose.add_prefix(original, "user_")
    assert [f"user_{f.name}" for f in original.functions] == [f.name for f in model.functions]
    native = lucid_onnx.to_form(model, "native")
    assert [n.op_type for n in native.graph.node] == [op]
    assert list(native.functions) == []
    again = lucid_onnx.to_form(model, "portable")
    assert sorted(f.name for f in again.functions) == sorted(f.name for f in original.functions)
    onnx.checker.check_model(again, full_check=True)


def _towers() -> onnx.ModelProto:
    """Two models of one bag, joined."""
    tower = _bag(mode="sum")
    return onnx.compose.merge_models(tower, tower, io_map=[], prefix1="user_", prefix2="item_")


FEEDS = {f"{tower}_{name}": array for tower in ("user", "item") for name, array in FLAT.items()}


@pytest.mark.parametrize("verb", ["fuse", "lower", "quantize", "to_form"])
def test_joined_models_are_taken_by_every_verb(tmp_path: Path, verb: str) -> None:
    model = _towers()
    before = model.SerializeToString()
    expected = results(model, FEEDS, native=False)
    path = tmp_path / "towers.onnx"
    onnx.save(model, path)
    calls: dict[str, Callable[[Any], onnx.ModelProto]] = {
        "fuse": lambda m: lucid_onnx.fuse(m).model,
        "lower": lucid_onnx.lower,
        "quantize": lambda m: lucid_onnx.quantize(m, dtype="float16", min_bytes=0).model,
        "to_form": lambda m: lucid_onnx.to_form(onnx.load(m) if isinstance(m, Path) else m, "portable"),
    }
    for source in (model, path):
        found = results(calls[verb](source), FEEDS, native=False)
        tolerance = 2e-3 if verb == "quantize" else 0
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=5 * tolerance)
    assert model.SerializeToString() == before


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("kind", ["model", "bytes", "path", "external"])
def test_joined_models_run_natively(tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder) -> None:
    model = _towers()
    source: Any = {"model": model, "bytes": model.SerializeToString()}.get(kind, tmp_path / "towers.onnx")
    if isinstance(source, Path):
        onnx.save(_towers(), source, save_as_external_data=kind == "external", size_threshold=0)
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = lucid_onnx.InferenceSession(source, options)
    found = session.run(None, FEEDS)
    for a, b in zip(found, results(model, FEEDS, native=False), strict=True):
        np.testing.assert_array_equal(a, b)
    events = [e for e in json.loads(Path(session.end_profiling()).read_text()) if e.get("cat") == "Node"]
    if not recwarn.list:  # an old release cannot be told where the data is
        assert {e["args"]["op_name"] for e in events} == {"EmbeddingBag"}
    # The options serve other models, whose external data is elsewhere.
    options.enable_profiling = False
    other = tmp_path / "other" / "bag.onnx"
    other.parent.mkdir()
    onnx.save(_bag(mode="sum"), other, save_as_external_data=True, size_threshold=0)
    lucid_onnx.InferenceSession(other, options).run(None, FLAT)


def test_another_body_is_not_taken_for_ours() -> None:
    """A function with a name like ours that computes something else is kept, and is told of."""
    model = onnx.compose.add_prefix(_bag(mode="sum"), "user_")
    (function,) = model.functions
    changed = next(n for n in function.node if n.op_type == "Add")
    changed.op_type = "Sub"
    assert renamed(model.functions) == {}
    assert [n.op_type for n in lucid_onnx.to_form(model, "portable").graph.node] == ["user_EmbeddingBag"]
    report = lucid_onnx.fuse(model)
    assert [(u.pattern, u.reason) for u in report.unfused] == [
        (
            "function",
            "ai.lucid::user_EmbeddingBag is a function that computes something else than the operators of this "
            "release of lucid-onnx",
        )
    ]
    assert [f.name for f in report.model.functions] == ["user_EmbeddingBag"]
    with pytest.raises(ValueError, match=r"computes something else .* no standard form"):
        lucid_onnx.lower(model)


@pytest.mark.parametrize("place", ["output", "input", "attribute", "constant", "branch"])
def test_every_part_of_a_body_counts(place: str) -> None:
    model = onnx.compose.add_prefix(_bag(mode="sum"), "user_")
    (function,) = model.functions
    if place == "output":
        function.output[0] = function.node[-1].input[0]
    elif place == "input":
        node = next(n for n in function.node if n.op_type == "Sub")
        node.input[0], node.input[1] = node.input[1], node.input[0]
    elif place == "attribute":
        node = next(n for n in function.node if n.op_type == "Concat")
        node.attribute[0].i = 1
    elif place == "constant":
        tensors = [a.t for n in function.node if n.op_type == "Constant" for a in n.attribute if a.HasField("t")]
        tensor = next(t for t in tensors if t.data_type == onnx.TensorProto.INT64)
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + 1))
    else:
        branches = [a.g for n in function.node if n.op_type == "If" for a in n.attribute]
        a, b = next((a, b) for a, b in zip(branches[::2], branches[1::2], strict=True) if a.node != b.node)
        kept = onnx.GraphProto()
        kept.CopyFrom(a)
        a.CopyFrom(b)
        b.CopyFrom(kept)
    assert renamed(model.functions) == {}


def test_names_order_and_duplicates_within_a_body_do_not_count() -> None:
    model = onnx.compose.add_prefix(_bag(mode="mean"), "user_")
    (function,) = model.functions
    twice = next(n for n in function.node if n.op_type == "Shape")
    again = onnx.NodeProto()
    again.CopyFrom(twice)
    again.output[0] = "again"
    function.node.insert(0, again)
    for node in function.node:
        node.name, node.doc_string = f"n_{node.output[0]}", "touched"
        for k, name in enumerate(node.input):
            if name == twice.output[0]:
                node.input[k] = "again"
    assert [op.name for op in renamed(model.functions).values()] == ["EmbeddingBag"]


def test_functions_are_read_without_the_rest_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "towers.onnx"
    path.write_bytes(_towers().SerializeToString())
    assert [f.name for f in functions(path)] == ["user_EmbeddingBag", "item_EmbeddingBag"]
    content = path.read_bytes()
    for length in (0, 1, 7, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert len(functions(path)) <= 1
    path.write_bytes(b"\xff" * 100)
    assert functions(path) == []


def test_a_version_converter_leaves_nodes_that_get_their_functions_back() -> None:
    """onnx.version_converter drops functions."""
    model = onnx.version_converter.convert_version(_bag(mode="mean"), 21)
    assert list(model.functions) == []
    expected = results(_bag(mode="mean"), FLAT, native=False)[0]
    for again in (lucid_onnx.to_form(model, "portable"), lucid_onnx.fuse(model).model):
        assert [f.name for f in again.functions] == ["EmbeddingBag"]
        np.testing.assert_allclose(results(again, FLAT, native=False)[0], expected, rtol=1e-6)
    lost = onnx.version_converter.convert_version(onnx.compose.add_prefix(_bag(mode="mean"), "user_"), 21)
    with pytest.raises(ValueError, match=r"ai.lucid::user_EmbeddingBag is not one of .* a tool has renamed it"):
        lucid_onnx.to_form(lost, "portable")


def test_bags_are_recognised_natively_whatever_their_names() -> None:
    report = lucid_onnx.fuse(_towers())
    assert [n.op_type for n in bags(report.model)] == ["EmbeddingBag", "EmbeddingBag"]
    assert report.unfused == ()
    assert library_path() is None or results(report.model, FEEDS)[0].shape == (2, 16)


@pytest.mark.parametrize("opset", [16, 18])
def test_inlined_functions_come_back(opset: int) -> None:
    """onnx.inliner, and others, put a function's nodes in the place of the node that calls it."""
    for case in [*list(named.all_cases().values())[3::40], *list(quantized.all_cases().values())[5::60]]:
        expected = case_model(case, "native", opset, constant=True)
        model = onnx.inliner.inline_local_functions(case_model(case, "portable", opset, constant=True))
        assert bags(model) == []
        report = lucid_onnx.fuse(model, form="native")
        assert [n.op_type for n in report.model.graph.node] == [n.op_type for n in expected.graph.node], case.name
        (found,), (wanted,) = report.model.graph.node, expected.graph.node
        assert (attributes(found), list(found.input)) == (attributes(wanted), list(wanted.input)), case.name
        assert report.unfused == ()


def test_a_changed_inlined_function_stays() -> None:
    inlined = onnx.inliner.inline_local_functions(_bag(mode="sum"))
    swaps = {"Add": "Sub", "Sub": "Add", "Max": "Min", "Min": "Max", "Greater": "Less", "ReduceSum": "ReduceMax"}
    stayed = 0
    for what, model in swapped_operators(inlined, swaps, step=9, more_than=10):
        report = lucid_onnx.fuse(model)
        # Else what was changed decides nothing for these attributes: a branch that is not taken.
        stayed += not report.fused
        if not report.fused:
            continue
        (expected,) = results(model, FLAT, native=False)
        np.testing.assert_allclose(results(report.model, FLAT)[0], expected, rtol=1e-5, atol=1e-6, err_msg=what)
    assert stayed > 5


@pytest.mark.parametrize("io", [False, True])
def test_a_model_in_float16_stays_a_bag(io: bool) -> None:
    """onnxruntime's converter, and onnxconverter_common's, turn the table; the function takes every dtype."""
    float16 = pytest.importorskip("onnxruntime.transformers.float16", reason="onnxruntime has no float16 converter")
    model = float16.convert_float_to_float16(_bag(mode="mean"), keep_io_types=io, disable_shape_infer=io)
    (table,) = model.graph.initializer
    assert table.data_type == onnx.TensorProto.FLOAT16
    (expected,) = results(_bag(mode="mean"), FLAT, native=False)
    for found in (model, lucid_onnx.fuse(model).model, lucid_onnx.lower(model)):
        assert len(bags(found)) == (found.functions != [])
        (pooled,) = results(found, FLAT, native=False)
        assert pooled.dtype == (np.float32 if io else np.float16)
        np.testing.assert_allclose(pooled, expected, rtol=2e-3, atol=2e-3)  # two roundings to float16
