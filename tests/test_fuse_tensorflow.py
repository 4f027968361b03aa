"""Fusing lookups that TensorFlow pools by segment: graphs written by hand, node for node as tf2onnx makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_testing.kernels import library_path

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

V, D = 10, 4
INT64 = np.int64


class Lookup:
    """A lookup in a table [10, 4] by ids [N] and segments [N], pooled by segment.

    Args:
        op: "sum", "mean", "sqrt_n" or "max".
        count: the number of segments: "largest" of them and one more, "given" as an input, or a constant.
        distinct: every distinct row is looked up once, as tf.nn.embedding_lookup_sparse does.
        weighted: None, or how the weights got their axis: "Unsqueeze", "constant shape" or "computed shape".
        combiner: what tf.nn.embedding_lookup_sparse divides sums by: "mean" by the sum of weights, "sqrtn" by the root
            of the sum of their squares, which "sqrtn, product" writes as a product.
        guarded: by div_no_nan.
        segment_type: of the ids and of the segments as they come in.
        change: called with an operator and its inputs and attributes before each node; may change them.
    """

    def __init__(
        self,
        op: str = "sum",
        *,
        count: str | int = "largest",
        distinct: bool = False,
        weighted: str | None = None,
        combiner: str | None = None,
        guarded: bool = False,
        segment_type: type = INT64,
        dtype: type = np.float32,
        opset: int = 15,
        change: Callable[[str, list[Any], dict[str, Any]], None] | None = None,
    ) -> None:
        self.opset, self._change = opset, change
        self._nodes: list[onnx.NodeProto] = []
        rows = np.random.default_rng(0).standard_normal((V, D)).astype(dtype)
        self._initializers = {"table": rows}
        self._inputs = {"ids": segment_type, "segments": segment_type}
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

        if distinct:
            narrow = segment_type is np.int32  # which Unique is given in 64 bits
            ids = self("Cast", "ids", to=TensorProto.INT64) if narrow else "ids"
            unique = self._multiple(4, "Unique", ids, sorted=0)
            looked_up = self("Cast", unique[0], to=TensorProto.INT32) if narrow else unique[0]
            inverse = self("Cast", unique[2], to=TensorProto.INT32)
            data = self("Gather", self("Gather", "table", looked_up, axis=0), inverse, axis=0)
        else:
            data = self("Gather", "table", "ids", axis=0)
        if weighted is not None:
            self._inputs["weights"] = dtype
            column = self._column(weighted)
            data = self("Mul", data, column)
        segments = "segments" if segment_type is INT64 else self("Cast", "segments", to=TensorProto.INT64)
        if count == "given":
            self._inputs["count"] = INT64
        pooled = self._segments(op, data, segments, count, kind)
        if combiner is not None:
            square = np.asarray(2, dtype)
            powers = column
            if combiner != "mean":
                powers = self("Pow", column, square) if combiner == "sqrtn" else self("Mul", column, column)
            divisor = self._segments("sum", powers, segments, count, kind)
            divisor = divisor if combiner == "mean" else self("Sqrt", divisor)
            pooled = self("Div", pooled, divisor)
            if guarded:
                zero = np.asarray(0, dtype)
                pooled = self("Where", self("Equal", divisor, zero), zero, pooled)
        self._nodes[-1].output[0] = "pooled"

        graph = helper.make_graph(
            self._nodes,
            "lookup",
            [
                helper.make_tensor_value_info(
                    n, helper.np_dtype_to_tensor_dtype(np.dtype(t)), [] if n == "count" else ["n"]
                )
                for n, t in self._inputs.items()
            ],
            [helper.make_tensor_value_info("pooled", kind, ["b", D])],
            [numpy_helper.from_array(np.asarray(a), n) for n, a in self._initializers.items()],
        )
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)

    def _segments(self, op: str, data: str, segments: str, count: str | int, kind: int) -> str:
        """The rows of each segment, pooled."""
        given = count != "largest"
        number: Any = "count"
        if isinstance(count, int):
            number = INT64(count)
        elif not given:
            number = self("Add", self._reduce("ReduceMax", segments, 0, 0), INT64(1))
        number_1 = np.array([count]) if isinstance(number, INT64) else self._axis("Unsqueeze", number, 0)
        length = self("Shape", segments)
        length_0 = self._axis("Squeeze", length, 0)
        ordered, order = self._multiple(2, "TopK", segments, length, axis=0, largest=0, sorted=1)
        distinct_, _, inverse, counts = self._multiple(4, "Unique", ordered, axis=0, sorted=1)
        longest = self._reduce("ReduceMax", counts, 0, 1)
        divisor = None
        if op in ("mean", "sqrt_n"):
            if isinstance(number, INT64):
                zeros: Any = np.zeros(count, INT64)
            else:
                zeros = self("ConstantOfShape", number_1, value=filled(TensorProto.INT64, 0))
            scattered = self("ScatterElements", zeros, distinct_, counts, axis=0)
            divisor = self("Cast", scattered, to=kind)
            divisor = self("Sqrt", divisor) if op == "sqrt_n" else divisor
            divisor = self("Max", divisor, np.float32(1)) if given else divisor
        each = self("Range", INT64(0), length_0, INT64(1))
        place = self("Mod", each, self("Gather", counts, inverse))
        shape = self("Concat", number_1, longest, axis=0)
        holes = self("ConstantOfShape", shape, value=filled(TensorProto.INT64, -1))
        at = self("Concat", self._axis("Unsqueeze", ordered, -1), self._axis("Unsqueeze", place, -1), axis=1)
        grid = self("ScatterND", holes, at, order)
        width = self("Slice", self("Shape", data), np.array([1]), np.array([2**63 - 1]), np.array([0]))
        nothing = self("ConstantOfShape", width, value=filled(kind, -np.inf if op == "max" else 0))
        rows_ = self("Gather", self("Concat", data, self._axis("Unsqueeze", nothing, 0), axis=0), grid)
        pooled = self._reduce("ReduceMax" if op == "max" else "ReduceSum", rows_, 1, 0)
        return pooled if divisor is None else self("Div", pooled, self._axis("Unsqueeze", divisor, 1))

    def __call__(self, op_type: str, *inputs: Any, **attributes: Any) -> str:
        return self._multiple(1, op_type, *inputs, **attributes)[0]

    def _multiple(self, count: int, op_type: str, *inputs: Any, **attributes: Any) -> list[str]:
        operands = list(inputs)
        if self._change is not None:
            self._change(op_type, operands, attributes)
        names = []
        for given in operands:
            name = given if isinstance(given, str) else f"c{len(self._initializers)}"
            if not isinstance(given, str):
                self._initializers[name] = given
            names.append(name)
        outputs = [f"v{len(self._nodes)}_{k}" for k in range(count)]
        if op_type == "Unique":
            outputs[1] = ""
        self._nodes.append(helper.make_node(op_type, names, outputs, **attributes))
        return outputs

    def _axis(self, op_type: str, value: Any, axis: int) -> str:
        if self.opset < 13:
            return self(op_type, value, axes=[axis])
        return self(op_type, value, np.array([axis]))

    def _reduce(self, op_type: str, value: str, axis: int, keepdims: int) -> str:
        if self.opset < (13 if op_type == "ReduceSum" else 18):
            return self(op_type, value, axes=[axis], keepdims=keepdims)
        return self(op_type, value, np.array([axis]), keepdims=keepdims)

    def _column(self, how: str) -> str:
        if how == "Unsqueeze":
            return self._axis("Unsqueeze", "weights", 1)
        if how == "constant shape":
            return self("Reshape", "weights", np.array([-1, 1]))
        shape = self("Cast", self("Shape", "weights"), to=TensorProto.INT32)
        shape = self("Concat", shape, np.array([1], np.int32), axis=0)
        return self("Reshape", "weights", self("Cast", shape, to=TensorProto.INT64))


def filled(kind: int, number: float) -> onnx.TensorProto:
    return helper.make_tensor("value", kind, [1], [number])


def feed_of(lookup: Lookup, segments: list[int], count: int | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(segments))
    inputs = {v.name: helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in lookup.model.graph.input}
    feed = {
        "ids": rng.integers(0, V, len(segments)).astype(inputs["ids"]),
        "segments": np.array(segments, inputs["segments"]),
    }
    if "weights" in inputs:
        feed["weights"] = rng.uniform(0.1, 2, len(segments)).astype(inputs["weights"])
    if "count" in inputs:
        feed["count"] = np.array(max(segments, default=-1) + 1 if count is None else count)
    return feed


def meant(lookup: Lookup, op: str, feed: dict[str, np.ndarray], count: int, combiner: str | None = None) -> np.ndarray:
    """TensorFlow's result: rows of zeros for empty segments."""
    table = numpy_helper.to_array(lookup.model.graph.initializer[0]).astype(np.float64)
    rows = table[feed["ids"]] * feed.get("weights", np.ones(1))[:, None]
    result = np.zeros((count, D))
    for k in range(count):
        mine = rows[feed["segments"] == k]
        if len(mine):
            number = {"mean": len(mine), "sqrt_n": len(mine) ** 0.5}.get(op, 1)
            if combiner is not None:
                w = feed["weights"][feed["segments"] == k].astype(np.float64)
                number = w.sum() if combiner == "mean" else (w * w).sum() ** 0.5
            result[k] = mine.max(0) if op == "max" else mine.sum(0) / number
    return result


#: Sorted as most are; in any order; with gaps; one segment; each of its own.
SEGMENTS = [[0, 0, 1, 2, 2, 2], [2, 0, 1, 1, 0, 0, 2, 1], [1, 4, 4], [0] * 40, [0, 1, 2, 3]]

LOOKUPS: dict[str, dict[str, Any]] = {
    "sum": {},
    "mean": {"op": "mean"},
    "sqrt_n": {"op": "sqrt_n"},
    "max": {"op": "max"},
    "sum, given": {"count": "given", "distinct": True, "opset": 18},
    "mean, given": {"op": "mean", "count": "given", "segment_type": np.int32, "opset": 13},
    "mean, constant": {"op": "mean", "count": 6, "distinct": True},
    "sqrt_n, given": {"op": "sqrt_n", "count": "given", "distinct": True},
    "mean, old": {"op": "mean", "distinct": True, "segment_type": np.int32, "opset": 11},
    "weights": {"weighted": "Unsqueeze", "distinct": True},
    "weights, reshaped": {"weighted": "constant shape"},
    "weights, shape computed": {"weighted": "computed shape", "distinct": True},
    "sum, double": {"dtype": np.float64},
    "mean by count": {"op": "mean", "weighted": "Unsqueeze"},
    "mean by weights": {"weighted": "Unsqueeze", "distinct": True, "combiner": "mean"},
    "mean by weights, guarded": {"weighted": "Unsqueeze", "combiner": "mean", "guarded": True},
    "sqrtn by weights": {"weighted": "constant shape", "combiner": "sqrtn", "count": "given"},
    "sqrtn by weights, guarded": {"weighted": "Unsqueeze", "combiner": "sqrtn, product", "guarded": True},
}


PORTABLE = ("sum", "mean, given", "weights")


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_pooled_by_segment_are_bags(name: str) -> None:
    keywords = LOOKUPS[name]
    lookup, op, count = Lookup(**keywords), keywords.get("op", "sum"), keywords.get("count", "largest")
    report = lucid_onnx.fuse(lookup.model)
    assert report.unfused == ()
    ((pattern, mode, operator),) = [(f.pattern, f.mode, f.op) for f in report.fused]
    combiner = keywords.get("combiner")
    pooling = combiner.partition(",")[0] if combiner else op.replace("_", "")
    assert (pattern, mode) == ("tf2onnx segments", pooling)
    by = ("weights" if combiner else "count") if "weighted" in keywords and mode != "sum" else None
    assert report.fused[0].attributes["divisor"] == by
    assert operator == ("EmbeddingBagWeighted" if "weighted" in keywords else "EmbeddingBag")
    kinds = [n.op_type for n in report.model.graph.node]
    # A guard needs the sum of weights; the rest is sorted, and no row of the table is gathered but by the bag.
    guarded = keywords.get("guarded", False)
    assert ("Unique" in kinds, "TopK" in kinds, "ScatterND" in kinds) == (guarded, True, guarded)
    assert "Div" not in kinds
    assert [n for n in report.model.graph.node if "table" in n.input and n.domain == ""] == []
    before = lucid_onnx.InferenceSession(lookup.model, native=False)
    after = {}
    if name in PORTABLE or library_path() is None:  # such a session takes half a second
        after["portable"] = lucid_onnx.InferenceSession(report.model, native=False)
    if library_path() is not None:
        after["native"] = lucid_onnx.InferenceSession(report.model)
    tolerance = 1e-13 if keywords.get("dtype") is np.float64 else 1e-5  # sums of up to 40 rows of about 1
    for segments in SEGMENTS:
        feed = feed_of(lookup, segments)
        total = count if isinstance(count, int) else max(segments) + 1
        expected = meant(lookup, op, feed, total, combiner)
        original = before.run(None, feed)[0]
        present = np.isin(np.arange(total), segments)
        np.testing.assert_allclose(original[present], expected[present], rtol=tolerance, atol=tolerance)
        for way, session in after.items():
            found = session.run(None, feed)[0]
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance, err_msg=f"{way} {segments}")
    if count == "given":
        for segments, number in (([0, 2], 5), ([], 3), ([], 0)):
            feed = feed_of(lookup, segments, number)
            for session in after.values():
                found = session.run(None, feed)[0]
                np.testing.assert_allclose(found, meant(lookup, op, feed, number, combiner), rtol=1e-5, atol=1e-5)
    for session in after.values():  # below zero, and as many as there are: no bag
        for wrong in (-1, *([7] if count != "largest" else [])):
            feed = feed_of(lookup, [0, wrong], 7)
            with pytest.raises(Exception, match=r"[Oo]ut of|bound|range|ndices element|index"):
                session.run(None, feed)


def test_a_maximum_of_a_given_number_of_segments_stays() -> None:
    """Of an empty one it is -inf to the model."""
    lookup = Lookup("max", count="given")
    report = lucid_onnx.fuse(lookup.model)
    assert report.fused == ()
    ((pattern, reason),) = [(u.pattern, u.reason) for u in report.unfused]
    assert pattern == "tf2onnx segments"
    assert reason == "the number of segments is given, and the maximum of an empty one is not a row of zeros"


def _swapped(op: str, old: Any, new: Any) -> Callable[[str, list[Any], dict[str, Any]], None]:
    """Puts ``new`` where an operator has the constant ``old``."""

    def change(op_type: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
        for k, given in enumerate(inputs):
            if op_type == op and not isinstance(given, str) and np.array_equal(given, old):
                inputs[k] = np.asarray(new, np.asarray(given).dtype)

    return change


def _set(op: str, name: str, value: Any, count: int = 1) -> Callable[[str, list[Any], dict[str, Any]], None]:
    """Gives the ``count``-th operator of a kind another attribute."""
    seen = 0

    def change(op_type: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
        nonlocal seen
        seen += op_type == op
        if op_type == op and seen == count:
            attributes[name] = value

    return change


CHANGES: dict[str, tuple[dict[str, Any], Callable[[str, list[Any], dict[str, Any]], None]]] = {
    "columns cut": ({}, _swapped("Slice", [1], [2])),
    "positions from 1": ({}, _swapped("Range", 0, 1)),
    "largest first": ({}, _set("TopK", "largest", 1)),
    "another hole": ({}, _set("ConstantOfShape", "value", filled(TensorProto.INT64, -2))),
    "holes that are ones": ({}, _set("ConstantOfShape", "value", filled(TensorProto.FLOAT, 1), 2)),
    "modulus": ({}, _set("Mod", "fmod", 1)),
    "columns gathered": ({}, _set("Gather", "axis", 1)),
    "column of weights": ({"weighted": "constant shape"}, _swapped("Reshape", [-1, 1], [1, -1])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_written_otherwise_stays(name: str) -> None:
    """Every change alters the graph's numbers, or is one that no exporter writes."""
    keywords, change = CHANGES[name]
    changed = Lookup(**keywords, change=change).model
    assert changed != Lookup(**keywords).model
    assert lucid_onnx.fuse(changed).fused == ()


@pytest.mark.parametrize("what", ["one segment more", "distinct rows otherwise"])
def test_what_is_a_bag_all_the_same(what: str) -> None:
    """Another way to compute the number of segments; distinct rows that are not known to be those of the ids."""
    more = what == "one segment more"
    change = _swapped("Add", 1, 2) if more else _set("Unique", "axis", 0)
    lookup = Lookup(distinct=not more, change=change)
    report = lucid_onnx.fuse(lookup.model)
    assert [f.table == "table" for f in report.fused] == [more]
    feed = feed_of(lookup, [2, 0, 0, 1])
    expected = lucid_onnx.InferenceSession(lookup.model, native=False).run(None, feed)[0]
    assert expected.shape == (4 if more else 3, D)
    found = lucid_onnx.InferenceSession(report.model, native=False).run(None, feed)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


ONES = filled(TensorProto.FLOAT, 1)
#: By what is divided by.
OTHER_DIVISORS: dict[str, tuple[dict[str, Any], Callable[[str, list[Any], dict[str, Any]], None]]] = {
    "at least two": ({"op": "mean", "count": "given"}, _swapped("Max", 1, 2)),
    "root of cubes": ({"weighted": "Unsqueeze", "combiner": "sqrtn"}, _swapped("Pow", 2, 3)),
    "weights and one": ({"weighted": "Unsqueeze", "combiner": "mean"}, _set("ConstantOfShape", "value", ONES, 4)),
}


@pytest.mark.parametrize("name", OTHER_DIVISORS)
def test_a_mean_of_other_counts_is_a_sum_behind_them(name: str) -> None:
    """The sum is a bag whatever it is divided by."""
    keywords, change = OTHER_DIVISORS[name]
    lookup = Lookup(**keywords, change=change)
    assert lookup.model != Lookup(**keywords).model
    report = lucid_onnx.fuse(lookup.model)
    assert [(f.pattern, f.mode, f.attributes["divisor"]) for f in report.fused] == [("tf2onnx segments", "sum", None)]
    assert "Div" in {n.op_type for n in report.model.graph.node}
    feed = feed_of(lookup, [0, 0, 1, 2, 2, 2])
    expected = lucid_onnx.InferenceSession(lookup.model, native=False).run(None, feed)[0]
    found = lucid_onnx.InferenceSession(report.model).run(None, feed)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
