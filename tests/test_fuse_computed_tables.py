"""Bags over tables that are no plain initializers: dequantized, cast, transposed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_onnx.ops.quantized_embedding_bag import spec as quantized
from lucid_testing.models import attributes, bags, results, same_as_before

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

V, D = 12, 5
RNG = np.random.default_rng(0)
FEED = {"i": RNG.integers(0, V, (4, 3))}


def _model(
    made: list[onnx.NodeProto], constants: dict[str, np.ndarray], kind: int = TensorProto.FLOAT, opset: int = 21
) -> onnx.ModelProto:
    """A sum over rows that the nodes give by the name of "rows"."""
    constants = {**constants, "one": np.array([1])}
    graph = helper.make_graph(
        [*made, helper.make_node("ReduceSum", ["rows", "one"], ["pooled"], keepdims=0)],
        "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, ["B", "L"])],
        [helper.make_tensor_value_info("pooled", kind, ["B", D])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def _dequantized(
    dtype: str, scale: np.ndarray, zero_point: Any, *, first: str, axis: int = 0, opset: int = 21
) -> onnx.ModelProto:
    """Rows of quantized values, dequantized before they are gathered, or behind that."""
    codes = RNG.integers(*((-128, 128) if dtype == "int8" else (0, 256)), (V, D)).astype(dtype)
    constants = {"codes": codes, "scale": scale}
    numbers = ["scale"]
    if zero_point is not None:
        constants["zero"] = np.broadcast_to(np.asarray(zero_point, dtype), scale.shape).copy()
        numbers.append("zero")
    keywords = {"axis": axis} if scale.ndim else {}
    if first == "dequantized":
        made = [
            helper.make_node("DequantizeLinear", ["codes", *numbers], ["table"], **keywords),
            helper.make_node("Gather", ["table", "i"], ["rows"]),
        ]
    else:
        made = [
            helper.make_node("Gather", ["codes", "i"], ["gathered"]),
            helper.make_node("DequantizeLinear", ["gathered", *numbers], ["rows"], **keywords),
        ]
    kind = helper.np_dtype_to_tensor_dtype(scale.dtype)
    return _model(made, constants, kind, opset)


PER_TABLE, PER_ROW = np.float32(0.03), RNG.uniform(0.01, 0.1, V).astype(np.float32)


@pytest.mark.parametrize("first", ["dequantized", "gathered"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("zero_point", [None, 0, 7])
def test_one_scale_for_a_table_is_a_quantized_bag(first: str, dtype: str, zero_point: int | None) -> None:
    model = _dequantized(dtype, np.asarray(PER_TABLE), zero_point, first=first)
    report = lucid_onnx.fuse(model)
    (bag,) = bags(report.model)
    assert bag.op_type == f"QuantizedEmbeddingBag{'ZeroPoint' if zero_point else ''}2D"
    assert quantized.Attributes.from_onnx(attributes(bag)) == quantized.Attributes(
        mode="sum", codes_type=dtype, embedding_dim=D
    )
    assert (report.fused[0].table, report.fused[0].table_from) == ("codes", None)
    assert "DequantizeLinear" not in [n.op_type for n in report.model.graph.node]
    same_as_before(model, report, FEED)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("zero_point", [None, np.arange(V) * 3])
def test_a_scale_for_each_row_is_a_quantized_bag(dtype: str, zero_point: Any) -> None:
    model = _dequantized(dtype, PER_ROW, zero_point, first="dequantized")
    report = lucid_onnx.fuse(model)
    (bag,) = bags(report.model)
    assert bag.op_type == f"QuantizedEmbeddingBag{'' if zero_point is None else 'ZeroPoint'}2D"
    assert list(bag.input)[:2] == ["codes", "scale"]
    same_as_before(model, report, FEED)


def test_a_scale_of_16_bits() -> None:
    model = _dequantized("int8", np.asarray(PER_TABLE, np.float16), 3, first="gathered")
    report = lucid_onnx.fuse(model)
    assert [n.op_type for n in bags(report.model)] == ["QuantizedEmbeddingBagZeroPoint2D"]
    (expected,) = results(model, FEED, native=False)
    # The graph rounds every row to 16 bits, and sums of 3 rows of up to 4.
    np.testing.assert_allclose(results(report.model, FEED)[0], expected, rtol=2e-3, atol=2e-2)


def test_a_scale_for_each_column_is_a_bag_over_a_computed_table() -> None:
    columns = RNG.uniform(0.01, 0.1, D).astype(np.float32)
    model = _dequantized("int8", columns, None, first="dequantized", axis=1)
    report = lucid_onnx.fuse(model)
    assert [n.op_type for n in report.model.graph.node] == ["DequantizeLinear", "EmbeddingBag2D"]
    assert (report.fused[0].table, report.fused[0].table_from) == ("table", "DequantizeLinear")
    same_as_before(model, report, FEED)


def test_scales_of_what_was_gathered_stay() -> None:
    """Over [B, L, D], axis 0 and 1 are bags and positions, and a scale for each is none of a row."""
    for axis, scale in ((0, PER_ROW[:4]), (1, PER_ROW[:3]), (2, PER_ROW[:D])):
        model = _dequantized("int8", scale, None, first="gathered", axis=axis)
        report = lucid_onnx.fuse(model)
        assert bags(report.model) == []
        same_as_before(model, report, FEED)


def test_as_many_rows_as_columns() -> None:
    """The axis tells a scale for each row from one for each column."""
    for axis, op in ((0, "QuantizedEmbeddingBag2D"), (1, "EmbeddingBag2D"), (-2, "QuantizedEmbeddingBag2D")):
        codes = RNG.integers(-128, 128, (D, D)).astype(np.int8)
        made = [
            helper.make_node("DequantizeLinear", ["codes", "scale"], ["table"], axis=axis),
            helper.make_node("Gather", ["table", "i"], ["rows"]),
        ]
        model = _model(made, {"codes": codes, "scale": PER_ROW[:D]})
        report = lucid_onnx.fuse(model)
        assert [n.op_type for n in bags(report.model)] == [op]
        same_as_before(model, report, {"i": FEED["i"] % D})


@pytest.mark.parametrize("how", ["Transpose", "Cast", "Identity", "Mul"])
def test_a_computed_table_is_told_of(how: str) -> None:
    table = RNG.standard_normal((V, D)).astype(np.float32)
    attribute: dict[str, Any] = {"Transpose": {"perm": [1, 0]}, "Cast": {"to": TensorProto.FLOAT}}.get(how, {})
    source = {"Transpose": table.T.copy(), "Cast": table.astype(np.float16)}.get(how, table)
    made = [
        helper.make_node(how, ["source", *(["two"] if how == "Mul" else [])], ["table"], **attribute),
        helper.make_node("Gather", ["table", "i"], ["rows"]),
    ]
    model = _model(made, {"source": source, "two": np.float32([2])})
    report = lucid_onnx.fuse(model)
    assert [n.op_type for n in bags(report.model)] == ["EmbeddingBag2D"]
    (fused,) = report.fused
    assert fused.table_shape == (V, D)
    assert fused.table_from == (None if how == "Identity" else how)
    same_as_before(model, report, FEED)


@pytest.mark.parametrize("padded", [False, True])
def test_what_onnxruntime_quantized(tmp_path: Path, padded: bool) -> None:
    """Its nodes do not stand in order: it does not see what a Loop's body reads."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    quantization = pytest.importorskip("onnxruntime.quantization", reason="onnxruntime has no quantization")
    module = torch.nn.EmbeddingBag(50, 8, mode="sum", padding_idx=2 if padded else None).eval()
    example = (torch.tensor([1, 2, 4, 5, 4, 3, 2, 9]), torch.tensor([0, 3, 5]))
    torch.onnx.export(
        *(module, example, str(tmp_path / "m.onnx")),
        dynamo=True,
        input_names=["ids", "starts"],
        dynamic_shapes=({0: "words"}, {0: "bags"}),
        external_data=False,
        verbose=False,
    )
    kind = quantization.QuantType.QInt8 if padded else quantization.QuantType.QUInt8
    quantization.quantize_dynamic(tmp_path / "m.onnx", tmp_path / "q.onnx", weight_type=kind)
    report = lucid_onnx.fuse(tmp_path / "q.onnx")
    assert [f.op for f in report.fused] == ["QuantizedEmbeddingBagZeroPoint"]
    feed = {"ids": np.arange(40), "starts": np.array([0, 3, 3, 30])}
    session = ort.InferenceSession(tmp_path / "q.onnx")
    for found in (results(report.model, feed), results(lucid_onnx.lower(report.model), feed, native=False)):
        np.testing.assert_allclose(found[0], session.run(None, feed)[0], rtol=1e-5, atol=1e-5)


def test_every_size_of_table() -> None:
    """One scale is written once, however many rows there are, and read for each."""
    for rows, zero_point in itertools.product((1, 70_000), (None, 5)):
        codes = RNG.integers(0, 256, (rows, D)).astype(np.uint8)
        constants = {"codes": codes, "scale": np.asarray(PER_TABLE)}
        numbers = ["scale"]
        if zero_point is not None:
            constants["zero"], numbers = np.asarray(zero_point, np.uint8), ["scale", "zero"]
        made = [
            helper.make_node("Gather", ["codes", "i"], ["gathered"]),
            helper.make_node("DequantizeLinear", ["gathered", *numbers], ["rows"]),
        ]
        model = _model(made, constants)
        report = lucid_onnx.fuse(model)
        assert len(report.fused) == 1
        assert report.model.ByteSize() < model.ByteSize() + 100_000
        same_as_before(model, report, {"i": RNG.integers(0, rows, (2, 3))})


def test_the_command_tells_of_a_computed_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = pytest.importorskip("lucid_onnx.cli", reason="typer is not installed")
    monkeypatch.setenv("COLUMNS", "250")
    made = [
        helper.make_node("Transpose", ["source"], ["table"], perm=[1, 0]),
        helper.make_node("Gather", ["table", "i"], ["rows"]),
    ]
    onnx.save(_model(made, {"source": RNG.standard_normal((D, V)).astype(np.float32)}), tmp_path / "m.onnx")
    assert cli.main(["inspect", str(tmp_path / "m.onnx")]) == 0
    assert "table (computed by Transpose)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["int4", "uint4"])
@pytest.mark.parametrize("by", ["table", "row"])
@pytest.mark.parametrize("columns", [3, 64])
def test_values_of_four_bits_are_packed_as_a_bag_reads_them(kind: str, by: str, columns: int) -> None:
    """ONNX packs a table's values one after another, and a bag those of each row."""
    rng = np.random.default_rng(0)
    low = -8 if kind == "int4" else 0
    codes = rng.integers(low, low + 16, (V, columns)).astype(getattr(ml_dtypes, kind))
    scale = (rng.random(V) + 0.5).astype(np.float32) if by == "row" else np.float32(0.25)
    zero_point = np.full(np.shape(scale), 3).astype(codes.dtype)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["table"], axis=0),
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("ReduceSum", ["rows", "axes"], ["pooled"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "l"])],
        [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["b", columns])],
        [
            numpy_helper.from_array(np.asarray(array), name)
            for name, array in (("codes", codes), ("scale", scale), ("zero_point", zero_point), ("axes", np.array([1])))
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    report = lucid_onnx.fuse(model)
    assert [(f.op, f.table_dtype) for f in report.fused] == [("QuantizedEmbeddingBagZeroPoint2D", kind)]
    assert "DequantizeLinear" not in {n.op_type for n in report.model.graph.node}
    feed = {"ids": rng.integers(0, V, (3, 4))}
    numbers = (codes.astype(np.float32) - 3) * (scale[:, None] if by == "row" else scale)
    for native in (True, False):
        (got,) = lucid_onnx.InferenceSession(report.model, native=native).run(None, feed)
        np.testing.assert_allclose(got, numbers[feed["ids"]].sum(1), rtol=1e-5, atol=1e-5)
