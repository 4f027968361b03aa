"""Pooled embeddings as graphs of standard nodes, and what ONNX Runtime makes of them before and after `fuse`."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx

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


def small(rank: int = 2, dtype: str = "float32") -> Graph:
    """A graph over indices of a rank, whose sizes are open."""
    g = Graph(0)
    g.dtype, g.opset = dtype, 18
    g.constants = {"table": np.random.default_rng(1).standard_normal((V, D)).astype(dtype)}
    g.inputs = {"i": (TensorProto.INT64, tuple(f"d{k}" for k in range(rank)))}
    return g


def fused(model: onnx.ModelProto) -> Any:
    return lucid_onnx.fuse(model, assume_nonempty=True)


def same(g: Graph, model: onnx.ModelProto, report: Any, *given: dict[str, np.ndarray]) -> None:
    expected = expected_results(model, list(given))
    assert all(e is not None for e in expected)
    compare(g, report.model, list(given), expected)
