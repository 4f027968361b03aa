"""Models of a few nodes to fuse and lower, what is asked of them, and ways to run them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_testing.graphs import nodes
from lucid_testing.kernels import library_path


def bags(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of our domain, wherever in the graph."""
    return [n for n in nodes(model.graph) if n.domain == spec.DOMAIN]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes, as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def results(model: onnx.ModelProto, feed: dict[str, np.ndarray], **kwargs: Any) -> list[np.ndarray]:
    """The outputs of one run in a new session."""
    return lucid_onnx.InferenceSession(model, **kwargs).run(None, feed)


def ways_to_run(model: onnx.ModelProto) -> dict[str, tuple[onnx.ModelProto, bool]]:
    """A portable model without the library, in standard form, and with the library where it is; by name.

    Each is a model, and whether the library is registered for it.
    """
    ways = {"portable": (model, False), "standard": (lucid_onnx.lower(model), False)}
    return {**ways, "native": (model, True)} if library_path() is not None else ways


def interface(model: onnx.ModelProto) -> tuple[list[bytes], list[bytes]]:
    """Inputs and outputs with their types and dimensions."""
    graph = model.graph
    return [v.SerializeToString() for v in graph.input], [v.SerializeToString() for v in graph.output]


def loop_body(model: onnx.ModelProto) -> onnx.GraphProto:
    """The body of the graph's first Loop."""
    return next(a.g for n in model.graph.node if n.op_type == "Loop" for a in n.attribute if a.name == "body")


def first(graph: onnx.GraphProto, op_type: str, index: int = 0) -> onnx.NodeProto:
    """The first node of an operator in a graph, or the one with that many before it."""
    return [n for n in graph.node if n.op_type == op_type][index]


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    """Give a node an attribute, in the place of the one of that name if there is one."""
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def changed_numbers(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The model once for each integer constant and integer attribute in it, with that one changed."""

    def tensors(found: onnx.ModelProto) -> list[onnx.TensorProto]:
        constants = [a.t for n in nodes(found.graph) for a in n.attribute if a.HasField("t")]
        return [
            t for t in (*found.graph.initializer, *constants) if t.data_type in (TensorProto.INT64, TensorProto.BOOL)
        ]

    def numbers(found: onnx.ModelProto) -> list[onnx.AttributeProto]:
        kinds = (onnx.AttributeProto.INT, onnx.AttributeProto.INTS)
        return [a for n in nodes(found.graph) for a in n.attribute if a.type in kinds and (a.ints or a.HasField("i"))]

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


def swapped_operators(
    model: onnx.ModelProto, swaps: Mapping[str, str], *, step: int, more_than: int
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The model once for every ``step``-th node whose operator is a key of ``swaps``, with that operator replaced.

    Args:
        more_than: asserts that there are more such nodes than this.
    """
    count = sum(node.op_type in swaps for node in nodes(model.graph))
    assert count > more_than
    for k in range(0, count, step):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        node = [node for node in nodes(copy.graph) if node.op_type in swaps][k]
        what = f"{k}: {node.op_type}"
        node.op_type = swaps[node.op_type]
        yield what, copy


#: The shape of the tables here.
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
        """Add a node, whose arrays become initializers; the name of its output."""
        names = []
        for given in inputs:
            name = given if isinstance(given, str) else f"c{len(self.initializers)}"
            if not isinstance(given, str):
                self.initializers[name] = given
            names.append(name)
        self.nodes.append(helper.make_node(op_type, names, [f"v{len(self.nodes)}"], **attributes))
        return self.nodes[-1].output[0]

    def model(self, output: str, rank: int = 2) -> onnx.ModelProto:
        """The graph as a model with one output, [b, 4] or [b, 1, 4]."""
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
        """A reduction over one axis, as the opset writes it."""
        if op == "ReduceSum" or self.opset >= 18:
            return self(op, rows, np.array([axis]), keepdims=keepdims)
        return self(op, rows, axes=[axis], keepdims=keepdims)

    def kept(self, padding: int) -> str:
        """[B, L, 1], float: 0 where the index is ``padding``, else 1."""
        equal = self("Not", self("Equal", "i", np.array(padding)))
        return self("Unsqueeze", self("Cast", equal, to=TensorProto.FLOAT), np.array([-1]))


def same_as_before(model: onnx.ModelProto, report: Any, feed: dict[str, np.ndarray]) -> None:
    """What a model was fused to gives the model's own first output, in every way to run it."""
    expected = results(model, feed, native=False)[0]
    for way, native in ways_to_run(report.model).values():
        np.testing.assert_allclose(results(way, feed, native=native)[0], expected, rtol=1e-5, atol=1e-6)


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


#: Inputs of the model that the fixture `lowered` saves.
LOWERED_FEED = {"indices": np.array([1, 999, 5, 5]), "offsets": np.array([0, 1, 1])}


def run_lowered(path: Path) -> np.ndarray:
    """The output of that model, or of what became of it, without the library."""
    return lucid_onnx.InferenceSession(path, native=False).run(None, LOWERED_FEED)[0]


def two_bags(table: np.ndarray, *, added: bool) -> onnx.ModelProto:
    """Two bags of one table and the same indices: outputs ``a`` and ``b``, or ``y``, the sum of both."""
    nodes = [
        lucid_onnx.make_node("t", "i", "o", "a", mode="max", padding_idx=1, name="first"),
        lucid_onnx.make_node("t", "i", "o", "b", mode="mean", max_norm=0.1, norm_type=3.0),
    ]
    if added:
        nodes.append(helper.make_node("Add", ["a", "b"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.INT32, [d]) for n, d in (("i", "n"), ("o", "b"))],
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", table.shape[1]])
            for n in (["y"] if added else ["a", "b"])
        ],
        [numpy_helper.from_array(table, "t")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def torch_keywords(attributes: spec.Attributes) -> dict[str, Any]:
    """The attributes of a bag that ``torch.nn.functional.embedding_bag`` has, as its keyword arguments."""
    import torch

    known = inspect.signature(torch.nn.functional.embedding_bag).parameters
    return {a.name: getattr(attributes, a.name) for a in spec.Attributes.keyword_table() if a.name in known}


def save_hollow(model: onnx.ModelProto, path: Path, rows: int, *, sized: bool = True) -> Path:
    """Save a model with as many rows of zeros as its table, in a file that takes no room on the disk.

    Args:
        sized: the table's entry says where in the file it begins and how long it is.

    Returns:
        The file of the table.
    """
    (tensor,) = (t for t in model.graph.initializer if t.name == "weight")
    size = len(tensor.raw_data) // tensor.dims[0] * rows
    tensor.ClearField("raw_data")
    tensor.dims[0], tensor.data_location = rows, TensorProto.EXTERNAL
    data = path.with_suffix(".data")
    for key, value in {"location": data.name, **({"offset": "0", "length": str(size)} if sized else {})}.items():
        tensor.external_data.add(key=key, value=value)
    with data.open("wb") as file:
        file.truncate(size)
    path.write_bytes(model.SerializeToString())
    return data


def bags_of_a_user() -> onnx.ModelProto:
    """Two bags of one model, a dense input, and a matrix behind them."""
    random = np.random.RandomState(3)
    tables = {
        "users": random.standard_normal((30, 4)).astype(np.float32),
        "items": random.standard_normal((7, 4)).astype(np.float32),
        "w": random.standard_normal((12, 2)).astype(np.float32),
    }
    nodes = [
        lucid_onnx.make_node("users", "ids", "starts", "user", mode="mean", padding_idx=3),
        helper.make_node("Cast", ["bought"], ["bought64"], to=TensorProto.INT64),
        lucid_onnx.make_node("items", "bought64", None, "item", mode="max"),
        helper.make_node("Concat", ["user", "item", "dense"], ["all"], axis=1),
        helper.make_node("MatMul", ["all", "w"], ["score"]),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("starts", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("bought", TensorProto.INT32, ["batch", "length"]),
            helper.make_tensor_value_info("dense", TensorProto.FLOAT, ["batch", 4]),
        ],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch", 2])],
        [onnx.numpy_helper.from_array(array, name) for name, array in tables.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return lucid_onnx.to_form(model, "portable")
