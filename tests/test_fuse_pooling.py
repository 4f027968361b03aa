"""Pooled embeddings as people write them: whatever is fused gives the model's own numbers, and few are not fused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

#: How many graphs are drawn; the first ones are always the same ones.
GRAPHS = int(os.environ.get("LUCID_POOLING_GRAPHS", "60"))
V, D = 11, 3
FLOATS = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE, "float16": TensorProto.FLOAT16}


class Graph:
    """A graph of standard nodes over a table [11, 3] and indices ``i`` [B, L], drawn by a generator.

    Attributes:
        feeds: the inputs' shapes and types, by name.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.inputs: dict[str, tuple[int, tuple[Any, ...]]] = {}
        self.words: list[str] = []
        self.dtype = self.pick("dtype", ["float32", "float32", "float32", "float64", "float16"])
        self.index_type = self.pick("index", ["int64", "int64", "int32"])
        self.opset = self.pick("opset", [13, 17, 18, 20])
        static = self.pick("sizes", ["b l", "b 4", "3 4", "b l"]).split()
        self.b, self.l = (int(n) if n.isdigit() else n for n in static)
        self.constants["table"] = self.rng.standard_normal((V, D)).astype(self.dtype)
        odd = self.pick("odd", [None, None, None, np.nan, np.inf])
        if odd is not None:
            self.constants["table"][int(self.rng.integers(0, 3)), 1] = odd
        self.inputs["i"] = (TensorProto.INT64 if self.index_type == "int64" else TensorProto.INT32, (self.b, self.l))

    def pick(self, what: str, options: list[Any]) -> Any:
        found = options[int(self.rng.integers(len(options)))]
        self.words.append(f"{what}={found}")
        return found

    def __call__(self, op_type: str, *inputs: Any, **attributes: Any) -> str:
        """Add a node, whose arrays become initializers; the name of its output."""
        names = []
        for given in inputs:
            name = given if isinstance(given, str) else f"c{len(self.constants)}"
            if not isinstance(given, str):
                self.constants[name] = np.asarray(given)
            names.append(name)
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, names, [output], **attributes))
        return output

    def cast(self, x: str, to: str) -> str:
        types = {**FLOATS, "int64": TensorProto.INT64, "int32": TensorProto.INT32, "bool": TensorProto.BOOL}
        return self("Cast", x, to=types[to])

    def reduced(self, op: str, x: str, axis: int, keepdims: int) -> str:
        if op == "ReduceSum" or self.opset >= 18:
            return self(op, x, np.array([axis]), keepdims=keepdims)
        return self(op, x, axes=[axis], keepdims=keepdims)

    # ---- Parts.

    def index_constant(self, value: int) -> np.ndarray:
        return np.array(value, self.index_type)

    def truth(self, kind: str) -> tuple[str, bool]:
        """A mask [B, L] of truth values, and whether it is true where rows are kept."""
        p = int(self.rng.integers(0, 3))
        if kind == "equal":
            return self("Equal", "i", self.index_constant(p)), False
        if kind == "not equal":
            return self("Not", self("Equal", "i", self.index_constant(p))), True
        if kind == "greater":
            return self("Greater", "i", self.index_constant(0)), True
        if kind == "bool of":
            return self.cast("i", "bool"), True
        if kind == "int64 and not equal":
            return self("Not", self("Equal", self.cast("i", "int64"), np.array(p))), True
        if kind == "order":  # which is no mask of one index
            return self("Less", "i", self.index_constant(4)), True
        if kind == "both":
            other = self("Less", "i", self.index_constant(7))
            return self("And", self("Greater", "i", self.index_constant(0)), other), True
        if kind == "lengths":
            self.inputs["lengths"] = (TensorProto.INT64, (self.b,))
            size = self("Squeeze", self("Shape", "i", start=1), np.array([0])) if self.opset >= 15 else None
            if size is None:
                size = self("Gather", self("Shape", "i"), np.array(1))
            places = self("Range", np.array(0), size, np.array(1))
            return self("Less", places, self("Unsqueeze", "lengths", np.array([1]))), True
        self.inputs["m"] = (TensorProto.BOOL, (self.b, self.l))
        return "m", True

    def column(self, x: str, dtype: str, *, wide: bool = True) -> str:
        """[B, L, 1] of [B, L], or repeated in all columns."""
        how = self.pick("column", ["-1", "2", "reshape", "expand", "shape", "tile", "repeat", "expand as constant"])
        if how == "reshape" and self.b == "b":
            if self.l == "l":
                how = "-1"
            else:
                return self("Reshape", x, np.array([-1, self.l, 1]))
        x = self("Unsqueeze", x, np.array([2 if how == "2" else -1]))
        if not wide or dtype == "bool":
            return x
        if how == "expand":
            return self("Expand", x, self("Shape", self("Gather", "table", "i")))
        if how == "shape":
            shape = self("Shape", "i")
            parts = [self("Slice", shape, np.array([k]), np.array([k + 1])) for k in (0, 1)]
            return self("Expand", x, self("Concat", *parts, np.array([D]), axis=0))
        if how == "tile":
            return self("Tile", x, np.array([1, 1, D]))
        if how == "repeat":
            x = self("Expand", self("Unsqueeze", x, np.array([3])), np.array([1, 1, 1, D]))
            shape = self("Slice", self("Shape", x), np.array([0]), np.array([2]))
            return self("Reshape", x, self("Concat", shape, np.array([-1]), axis=0))
        if how == "expand as constant" and (self.b, self.l) == (3, 4):
            return self("Expand", x, np.array([3, 4, D]))
        return x

    def weights(self, kind: str) -> str:
        """Numbers [B, L] of the table's type."""
        if kind == "input":
            self.inputs["w"] = (FLOATS[self.dtype], (self.b, self.l))
            return "w"
        if kind == "by row":
            return self("Gather", self.rng.standard_normal(V).astype(self.dtype), "i")
        if kind == "by row, a column":
            column = self("Gather", self.rng.standard_normal((V, 1)).astype(self.dtype), "i")
            return self("Squeeze", column, np.array([-1]))
        one = numpy_helper.from_array(np.ones(1, self.dtype))
        if kind == "ones":
            return self("ConstantOfShape", self("Shape", "i"), value=one)
        assert kind == "ones expanded"
        return self("Expand", np.ones((), self.dtype), self("Shape", "i"))


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


def model_of(g: Graph, output: str, keepdims: int = 0) -> onnx.ModelProto:
    dims = ["rows", 1, D] if keepdims else ["rows", D]
    graph = helper.make_graph(
        g.nodes,
        "pooled",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in g.inputs.items()],
        [helper.make_tensor_value_info(output, FLOATS[g.dtype], dims)],
        [numpy_helper.from_array(a, n) for n, a in g.constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", g.opset)], ir_version=8)


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


def expected_results(model: onnx.ModelProto, given: list[dict[str, np.ndarray]]) -> list[np.ndarray | None]:
    """None where ONNX Runtime does not run the model, as with a -1 in a shape that has a 0."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    found: list[np.ndarray | None] = [None] * len(given)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # it has many classes for a model that it does not take
        return found
    for k, feed in enumerate(given):
        with contextlib.suppress(Exception):
            found[k] = session.run(None, feed)[0]
    return found


def compare(
    g: Graph, fused: onnx.ModelProto, given: list[dict[str, np.ndarray]], expected: list[np.ndarray | None]
) -> None:
    # Numbers of 16 bits are rounded once by a bag, and after each step by the model.
    tolerance = {"float16": 2e-2, "float32": 1e-5, "float64": 1e-12}[g.dtype]
    session = lucid_onnx.InferenceSession(fused)
    for feed, wanted in zip(given, expected, strict=True):
        if wanted is None:
            continue
        found = session.run(None, feed)[0]
        assert found.shape == wanted.shape, g.words
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance, err_msg=str(g.words))


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
