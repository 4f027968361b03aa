"""Fusing bags inside of functions, branches and loops."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import lucid_onnx
from lucid_testing.models import D, Small, V, attributes, bags, in_function, results, same_as_before, ways_to_run

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


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
    for way, native in ways_to_run(report.model).values():
        for found, e in zip(results(way, feed, native=native), expected, strict=True):
            np.testing.assert_allclose(found, e, rtol=1e-5, atol=1e-6)


def test_functions_whose_calls_differ_keep_their_nodes() -> None:
    """One call has a table of doubles, another one of floats; and a function of another opset is not searched."""
    table = np.ones((V, 2))
    for model in (in_function(other=table), in_function(opset=19)):
        model.graph.output[1].type.tensor_type.elem_type = TensorProto.DOUBLE if model.functions[0] else 1
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
