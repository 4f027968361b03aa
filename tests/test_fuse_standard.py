"""Fusing our own standard form: what was lowered comes back, and what was changed stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops.embedding_bag import cases as named
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.quantized_embedding_bag import cases as quantized
from lucid_testing.models import attributes, bags, interface, swapped_operators, two_bags

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


OPSETS = (16, 18, min(spec.MAX_OPSET, onnx.defs.onnx_opset_version()))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("constant", [False, True])
def test_what_was_lowered_comes_back(opset: int, constant: bool) -> None:
    """Named cases, with another opset and kind of table in each turn; more than half of them, some of every sort."""
    turn = OPSETS.index(opset) * 2 + constant
    for case in list(named.all_cases().values())[turn::11]:
        expected = case_model(case, "native", opset, constant=constant)
        report = lucid_onnx.fuse(case_model(case, "standard", opset, constant=constant), form="native")
        assert [n.op_type for n in report.model.graph.node] == [n.op_type for n in expected.graph.node], case.name
        found, wanted = report.model.graph.node[0], expected.graph.node[0]
        assert found.op_type == wanted.op_type
        assert attributes(found) == attributes(wanted), case.name
        assert list(found.input) == list(wanted.input)
        assert interface(report.model) == interface(expected)
        assert report.unfused == ()


def test_codes_that_were_lowered_come_back() -> None:
    """Every thirteenth named case of quantized tables; opsets and kinds of table in turn."""
    for k, case in enumerate(list(quantized.all_cases().values())[::13]):
        opset, constant = OPSETS[k % 3], k % 2 == 0
        expected = case_model(case, "native", opset, constant=constant)
        report = lucid_onnx.fuse(case_model(case, "standard", opset, constant=constant), form="native")
        (found,), (wanted,) = report.model.graph.node, expected.graph.node
        assert (found.op_type, list(found.input)) == (wanted.op_type, list(wanted.input)), case.name
        assert attributes(found) == attributes(wanted), case.name
        assert interface(report.model) == interface(expected)
        assert report.unfused == ()
        (fused,) = report.fused
        assert (fused.pattern, fused.table) == ("quantized standard form", "codes")
        assert (fused.table_dtype, fused.table_shape[1]) == (case.attributes.codes_type, case.table.shape[1])
        held = sum(a.nbytes for n, a in case.inputs.items() if n in ("codes", "scale", "zero_point", "bias"))
        assert fused.table_bytes == (held if constant else None)


def test_a_quantised_model_is_lowered_and_fused_to_itself() -> None:
    model = two_bags(np.random.default_rng(0).standard_normal((20, 13)).astype(np.float32), added=False)
    for dtype in ("int8", "uint4"):
        small = lucid_onnx.quantize(model, dtype=dtype).model
        back = lucid_onnx.fuse(lucid_onnx.lower(small), form="native").model
        assert [attributes(n) for n in bags(back)] == [attributes(n) for n in bags(small)]
        assert [(n.op_type, n.input, n.output) for n in bags(back)] == [
            (n.op_type, n.input, n.output) for n in bags(small)
        ]
        assert back.graph.initializer == small.graph.initializer


def test_changed_codes_stay() -> None:
    table = lucid_onnx.QuantizedTable.quantize(np.eye(3, 5, dtype=np.float32), "int4")
    standard = lucid_onnx.build_quantized_model(table, mode="sum", form="standard")
    assert len(lucid_onnx.fuse(standard).fused) == 1
    swaps = {"Add": "Sub", "Sub": "Add", "Floor": "Ceil", "Mul": "Div"}
    for what, model in swapped_operators(standard, swaps, step=12, more_than=30):
        assert bags(lucid_onnx.fuse(model).model) == [], what


def test_two_bags_of_a_lowered_graph_come_back() -> None:
    model = two_bags(np.eye(3, dtype=np.float32), added=True)
    portable = lucid_onnx.to_form(model, "portable")
    standard = lucid_onnx.lower(portable)
    assert bags(standard) == []
    back = lucid_onnx.fuse(standard).model
    assert [attributes(n) for n in bags(back)] == [attributes(n) for n in bags(portable)]
    assert [(list(n.input), list(n.output)) for n in bags(back)] == [
        (list(n.input), list(n.output)) for n in bags(portable)
    ]


def test_a_changed_standard_form_stays() -> None:
    standard = lucid_onnx.build_model(np.eye(3, dtype=np.float32), mode="sum", form="standard")
    swaps = {"Add": "Sub", "Sub": "Add", "Max": "Min", "Min": "Max", "Greater": "Less", "LessOrEqual": "Less"}
    swaps |= {"ReduceSum": "ReduceMax", "ReduceMax": "ReduceMin"}
    for what, model in swapped_operators(standard, swaps, step=8, more_than=30):
        assert bags(lucid_onnx.fuse(model).model) == [], what
