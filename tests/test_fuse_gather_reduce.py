"""Fusing a Gather and a reduction over indices [B, L], with masks and weights; what only looks like it stays."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec
from lucid_testing.models import D, Small, V, attributes, bags, changed_numbers, interface, results, same_as_before

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


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


@pytest.mark.parametrize("last", [-1, 2])
def test_rows_by_one_coordinate_are_a_bag(last: int) -> None:
    """As torch's exporter writes ``table[ids]``."""
    g = Small(opset=18)
    model = g.model(g.reduced(g("GatherND", "table", g("Unsqueeze", "i", np.array([last])))))
    report = lucid_onnx.fuse(model)
    assert [f.op for f in report.fused] == ["EmbeddingBag2D"]
    same_as_before(model, report, {"i": np.random.default_rng(1).integers(0, V, (7, 5))})


def test_numbers_by_two_coordinates_are_not_rows() -> None:
    g = Small(shape=(4, 2), opset=18)
    numbers = g("GatherND", "table", g("Unsqueeze", "i", np.array([0])))
    model = g.model(g.reduced(numbers, axis=0, keepdims=1))
    report = lucid_onnx.fuse(model)
    assert report.fused == ()
    same_as_before(model, report, {"i": np.array([[3, 1], [0, 2], [9, 3], [9, 0]])})


def test_a_sum_over_no_columns_is_zeros_to_both() -> None:
    g = Small(shape=("b", "l"))
    model = g.model(g.reduced(g("Gather", "table", "i")))
    report = lucid_onnx.fuse(model)
    assert len(report.fused) == 1
    for shape in ((3, 0), (0, 3), (0, 0), (2, 2)):
        same_as_before(model, report, {"i": np.zeros(shape, np.int64)})


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax"])
@pytest.mark.parametrize("length", ["l", None, 0])
def test_a_length_that_may_be_zero_needs_a_word_in_old_opsets(op: str, length: Any) -> None:
    g = Small(shape=("b", length), opset=14)
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


@pytest.mark.parametrize("opset", [15, 18, 20])
@pytest.mark.parametrize("length", ["l", None])
def test_a_length_that_may_be_zero(length: Any, opset: int) -> None:
    """A mean over nothing stays NaN, and a maximum an error; both are zeros to a bag."""
    for op in ("ReduceMean", "ReduceMax"):
        g = Small(shape=("b", length), opset=opset)
        model = g.model(g.reduced(g("Gather", "table", "i"), op))
        report = lucid_onnx.fuse(model)
        assert [f.op for f in report.fused] == ["EmbeddingBag2D"]
        same_as_before(model, report, {"i": np.array([[1, 2, 3], [4, 4, 0]])})
        same_as_before(model, report, {"i": np.zeros((0, 3), np.int64)})
        nothing = {"i": np.zeros((2, 0), np.int64)}
        if op == "ReduceMean":
            assert np.isnan(results(report.model, nothing)[0]).all()
        else:
            with pytest.raises(Exception, match="cannot be reshaped"):
                results(report.model, nothing)
        assumed = lucid_onnx.fuse(model, assume_nonempty=True)
        left = {n.op_type for n in assumed.model.graph.node} - {n.op_type for n in bags(assumed.model)}
        assert left <= {"Cast"}


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax"])
def test_a_length_of_zero_is_no_bag(op: str) -> None:
    g = Small(shape=("b", 0))
    report = lucid_onnx.fuse(g.model(g.reduced(g("Gather", "table", "i"), op)))
    assert report.fused == ()
    assert report.unfused[0].reason.startswith("the length of the bags is 0: a")


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
    # With nothing in the way of 0 / 0, the mask is weights, whose sum the bag divides by as well.
    by_weights = what == "none"
    assert [(f.mode, f.attributes["divisor"]) for f in report.fused] == [
        ("mean", "weights") if by_weights else ("sum", None)
    ]
    assert ("Div" in [n.op_type for n in report.model.graph.node]) != by_weights
    same_as_before(model, report, {"i": np.array([[1, 3, 3, 2, 0], [0, 1, 2, 4, 3], [3, 3, 3, 3, 3]])})


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
        return g.reduced(g("Mul", g("Gather", "table", "i"), np.array([1, 1, 1, 2], np.float32)))

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
        where_not_zero: "something else than zero in the place of rows",
    }
    for write, why in reasons.items():
        g = Small()
        report = lucid_onnx.fuse(g.model(write(g)))
        assert report.fused == (), write.__name__
        assert [why in u.reason for u in report.unfused] == ([True] if why else []), (write.__name__, report.unfused)


@pytest.mark.parametrize("shape", [(1, 5), ("c", 5), ("b", 1), (5,), ()])
@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean"])
def test_factors_of_another_shape_are_broadcast(shape: tuple[Any, ...], op: str) -> None:
    """Numbers and indices both grow to the shape of the product, as in the model."""
    g = Small()
    g.inputs["w"] = (TensorProto.FLOAT, shape)
    factors = g("Unsqueeze", "w", np.array([len(shape)])) if shape else "w"
    report = lucid_onnx.fuse(g.model(g.reduced(g("Mul", g("Gather", "table", "i"), factors), op)))
    mode, divisor = ("sum", None) if op == "ReduceSum" else ("mean", "count")
    found = [(f.op, f.mode, f.attributes["divisor"]) for f in report.fused]
    assert found == [("EmbeddingBag2DWeighted", mode, divisor)]
    rng = np.random.default_rng(1)
    sizes_of_both = (
        [(7, 7), (1, 1)] if shape[:1] == ("b",) else [(7, 7), (1, 7), (7, 1)] if shape[:1] == ("c",) else [(7, 1)]
    )
    for num_bags, factor_rows in sizes_of_both:
        sizes = {"b": factor_rows, "c": factor_rows}
        feed = {"i": rng.integers(0, V, (num_bags, 5))}
        feed["w"] = rng.standard_normal([sizes.get(n, n) for n in shape]).astype(np.float32)
        same_as_before(g.model(g.nodes[-1].output[0]), report, feed)


@pytest.mark.parametrize("finite", [True, False])
def test_where_selects_by_any_mask(finite: bool) -> None:
    """What is not selected is not read, also where it is no number."""
    g = Small()
    if not finite:
        g.table[0], g.table[3] = np.nan, np.inf
    mask = g("Unsqueeze", g("Less", "i", np.array(4)), np.array([-1]))
    model = g.model(g.reduced(g("Where", mask, np.zeros((), np.float32), g("Gather", "table", "i"))))
    report = lucid_onnx.fuse(model)
    assert [(f.op, f.attributes["negative"]) for f in report.fused] == [("EmbeddingBag2D", "skip")]
    feed = {"i": np.array([[1, 3, 3, 2, 0], [3, 3, 3, 3, 3], [0, 5, 8, 4, 5]])}
    same_as_before(model, report, feed)
    assert np.isfinite(results(report.model, feed)[0]).all()


@pytest.mark.parametrize("low", [-np.inf, -1e9, 0.25])
def test_a_maximum_of_what_a_mask_selects(low: float) -> None:
    """A bag that has nothing selected, or less than what stands in for it, is what the model says."""
    g = Small()
    mask = g("Unsqueeze", g("Equal", "i", np.array(3)), np.array([-1]))
    rows = g("Where", mask, np.array(low, np.float32), g("Gather", "table", "i"))
    model = g.model(g.reduced(rows, "ReduceMax"))
    report = lucid_onnx.fuse(model)
    assert [(f.op, f.mode, f.attributes["negative"]) for f in report.fused] == [("EmbeddingBag2D", "max", "skip")]
    same_as_before(model, report, {"i": np.array([[1, 3, 3, 2, 0], [3, 3, 3, 3, 3], [0, 5, 8, 4, 5]])})


def test_a_second_output_has_a_type_of_its_own() -> None:
    """TopK's indices are int64 whatever its values are; a Cast of them is needed."""
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
