"""Quantized tables: every case in every form, against torch's own quantized bags, and what is rejected."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lucid_onnx
from lucid_onnx import QuantizedTable, quantized_embedding_bag
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops.embedding_bag import reference as pooling
from lucid_onnx.ops.quantized_embedding_bag import reference, spec
from lucid_onnx.ops.quantized_embedding_bag.cases import Case, all_cases
from lucid_onnx.runtime import info
from lucid_testing.hostile import check_attribute_types
from lucid_testing.quantized import check_class, not_finite

CASES = all_cases()
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_kind = pytest.mark.parametrize("kind", spec.CODES_TYPES)
model_of = functools.cache(case_model)


def run(case: Case, form: str, *, native: bool, constant: bool = False) -> np.ndarray:
    session = lucid_onnx.InferenceSession(model_of(case, form, constant=constant), native=native)
    names = {i.name for i in session.get_inputs()}
    return session.run(None, {name: array for name, array in case.inputs.items() if name in names})[0]


@every_case
def test_kernel(case: Case, native: None) -> None:
    given_table = run(case, "native", native=True)
    case.check(given_table)
    # A constant table has its scales packed beside their zero_points or biases: the same numbers.
    assert run(case, "portable", native=True, constant=True).tobytes() == given_table.tobytes()


@every_case
@pytest.mark.parametrize("form", ["portable", "standard"])
def test_standard_operators(case: Case, form: str) -> None:
    onnx.checker.check_model(model_of(case, form), full_check=True)
    case.check(run(case, form, native=False))


@every_case
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about the infinity that stands for "no norm"
def test_onnx_reference(case: Case) -> None:
    evaluator = onnx.reference.ReferenceEvaluator(model_of(case, "portable"))
    case.check(np.asarray(evaluator.run(None, case.inputs)[0]))


@every_case
def test_call(case: Case, native: None) -> None:
    table = QuantizedTable.of(case.table, case.scale, zero_point=case.zero_point, bias=case.bias)
    got = quantized_embedding_bag(
        case.indices, table, case.offsets, per_sample_weights=case.per_sample_weights, **case.keywords
    )
    case.check(got)


@every_kind
@pytest.mark.parametrize("second", [None, *spec.SECOND_NUMBERS])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("form", "native"), [("portable", True), ("portable", False), ("standard", False)])
def test_numbers_that_are_not_finite(
    form: str, native: bool, dtype: str, second: str | None, kind: str, request: pytest.FixtureRequest
) -> None:
    """A row is dequantized before it is weighted: 0 * inf and inf - inf come from nowhere else."""
    if native:
        request.getfixturevalue("native")
    case = not_finite(kind, second, dtype)
    check_class(case, run(case, form, native=native))


@pytest.mark.parametrize("name", ["int8_zero_point_mean_rows_float16", "int4_bias_max_ragged_float32"])
def test_an_attribute_of_another_type_is_not_absent(name: str, native: None) -> None:
    check_attribute_types(case_model(CASES[name], "native"), CASES[name].op.name)


def test_every_name_has_a_case() -> None:
    assert {case.op.name for case in CASES.values()} >= {
        name for name, op in spec.VARIANTS.items() if not (op.weighted and op.two_d and op.second)
    }


@pytest.mark.parametrize("opset", [16, 17, 21, 26])
def test_opsets(opset: int) -> None:
    case = CASES["int4_bias_max_ragged_float32"]
    model = case_model(case, "standard", opset)
    case.check(np.asarray(onnx.reference.ReferenceEvaluator(model).run(None, case.inputs)[0]))


@every_kind
@pytest.mark.parametrize("dim", [0, 1, 2, 7, 64])
def test_packing_is_lossless(kind: str, dim: int) -> None:
    codes = spec.CODES_TYPES[kind]
    table = np.random.RandomState(0).randint(codes.lowest, codes.highest + 1, (9, dim)).astype(codes.dtype)
    stored = spec.pack(table)
    assert stored.dtype == codes.stored
    assert stored.shape == (9, codes.stored_columns(dim))
    np.testing.assert_array_equal(spec.unpack(stored, codes, dim).astype(int), table.astype(int))


def test_packed_codes_are_onnx_bytes() -> None:
    """With an even number of columns the bytes are those of an ONNX tensor of UINT4."""
    table = np.arange(24).reshape(3, 8) % 16
    packed = spec.pack(table.astype(ml_dtypes.uint4))
    tensor = onnx.helper.make_tensor("t", onnx.TensorProto.UINT4, (3, 8), table.reshape(-1))
    assert packed.tobytes() == (tensor.raw_data or bytes(tensor.int32_data))


@every_kind
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_quantize_is_within_half_a_scale(kind: str, dtype: str) -> None:
    random = np.random.RandomState(1)
    weight = (random.standard_normal((50, 33)) * 10.0 ** random.randint(-3, 4, (50, 1))).astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )
    weight[7] = 0
    weight[8] = weight[8, 0]
    table = QuantizedTable.quantize(weight, kind)
    assert table.shape == weight.shape
    off = np.abs(table.dequantize() - weight.astype(np.float64))
    # Half a scale, and what float32 rounds of scale and bias, at most 256 scales away.
    assert (off <= table.scale[:, None] * (0.5 + 256 * 2.0**-23) + np.abs(weight).max(axis=1)[:, None] * 2.0**-23).all()
    assert (table.dequantize()[7] == 0).all()
    # Where all bits are used, they are: the ends of the range occur in almost every row.
    codes = spec.unpack(table.codes, spec.CODES_TYPES[kind], 33).astype(int)
    extremes = np.abs(codes).max(axis=1) == spec.CODES_TYPES[kind].highest
    assert extremes.sum() >= 48


@every_kind
def test_quantize_in_parts_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.RandomState(2).standard_normal((101, 9)).astype(np.float32)
    whole = QuantizedTable.quantize(weight, kind)
    monkeypatch.setattr("lucid_onnx.ops.quantized_embedding_bag.table._AT_ONCE", 90)
    parts = QuantizedTable.quantize(weight, kind)
    for name, array in whole.inputs.items():
        assert array.tobytes() == parts.inputs[name].tobytes()


def test_quantize_refuses() -> None:
    weight = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match=re.escape("dtype = 'int3' is not one of int8, uint8, int4, uint4")):
        QuantizedTable.quantize(weight, "int3")
    weight[2, 1] = np.nan
    with pytest.raises(ValueError, match=re.escape("weight[2, 1] = nan has no code")):
        QuantizedTable.quantize(weight)
    with pytest.raises(TypeError, match="weight has dtype int64"):
        QuantizedTable.quantize(np.ones((2, 2), np.int64))
    with pytest.raises(ValueError, match=re.escape("weight has shape [4], expected [V, D]")):
        QuantizedTable.quantize(np.ones(4, np.float32))


def test_a_table_refuses_what_does_not_fit() -> None:
    codes, scale = np.ones((4, 3), np.int8), np.ones(4, np.float32)
    with pytest.raises(TypeError, match="codes has dtype int16, expected int8, uint8, int4 or uint4"):
        QuantizedTable.of(codes.astype(np.int16), scale)
    with pytest.raises(ValueError, match=re.escape("codes has shape [12], expected [V, D]")):
        QuantizedTable.of(codes.reshape(-1), scale)
    with pytest.raises(TypeError, match="scale has dtype float64"):
        QuantizedTable.of(codes, scale.astype(np.float64))
    with pytest.raises(ValueError, match=re.escape("scale has shape [3], expected [4]")):
        QuantizedTable.of(codes, scale[:3])
    with pytest.raises(TypeError, match="bias has dtype float16, scale has float32"):
        QuantizedTable.of(codes, scale, bias=scale.astype(np.float16))
    with pytest.raises(ValueError, match="zero_point and bias are given"):
        QuantizedTable.of(codes, scale, bias=scale, zero_point=scale)
    with pytest.raises(ValueError, match=re.escape("codes has shape [4, 3], expected [V, 2]")):
        QuantizedTable(codes.view(np.uint8), "uint4", 4, scale)


TABLE = QuantizedTable.quantize(np.random.RandomState(3).standard_normal((10, 5)).astype(np.float32), "int4")
GOOD = {"x": np.array([1, 2, 9]), "offsets": np.array([0, 2])}
REFUSED = [
    ({"x": np.array([1, 10, 9])}, IndexError, "indices[1] = 10 is outside [0, 10)"),
    ({"x": np.array([1, -1, 9])}, IndexError, "indices[1] = -1 is outside [0, 10)"),
    ({"offsets": np.array([1, 2])}, ValueError, "offsets[0] = 1 must be 0"),
    ({"offsets": np.array([0, 4])}, ValueError, "offsets[1] = 4 is past the number of indices, 3"),
    ({"offsets": None}, ValueError, "offsets missing"),
    ({"mode": "median"}, ValueError, "mode = 'median'"),
    ({"padding_idx": 10}, ValueError, "padding_idx = 10 is outside [-10, 10)"),
    ({"x": np.array([1.0, 2.0, 3.0])}, TypeError, "indices has dtype float64"),
    (
        {"mode": "sum", "per_sample_weights": np.ones(3)},
        TypeError,
        "per_sample_weights has dtype float64, scale has float32",
    ),
    ({"per_sample_weights": np.ones(3, np.float32)}, ValueError, "per_sample_weights needs mode 'sum'"),
    ({"table": np.ones((3, 3))}, TypeError, "table is a ndarray, expected a QuantizedTable"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), REFUSED, ids=[r[2] for r in REFUSED])
@pytest.mark.parametrize("kernel", [True, False], ids=["native", "graph"])
def test_refusals(wrong: dict, error: type, message: str, kernel: bool, native: None) -> None:
    arguments = {"table": TABLE, **GOOD, **wrong}
    with pytest.raises(error, match=re.escape(message)):
        quantized_embedding_bag(**arguments, native=kernel)
    good = quantized_embedding_bag(table=TABLE, **GOOD, native=kernel)
    np.testing.assert_allclose(good[1], TABLE.dequantize()[9], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.zeros((10, 4), np.uint8)}, "codes has shape [10, 4], which does not hold embedding_dim = 5"),
        ({"scale": np.ones(9, np.float32)}, "scale has shape [9], codes has 10 rows"),
        ({"scale": np.ones((10, 1), np.float32)}, "scale has 2 dimensions, expected [V]"),
        ({"zero_point": np.ones(11, np.float32)}, "zero_point has shape [11], codes has 10 rows"),
        ({"indices": np.array([3, 99, 0])}, "indices[1] = 99 is outside [0, 10)"),
    ],
)
def test_the_kernel_refuses(change: dict, message: str, native: None) -> None:
    case = CASES["uint4_zero_point_sum_ragged_float32"]
    model = case_model(case, "native")
    for value in model.graph.input:  # so that onnxruntime lets every shape through to the kernel
        value.type.tensor_type.ClearField("shape")
    session = lucid_onnx.InferenceSession(model)
    good = {"offsets": np.array([0, 1]), "indices": np.array([3, 4, 0]), "codes": case.codes, "scale": case.scale}
    good["zero_point"] = case.zero_point
    with pytest.raises(Exception, match=re.escape(message)):
        session.run(None, {**good, **change})
    assert session.run(None, good)[0].shape == (2, 5)


@pytest.mark.parametrize("codes_type", [3, 1, 0, 23])
def test_the_kernel_refuses_codes_of_another_type(codes_type: int, native: None) -> None:
    model = case_model(CASES["uint4_sum_ragged_float32"], "native")
    (attribute,) = (a for a in model.graph.node[0].attribute if a.name == "codes_type")
    attribute.i = codes_type
    with pytest.raises(Exception, match=f"codes_type = {codes_type} does not match codes of type 2"):
        lucid_onnx.InferenceSession(model)


def test_a_node_without_its_codes_type_is_refused() -> None:
    model = case_model(CASES["uint4_sum_ragged_float32"], "native")
    node = model.graph.node[0]
    node.attribute.remove(next(a for a in node.attribute if a.name == "codes_type"))
    with pytest.raises(ValueError, match="the attribute codes_type is missing"):
        lucid_onnx.to_form(model, "portable")


@every_kind
def test_to_form_and_back(kind: str) -> None:
    model = lucid_onnx.build_quantized_model(QuantizedTable.quantize(np.eye(6, 5, dtype=np.float32), kind), mode="sum")
    native = lucid_onnx.to_form(model, "native")
    assert not native.functions
    assert lucid_onnx.to_form(native, "portable") == model
    standard = lucid_onnx.to_form(model, "standard")
    assert [entry.domain for entry in standard.opset_import] == [""]
    feed = {"indices": np.array([0, 5, 3]), "offsets": np.array([0, 2])}
    expected = lucid_onnx.InferenceSession(model, native=False).run(None, feed)[0]
    np.testing.assert_array_equal(ort.InferenceSession(standard.SerializeToString()).run(None, feed)[0], expected)


@pytest.mark.parametrize("kind", ["int8", "uint4"])
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_the_same_bits_at_any_number_of_threads(kind: str, mode: str, native: None) -> None:
    random = np.random.RandomState(4)
    table = QuantizedTable.quantize(random.standard_normal((5000, 65)).astype(np.float32), kind)
    lengths = np.array([3] * 500 + [30000, 0, 2000])
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    feed = {"indices": random.randint(0, 5000, lengths.sum()), "offsets": offsets}
    results = []
    for threads in (1, 2, 8):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        model = lucid_onnx.build_quantized_model(table, mode=mode)
        session = lucid_onnx.InferenceSession(model, session_options=options)
        results.append(session.run(None, feed)[0])
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()
    exact = pooling.embedding_bag(feed["indices"], table.dequantize(), offsets, mode=mode)
    np.testing.assert_allclose(results[0], exact, atol=1e-6 * 30000 * 4, rtol=0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_kernel_graph_and_reference_agree(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(spec.CODES_TYPES)))
    dim = data.draw(st.sampled_from([1, 2, 3, 7, 15, 16, 17, 31, 33, 100]))
    rows = data.draw(st.integers(1, 20))
    lengths = data.draw(st.lists(st.integers(0, 40), max_size=8))
    random = np.random.RandomState(data.draw(st.integers(0, 2**31)))
    table = QuantizedTable.quantize(random.standard_normal((rows, dim)).astype(np.float32), kind)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) if lengths else np.zeros(0, np.int64)
    indices = random.randint(0, rows, sum(lengths))
    mode = data.draw(st.sampled_from(["sum", "mean", "max"]))
    padding_idx = data.draw(st.none() | st.integers(-rows, rows - 1))
    exact = pooling.embedding_bag(indices, table.dequantize(), offsets, mode=mode, padding_idx=padding_idx)
    size = np.abs(table.dequantize()) + (0 if table.bias is None else 2 * np.abs(table.bias[:, None]))
    allowed = 1e-6 * pooling.embedding_bag(indices, size, offsets, mode=mode, padding_idx=padding_idx)
    for native in (True, False):
        got = quantized_embedding_bag(indices, table, offsets, mode=mode, padding_idx=padding_idx, native=native)
        assert (np.abs(got - exact) <= allowed).all()


@pytest.mark.parametrize(("kind", "bits"), [("uint8", 8), ("uint4", 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_torch_agrees(kind: str, bits: int, weighted: bool, native: None) -> None:
    """torch's own quantized bags, over what torch packed: FBGEMM's rows of quantized values, then scale and bias."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    random = np.random.RandomState(5)
    weight = random.standard_normal((100, 32)).astype(np.float32)
    lengths = [0, 3, 20, 1, 7]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    indices = random.randint(0, 100, sum(lengths))
    weights = random.standard_normal(len(indices)).astype(np.float32) if weighted else None
    prefix = f"embedding_bag_{'byte' if bits == 8 else '4bit'}"
    packed = getattr(torch.ops.quantized, f"{prefix}_prepack")(torch.from_numpy(weight)).numpy()
    pool = getattr(torch.ops.quantized, f"{prefix}_rowwise_offsets")
    table = QuantizedTable.from_torch_prepacked(packed, kind)
    assert table.shape == weight.shape
    assert table.codes.flags.c_contiguous
    unpacked = getattr(torch.ops.quantized, f"{prefix}_unpack")(torch.from_numpy(packed)).numpy()
    # torch multiplies and adds in float32; what it means is the same numbers.
    np.testing.assert_allclose(table.dequantize(), unpacked, rtol=0, atol=2.0**-22 * np.abs(weight).max())
    expected = pool(
        torch.from_numpy(packed),
        torch.from_numpy(indices),
        torch.from_numpy(offsets),
        mode=0,
        per_sample_weights=None if weights is None else torch.from_numpy(weights),
        include_last_offset=True,
    ).numpy()
    got = quantized_embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
    np.testing.assert_allclose(got, expected, atol=2e-5)
    # And our quantisation is torch's, up to the half precision that its 4-bit rows keep their scale in.
    ours = QuantizedTable.quantize(weight, kind).dequantize()
    np.testing.assert_allclose(ours, table.dequantize(), atol=float(table.scale.max()) * (1.01 if bits == 4 else 0.01))


def test_prepacked_rows_that_are_none_are_refused() -> None:
    rows = np.zeros((3, 12), np.uint8)
    assert QuantizedTable.from_torch_prepacked(rows, "uint8").shape == (3, 4)
    assert QuantizedTable.from_torch_prepacked(rows, "uint4").shape == (3, 16)
    assert QuantizedTable.from_torch_prepacked(rows[:, :8], "uint8").shape == (3, 0)
    with pytest.raises(ValueError, match=re.escape("dtype = 'int8' is not one of uint8, uint4")):
        QuantizedTable.from_torch_prepacked(rows, "int8")
    with pytest.raises(TypeError, match="packed has dtype int8, expected uint8"):
        QuantizedTable.from_torch_prepacked(rows.view(np.int8), "uint8")
    with pytest.raises(ValueError, match=re.escape("packed has shape [3, 7], expected [V, codes + 8]")):
        QuantizedTable.from_torch_prepacked(rows[:, :7], "uint8")
    with pytest.raises(ValueError, match=re.escape("packed has shape [36], expected [V, codes + 4]")):
        QuantizedTable.from_torch_prepacked(rows.reshape(-1), "uint4")
    rows[1, -4:] = np.frombuffer(np.float32(np.inf).tobytes(), np.uint8)
    with pytest.raises(ValueError, match=re.escape("packed[1] has the bias inf; is it uint8?")):
        QuantizedTable.from_torch_prepacked(rows, "uint8")


def test_reference_refuses_weights_of_another_dtype() -> None:
    with pytest.raises(TypeError, match="per_sample_weights has dtype float64, scale has float32"):
        reference.quantized_embedding_bag(
            [0], np.ones((1, 1), np.int8), np.ones(1, np.float32), [0], mode="sum", per_sample_weights=[1.0]
        )


@every_kind
def test_files_are_lowered_and_told_about(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
    table = QuantizedTable.quantize(np.random.RandomState(6).standard_normal((50, 7)).astype(np.float32), kind)
    path, lowered = tmp_path / "codes.onnx", tmp_path / "lowered.onnx"
    lucid_onnx.save(lucid_onnx.build_quantized_model(table, mode="sum", padding_idx=-1), path)
    (node,) = info.model(str(path)).nodes
    assert (node.table.dtype, node.table.shape, node.table_bytes) == (kind, (50, 7), table.codes.nbytes)
    assert (node.mode, node.padding_idx, node.form) == ("sum", -1, "portable")
    assert lucid_onnx.fuse(path).fused == ()
    lucid_onnx.lower(path, lowered)
    assert b"ai.lucid" not in lowered.read_bytes()
    feed = {"indices": np.array([0, 49, 3]), "offsets": np.array([0, 2])}
    bits = [lucid_onnx.InferenceSession(str(p), native=False).run(None, feed)[0].tobytes() for p in (path, lowered)]
    assert bits[0] == bits[1]


def test_norms_are_taken_in_float32(native: None) -> None:
    """One that overflows leaves nothing of its row, in each form and in the reference."""
    codes, scale = np.array([[3, 4], [1, 2]], np.int8), np.array([1e25, 1], np.float32)
    given = np.array([0, 1]), codes, scale, np.array([0, 1])
    keywords: dict[str, Any] = {"mode": "sum", "max_norm": 1e30}
    expected = np.array([[0, 0], [1, 2]], np.float32)
    np.testing.assert_array_equal(reference.quantized_embedding_bag(*given, **keywords), expected)
    table = QuantizedTable(codes, "int8", 2, scale)
    for form in ("native", "standard"):
        got = quantized_embedding_bag(given[0], table, given[3], form=form, native=form == "native", **keywords)
        np.testing.assert_array_equal(got, expected)
