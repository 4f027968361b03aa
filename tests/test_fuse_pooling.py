"""Pooled embeddings as people write them: whatever is fused gives the model's own numbers, and few are not fused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_testing.pooled_graphs import FLOATS, D, Graph, V, compare, expected_results, fused, model_of, same, small

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

#: How many graphs are drawn; the first ones are always the same ones.
GRAPHS = int(os.environ.get("LUCID_POOLING_GRAPHS", "60"))


def draw(seed: int) -> tuple[Graph, onnx.ModelProto]:
    """A pooled embedding."""
    g = Graph(seed)
    rows = g("Gather", "table", "i")
    masks = ["equal", "not equal", "greater", "bool of", "int64 and not equal", "order", "both", "lengths", "input"]
    mask = g.pick("mask", [None, None, *masks])
    weights = g.pick("weights", [None, None, "input", "by row", "by row, a column", "ones", "ones expanded"])
    pooled_by = g.pick("pooled by", ["ReduceSum", "ReduceSum", "ReduceSum", "MatMul", "Einsum", "ReduceMean"])
    kept = None
    if mask is not None:
        truth, positive = g.truth(mask)
        kept = truth if positive else g("Not", truth)
        selected = g.pick("selects", [False, False, True]) and pooled_by != "MatMul"
        if selected:
            zero = g.pick("zero", ["scalar", "zeros like"])
            if zero == "scalar":
                nothing: Any = np.zeros((), g.dtype)
            else:
                nothing = g("Expand", np.zeros((), g.dtype), g("Shape", rows))
            condition = g.column(truth, "bool", wide=False)
            rows = g("Where", condition, *((rows, nothing) if positive else (nothing, rows)))
    factors = []
    if mask is not None and kept is not None and not selected:
        if g.pick("count first", [False, True]):
            factors.append(g.cast(g.cast(kept, "int64"), g.dtype))
        else:
            factors.append(g.cast(kept, g.dtype))
    if weights is not None:
        factors.append(g.weights(weights))
    keepdims = 0
    if pooled_by in ("MatMul", "Einsum") and factors:
        factor = factors[0] if len(factors) == 1 else g("Mul", *factors)
        if pooled_by == "MatMul" and g.pick("side", ["left", "right"]) == "left":
            y = g("Squeeze", g("MatMul", g("Unsqueeze", factor, np.array([1])), rows), np.array([1]))
        elif pooled_by == "MatMul":
            rows = g("Transpose", rows, perm=[0, 2, 1])
            y = g("Squeeze", g("MatMul", rows, g("Unsqueeze", factor, np.array([2]))), np.array([-1]))
        else:
            y = g("Einsum", factor, rows, equation="bl,bld->bd")
    else:
        for factor in factors:
            column = g.column(factor, g.dtype)
            rows = g("Mul", *((rows, column) if g.pick("order", [0, 1]) else (column, rows)))
        keepdims = g.pick("keepdims", [0, 0, 1])
        op = "ReduceMean" if pooled_by == "ReduceMean" and g.dtype != "float16" else "ReduceSum"
        y = g.reduced(op, rows, g.pick("axis", [1, -2]), keepdims)
    if kept is not None and g.pick("divided", [False, True]):
        y = g("Div", y, divisor(g, kept, keepdims))
    elif weights == "input" and g.pick("divided by weights", [False, False, True]):
        y = g(
            "Div",
            y,
            g("Unsqueeze", g.reduced("ReduceSum", "w", 1, 1), np.array([2]))
            if keepdims
            else g.reduced("ReduceSum", "w", 1, 1),
        )
    return g, model_of(g, y, keepdims)


def divisor(g: Graph, kept: str, keepdims: int) -> str:
    """A count of what is kept, [B, 1] or [B, 1, 1]."""
    counted_in = g.pick("counted in", ["int64", g.dtype])
    numbers = g.cast(kept, counted_in)
    how = g.pick("count", ["keepdims", "unsqueeze after", "of the column"])
    if how == "keepdims":
        n = g.reduced("ReduceSum", numbers, g.pick("count axis", [1, -1]), 1)
        n = g("Unsqueeze", n, np.array([2])) if keepdims else n
    elif how == "unsqueeze after":
        n = g.reduced("ReduceSum", numbers, 1, 0)
        n = g("Unsqueeze", n, np.array([1, 2] if keepdims else [-1]))
    else:
        n = g.reduced("ReduceSum", g("Unsqueeze", numbers, np.array([-1])), 1, keepdims)
    least = g.pick("least", ["clip", "max", "eps", "where", "two", "large eps", "none"])
    number: Callable[[float], np.ndarray] = lambda x: np.array(x, counted_in)  # noqa: E731
    if least == "clip":
        n = g("Clip", n, number(1))
    elif least == "max":
        n = g("Max", n, number(1))
    elif least == "two":
        n = g("Max", n, number(2))
    elif least == "where":
        n = g("Where", g("Equal", n, number(0)), number(1), n)
    n = n if counted_in == g.dtype else g.cast(n, g.dtype)
    if least in ("eps", "large eps"):
        n = g("Add", n, np.array({"eps": 1e-16, "large eps": 1e-2}[least] if g.dtype != "float16" else 0.25, g.dtype))
    return n


def feeds(g: Graph) -> list[dict[str, np.ndarray]]:
    """Inputs of several sizes, with bags whose indices are all masked."""
    found = []
    for bags, length in ((3, 4), (1, 4), (5, 1), (2, 0)):
        sizes = {"b": bags, "l": length}
        feed = {}
        for name, (kind, dims) in g.inputs.items():
            shape = [sizes.get(d, d) for d in dims]
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            if name == "i":
                array = g.rng.integers(0, V, shape)
                array[:1] = 0
                array[1:2] = g.rng.integers(0, 3)
            elif name == "w":
                array = g.rng.standard_normal(shape)
            else:
                array = g.rng.integers(0, 2 if kind == TensorProto.BOOL else 4, shape)
                array[:1] = 0
            feed[name] = array.astype(dtype)
        found.append(feed)
    return found


#: Operators that are put in the place of others; most of them are no pooling any more, or another one.
SWAPS = {
    "Equal": ["Less", "Greater"],
    "Greater": ["Less", "GreaterOrEqual", "Equal"],
    "Less": ["Greater", "LessOrEqual"],
    "Not": ["Identity"],
    "And": ["Or", "Xor"],
    "Mul": ["Add", "Div", "Sub", "Max"],
    "Div": ["Mul", "Add", "Sub"],
    "Max": ["Min", "Add"],
    "Add": ["Sub", "Mul", "Max"],
    "ReduceSum": ["ReduceMax", "ReduceMin", "ReduceProd", "ReduceMean"],
    "ReduceMean": ["ReduceSum", "ReduceMax"],
}


def near_misses(model: onnx.ModelProto, rng: np.random.Generator) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The model once for each node and constant, with that one changed."""
    for k, node in enumerate(model.graph.node):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        changed = copy.graph.node[k]
        if node.op_type in SWAPS:
            changed.op_type = str(rng.choice(SWAPS[node.op_type]))
            yield f"{node.op_type} to {changed.op_type}", copy
        elif node.op_type == "Where":
            changed.input[1], changed.input[2] = node.input[2], node.input[1]
            yield "swapped branches", copy
        elif node.op_type == "MatMul":
            changed.input[0], changed.input[1] = node.input[1], node.input[0]
            yield "swapped operands", copy
    for k, tensor in enumerate(model.graph.initializer):
        value = numpy_helper.to_array(tensor)
        if tensor.name == "table" or not value.size:
            continue
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        other = value.copy()
        other.reshape(-1)[int(rng.integers(value.size))] += rng.choice([-1, 1]).astype(value.dtype)
        copy.graph.initializer[k].CopyFrom(numpy_helper.from_array(other, tensor.name))
        yield f"{value.tolist()} to {other.tolist()}", copy
    yield from changed_attributes(model)


def changed_attributes(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    for k, node in enumerate(model.graph.node):
        for n, attribute in enumerate(node.attribute):
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            changed = copy.graph.node[k].attribute[n]
            if attribute.name == "keepdims":
                changed.i = 1 - attribute.i
            elif attribute.name == "perm":
                changed.ints[:] = [2, 0, 1]
            elif attribute.name == "equation":
                changed.s = b"bl,bld->bl"
            else:
                continue
            yield f"{node.op_type}'s {attribute.name}", copy


def test_near_misses_keep_their_numbers() -> None:
    """Three changes of each graph that is drawn: what is fused then gives what the changed graph gives."""
    compared = left = 0
    for seed in range(GRAPHS // 2):
        g, model = draw(seed)
        misses = list(near_misses(model, g.rng))
        for k in g.rng.permutation(len(misses))[:3]:
            what, changed = misses[int(k)]
            output = changed.graph.output[0]
            output.type.tensor_type.ClearField("shape")
            given = [feed for feed in feeds(g) if feed["i"].size]  # which ``assume_nonempty`` says
            expected = expected_results(changed, given)
            ranks = [e.ndim for e in expected if e is not None]
            if not ranks:
                continue
            output.CopyFrom(helper.make_tensor_value_info(output.name, FLOATS[g.dtype], [None] * ranks[0]))
            g.words.append(what)
            report = None
            with contextlib.suppress(ValueError):  # onnx.checker's, about a graph that ONNX Runtime takes
                report = lucid_onnx.fuse(changed, assume_nonempty=True)
            if report is not None and report.fused:
                compare(g, report.model, given, expected)
            compared, left = compared + bool(report and report.fused), left + bool(report and not report.fused)
            g.words.pop()
    assert compared > GRAPHS // 4
    assert left > GRAPHS // 4


def test_what_is_drawn_is_fused_and_keeps_its_numbers() -> None:
    """All of them: a mask, weights and a divisor in any spelling, with what is left of them beside the bag."""
    for seed in range(GRAPHS):
        g, model = draw(seed)
        onnx.checker.check_model(model, full_check=True)
        report = lucid_onnx.fuse(model, assume_nonempty=True)
        assert len(report.fused) == 1, (seed, g.words, report.unfused)
        assert report.unfused == (), (seed, g.words)
        given = feeds(g)
        expected = expected_results(model, given)
        assert sum(e is not None for e in expected) >= len(given) - 1  # all but L = 0
        compare(g, report.model, given, expected)


# ---- Of one kind each.


def test_indices_of_any_rank_are_pooled_over_any_axes() -> None:
    """Rows [.., L, .., D], transposed or not, over one axis or several, kept or not, with weights or without."""
    rng = np.random.default_rng(3)
    for _ in range(max(25, GRAPHS // 2)):
        rank = int(rng.integers(1, 5))
        g = small(rank)
        sizes = rng.integers(1, 4, rank)
        names = tuple(int(n) if rng.random() < 0.3 else f"d{k}" for k, n in enumerate(sizes))
        g.inputs["i"] = (TensorProto.INT64, names)
        rows = g("Gather", "table", "i")
        weighted = bool(rng.random() < 0.5)
        if weighted:
            g.inputs["w"] = (TensorProto.FLOAT, names)
            rows = g("Mul", rows, g("Unsqueeze", "w", np.array([-1])))
        perm = np.arange(rank + 1) if rng.random() < 0.5 else rng.permutation(rank + 1)
        rows = g("Transpose", rows, perm=perm.tolist())
        places = [k for k in range(rank + 1) if perm[k] != rank]
        axes = rng.choice(places, int(rng.integers(1, rank + 1)), replace=False)
        axes -= (rank + 1) * (rng.random(len(axes)) < 0.5)
        op = str(rng.choice(["ReduceSum", "ReduceMean"] if weighted else ["ReduceSum", "ReduceMean", "ReduceMax"]))
        keepdims = int(rng.integers(2))
        y = g(op, rows, axes.astype(np.int64), keepdims=keepdims)
        model = model_of(g, y)
        count = rank + 1 - (0 if keepdims else len(axes))
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info(y, TensorProto.FLOAT, [None] * count))
        g.words = [f"{names} {perm} {axes} {op} {keepdims}"]
        report = fused(model)
        assert (len(report.fused), report.unfused) == (1, ()), g.words
        feed = {"i": rng.integers(0, V, sizes)}
        same(g, model, report, {**feed, "w": rng.standard_normal(sizes).astype(np.float32)} if weighted else feed)


@pytest.mark.parametrize("mask", ["not -1", "at least 0", "above -1"])
@pytest.mark.parametrize("finite", [True, False])
def test_a_mask_of_indices_below_zero_keeps_them(mask: str, finite: bool) -> None:
    """A model that has them counts from the end, and so does the result, where a bag alone rejects them."""
    g = small()
    if not finite:
        g.constants["table"][-1] = np.inf
    kept = {
        "not -1": lambda: g("Not", g("Equal", "i", np.array(-1))),
        "at least 0": lambda: g("GreaterOrEqual", "i", np.array(0)),
        "above -1": lambda: g("Greater", "i", np.array(-1)),
    }[mask]()
    column = g("Unsqueeze", g.cast(kept, "float32"), np.array([-1]))
    model = model_of(g, g.reduced("ReduceSum", g("Mul", g("Gather", "table", "i"), column), 1, 0))
    report = fused(model)
    assert [(f.op, f.attributes["negative"]) for f in report.fused] == [
        ("EmbeddingBag2D", "skip") if finite else ("EmbeddingBag2DWeighted", "refuse")
    ]
    same(g, model, report, {"i": np.array([[1, -1, -1], [-1, -1, -1], [0, 2, -3]])})


def test_one_column_may_be_squeezed_before_it_is_pooled() -> None:
    """As linear terms of a factorization machine are."""
    for times in (False, True):
        g = small()
        g.constants["table"] = g.constants["table"][:, :1].copy()
        g.inputs["w"] = (TensorProto.FLOAT, g.inputs["i"][1])
        terms = g("Squeeze", g("Gather", "table", "i"), np.array([-1]))
        y = g.reduced("ReduceSum", g("Mul", terms, "w") if times else terms, 1, 0)
        model = model_of(g, y)
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info(y, TensorProto.FLOAT, [None]))
        report = fused(model)
        assert [f.mode for f in report.fused] == ["sum"]
        w = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
        same(g, model, report, {"i": np.arange(12).reshape(4, 3) % V, "w": w})


@pytest.mark.parametrize("what", ["sum", "mean", "masked mean", "weights", "max"])
def test_sixteen_bits_may_be_pooled_in_float32(what: str) -> None:
    g = small(dtype="float16")
    rows = g.cast(g("Gather", "table", "i"), "float32")
    kept = g("Not", g("Equal", "i", np.array(0)))
    if what == "masked mean":
        rows = g("Mul", rows, g("Unsqueeze", g.cast(kept, "float32"), np.array([-1])))
    elif what == "weights":
        g.inputs["w"] = (TensorProto.FLOAT16, g.inputs["i"][1])
        rows = g("Mul", rows, g("Unsqueeze", g.cast("w", "float32"), np.array([-1])))
    y = g.reduced({"mean": "ReduceMean", "max": "ReduceMax"}.get(what, "ReduceSum"), rows, 1, 0)
    if what == "masked mean":
        n = g("Clip", g.reduced("ReduceSum", g.cast(kept, "int64"), 1, 1), np.array(1))
        y = g("Div", y, g.cast(n, "float32"))
    model = model_of(g, g.cast(y, "float16"))
    report = fused(model)
    (found,) = report.fused
    assert (found.mode, found.table_dtype) == ({"masked mean": "mean", "weights": "sum"}.get(what, what), "float16")
    assert "Gather" not in {n.op_type for n in report.model.graph.node}
    feed = {"i": np.array([[1, 2, 0], [0, 0, 0], [5, 5, 6]])}
    w = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float16)
    same(g, model, report, {**feed, "w": w} if what == "weights" else feed)


@pytest.mark.parametrize("opset", [11, 12])
def test_axes_are_attributes_in_older_opsets(opset: int) -> None:
    """What is written around a bag is written as the model's opset has it, and raised with the model."""
    g = small()
    g.opset = opset
    g.inputs["m"] = (TensorProto.FLOAT, (*g.inputs["i"][1], 1))
    rows = g("Mul", g("Gather", "table", "i"), g("Expand", "m", g("Shape", g("Gather", "table", "i"))))
    number = g("ReduceSum", g("Expand", "m", g("Shape", g("Gather", "table", "i"))), axes=[1], keepdims=1)
    model = model_of(
        g, g("Div", g("ReduceSum", rows, axes=[1], keepdims=1), g("Clip", number, np.array(1, np.float32))), 1
    )
    report = fused(model)
    assert [f.op for f in report.fused] == ["EmbeddingBag2DWeighted"]
    assert not {"Gather", "Expand"} & {n.op_type for n in report.model.graph.node}
    mask = np.array([[1, 0, 1], [0, 0, 0]], np.float32)[..., None]
    same(g, model, report, {"i": np.array([[1, 2, 3], [4, 5, 6]]), "m": mask})


def test_what_is_in_the_way_is_named() -> None:
    def product(g: Graph, rows: str) -> str:
        return g.reduced("ReduceSum", g("Mul", rows, rows), 1, 0)

    def minus(g: Graph, rows: str) -> str:
        far = g("Mul", g("Unsqueeze", g.cast("i", "float32"), np.array([-1])), np.array(1e9, np.float32))
        return g.reduced("ReduceMax", g("Sub", rows, far), 1, 0)

    def several(g: Graph, rows: str) -> str:
        g.inputs["w"] = (TensorProto.FLOAT, ("d0", 2, "d1"))
        return g.reduced("ReduceSum", g("MatMul", "w", rows), 1, 0)

    def minimum(g: Graph, rows: str) -> str:
        return g.reduced("ReduceMin", rows, 1, 0)

    def activated(g: Graph, rows: str) -> str:
        return g.reduced("ReduceSum", g("Relu", rows), 1, 0)

    def projected(g: Graph, rows: str) -> str:
        return g.reduced("ReduceSum", g("MatMul", rows, np.ones((D, D), np.float32)), 1, 0)

    def divided(g: Graph, rows: str) -> str:
        return g.reduced("ReduceSum", g("Div", rows, np.zeros((), np.float32)), 1, 0)

    def filled(g: Graph, rows: str) -> str:
        mask = g("Unsqueeze", g("Equal", "i", np.array(0)), np.array([-1]))
        return g.reduced("ReduceSum", g("Where", mask, np.array(-1e9, np.float32), rows), 1, 0)

    def by_column(g: Graph, rows: str) -> str:
        mask = g("Less", rows, np.array(0, np.float32))
        return g.reduced("ReduceSum", g("Where", mask, np.array(0, np.float32), rows), 1, 0)

    def over_axes_unknown(g: Graph, rows: str) -> str:
        g.inputs["a"] = (TensorProto.INT64, (1,))
        return g("ReduceSum", rows, "a", keepdims=0)

    def wide(g: Graph, rows: str) -> str:
        return g.cast(g.reduced("ReduceSum", g.cast(rows, "float64"), 1, 0), "float32")

    reasons = {
        product: "multiplied by something else than a number for each index, Gather",
        minus: "ReduceMax over rows that were changed is not a max of rows (the rows go through Sub",
        several: "weighs the same rows in several ways at once, by value 'w' of shape ['d0', 2, 'd1']",
        minimum: "ReduceMin pools rows, and a bag has the modes sum, mean and max",
        activated: "the rows go through Relu before they are pooled",
        projected: "the rows go through MatMul before they are pooled",
        divided: "the rows go through Div before they are pooled",
        filled: "something else than zero in the place of rows, the constant -1.e+09",
        by_column: "by something else than one truth value for each index, Less",
        over_axes_unknown: "axes that are computed",
        wide: "rows of float32 are pooled in float64",
    }
    for write, why in reasons.items():
        g = small()
        report = fused(model_of(g, write(g, g("Gather", "table", "i"))))
        assert report.fused == (), write.__name__
        assert [why in u.reason for u in report.unfused] == [True], (write.__name__, report.unfused)


def test_look_alikes_keep_their_numbers() -> None:
    """Masks, counts and numbers that are not those of the bag's own positions."""

    def column(g: Graph, x: str) -> str:
        return g("Unsqueeze", x, np.array([-1]))

    def kept(g: Graph, indices: str = "i", p: int = 0) -> str:
        return g.cast(g("Not", g("Equal", indices, np.array(p))), "float32")

    def count(g: Graph, mask: str, axis: int = 1) -> str:
        n = g.reduced("ReduceSum", mask, axis, 1)
        return g("Max", n, np.array(1, np.float32))

    def pooled(g: Graph, mask: str) -> str:
        return g.reduced("ReduceSum", g("Mul", g("Gather", "table", "i"), column(g, mask)), 1, 0)

    def other_indices(g: Graph) -> str:
        g.inputs["j"] = g.inputs["i"]
        return g("Div", pooled(g, kept(g, "j")), count(g, kept(g, "j")))

    def other_count(g: Graph) -> str:
        return g("Div", pooled(g, kept(g)), count(g, kept(g, "i", 1)))

    def other_axis(g: Graph) -> str:
        return g("Div", pooled(g, kept(g)), count(g, kept(g), 0))

    def transposed(g: Graph) -> str:
        return pooled(g, g("Transpose", kept(g), perm=[1, 0]))

    def transposed_count(g: Graph) -> str:
        return g("Div", pooled(g, kept(g)), count(g, g("Transpose", kept(g), perm=[1, 0])))

    def along_columns(g: Graph) -> str:
        rows = g("Mul", g("Gather", "table", "i"), g("Unsqueeze", kept(g), np.array([1])))
        return g.reduced("ReduceSum", rows, 1, 0)

    def column_along_columns(g: Graph) -> str:
        return g.reduced("ReduceSum", g("Mul", g("Gather", "table", "i"), kept(g)), 1, 0)

    def shifted(g: Graph) -> str:
        return pooled(g, kept(g, g("Add", "i", np.array(1)), 1))

    def shifted_count(g: Graph) -> str:
        return g("Div", pooled(g, kept(g)), count(g, kept(g, g("Sub", "i", np.array(1)), 1)))

    def whole_count(g: Graph) -> str:
        n = g("ReduceSum", kept(g), np.array([0, 1]), keepdims=1)
        return g("Div", pooled(g, kept(g)), g("Max", n, np.array(1, np.float32)))

    def whole_numbers(g: Graph) -> str:
        n = g.cast(g("Div", g.cast(count(g, kept(g)), "int64"), np.array(2)), "float32")
        return g("Div", pooled(g, kept(g)), g("Max", n, np.array(1, np.float32)))

    def most(g: Graph) -> str:
        n = g("Clip", g.reduced("ReduceSum", kept(g), 1, 1), np.array(1, np.float32), np.array(2, np.float32))
        return g("Div", pooled(g, kept(g)), n)

    def squared(g: Graph) -> str:
        return pooled(g, g("Mul", kept(g), g.cast("i", "float32")))

    def swapped(g: Graph) -> str:
        mask = column(g, g("Equal", "i", np.array(0)))
        return g.reduced("ReduceSum", g("Where", mask, g("Gather", "table", "i"), np.zeros((), np.float32)), 1, 0)

    def one_row_for_all(g: Graph) -> str:
        return pooled(g, g("Gather", kept(g), np.array([0])))

    def one_column_for_all(g: Graph) -> str:
        return pooled(g, g("Gather", kept(g), np.array([0]), axis=1))

    means = []
    for write in (
        *(other_indices, other_count, other_axis, transposed, transposed_count, along_columns, column_along_columns),
        *(shifted, shifted_count, whole_count, whole_numbers, most, squared, swapped, one_row_for_all),
        one_column_for_all,
    ):
        g = small()
        model = model_of(g, write(g))
        report = fused(model)
        g.words = [write.__name__]
        means += [write] * any(f.mode == "mean" for f in report.fused)
        if report.fused:  # as many bags as indices in a bag as columns, so that all of them run
            rng = np.random.default_rng(2)
            feed = {name: rng.integers(0, 3, (D, D)) for name in g.inputs}
            feed["i"][1] = 0
            same(g, model, report, feed)
    assert means == [other_indices]  # whose mask is no padding_idx, but skips positions and counts the others


# ---- What torch's exporters make of the poolings that libraries have.


class Poolings(torch.nn.Module):
    """A table, numbers by row, and every pooling of `POOLINGS` of one input."""

    def __init__(self, poolings: dict[str, Callable[..., Any]], dtype: Any = torch.float32) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(50, 6, dtype=dtype)
        self.numbers = torch.nn.Parameter(torch.rand(50, dtype=dtype))
        self.column = torch.nn.Embedding(50, 1, dtype=dtype)
        self.poolings = poolings

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        return tuple(pool(self, *inputs) for pool in self.poolings.values())


def wide_mask(m: Any, rows: Any) -> Any:
    return m.unsqueeze(-1).expand(rows.size()).to(rows.dtype)


def sentence_transformers(s: Any, i: Any, m: Any, w: Any) -> Any:
    rows = s.words(i)
    mask = wide_mask(m, rows)
    return torch.sum(rows * mask, 1) / torch.clamp(mask.sum(1), min=1e-9)


def sentence_transformers_sqrt(s: Any, i: Any, m: Any, w: Any) -> Any:
    rows = s.words(i)
    mask = wide_mask(m, rows)
    return torch.sum(rows * mask, 1) / torch.sqrt(torch.clamp(mask.sum(1), min=1e-9))


def sentence_transformers_weighted(s: Any, i: Any, m: Any, w: Any) -> Any:
    rows = s.words(i)
    places = torch.arange(1, rows.shape[1] + 1).unsqueeze(0).unsqueeze(-1).expand(rows.size()).to(rows.dtype)
    mask = wide_mask(m, rows) * places
    return torch.sum(rows * mask, 1) / torch.clamp(mask.sum(1), min=1e-9)


def torch_rechub(s: Any, i: Any, m: Any, w: Any) -> Any:
    mask = (i != 0).unsqueeze(1).float()
    return torch.bmm(mask, s.words(i)).squeeze(1) / (mask.sum(dim=-1).float() + 1e-16)


def deepctr(s: Any, i: Any, m: Any, w: Any) -> Any:
    mask, rows = i != 0, s.words(i)
    length = torch.sum(mask.type(torch.long), dim=-1, keepdim=True)
    mask = torch.repeat_interleave(mask.unsqueeze(2).float(), rows.shape[-1], dim=2)
    return torch.sum(rows * mask, dim=1) / (length.type(torch.float32) + 1e-8)


def deepctr_by_length(s: Any, i: Any, m: Any, w: Any) -> Any:
    rows, length = s.words(i), m.sum(1, keepdim=True)
    mask = (torch.arange(0, rows.shape[1], 1) < length).type(torch.float32).unsqueeze(2).repeat(1, 1, rows.shape[-1])
    return torch.sum(rows * mask, dim=1) / (length.type(torch.float32) + 1e-8)


def recbole(s: Any, i: Any, m: Any, w: Any) -> Any:
    mask = (i != 0).float()
    rows = s.words(i)
    return (rows * mask.unsqueeze(2).expand_as(rows)).sum(dim=1) / (mask.sum(dim=1, keepdim=True) + 1e-8)


def keras_wraps(s: Any, i: Any, m: Any, w: Any) -> Any:
    wrapped = torch.where(i < 0, i + 50, i)
    mask = (i != 0).float().unsqueeze(2)
    return torch.sum(s.words(wrapped) * mask, 1) / torch.sum(mask, 1)


#: By name. Those whose names begin with "mean" become a mean, where the exporter left it one.
POOLINGS: dict[str, Callable[..., Any]] = {
    "sentence-transformers": sentence_transformers,
    "sentence-transformers, sqrt": sentence_transformers_sqrt,
    "sentence-transformers, weighted": sentence_transformers_weighted,
    "torch-rechub": torch_rechub,
    "DeepCTR-Torch": deepctr,
    "DeepCTR-Torch, lengths": deepctr_by_length,
    "RecBole": recbole,
    "Keras": keras_wraps,
    "model2vec": lambda s, i, m, w: (s.words(i) * w.unsqueeze(-1)).mean(1),
    "keras-rs": lambda s, i, m, w: (s.words(i) * torch.ones_like(i, dtype=torch.float32).unsqueeze(-1)).sum(-2),
    "mean, filled": lambda s, i, m, w: (
        s.words(i).masked_fill((i == 0).unsqueeze(-1), 0.0).sum(1) / (i != 0).sum(1, keepdim=True).clamp(min=1)
    ),
    "mean, greater": lambda s, i, m, w: (
        (s.words(i) * (i > 0).unsqueeze(2)).sum(1) / (i > 0).sum(1).clamp(min=1).unsqueeze(1)
    ),
    "where": lambda s, i, m, w: torch.where(m.bool()[..., None], s.words(i), torch.zeros_like(s.words(i))).sum(1),
    "einsum": lambda s, i, m, w: torch.einsum("bl,bld->bd", w, s.words(i)),
    "einsum, transposed": lambda s, i, m, w: torch.einsum("bld,bl->db", s.words(i), w),
    "matmul": lambda s, i, m, w: (w.unsqueeze(1) @ s.words(i)).squeeze(1),
    "matmul, transposed": lambda s, i, m, w: (s.words(i).transpose(1, 2) @ w.unsqueeze(-1)).squeeze(-1),
    "learned numbers": lambda s, i, m, w: (s.words(i) * s.numbers[i].unsqueeze(-1)).sum(1),
    "learned column": lambda s, i, m, w: (s.words(i) * s.column(i) * m.unsqueeze(-1)).sum(1),
    "attention": lambda s, i, m, w: (
        torch.softmax(s.column(i).squeeze(-1).masked_fill(m == 0, -1e9), -1).unsqueeze(-1) * s.words(i)
    ).sum(1),
    "term frequencies": lambda s, i, m, w: (s.words(i) * w[:, :, None]).sum(1) / w.sum(1, keepdim=True),
    "over the batch": lambda s, i, m, w: s.words(i).sum(0, keepdim=True),
    "of one": lambda s, i, m, w: s.words(i[0]).sum(0),
    "average pool": lambda s, i, m, w: s.words(i).transpose(1, 2).mean(-1),
    "without the first": lambda s, i, m, w: s.words(i)[:, 1:].sum(1),
    "scaled": lambda s, i, m, w: (s.words(i) * 2.5 / 7.0).sum(1),
    "maximum": lambda s, i, m, w: s.words(i).max(1).values,
}


def exported(module: Any, example: tuple[Any, ...], how: str, path: Path) -> onnx.ModelProto:
    """A model with inputs i, m and w, of [b, l] unless it is static."""
    names = ["i", "m", "w"][: len(example)]
    sizes = tuple({k: "bl"[k] if e.ndim == 2 else "bfl"[k] for k in range(e.ndim)} for e in example)
    options: dict[str, Any] = {"dynamo": how != "legacy"}
    if how == "legacy":
        options["dynamic_axes"] = dict(zip(names, sizes, strict=True))
    elif how == "dynamo":
        options["dynamic_shapes"] = (sizes,)
    torch.onnx.export(module.eval(), example, str(path), input_names=names, verbose=False, **options)
    return onnx.load(path)


def drawn(shape: tuple[int, ...], seed: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    indices, mask = rng.integers(0, 4, shape), rng.integers(0, 2, shape)
    indices[0], mask[-1] = 0, 0
    indices[-1, 0] = 7
    return torch.tensor(indices), torch.tensor(mask), torch.tensor(rng.random(shape), dtype=torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["legacy", "dynamo", "static"])
def test_what_libraries_pool_by_is_fused(how: str, tmp_path: Path) -> None:
    module = Poolings(POOLINGS)
    model = exported(module, drawn((3, 5), 0), how, tmp_path / "m.onnx")
    report = lucid_onnx.fuse(model, assume_nonempty=True)
    assert report.unfused == ()
    # Two poolings have the same sum, which exporters write once; and nothing but bags reads the table.
    assert len(report.fused) == len(POOLINGS) - 1
    (table,) = {f.table for f in report.fused}
    assert {n.domain for n in report.model.graph.node if table in n.input} == {spec.DOMAIN}
    modes = [f.mode for f in report.fused]
    assert modes.count("max") == 1
    assert modes.count("mean") >= 3
    session, unfused = lucid_onnx.InferenceSession(report.model), lucid_onnx.InferenceSession(model, native=False)
    for shape in ((3, 5),) if how == "static" else ((3, 5), (1, 5), (4, 1)):
        given = drawn(shape, 1)
        feed = {name: array.numpy() for name, array in zip("imw", given, strict=True)}
        expected, found = unfused.run(None, feed), session.run(None, feed)
        for name, a, b, c in zip(POOLINGS, found, expected, module(*given), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
            if not np.isnan(a).any():  # torch's exporter loses a small number that a count has added to it
                np.testing.assert_allclose(a, c.detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
