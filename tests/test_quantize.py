"""Quantizing the tables of a model: in every form, the result pools the dequantized rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_onnx import QuantizedTable
from lucid_onnx.ops.embedding_bag import reference, spec
from lucid_testing.models import save_hollow, ways_to_run
from lucid_testing.processes import PEAK_KIB, needs_peak_memory, run_script

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

DTYPES = ("int8", "uint8", "int4", "uint4", "float16", "bfloat16")
CODES = DTYPES[:4]
HALVES = {"float16": np.dtype(np.float16), "bfloat16": spec.BFLOAT16}
#: float64 sums of float32 products, as a share of the magnitudes that were summed.
RELATIVE = 1e-6


def table_of(rows: int, dim: int, seed: int, dtype: str = "float32") -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, dim))
    return values.astype(spec.BFLOAT16 if dtype == "bfloat16" else dtype)


def tensor(name: str, array: np.ndarray) -> onnx.TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return TensorProto(name=name, data_type=kind, dims=array.shape, raw_data=array.tobytes())


def stands_for(table: np.ndarray, dtype: str) -> np.ndarray:
    """The rows that a table becomes."""
    if dtype in HALVES:
        return table.astype(HALVES[dtype]).astype(np.float64)
    return QuantizedTable.quantize(table, dtype).dequantize()


#: Bags over two tables: by output, the table and the arguments of the call.
BAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "weighted": ("users", {"mode": "sum", "padding_idx": -1}),
    "largest": ("users", {"mode": "max"}),
    "clipped": ("items", {"mode": "mean", "max_norm": 1.5, "norm_type": 3.0}),
    "rows": ("items", {"mode": "mean", "padding_idx": 2}),
}
FEED = {
    "i": np.array([3, 0, 29, 29, 7, 11, 2]),
    "o": np.array([0, 0, 3, 6]),
    "x": np.array([[2, 2, 2], [0, 19, 2]]),
    "w": np.linspace(-1, 2, 7).astype(np.float32),
    "flag": np.array(True),
}


def several(dtype: str = "float32", form: Any = "portable") -> onnx.ModelProto:
    """The bags of `BAGS`, one of them in a branch, and a Gather over another table."""

    def bag(output: str) -> onnx.NodeProto:
        table, keywords = BAGS[output]
        places = ("x",) if output == "rows" else ("i", "o")
        weights = "w" if output == "weighted" else None
        name = f"{output} bag"
        return lucid_onnx.make_node(
            table, *places, output=output, per_sample_weights=weights, weight_dtype=dtype, name=name, **keywords
        )

    kind = helper.np_dtype_to_tensor_dtype(table_of(1, 1, 0, dtype).dtype)
    info = helper.make_tensor_value_info
    then = helper.make_graph([bag("clipped")], "then", [], [info("clipped", kind, ["b", 12])])
    other = helper.make_node("Identity", ["again"], ["zeros"])
    otherwise = helper.make_graph([other], "else", [], [info("zeros", kind, ["b", 12])])
    nodes = [
        bag("weighted"),
        bag("largest"),
        bag("rows"),
        helper.make_node("Identity", ["rows"], ["again"]),
        helper.make_node("If", ["flag"], ["chosen"], then_branch=then, else_branch=otherwise),
        helper.make_node("Gather", ["plain", "o"], ["gathered"]),
    ]
    integers = (info("i", TensorProto.INT64, ["n"]), info("o", TensorProto.INT64, ["b"]))
    graph = helper.make_graph(
        nodes,
        "several",
        [*integers, info("x", TensorProto.INT64, [2, 3]), info("w", kind, ["n"]), info("flag", TensorProto.BOOL, [])],
        [info(n, kind, ["b", 15]) for n in ("weighted", "largest")]
        + [info("rows", kind, [2, 12]), info("chosen", kind, ["c", 12]), info("gathered", kind, ["b", 4])],
        [
            tensor("users", table_of(30, 15, 1, dtype)),
            tensor("items", table_of(30, 12, 2, dtype)),
            tensor("plain", table_of(9, 4, 3, dtype)),
        ],
        value_info=[info("users", kind, [30, 15])],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, producer_name="somebody"
    )
    model.metadata_props.add(key="vocabulary", value="words.txt")
    return lucid_onnx.to_form(model, form)


def check(model: onnx.ModelProto, source: str, dtype: str) -> None:
    """What the bags of `several` give is the pooled rows of the smaller tables."""
    kind = table_of(1, 1, 0, source).dtype
    feed = {**FEED, "w": FEED["w"].astype(kind)}
    weights = feed["w"] if dtype in CODES else feed["w"].astype(HALVES[dtype])
    for way, native in ways_to_run(model).values():
        session = lucid_onnx.InferenceSession(way, native=native)
        got = dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))
        np.testing.assert_array_equal(got.pop("gathered"), table_of(9, 4, 3, source)[FEED["o"]])
        for output, (table, keywords) in BAGS.items():
            name = "chosen" if output == "clipped" else output
            rows = stands_for(table_of(30, 15 if table == "users" else 12, 1 if table == "users" else 2, source), dtype)
            places = (FEED["x"], rows) if output == "rows" else (FEED["i"], rows, FEED["o"])
            given = weights.astype(np.float64) if output == "weighted" else None
            exact = reference.embedding_bag(*places, per_sample_weights=given, **keywords)
            size = (places[0], np.abs(rows) + 2 * np.abs(rows).max(axis=1, keepdims=True), *places[2:])  # and the bias
            given = None if given is None else np.abs(given)
            allowed = RELATIVE * reference.embedding_bag(*size, per_sample_weights=given, **keywords)
            for rounded in {kind, *((HALVES[dtype],) if dtype in HALVES else ())}:
                if rounded.itemsize == 2:
                    allowed = allowed + 0.5 * float(ml_dtypes.finfo(rounded).eps) * np.abs(exact) + 2.0**-24
            assert got[name].dtype == kind
            assert (np.abs(got[name].astype(np.float64) - exact) <= allowed).all(), (output, native)


@pytest.mark.parametrize(
    ("source", "dtype"),
    [
        *(("float32", dtype) for dtype in DTYPES),
        *(("float64", dtype) for dtype in ("uint4", "bfloat16")),
        *(("float16", dtype) for dtype in ("int8", "float16", "bfloat16")),
        *(("bfloat16", dtype) for dtype in ("uint8", "float16")),
    ],
)
def test_every_bag_pools_its_smaller_table(source: str, dtype: str) -> None:
    model = several(source)
    before = model.SerializeToString()
    report = lucid_onnx.quantize(model, dtype=dtype)
    assert model.SerializeToString() == before
    if dtype in HALVES and source in HALVES:  # the same, or the other one: nothing is won
        why = f"it is {dtype} already" if dtype == source else "it would not be smaller: 900 bytes for 900"
        assert (report.quantized, report.unquantized[0].reason) == ((), why)
        assert report.model.SerializeToString() == before
        return
    assert report.unquantized == ()
    users, items = report.quantized
    assert (users.table, users.shape, users.bags) == ("users", (30, 15), ("node 'weighted bag'", "node 'largest bag'"))
    assert (items.table, items.bags) == ("items", ("node 'rows bag'", "node 'clipped bag'"))
    itemsize = table_of(1, 1, 0, source).dtype.itemsize
    per_row = {"int8": 15 + 4, "uint8": 15 + 8, "int4": 8 + 4, "uint4": 8 + 8}.get(dtype, 30)
    assert (users.bytes_before, users.bytes_after) == (450 * itemsize, 30 * per_row)
    held = [t for t in report.model.graph.initializer if t.name.startswith("users")]
    assert sum(len(t.raw_data) for t in held) == users.bytes_after
    assert sum(t.name.startswith("items") for t in report.model.graph.initializer) == len(held)  # once, for two bags

    graph = report.model.graph
    assert [v.SerializeToString() for v in graph.input] == [v.SerializeToString() for v in model.graph.input]
    assert [v.SerializeToString() for v in graph.output] == [v.SerializeToString() for v in model.graph.output]
    assert report.model.metadata_props == model.metadata_props
    assert report.model.producer_name == "somebody"
    assert "users" not in {v.name for v in (*graph.value_info, *graph.initializer)}
    onnx.checker.check_model(report.model, full_check=True)
    onnx.shape_inference.infer_shapes(report.model, check_type=True, strict_mode=True, data_prop=True)
    casts = [n.op_type for n in graph.node].count("Cast")
    computes_in = {"int8": "float32", "uint8": "float32", "int4": "float32", "uint4": "float32"}.get(dtype, dtype)
    assert casts == (0 if source == computes_in else 4)  # three pooled, one of weights; the branch has its own
    check(report.model, source, dtype)


@pytest.mark.parametrize("dtype", ["int4", "float16"])
def test_every_attribute_is_kept(dtype: Any) -> None:
    table, random = table_of(20, 6, 4), np.random.RandomState(4)
    feed = {"indices": random.randint(-1, 20, 30), "offsets": np.array([0, 0, 3, 9])}
    for mode, divisor, negative in (
        ("sum", None, "skip"),
        ("max", None, "skip"),
        ("sqrtn", None, "refuse"),
        ("mean", "count", "refuse"),
        ("mean", "weights", "skip"),
        ("sqrtn", "weights", "skip"),
    ):
        given: dict[str, Any] = {"mode": mode, "divisor": divisor, "negative": negative, "padding_idx": 3}
        inputs = dict(feed, indices=feed["indices"] if negative == "skip" else np.abs(feed["indices"]))
        if divisor is not None:
            inputs["per_sample_weights"] = random.uniform(0.5, 2, 30).astype(np.float32)
        model = lucid_onnx.build_model(table, per_sample_weights=divisor is not None, **given)
        report = lucid_onnx.quantize(model, dtype=dtype)
        (node,) = (n for n in report.model.graph.node if n.domain == spec.DOMAIN)
        found = spec.Attributes.from_onnx({a.name: helper.get_attribute_value(a) for a in node.attribute}).keywords
        assert {name: found[name] for name in given} == given
        weights = inputs.get("per_sample_weights")
        exact = reference.embedding_bag(
            *(inputs["indices"], stands_for(table, dtype), inputs["offsets"]),
            per_sample_weights=None if weights is None else weights.astype(np.float64),
            **given,
        )
        (got,) = lucid_onnx.InferenceSession(report.model).run(None, inputs)
        # In float16 the weights are rounded too, and the result is.
        tolerance = 4 * 2.0**-11 if dtype == "float16" else 1e-5
        np.testing.assert_allclose(got, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_rows(dtype: str) -> None:
    table = table_of(300, 20, 5)
    table[7] = 0
    table[100] *= 1e-20 if dtype != "float16" else 1e-3
    model = lucid_onnx.build_model(table)
    (found,) = lucid_onnx.quantize(model, dtype=dtype).quantized
    lost = table.astype(np.float64) - stands_for(table, dtype)
    length = np.linalg.norm(table.astype(np.float64), axis=1)
    errors = np.linalg.norm(lost, axis=1) / np.where(length > 0, length, 1)
    assert found.worst_row == errors.argmax()
    # Double precision, squares of 20 numbers.
    np.testing.assert_allclose(found.largest_row_error, errors.max(), rtol=1e-13)
    np.testing.assert_allclose(found.mean_row_error, errors.mean(), rtol=1e-13)
    assert found.largest_difference == np.abs(lost).max()
    whole = lucid_onnx.build_model(np.zeros((4, 20), np.float32))
    (found,) = lucid_onnx.quantize(whole, dtype=dtype).quantized
    assert (found.largest_row_error, found.worst_row, found.mean_row_error) == (0.0, None, 0.0)


@pytest.mark.parametrize("form", ["portable", "native"])
def test_forms(form: Any) -> None:
    model = several(form=form)
    assert bool(lucid_onnx.quantize(model).model.functions) == (form == "portable")
    standard = lucid_onnx.quantize(model, form="standard").model
    assert spec.DOMAIN.encode() not in standard.SerializeToString()
    assert lucid_onnx.quantize(model, form="portable").model == lucid_onnx.to_form(
        lucid_onnx.quantize(model, form="native").model, "portable"
    )


# ---- What stays as it is.


def of_one(**changes: Any) -> onnx.ModelProto:
    """One bag over ``t`` [6, 8]."""
    info = helper.make_tensor_value_info
    table = changes.get("table", table_of(6, 8, 1))
    kind = helper.np_dtype_to_tensor_dtype(table.dtype)
    graph = helper.make_graph(
        [lucid_onnx.make_node("t", "i", "o", "y", name="bag", weight_dtype=table.dtype), *changes.get("nodes", ())],
        "one",
        [info("i", TensorProto.INT64, ["n"]), info("o", TensorProto.INT64, ["b"]), *changes.get("inputs", ())],
        [info("y", kind, ["b", table.shape[1]]), *changes.get("outputs", ())],
        changes.get("initializers", [tensor("t", table)]),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("ai.lucid", 1)])


def with_element(value: float, dtype: str = "float32") -> np.ndarray:
    table = table_of(6, 8, 1, dtype)
    table[4, 3] = value
    return table


INFO = helper.make_tensor_value_info
STAYS: dict[str, tuple[onnx.ModelProto, str, str]] = {
    "a Gather": (
        of_one(nodes=[helper.make_node("Gather", ["t", "o"], ["g"])], outputs=[INFO("g", 1, ["b", 8])]),
        "int8",
        "node 'g' (Gather) reads it as well",
    ),
    "an output": (of_one(outputs=[INFO("t", 1, [6, 8])]), "int8", "it is an output of the model"),
    "an input": (of_one(inputs=[INFO("t", 1, [6, 8])], initializers=[]), "int8", "it is an input of the model"),
    "a default": (of_one(inputs=[INFO("t", 1, [6, 8])]), "int8", "it is an input of the model"),
    "NaN": (of_one(table=with_element(np.nan)), "uint4", "its element [4, 3] is nan, which has no quantized value"),
    "infinity": (of_one(table=with_element(-np.inf)), "int8", "element [4, 3] is -inf, which has no quantized value"),
    "too large": (of_one(table=with_element(2.0**127.5)), "uint8", "e+38, which is beyond what quantized values"),
    "too large for float16": (of_one(table=with_element(7e4)), "float16", "[4, 3] is 70000.0, which is beyond float16"),
    "small already": (
        of_one(table=table_of(6, 2, 1, "float16")),
        "uint8",
        "it would not be smaller: 60 bytes for 24",
    ),
    "no rows": (of_one(table=table_of(0, 2, 1)), "int8", "it would not be smaller: 0 bytes for 0"),
}  # fmt: skip


@pytest.mark.parametrize("why", STAYS)
def test_what_stays_says_why(why: str) -> None:
    model, dtype, reason = STAYS[why]
    report = lucid_onnx.quantize(model, dtype=dtype)
    assert report.quantized == ()
    ((table, bags, found),) = [(u.table, u.bags, u.reason) for u in report.unquantized]
    assert (table, bags) == ("t", ("node 'bag'",))
    assert reason in found
    assert report.model.graph.node[0].op_type == "EmbeddingBag"
    assert list(report.model.graph.initializer) == list(model.graph.initializer)


def test_tables_that_are_made_or_have_codes_stay() -> None:
    made = of_one(initializers=[tensor("s", table_of(6, 8, 1))])
    made.graph.node.insert(0, helper.make_node("Neg", ["s"], ["t"], name="negated"))
    (found,) = lucid_onnx.quantize(made).unquantized
    assert found.reason == "it is made by node 'negated' (Neg), and is not an initializer"
    constant = of_one(initializers=[])
    constant.graph.node.insert(0, helper.make_node("Constant", [], ["t"], value=tensor("", table_of(6, 8, 1))))
    (found,) = lucid_onnx.quantize(constant).unquantized
    assert found.reason == "it is made by a Constant node, and is not an initializer"
    once = lucid_onnx.quantize(of_one(), dtype="uint4").model
    again = lucid_onnx.quantize(once)
    assert again.model == once
    assert [(u.table, u.reason) for u in again.unquantized] == [("t_codes", "it is quantized already, uint4")]


def test_special_values_in_16_bits() -> None:
    """16-bit floats can represent them, so they are not an error."""
    table = with_element(np.inf)
    table[2, 1] = np.nan
    (found,) = lucid_onnx.quantize(of_one(table=table), dtype="bfloat16").quantized
    assert 0 < found.largest_row_error < 2.0**-8
    assert found.largest_difference < 2.0**-8 * 4


def test_min_bytes() -> None:
    assert len(lucid_onnx.quantize(several(), min_bytes=30 * 12 * 4).quantized) == 2
    report = lucid_onnx.quantize(several(), min_bytes=30 * 12 * 4 + 1)
    assert [q.table for q in report.quantized] == ["users"]
    assert [u.reason for u in report.unquantized] == ["it has 1440 bytes, less than min_bytes = 1441"]


def test_bad_arguments(tmp_path: Path) -> None:
    model = of_one()
    for keywords, error, message in (
        ({"dtype": "int3"}, ValueError, "dtype = 'int3' is not one of int8, uint8, int4, uint4, float16, bfloat16"),
        ({"form": "zip"}, ValueError, "form = 'zip' is not one of 'portable', 'standard', 'native'"),
        ({"min_bytes": -1}, ValueError, "min_bytes = -1 must be >= 0"),
        ({"min_bytes": 1.5}, TypeError, "min_bytes = 1.5 must be an integer"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            lucid_onnx.quantize(model, **keywords)
    with pytest.raises(ValueError, match=r"the model has no ai\.lucid nodes: `fuse` finds bags that are written out"):
        lucid_onnx.quantize(lucid_onnx.lower(model))
    with pytest.raises(FileNotFoundError):
        lucid_onnx.quantize(tmp_path / "none.onnx")
    model.graph.node.append(helper.make_node("Relu", ["nowhere"], ["z"]))
    with pytest.raises(ValueError, match=r"the model, before any change, does not pass onnx\.checker: .*nowhere"):
        lucid_onnx.quantize(model)


# ---- Files.


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A model of two bags and a Gather, alone in a folder, with external tables, one of them with a NaN."""
    info = helper.make_tensor_value_info
    bad = table_of(900, 16, 4)
    bad[801, 5] = np.nan
    tables = {"good": table_of(1000, 20, 3), "bad": bad, "plain": table_of(300, 8, 5)}
    graph = helper.make_graph(
        [
            lucid_onnx.make_node("bad", "i", "o", "a", mode="sum", name="first"),
            lucid_onnx.make_node("good", "i", "o", "b", mode="sum", name="second"),
            helper.make_node("Gather", ["plain", "i"], ["c"]),
        ],
        "stored",
        [info("i", TensorProto.INT64, ["n"]), info("o", TensorProto.INT64, ["b"])],
        [info(n, TensorProto.FLOAT, [None, None]) for n in "abc"],
        [tensor(name, array) for name, array in tables.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    lucid_onnx.save(lucid_onnx.to_form(model, "portable"), path, external_data=True)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


SMALL_FEED = {"i": np.array([3, 0, 299, 7]), "o": np.array([0, 3])}


@pytest.mark.parametrize("dtype", DTYPES)
def test_external_tables_in_parts(stored: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes as in memory; what stays is carried over bit by bit, and what failed leaves no hole behind."""
    before = contents(stored.parent)
    whole = lucid_onnx.quantize(onnx.load(stored), dtype=dtype)
    monkeypatch.setattr("lucid_onnx.rewrite.tables.ELEMENTS_AT_ONCE", 999)
    ticks: list[tuple[int, int]] = []
    output = tmp_path / "out.onnx"
    report = lucid_onnx.quantize(stored, output, dtype=dtype, progress=lambda done, total: ticks.append((done, total)))
    assert contents(stored.parent) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.onnx", "out.onnx.data"]
    assert len(report.quantized) == (2 if dtype in HALVES else 1)
    if dtype in CODES:
        assert report.unquantized[0].reason == "its element [801, 5] is nan, which has no quantized value"
    assert [dataclass_without_mean(q) for q in report.quantized] == [dataclass_without_mean(q) for q in whole.quantized]
    assert ticks[-1] == (1000 * 20 * 4 + 900 * 16 * 4,) * 2
    assert ticks == sorted(ticks)
    light = onnx.load(output, load_external_data=False)
    assert light == report.model
    assert {t.name for t in light.graph.initializer if t.data_location == TensorProto.EXTERNAL} >= {"plain"}
    loaded = onnx.load(output)
    for one, other in zip(loaded.graph.initializer, whole.model.graph.initializer, strict=True):
        assert (one.name, one.dims, one.raw_data) == (other.name, other.dims, other.raw_data)
    used = sum(-(-len(t.raw_data) // 4096) * 4096 for t in loaded.graph.initializer)
    assert output.with_name("out.onnx.data").stat().st_size <= used
    for found, expected in zip(
        lucid_onnx.InferenceSession(output, native=False).run(None, SMALL_FEED),
        lucid_onnx.InferenceSession(whole.model, native=False).run(None, SMALL_FEED),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def dataclass_without_mean(found: Any) -> dict[str, Any]:
    """A mean of parts is another order of additions."""
    return {k: v if k != "mean_row_error" else round(v, 14) for k, v in vars(found).items()}


def test_without_an_output_new_tables_are_in_memory(stored: Path) -> None:
    report = lucid_onnx.quantize(stored)
    kinds = {t.name: t.data_location == TensorProto.EXTERNAL for t in report.model.graph.initializer}
    assert kinds == {"bad": True, "good_codes": False, "good_scale": False, "plain": True}


def test_in_place(tmp_path: Path) -> None:
    onnx.save(of_one(), tmp_path / "model.onnx")
    lucid_onnx.quantize(tmp_path / "model.onnx", tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert onnx.load(tmp_path / "model.onnx").graph.node[0].op_type == "QuantizedEmbeddingBag"


def test_failures_leave_nothing_behind(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored.parent
    before = contents(folder)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lucid_onnx.rewrite.tables.copy_external", full)
        with pytest.raises(OSError, match="No space left"):
            lucid_onnx.quantize(stored, folder / "new.onnx")
    for output in ("model.onnx", "model.onnx.data"):
        with pytest.raises(ValueError, match=r"model\.onnx\.data is the external data of the model"):
            lucid_onnx.quantize(stored, folder / output)
    with pytest.raises(ValueError, match="initializer 'good' is external data that was not loaded: give the path"):
        lucid_onnx.quantize(onnx.load(stored, load_external_data=False))
    with pytest.raises(IsADirectoryError):
        lucid_onnx.quantize(stored, folder)
    assert contents(folder) == before
    model = onnx.load(stored, load_external_data=False)
    for key, value, message in (
        ("length", "79999", "initializer 'good' has 79999 bytes in .*, and its shape takes 80000"),
        ("offset", "9999999", "initializer 'good' has its data at 9999999 to 10079999 of .*, which has"),
        ("offset", "x", "initializer 'good': its external data is described by"),
        ("location", "../data", "initializer 'good' has its data at '../data', outside of the model's folder"),
    ):
        broken = onnx.ModelProto()
        broken.CopyFrom(model)
        (good,) = (t for t in broken.graph.initializer if t.name == "good")
        next(e for e in good.external_data if e.key == key).value = value
        stored.write_bytes(broken.SerializeToString())
        with pytest.raises(ValueError, match=message):
            lucid_onnx.quantize(stored, folder / "new.onnx")
    (folder / "model.onnx.data").unlink()
    stored.write_bytes(before["model.onnx"])
    with pytest.raises(FileNotFoundError, match="has its data there"):
        lucid_onnx.quantize(stored, folder / "new.onnx")
    assert [p.name for p in folder.iterdir()] == ["model.onnx"]


@needs_peak_memory
@pytest.mark.large
def test_a_large_table_is_not_loaded(tmp_path: Path) -> None:
    """256 MiB of external data, a hole in the file system, in under 200 MB of memory with everything imported."""
    rows = 2**28 // 256
    model = lucid_onnx.build_model(np.zeros((4, 64), np.float32), mode="sum")
    save_hollow(model, tmp_path / "model.onnx", rows, sized=False)
    script = (
        "import lucid_onnx\n"
        "report = lucid_onnx.quantize('model.onnx', 'small.onnx', dtype='uint4')\n"
        f"print(len(report.quantized), {PEAK_KIB})"
    )
    done = run_script(script, tmp_path, timeout=250)
    assert done.returncode == 0, done.stderr
    count, kibibytes = map(int, done.stdout.split())
    assert count == 1
    assert kibibytes < 200_000
    assert rows * 40 <= (tmp_path / "small.onnx.data").stat().st_size < rows * 40 + 3 * 4096


# ---- The command line.


def test_the_command(stored: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored.parent)
    code, out, err = run("quantize", "model.onnx", "-o", "s.onnx", "--dtype", "uint4", "--report", "r.json")
    assert (code, err) == (0, "")
    assert out.startswith("wrote s.onnx (")
    text = " ".join(out.split())
    assert "good float32 uint4 [1000, 20] 78.1 KiB 17.6 KiB (4.44x smaller)" in text
    assert "bad its element [801, 5] is nan, which has no quantized value node 'first'" in text
    report = json.loads(Path("r.json").read_text())
    assert [q["bytes_after"] for q in report["quantized"]] == [18_000]
    assert [u["table"] for u in report["unquantized"]] == ["bad"]
    code, out, err = run("info", "s.onnx")
    assert "QuantizedEmbeddingBagBias" in out
    before = sorted(Path().iterdir())
    for arguments, message in {
        ("none.onnx", "-o", "x.onnx"): "none.onnx: no such file",
        ("model.onnx", "-o", "x.onnx", "--dtype", "int2"): "dtype = 'int2' is not one of",
        ("model.onnx", "-o", "x.onnx", "--min-bytes", "-1"): "--min-bytes = -1 must be",
        ("model.onnx", "-o", "x.onnx", "--form", "zip"): "form = 'zip' is not one of",
        ("model.onnx", "-o", "x.onnx", "--report", "x.onnx"): "--report x.onnx: is the model to write",
        ("model.onnx", "-o", "model.onnx"): "model.onnx: model.onnx.data is the external data of the model",
        ("model.onnx", "-o", "no/x.onnx"): "--output no/x.onnx: there is no directory no",
    }.items():
        code, out, err = run("quantize", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), arguments
        assert err.startswith(f"lucid-onnx: error: {message}"), err
    assert sorted(Path().iterdir()) == before


def test_an_initializer_of_fields_is_read() -> None:
    """Not every exporter writes raw_data."""
    table = table_of(6, 8, 1)
    fields = helper.make_tensor("t", TensorProto.FLOAT, table.shape, table.reshape(-1).tolist())
    plain, other = (lucid_onnx.quantize(of_one(initializers=[t])).model for t in (fields, tensor("t", table)))
    assert plain == other
    codes = numpy_helper.to_array(next(t for t in plain.graph.initializer if t.name == "t_codes"))
    np.testing.assert_array_equal(codes, QuantizedTable.quantize(table).codes)
