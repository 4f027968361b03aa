"""Masks, weights and divisors beside a bag: one node that skips positions and divides, wherever that is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import lucid_onnx
from lucid_testing.pooled_graphs import D, Graph, V, expected_results, fused, model_of, same, small

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

KINDS = {"bool": TensorProto.BOOL, "int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
#: Bags of three positions: one whole, one masked in part, one altogether.
MASK = np.array([[1, 1, 1], [0, 1, 0], [0, 0, 0]])
IDS = np.array([[1, 5, 2], [0, 7, 9], [3, 3, 4]])


def column(g: Graph, x: str) -> str:
    return g("Unsqueeze", x, np.array([-1]))


def masked(g: Graph, mask: str = "m", how: str = "multiplied") -> str:
    """Rows whose mask is a value of truth or of numbers."""
    rows = g("Gather", "table", "i")
    if how == "selected":
        return g("Where", column(g, g.cast(mask, "bool")), rows, np.zeros((), np.float32))
    return g("Mul", rows, column(g, g.cast(mask, "float32")))


def total(g: Graph, x: str, keepdims: int = 1) -> str:
    return g("ReduceSum", x, np.array([1]), keepdims=keepdims)


def with_mask(kind: str = "bool") -> Graph:
    g = small()
    g.inputs["m"] = (KINDS[kind], g.inputs["i"][1])
    return g


def found(report: Any) -> tuple[str, str, str, str | None]:
    assert report.unfused == ()
    (bag,) = report.fused
    return bag.op.removeprefix("EmbeddingBag"), bag.mode, bag.attributes["negative"], bag.attributes["divisor"]


def kinds(report: Any) -> set[str]:
    return {n.op_type for n in report.model.graph.node}


#: Divisors by the count of a mask of truth values; each is that count where it is 1 or more.
DIVISORS: dict[str, Callable[[Graph, str], str]] = {
    "clip 1": lambda g, n: g("Clip", n, np.array(1, np.float32)),
    "clip 1e-9": lambda g, n: g("Clip", n, np.array(1e-9, np.float32)),
    "max": lambda g, n: g("Max", n, np.array(1, np.float32)),
    "+ 1e-9": lambda g, n: g("Add", n, np.array(1e-9, np.float32)),
    "+ 5.9e-8": lambda g, n: g("Add", n, np.array(5.9e-8, np.float32)),
    "where": lambda g, n: g("Where", g("Equal", n, np.array(0, np.float32)), np.array(1, np.float32), n),
}


@pytest.mark.parametrize("how", ["multiplied", "selected"])
@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("root", ["", "inside", "outside"])
def test_means_over_a_mask_of_truth_values_are_one_node(how: str, divisor: str, root: str) -> None:
    g = with_mask()
    n = total(g, g.cast("m", "float32"))
    n = g("Sqrt", n) if root == "inside" else n
    n = DIVISORS[divisor](g, n)
    n = g("Sqrt", n) if root == "outside" else n
    model = model_of(g, g("Div", total(g, masked(g, how=how), 0), n))
    report = fused(model)
    assert found(report) == ("2D", "sqrtn" if root else "mean", "skip", None)
    assert not {"Div", "ReduceSum", "Mul", "Sqrt"} & kinds(report)
    same(g, model, report, {"i": IDS, "m": MASK.astype(bool)})


@pytest.mark.parametrize("least", [6e-8, 1e-7, 1e-3, 2.0])
def test_larger_divisors_stay(least: float) -> None:
    """1 + 6e-8 is 1 in float32, 1 + 1e-7 is not; and a bag of one row is not to be divided by 2."""
    g = with_mask()
    n = total(g, g.cast("m", "float32"))
    n = g("Max", n, np.float32(least)) if least > 1 else g("Add", n, np.float32(least))
    report = fused(model_of(g, g("Div", total(g, masked(g), 0), n)))
    lost = np.float32(1) + np.float32(least) == 1
    assert found(report) == ("2D", "mean" if lost else "sum", "skip", None)
    assert ("Div" in kinds(report)) != lost
    same(g, model_of(g, g.nodes[-1].output[0]), report, {"i": IDS, "m": MASK.astype(bool)})


SUMS: dict[str, tuple[Callable[[Graph], str], str, str]] = {
    "two masks": (lambda g: masked(g, g("And", "m", g("Less", "i", np.array(6)))), "2D", "skip"),
    "a mask of ids that are kept": (lambda g: masked(g, g("Less", "i", np.array(6))), "2D", "skip"),
    "a mask after another": (
        lambda g: g(
            "Mul", masked(g, how="selected"), column(g, g.cast(g("Not", g("Equal", "i", np.array(5))), "float32"))
        ),
        "2D",
        "skip",
    ),
    "one minus a mask": (
        lambda g: masked(g, g("Sub", np.array(1, np.float32), g.cast(g("Not", "m"), "float32"))),
        "2D",
        "skip",
    ),
    "weights by row": (
        lambda g: g("Mul", masked(g), column(g, g("Gather", np.linspace(-1, 1, V, dtype=np.float32), "i"))),
        "2DWeighted",
        "skip",
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_skip_what_is_masked(name: str) -> None:
    write, op, negative = SUMS[name]
    g = with_mask()
    model = model_of(g, total(g, write(g), 0))
    report = fused(model)
    assert found(report) == (op, "sum", negative, None)
    same(g, model, report, {"i": IDS, **({"m": MASK.astype(bool)} if "m" in str(model) else {})})


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["table", "weights"])
@pytest.mark.parametrize("how", ["multiplied", "selected"])
def test_what_is_not_finite_is_not_skipped_under_a_product(number: float, where: str, how: str) -> None:
    """0 times infinity is NaN to the model. What is selected away is not read, unless it is multiplied afterwards."""
    g = with_mask()
    rows = masked(g, how=how)
    if where == "table":
        g.constants["table"][7] = number
    else:
        g.inputs["w"] = (TensorProto.FLOAT, g.inputs["i"][1])
        rows = g("Mul", rows, column(g, "w"))
    model = model_of(g, total(g, rows, 0))
    report = fused(model)
    skips = how == "selected" and where == "table"
    assert found(report) == ("2D" if skips else "2DWeighted", "sum", "skip" if skips else "refuse", None)
    mask = MASK.astype(bool)
    mask[1, 1] = False  # id 7
    w = np.ones(IDS.shape, np.float32)
    w[1, 1] = number
    feed = {"i": IDS, "m": mask, **({"w": w} if where == "weights" else {})}
    (expected,) = expected_results(model, [feed])
    assert expected is not None
    assert np.isnan(expected[1]).all() != skips
    same(g, model, report, feed)


def test_a_table_that_is_an_input_may_hold_anything() -> None:
    g = with_mask()
    del g.constants["table"]
    g.inputs["table"] = (TensorProto.FLOAT, (V, D))
    model = model_of(g, total(g, masked(g), 0))
    report = fused(model)
    assert found(report) == ("2DWeighted", "sum", "refuse", None)
    table = np.ones((V, D), np.float32)
    table[9] = np.inf
    same(g, model, report, {"i": IDS, "m": MASK.astype(bool), "table": table})


@pytest.mark.parametrize("kind", ["int64", "float32"])
def test_masks_of_numbers_may_hold_other_numbers(kind: str) -> None:
    """Of an input of numbers is not known that it holds 0 and 1: they are weights, and a Clip of their sum stays."""
    g = with_mask(kind)
    n = g("Clip", total(g, g.cast("m", "float32")), np.array(1, np.float32))
    model = model_of(g, g("Div", total(g, masked(g), 0), n))
    report = fused(model)
    assert found(report) == ("2DWeighted", "sum", "skip" if kind == "int64" else "refuse", None)
    other = np.array([[2, 1, -1], [0, -2, 1], [1, -1, 0]])
    for mask in (MASK, other):
        same(g, model, report, {"i": IDS, "m": mask.astype(kind)})


@pytest.mark.parametrize("of", ["weights", "squares", "int64 mask", "bool mask", "weights by mask"])
def test_sums_that_are_divided_by_their_weights(of: str) -> None:
    g = with_mask("int64" if of == "int64 mask" else "bool")
    g.inputs["w"] = (TensorProto.FLOAT, g.inputs["i"][1])
    w = g.cast("m", "float32") if of in ("int64 mask", "bool mask") else "w"
    w = g("Mul", w, g.cast("m", "float32")) if of == "weights by mask" else w
    rows = g("Mul", g("Gather", "table", "i"), column(g, w))
    n = g("Sqrt", total(g, g("Mul", w, w))) if of == "squares" else total(g, w)
    g.inputs = {name: kind for name, kind in g.inputs.items() if any(name in node.input for node in g.nodes)}
    model = model_of(g, g("Div", total(g, rows, 0), n))
    report = fused(model)
    assert found(report) == ("2DWeighted", "sqrtn" if of == "squares" else "mean", "refuse", "weights")
    assert not {"Div", "ReduceSum", "Sqrt"} & kinds(report)
    feed = {"i": IDS, "m": MASK, "w": np.array([[1, 2, -1], [0.5, 0, 0], [0, 0, 0]])}
    types = {name: {1: np.float32, 7: np.int64, 9: bool}[kind] for name, (kind, _) in g.inputs.items()}
    same(g, model, report, {name: np.asarray(feed[name]).astype(dtype) for name, dtype in types.items()})


NOT_THEIR_WEIGHTS: dict[str, Callable[[Graph], str]] = {
    "magnitudes": lambda g: total(g, g("Abs", "w")),
    "clipped": lambda g: g("Clip", total(g, "w"), np.array(1e-9, np.float32)),
    "one more": lambda g: g("Add", total(g, "w"), np.array(1e-3, np.float32)),
    "others": lambda g: total(g, "v"),
    "cubes": lambda g: g("Sqrt", total(g, g("Mul", g("Mul", "w", "w"), "w"))),
    "squares": lambda g: total(g, g("Mul", "w", "w")),
    "root": lambda g: g("Sqrt", total(g, "w")),
    "products": lambda g: total(g, g("Mul", "w", "v")),
    "over bags": lambda g: column(g, g("ReduceSum", "w", np.array([0]), keepdims=0)),
    "of the first": lambda g: total(g, g("Slice", "w", np.array([0]), np.array([2]), np.array([1]))),
}


@pytest.mark.parametrize("name", NOT_THEIR_WEIGHTS)
def test_what_is_not_the_sum_of_the_weights_stays(name: str) -> None:
    g = small()
    g.inputs |= {"w": (TensorProto.FLOAT, ("d0", "d1")), "v": (TensorProto.FLOAT, ("d0", "d1"))}
    divisor = NOT_THEIR_WEIGHTS[name](g)
    rows = g("Mul", g("Gather", "table", "i"), column(g, "w"))
    model = model_of(g, g("Div", total(g, rows, 0), divisor))
    report = fused(model)
    assert found(report) == ("2DWeighted", "sum", "refuse", None)
    w, v = np.random.default_rng(0).uniform(0.1, 2, (2, 3, 3)).astype(np.float32)
    same(g, model, report, {"i": IDS, "w": w, "v": v})


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("by", ["mean", "constant", "shape", "ones", "root"])
def test_sums_that_are_divided_by_the_length_of_bags(by: str, weighted: bool) -> None:
    g = small()
    if by == "constant":
        g.inputs["i"] = (TensorProto.INT64, ("d0", 3))
    rows = g("Gather", "table", "i")
    if weighted:
        g.inputs["w"] = (TensorProto.FLOAT, g.inputs["i"][1])
        rows = g("Mul", rows, column(g, "w"))
    size = g.cast(g("Gather", g("Shape", "i"), np.array([1])), "float32")
    n = {
        "mean": lambda: None,
        "constant": lambda: np.array(3, np.float32),
        "shape": lambda: size,
        "ones": lambda: total(g, g("Expand", np.ones((), np.float32), g("Shape", "i"))),
        "root": lambda: g("Sqrt", size),
    }[by]()
    pooled = g("ReduceMean", rows, np.array([1]), keepdims=0) if n is None else g("Div", total(g, rows, 0), n)
    model = model_of(g, pooled)
    report = fused(model)
    mode = "sqrtn" if by == "root" else "mean"
    assert found(report) == (*(("2DWeighted", mode, "refuse", "count") if weighted else ("2D", mode, "refuse", None)),)
    assert not {"Div", "ReduceSum"} & kinds(report)
    same(g, model, report, {"i": IDS, **({"w": np.eye(3, dtype=np.float32)} if weighted else {})})
    # A mean over no columns is NaN to torch: where L may be 0, the bag gets what keeps it so.
    report = lucid_onnx.fuse(model)
    (bag,) = report.fused
    assert bag.mode == mode
    feed = {"i": np.zeros((2, 0), np.int64), **({"w": np.zeros((2, 0), np.float32)} if weighted else {})}
    if by in ("shape", "root"):
        (got,) = lucid_onnx.InferenceSession(report.model).run(None, feed)
        assert np.isnan(got).all()


@pytest.mark.parametrize("number", [2, 4])
def test_another_length_stays(number: int) -> None:
    g = small()
    g.inputs["i"] = (TensorProto.INT64, ("d0", 3))
    model = model_of(g, g("Div", total(g, g("Gather", "table", "i"), 0), np.array(number, np.float32)))
    report = fused(model)
    assert found(report) == ("2D", "sum", "refuse", None)
    same(g, model, report, {"i": IDS})


@pytest.mark.parametrize("of", ["bool mask", "weights", "length", "squares"])
@pytest.mark.parametrize("safe", [True, False])
def test_means_that_are_zero_where_they_would_be_divided_by_zero(of: str, safe: bool) -> None:
    """``divide_no_nan`` of Keras and TensorFlow."""
    g = with_mask()
    g.inputs["w"] = (TensorProto.FLOAT, g.inputs["i"][1])
    w = {"bool mask": lambda: g.cast("m", "float32"), "length": lambda: g("Expand", np.float32(1), g("Shape", "i"))}
    weights = w.get(of, lambda: "w")()
    n = total(g, weights) if of != "squares" else g("Sqrt", total(g, g("Mul", weights, weights)))
    zero = g("Equal", n, np.array(0, np.float32))
    sums = total(g, g("Mul", g("Gather", "table", "i"), column(g, weights)), 0)
    quotient = g("Div", sums, g("Where", zero, np.array(1, np.float32), n) if safe else n)
    g.inputs = {name: kind for name, kind in g.inputs.items() if any(name in node.input for node in g.nodes)}
    model = model_of(g, g("Where", zero, np.array(0, np.float32), quotient))
    report = lucid_onnx.fuse(model)
    expected = {
        "bool mask": ("2D", "mean", "skip", None),
        "length": ("2D", "mean", "refuse", None),
        "weights": ("2DWeighted", "mean", "refuse", "weights"),
        "squares": ("2DWeighted", "sqrtn", "refuse", "weights"),
    }
    assert found(report) == expected[of]
    given = {"i": IDS, "m": MASK.astype(bool), "w": np.array([[1, 2, -1], [0.5, 0, 0], [1, -1, 0]], np.float32)}
    same(g, model, report, {name: given[name] for name in g.inputs})


def test_another_guard_stays() -> None:
    """Of bags with one row, not of those with none."""
    g = with_mask()
    n = total(g, g.cast("m", "float32"))
    one = g("Equal", n, np.array(1, np.float32))
    quotient = g("Div", total(g, masked(g), 0), g("Clip", n, np.array(1, np.float32)))
    model = model_of(g, g("Where", one, np.array(0, np.float32), quotient))
    report = fused(model)
    assert "Where" in kinds(report)
    same(g, model, report, {"i": IDS, "m": MASK.astype(bool)})


# ---- Indices that are below zero all the same.


def test_an_index_below_zero_is_rejected_and_not_skipped() -> None:
    """Gather counts it from the end, and a bag that skips positions must not take it for one that is not there."""
    g = with_mask()
    report = fused(model_of(g, total(g, masked(g), 0)))
    wrong, mask = IDS.copy(), MASK.astype(bool)
    wrong[1, 0] = -1  # where the mask is false
    for native in (True, False):
        session = lucid_onnx.InferenceSession(report.model, native=native)
        session.run(None, {"i": wrong, "m": mask})
        with pytest.raises(Exception, match=r"outside \[0, 11\)|out of|bounds"):
            session.run(None, {"i": wrong, "m": np.ones_like(mask)})


@pytest.mark.parametrize("how", ["mod", "clip", "list", "at least 0"])
def test_indices_that_cannot_be_below_zero_are_not_looked_at(how: str) -> None:
    g = with_mask()
    mask = "m"
    if how == "mod":
        indices = g("Mod", "i", np.array(V))
    elif how == "clip":
        indices = g("Clip", "i", np.array(0), np.array(V - 1))
    elif how == "list":
        indices = g("Gather", np.arange(V)[::-1].copy(), "i")
    else:
        indices, mask = "i", g("GreaterOrEqual", "i", np.array(0))
        del g.inputs["m"]
    rows = g("Mul", g("Gather", "table", indices), column(g, g.cast(mask, "float32")))
    model = model_of(g, total(g, rows, 0))
    report = fused(model)
    assert found(report) == ("2D", "sum", "skip", None)
    assert "Greater" not in kinds(report)
    assert ("Where" in kinds(report)) == (how != "at least 0")  # there, the indices say it themselves
    given = {"i": np.where(MASK, IDS, -1) if how == "at least 0" else IDS, "m": MASK.astype(bool)}
    same(g, model, report, {name: given[name] for name in g.inputs})


# ---- Maxima.


def maximum(g: Graph, how: str, filler: float) -> onnx.ModelProto:
    rows = g("Gather", "table", "i")
    if how == "where":
        rows = g("Where", column(g, "m"), rows, np.array(filler, np.float32))
    elif how == "product":
        rows = g("Mul", rows, column(g, g.cast("m", "float32")))
    else:
        missing = g("Sub", np.array(1, np.float32), g.cast("m", "float32"))
        rows = g("Add", rows, column(g, g("Mul", missing, np.array(filler, np.float32))))
    return model_of(g, g("ReduceMax", rows, np.array([1]), keepdims=0))


@pytest.mark.parametrize(
    ("how", "filler"),
    [
        *(("where", filler) for filler in (-np.inf, -1e9, -0.5, 0.0, 7.0)),
        *(("product", 0.0), ("sum", -1e9), ("sum", -np.finfo(np.float32).max)),
    ],
)
def test_maxima_over_masked_rows(how: str, filler: float) -> None:
    """A bag that skips the others, and beside it what stands for them in bags that have none, or that have some."""
    g = with_mask()
    model = maximum(g, how, filler)
    report = fused(model)
    assert found(report) == ("2D", "max", "skip", None)
    assert not {"ReduceMax", "Gather"} & kinds(report)
    same(g, model, report, {"i": IDS, "m": MASK.astype(bool)})


@pytest.mark.parametrize("what", ["large rows", "small number", "int64 mask", "open table"])
def test_maxima_that_are_not_known_to_be_those_of_a_bag_stay(what: str) -> None:
    """32 is the largest number that is lost beside 1e9 in float32."""
    g = with_mask("int64" if what == "int64 mask" else "bool")
    if what == "large rows":
        g.constants["table"][5] = [33, 40, -70]
    elif what == "open table":
        del g.constants["table"]
        g.inputs["table"] = (TensorProto.FLOAT, (V, D))
    model = maximum(g, "sum", -3.0 if what == "small number" else -1e9)
    report = fused(model)
    assert report.fused == ()
    ((reason),) = [u.reason for u in report.unfused]
    assert reason.startswith("ReduceMax over rows that were changed is not a max of rows (the rows go through Add")
