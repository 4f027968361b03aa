"""Indices [B, L] in standard operators: few nodes, with names, and the same numbers whatever is known and runs them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_testing.graphs import nodes, unread
from lucid_testing.models import attributes

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

TABLE = np.random.default_rng(3).standard_normal((40, 5)).astype(np.float32)


def with_dims(model: onnx.ModelProto, num_bags: int | None, length: int | None) -> onnx.ModelProto:
    """The model, with dimensions of its indices that are known."""
    for value in model.graph.input:
        if value.name in ("indices", "per_sample_weights"):
            for dim, known in zip(value.type.tensor_type.shape.dim, (num_bags, length), strict=True):
                if known is not None:
                    dim.dim_value = known
    return model


def model_of(num_bags: int | None = None, length: int | None = None, **keywords: Any) -> onnx.ModelProto:
    return with_dims(lucid_onnx.build_model(TABLE, two_d=True, **keywords), num_bags, length)


def session(model: onnx.ModelProto, threads: int = 1, fixed: tuple[int, int] | None = None) -> Any:
    """A session; ``fixed``: what num_bags and bag_length are in all its calls."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if fixed is not None:
        for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, fixed, strict=True):
            options.add_free_dimension_override_by_name(dim.dim_param, size)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return lucid_onnx.InferenceSession(model, native=False, session_options=options)


@pytest.mark.parametrize(
    ("length", "keywords", "most"),
    [
        (20, {"mode": "sum"}, 12),
        (64, {"mode": "mean"}, 12),
        (20, {"mode": "max"}, 25),
        (20, {"mode": "sum", "padding_idx": 0}, 25),
        (65, {"mode": "sum"}, 30),
        (None, {"mode": "sum"}, 50),
        (None, {"mode": "mean"}, 50),
        (None, {"mode": "max"}, 90),
    ],
)
def test_few_nodes(length: int | None, keywords: dict[str, Any], most: int) -> None:
    lowered = lucid_onnx.lower(model_of(None, length, **keywords))
    assert len(list(nodes(lowered.graph))) <= most
    onnx.checker.check_model(lowered, full_check=True)
    onnx.shape_inference.infer_shapes(lowered, check_type=True, strict_mode=True, data_prop=True)


def test_every_node_has_a_name_of_its_own() -> None:
    for keywords in ({"mode": "sum"}, {"mode": "max", "padding_idx": 1}, {"mode": "mean", "negative": "skip"}):
        lowered = lucid_onnx.lower(model_of(**keywords))
        names = [node.name for node in nodes(lowered.graph) if node.op_type != "Constant"]
        assert all(names)
        assert len(names) == len(set(names))


@pytest.mark.parametrize("keywords", [{"mode": mode, "max_norm": 1.0} for mode in spec.MODES], ids=str)
def test_no_branch_is_in_another(keywords: dict[str, Any]) -> None:
    """ONNX Runtime 1.32 removes an outer If whose condition it finds constant; an If in it then fails, or crashes."""
    for two_d in (False, True):
        graph = lucid_onnx.lower(lucid_onnx.build_model(TABLE, two_d=two_d, **keywords)).graph
        for node in graph.node:
            for branch in (a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH):
                assert not [n for n in nodes(branch) if n.op_type in ("If", "Loop")]


SHAPES = [(0, 3), (3, 0), (1, 5), (2, 65), (511, 3), (512, 64), (3, 300), (1, 4200)]
KEYWORDS: list[dict[str, Any]] = [
    {"mode": "sum"},
    {"mode": "mean", "padding_idx": -1},
    {"mode": "max", "padding_idx": 0},
    {"mode": "max"},
    {"mode": "sqrtn", "negative": "skip"},
    {"mode": "sum", "max_norm": 1.5},
    {"mode": "mean", "per_sample_weights": True, "divisor": "weights"},
]


@pytest.mark.parametrize("keywords", KEYWORDS, ids=str)
def test_what_is_known_of_the_indices_changes_no_number(keywords: dict[str, Any]) -> None:
    """Functions and nodes, dimensions that are named and that are known, twice in a row, at any thread count."""
    random = np.random.default_rng(11)
    general = [session(lucid_onnx.lower(model_of(**keywords)), threads) for threads in (1, 2, 300)]
    for num_bags, length in SHAPES:
        low = -2 if keywords.get("negative") == "skip" else 0
        feed = {"indices": random.integers(low, len(TABLE), (num_bags, length))}
        if keywords.get("per_sample_weights"):
            feed["per_sample_weights"] = random.uniform(0.5, 1.5, (num_bags, length)).astype(np.float32)
        call = {k: v for k, v in keywords.items() if k != "per_sample_weights"}
        expected = lucid_onnx.reference.embedding_bag(
            feed["indices"], TABLE, per_sample_weights=feed.get("per_sample_weights"), **call
        )
        found = [at.run(None, feed)[0] for at in general for _ in range(2)]
        np.testing.assert_allclose(found[0], expected, rtol=3e-5, atol=3e-5)
        found.append(session(lucid_onnx.lower(model_of(**keywords)), fixed=(num_bags, length)).run(None, feed)[0])
        assert len({array.tobytes() for array in found}) == 1
        if length not in (0, 3, 65):  # which are enough
            continue
        known = session(lucid_onnx.lower(model_of(None, length, **keywords)), 2).run(None, feed)[0]
        np.testing.assert_allclose(known, expected, rtol=3e-5, atol=3e-5)


def test_a_table_without_rows() -> None:
    """Negative indices that are skipped are no rows; others are rejected."""
    table = np.zeros((0, 3), np.float32)
    for mode in ("sum", "max"):
        skipping = session(lucid_onnx.lower(lucid_onnx.build_model(table, mode=mode, two_d=True, negative="skip")))  # type: ignore[arg-type]
        assert not skipping.run(None, {"indices": np.full((2, 70), -1)})[0].any()
        plain = session(lucid_onnx.lower(lucid_onnx.build_model(table, mode=mode, two_d=True)))  # type: ignore[arg-type]
        assert plain.run(None, {"indices": np.zeros((2, 0), np.int64)})[0].shape == (2, 3)
        with pytest.raises(Exception, match=r"out of data bounds|out of bounds"):
            plain.run(None, {"indices": np.zeros((2, 1), np.int64)})


@pytest.mark.parametrize("index", [-1, -(2**63), 40, 2**62])
@pytest.mark.parametrize("length", [None, 3])
def test_bad_indices_are_rejected(index: int, length: int | None) -> None:
    at = session(lucid_onnx.lower(model_of(None, length, mode="sum")))
    with pytest.raises(Exception, match=r"out of data bounds|out of bounds"):
        at.run(None, {"indices": np.array([[0, 1, index]])})
    np.testing.assert_array_equal(at.run(None, {"indices": np.array([[0, 0, 0]])})[0], [3 * TABLE[0]])


def test_no_node_is_unread_when_a_function_is_inlined(tmp_path: Path) -> None:
    """ONNX Runtime before 1.19 gives the memory of what nobody reads to other values, from the second run on."""
    for k, (mode, padding, skip, clip, weighted) in enumerate(
        itertools.product(spec.MODES, (None, 0), ("refuse", "skip"), (None, 1.0), (False, True))
    ):
        if weighted and mode == "max":
            continue
        keywords: dict[str, Any] = {"mode": mode, "padding_idx": padding, "negative": skip, "max_norm": clip}
        if weighted:
            keywords |= {"per_sample_weights": True, "divisor": None if mode == "sum" else ("count", "weights")[k % 2]}
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "inlined.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(model_of(**keywords).SerializeToString(), options, providers=["CPUExecutionProvider"])
        assert not unread(onnx.load(tmp_path / "inlined.onnx")), keywords


@pytest.mark.parametrize("dims", [(None, None), (None, 7), (200, 7), (None, 80)])
@pytest.mark.parametrize(("way", "step"), [("pieces", 1), ("blocks", 4)])
def test_what_was_lowered_comes_back(way: Any, step: int, dims: tuple[int | None, int | None]) -> None:
    """Also in blocks, as releases before wrote, and where dimensions are known later than they were lowered."""
    for keywords in KEYWORDS[::step]:
        model = model_of(*dims, **keywords)
        (wanted,) = lucid_onnx.to_form(model, "native").graph.node
        lowered = lucid_onnx.lower(model, ragged=way)
        late = with_dims(lucid_onnx.lower(model_of(**keywords), ragged=way), *dims)
        for standard in (lowered, late):
            (found,) = lucid_onnx.fuse(standard, form="native").model.graph.node
            assert (found.op_type, list(found.input)) == (wanted.op_type, list(wanted.input))
            assert attributes(found) == attributes(wanted)


def test_what_is_changed_stays() -> None:
    """Other numbers than a bag's: another axis, limit, or reduction."""
    swaps = {
        "ReduceSum": "ReduceMax",
        "LessOrEqual": "Less",
        "GreaterOrEqual": "Greater",
        "And": "Or",
        "Less": "Greater",
    }
    for keywords in ({"mode": "sum"}, {"mode": "max", "padding_idx": 1}):
        standard = lucid_onnx.lower(model_of(**keywords))
        assert len(lucid_onnx.fuse(standard).fused) == 1
        for op_type, other in swaps.items():
            for k, node in enumerate(n for n in nodes(standard.graph) if n.op_type == op_type):
                node.op_type = other
                (first, *_) = lucid_onnx.fuse(standard).fused or [None]
                assert first is None or first.where != "node 'output'", (op_type, k)
                node.op_type = op_type
