"""Sessions: what runs where, in any form, from any source, on many threads, and what `save` leaves on the disk."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import itertools
import json
import os
import queue
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lucid_onnx
from lucid_onnx.builder import origins
from lucid_onnx.builder.conformance import case_model as model_of
from lucid_onnx.ops.embedding_bag import cases, spec
from lucid_testing.kernels import library_path, needs_library
from lucid_testing.processes import free_memory

ort = pytest.importorskip("onnxruntime")
from lucid_onnx.runtime import placement  # noqa: E402
from lucid_onnx.runtime import session as session_module  # noqa: E402  # needs onnxruntime

ort.set_default_logger_severity(3)

ROOT = Path(__file__).resolve().parent.parent

#: The attributes of the cases here, by the first word of a case's name; the others are its layout and its dtype.
KINDS: dict[str, dict[str, Any]] = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean"},
    "max": {"mode": "max"},
    "weights": {"mode": "sum", "weighted": True},
    "padding_mean": {"mode": "mean", "padding_idx": 2},
    "padding_max": {"mode": "max", "padding_idx": -3},
    "clipped": {"mode": "mean", "max_norm": 1.3},
    "clipped_inf": {"mode": "sum", "max_norm": 1.3, "norm_type": np.inf},
    "everything": {"mode": "sum", "weighted": True, "padding_idx": -2, "max_norm": 1.1},
    "long": {"mode": "mean", "dim": 2, "lengths": (1, 2, 700, 0, 1, 333, 1, 1) + (1,) * 40},
    "none": {"mode": "sum", "lengths": (), "length": 3},
}


def case_of(name: str) -> cases.Case:
    kind, layout, dtype = name.split()
    return cases.make(name, layout=layout, dtype=dtype, **KINDS[kind])


#: Every way that a model can run: form, and whether the library is registered.
WAYS = [("portable", True), ("portable", False), ("standard", True), ("standard", False), ("native", True)]
each_way = pytest.mark.parametrize(
    ("form", "native"), [pytest.param(f, n, marks=needs_library if n else ()) for f, n in WAYS]
)
LEVELS = ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"]


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def run(session: Any, case: cases.Case) -> np.ndarray:
    names = {value.name.removesuffix("__float32") for value in session.get_inputs()}
    return session.run(None, {k: v for k, v in case.inputs.items() if k in names})[0]


def profiled(
    model: Any, feed: dict[str, np.ndarray], *, native: bool, folder: Path
) -> tuple[list[Any], dict[str, int]]:
    """A run's results, and how often each operator ran by ONNX Runtime's profile."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = lucid_onnx.InferenceSession(model, native=native, session_options=options)
    results = session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    assert ran, "the profile has no nodes"
    return results, dict(collections.Counter(ran))


# ---- What runs.


@needs_library
@pytest.mark.parametrize("name", ["sum ragged float32", "everything rows float64", "padding_max ends float32"])
@pytest.mark.parametrize("form", ["portable", "native"])
def test_the_library_runs_one_node(name: str, form: str, tmp_path: Path) -> None:
    case = case_of(name)
    (got,), ran = profiled(model_of(case, form), case.inputs, native=True, folder=tmp_path)
    case.check(got)
    assert ran == {case.op.name: 1}


@pytest.mark.parametrize("name", ["sum ragged float32", "everything rows float64", "padding_max ends float32"])
@pytest.mark.parametrize("form", ["portable", "standard"])
def test_without_the_library_the_function_runs(name: str, form: str, tmp_path: Path) -> None:
    case = case_of(name)
    (got,), ran = profiled(model_of(case, form), case.inputs, native=False, folder=tmp_path)
    case.check(got)
    assert not set(ran) & set(spec.VARIANTS)
    assert ran["Gather"] >= 1


@needs_library
def test_the_standard_form_never_runs_the_library(tmp_path: Path) -> None:
    case = case_of("mean ragged float32")
    (got,), ran = profiled(model_of(case, "standard"), case.inputs, native=True, folder=tmp_path)
    case.check(got)
    assert not set(ran) & set(spec.VARIANTS)


def calling_model() -> onnx.ModelProto:
    """Bags: in the graph without a name, in two branches, in a function, and in one that nobody calls."""
    bag = lucid_onnx.make_node("t", "i", "o", "y", mode="sum")
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(spec.DOMAIN, 1)]
    wrap = helper.make_function("my", "Wrap", ["t", "i", "o"], ["y"], [bag], imports)
    unused = helper.make_function("my", "Unused", ["t", "i", "o"], ["y"], [bag], imports)
    branches = {}
    for name in ("then_branch", "else_branch"):
        node = lucid_onnx.make_node("table", "indices", "offsets", f"{name}_y", mode="sum", name=f"in_{name}")
        value = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, [None, 2])
        branches[name] = helper.make_graph([node], name, [], [value])
    nodes = [
        lucid_onnx.make_node("table", "indices", "offsets", "plain", mode="sum"),
        helper.make_node("If", ["condition"], ["branched"], name="if", **branches),
        helper.make_node("Wrap", ["table", "indices", "offsets"], ["wrapped"], name="wrap", domain="my"),
        helper.make_node("Sum", ["plain", "branched", "wrapped"], ["sum"], name="sum"),
    ]
    integers = [helper.make_tensor_value_info(name, TensorProto.INT64, [name]) for name in ("indices", "offsets")]
    graph = helper.make_graph(
        nodes,
        "g",
        [*integers, helper.make_tensor_value_info("condition", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, [None, 2])],
        [numpy_helper.from_array(np.eye(4, 2, dtype=np.float32), "table")],
    )
    model = helper.make_model(
        graph, functions=[wrap, unused], opset_imports=[*imports, helper.make_opsetid("my", 1)], ir_version=8
    )
    return lucid_onnx.to_form(model, "portable")


def test_sessions_tell_what_the_kernels_run(tmp_path: Path) -> None:
    """As a profile does; from a path, bytes or a model."""
    model = calling_model()
    onnx.save(model, tmp_path / "model.onnx")
    feed = {"indices": ints(1, 2, 3), "offsets": ints(0, 2), "condition": np.array(True)}
    for native in (True, False) if library_path() is not None else (False,):
        for source in (model, tmp_path / "model.onnx", model.SerializeToString()):
            session = lucid_onnx.InferenceSession(source, native=native)
            if native:
                assert sorted(session.native_nodes) == ["in_else_branch", "in_then_branch", "plain", "y"]
                assert session.function_nodes == ("wrap",)
            else:
                assert session.native_nodes == ()
                assert sorted(session.function_nodes) == ["in_else_branch", "in_then_branch", "plain", "wrap", "y"]
        (got,), ran = profiled(model, feed, native=native, folder=tmp_path)
        np.testing.assert_array_equal(got, 3 * np.array([[0, 1], [0, 0]], np.float32))
        assert ran.get("EmbeddingBag", 0) == (3 if native else 0)  # one of the branches
    standard = lucid_onnx.InferenceSession(lucid_onnx.to_form(model, "standard"), native=False)
    assert (standard.native_nodes, standard.function_nodes) == ((), ("wrap",))


def test_a_profile_is_put_down_to_nodes_and_functions(tmp_path: Path) -> None:
    model = calling_model()
    placement.name_nodes(model)
    feed = {"indices": ints(1, 2, 3), "offsets": ints(0, 2), "condition": np.array(True)}
    for native in (True, False) if library_path() is not None else (False,):
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "profile")
        session = lucid_onnx.InferenceSession(model, options, native=native)
        for _ in range(2):
            session.run(None, feed)
        times = placement.node_times(session.end_profiling(), model)
        assert [t.milliseconds for t in times] == sorted((t.milliseconds for t in times), reverse=True)
        by = {kind: {(t.op, t.count) for t in times if t.by == kind} for kind in ("native", "function", "standard")}
        assert by["standard"] >= {("If", 1), ("Sum", 1)}
        names = {t.name for t in times if t.op == "EmbeddingBag"}
        if native:
            assert by["native"] == {("EmbeddingBag", 1)}  # three times, each under its own name
            assert {"in_then_branch", "Wrap_y"} <= names
            assert len(names) == 3
        else:
            assert not by["native"]
            ((op, count),) = by["function"]  # all that Wrap does is to call EmbeddingBag
            assert op == "EmbeddingBag"
            assert count > 150
            (callers,) = names
            assert sorted(callers.split(", ")) == ["in_else_branch", "in_then_branch", "plain", "y"]


def test_the_time_of_a_node_is_without_those_within(tmp_path: Path) -> None:
    def event(name: str, op: str, begin: int, duration: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": begin, "dur": duration, "args": {"op_name": op}}

    def run_event(begin: int) -> dict[str, Any]:
        return {"cat": "Session", "name": "model_run", "ts": begin, "dur": 1000}

    first = [run_event(0), event("loop", "Loop", 10, 900)]
    second = [
        *(event("a", "Add", 1110, 100), event("a", "Add", 1300, 150), event("loop", "Loop", 1100, 510)),
        *(event("bag", "EmbeddingBag", 1700, 200), run_event(1050)),
    ]
    (tmp_path / "profile.json").write_text(json.dumps([*first, *second]))
    times = placement.node_times(tmp_path / "profile.json", onnx.ModelProto())
    assert [tuple(dataclasses.astuple(t)) for t in times] == [
        ("loop", "Loop", "standard", 1, 0.26),
        ("a", "Add", "standard", 2, 0.25),
        ("bag", "EmbeddingBag", "native", 1, 0.2),
    ]


def test_the_native_form_needs_the_library() -> None:
    with pytest.raises(Exception, match=r"ai\.lucid:EmbeddingBag\(-1\) is not a registered function/op"):
        lucid_onnx.InferenceSession(model_of(case_of("sum ragged float32"), "native"), native=False)


@each_way
@pytest.mark.parametrize("level", LEVELS)
def test_every_optimisation_level(form: str, native: bool, level: str) -> None:
    names = ("everything ends float32", "padding_mean rows float64", "max ragged float32", "none ragged float32")
    for name in (*names, "clipped_inf rows float32", "mean ragged float16", "long ends float32"):
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        for constant in (False, True):
            case = case_of(name)
            model = model_of(case, form, constant=constant)
            case.check(run(lucid_onnx.InferenceSession(model, native=native, session_options=_copy(options)), case))


def _copy(options: Any) -> Any:
    """New options with the same level."""
    copy = ort.SessionOptions()
    copy.graph_optimization_level = options.graph_optimization_level
    return copy


@pytest.mark.parametrize("form", ["portable", "standard", "native"])
@pytest.mark.parametrize("opset", range(spec.MIN_OPSET, spec.MAX_OPSET + 1))
def test_every_opset(form: str, opset: int, newest_opset: int) -> None:
    if opset > onnx.defs.onnx_opset_version():
        pytest.skip(f"onnx {onnx.__version__} knows no opset {opset}")
    picked = [case_of(n) for n in ("everything ragged float32", "padding_max rows float64", "long ragged float32")]
    picked += [case_of(n) for n in ("clipped_inf rows float16", "mean ends bfloat16", "weights rows float32")]
    for case in picked:
        model = model_of(case, form, opset=opset)
        assert [i.version for i in model.opset_import if i.domain == ""] == [opset]
        assert {i.version for f in model.functions for i in f.opset_import if i.domain == ""} <= {opset}
        onnx.checker.check_model(model, full_check=True)
    if opset > newest_opset:
        pytest.skip(f"onnxruntime {ort.__version__} knows no opset {opset}")
    if form == "native" and library_path() is None:
        pytest.skip("lucid_onnx is installed without its native library")
    for case, native in itertools.product(picked, [True] if form == "native" else [False]):
        case.check(run(lucid_onnx.InferenceSession(model_of(case, form, opset=opset), native=native), case))


# ---- Where a model and its table come from.


@each_way
def test_sources_of_a_model(form: Any, native: bool, tmp_path: Path) -> None:
    case = case_of("everything ragged float32")
    model = model_of(case, form, constant=True)
    path = tmp_path / "model.onnx"
    lucid_onnx.save(model, path)

    class Somewhere(os.PathLike):  # type: ignore[type-arg]
        def __fspath__(self) -> str:
            return str(path)

    got = {
        kind: run(lucid_onnx.InferenceSession(source, native=native), case).tobytes()
        for kind, source in {
            "ModelProto": model,
            "bytes": model.SerializeToString(),
            "str": str(path),
            "Path": path,
            "PathLike": Somewhere(),
        }.items()
    }
    case.check(np.frombuffer(got["ModelProto"], np.float32).reshape(case.expected().shape))
    assert set(got.values()) == {got["ModelProto"]}
    assert model.SerializeToString() == model_of(case, form, constant=True).SerializeToString()


@pytest.mark.parametrize("external_data", [None, False, True])
@pytest.mark.parametrize("rows", [10, 500])  # less and more than what is worth a place outside
def test_tables_from_elsewhere(external_data: bool | None, rows: int, tmp_path: Path) -> None:
    """`save` writes data that the model does not hold; the model stays as it is."""
    case = cases.make("elsewhere", rows=rows, mode="sum")
    whole, light = (model_of(case, "portable", constant=True) for _ in range(2))
    (table,) = light.graph.initializer
    table.ClearField("raw_data")
    table.data_location = TensorProto.EXTERNAL
    with pytest.raises(ValueError, match="initializer 'weight' is external data that was not loaded"):
        lucid_onnx.save(light, tmp_path / "none.onnx", external_data=external_data)
    data = {"weight": memoryview(case.weight.tobytes())}
    lucid_onnx.save(light, tmp_path / "light.onnx", external_data=external_data, tables=data)
    assert not table.raw_data
    lucid_onnx.save(whole, tmp_path / "whole.onnx", external_data=external_data)
    read = [onnx.load(tmp_path / f"{name}.onnx").SerializeToString() for name in ("light", "whole")]
    assert read[0] == read[1]
    assert len(list(tmp_path.iterdir())) == (4 if external_data and rows == 500 else 2)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", str(tmp_path)):
        with pytest.raises(FileNotFoundError) as caught:
            lucid_onnx.InferenceSession(path, native=False)
        assert str(caught.value) == f"{path}: no such model file"
    with pytest.raises(Exception, match=r"INVALID_PROTOBUF|Error parsing message"):
        lucid_onnx.InferenceSession(b"not a model", native=False)


@each_way
def test_a_constant_table_gives_the_bits_of_an_input(form: str, native: bool) -> None:
    for name in ("everything ragged float32", "mean rows float16", "max ends float64", "sum ragged bfloat16"):
        case = case_of(name)
        results = [
            run(lucid_onnx.InferenceSession(model_of(case, form, constant=c), native=native), case)
            for c in (False, True)
        ]
        case.check(results[0])
        assert results[0].tobytes() == results[1].tobytes()


# ---- bfloat16 and float16.


@each_way
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_two_byte_floats(form: str, native: bool, dtype: str) -> None:
    names = [f"{n} {dtype}" for n in ("everything ragged", "weights rows", "max ends", "clipped ragged")]
    for case in map(case_of, names):
        session = lucid_onnx.InferenceSession(model_of(case, form), native=native)
        got = run(session, case)
        case.check(got)
        for name, array in case.inputs.items():  # strided arrays are as good
            strided = np.repeat(array, 2, axis=0)[::2]
            assert session.run(None, {**case.inputs, name: strided})[0].tobytes() == got.tobytes()
        named = session.run(["output"], case.inputs)
        assert [a.tobytes() for a in named] == [got.tobytes()]


@each_way
def test_empty_bfloat16(form: str, native: bool) -> None:
    for lengths, dim in (((), 5), ((0, 0), 5), ((2, 1), 0), ((), 0)):
        for layout in ("ragged", "ends", "rows"):
            case = cases.make("empty", dtype="bfloat16", layout=layout, lengths=lengths, length=2, dim=dim, mode="sum")
            if layout == "rows" and lengths == (0, 0):
                case = cases.make("empty", dtype="bfloat16", layout=layout, lengths=lengths, length=0, mode="sum")
            case.check(run(lucid_onnx.InferenceSession(model_of(case, form), native=native), case))


@each_way
def test_a_bfloat16_model_with_other_inputs(form: Any, native: bool) -> None:
    """Names and order of the outputs, and inputs that are not bfloat16, stay what they are."""
    table = np.arange(8).reshape(4, 2).astype(spec.BFLOAT16)
    graph = helper.make_graph(
        [
            lucid_onnx.make_node("table", "i", "o", "bag", mode="sum", weight_dtype="bfloat16"),
            helper.make_node("Cast", ["bag"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["wide", "shift"], ["sum"]),
        ],
        "g",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("o", TensorProto.INT64, ["b"]),
            helper.make_tensor_value_info("shift", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["b", 2]),
            helper.make_tensor_value_info("bag", TensorProto.BFLOAT16, ["b", 2]),
        ],
        [TensorProto(name="table", data_type=TensorProto.BFLOAT16, dims=(4, 2), raw_data=table.tobytes())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = lucid_onnx.InferenceSession(lucid_onnx.to_form(model, form), native=native)
    feed = {"i": ints(1, 3, 2), "o": ints(0, 2), "shift": np.float32(0.5)}
    total, bag = session.run(None, feed)
    assert (bag.dtype, bag.astype(int).tolist()) == (spec.BFLOAT16, [[8, 10], [4, 5]])
    assert (total.dtype, total.tolist()) == (np.float32, [[8.5, 10.5], [4.5, 5.5]])
    assert session.run(["bag", "sum"], feed)[1].tolist() == total.tolist()


# ---- Threads, and options.


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """``work(0)`` to ``work(count - 1)`` at once."""
    threads = [threading.Thread(target=work, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(("form", "native"), [pytest.param("native", True, marks=needs_library), ("portable", False)])
def test_eight_threads_share_a_session(form: str, native: bool) -> None:
    workers, calls = 8, 1000
    shapes = [(1, 5), (3, 0, 4), (60, 1), (), (2,) * 30, (0, 0), (17,), (5, 33, 0, 1)]
    made = [
        cases.make(f"thread {k}", mode="sum", rows=50, dim=8, lengths=lengths, weighted=True, padding_idx=1)
        for k, lengths in enumerate(shapes)
    ]
    assert len(made) == workers
    session = lucid_onnx.InferenceSession(model_of(made[0], form), native=native)
    expected = [run(session, case) for case in made]
    for case, first in zip(made, expected, strict=True):
        case.check(first)
    wrong: list[str] = []
    begin = threading.Barrier(workers)

    def work(k: int) -> None:
        case, bits = made[k], expected[k].tobytes()
        begin.wait()
        try:
            for _ in range(calls):
                got = session.run(None, case.inputs)[0]
                if native:  # always the same bits; standard operators promise the numbers only
                    if got.tobytes() != bits:
                        raise AssertionError("other bits")
                else:
                    case.check(got)
        except Exception as error:
            wrong.append(f"thread {k}: {error}")

    in_threads(workers, work)
    assert wrong == []


@needs_library
def test_threads_that_register_and_load_at_once() -> None:
    case = case_of("sum ragged float32")
    data = model_of(case, "native").SerializeToString()
    wrong: list[BaseException] = []

    def work(_: int) -> None:
        try:
            for _ in range(20):
                case.check(run(lucid_onnx.InferenceSession(data), case))
        except BaseException as error:
            wrong.append(error)

    in_threads(8, work)
    assert wrong == []


@needs_library
def test_many_session_options() -> None:
    case = case_of("mean ragged float32")
    data = model_of(case, "native").SerializeToString()
    kept = []
    for k in range(200):
        options = ort.SessionOptions()
        lucid_onnx.register(options)
        if k % 20 == 0:  # onnxruntime's own class: the library is all that a session needs
            kept.append(ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]))
        del options
    for session in kept:
        case.check(session.run(None, case.inputs)[0])


@needs_library
def test_one_session_options_for_several_sessions() -> None:
    options = ort.SessionOptions()
    lucid_onnx.register(options)
    for name in ("mean ragged float32", "everything rows float64"):
        data = model_of(case_of(name), "native").SerializeToString()
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        case_of(name).check(session.run(None, case_of(name).inputs)[0])


@needs_library
def test_registering_twice_with_the_same_settings_does_nothing() -> None:
    case = case_of("mean ragged float32")
    data = model_of(case, "native").SerializeToString()
    options = ort.SessionOptions()
    for table_memory in (None, "auto", None):
        lucid_onnx.register(options, table_memory=table_memory)
    case.check(ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, case.inputs)[0])
    for _ in range(3):
        session = lucid_onnx.InferenceSession(data, options)
        case.check(run(session, case))
    # These options are new ones, which nothing is registered on.
    case.check(run(lucid_onnx.InferenceSession(data, session.get_session_options()), case))


@needs_library
def test_registering_twice_with_other_settings_says_which() -> None:
    data = model_of(case_of("mean ragged float32"), "native").SerializeToString()
    options = ort.SessionOptions()
    lucid_onnx.register(options)
    message = r"registered on these session options with other settings \(%s\): use a new onnxruntime.SessionOptions"
    for call in (lucid_onnx.register, lambda o, **kw: lucid_onnx.InferenceSession(data, o, **kw)):
        with pytest.raises(ValueError, match=message % "lucid.table_memory = 'auto' then, 'mmap' now"):
            call(options, table_memory="mmap")
    options.add_session_config_entry("lucid.bounds_check", "deferred")
    with pytest.raises(ValueError, match=message % "lucid.bounds_check = 'report' then, 'deferred' now"):
        lucid_onnx.register(options)
    lucid_onnx.InferenceSession(data, ort.SessionOptions(), table_memory="mmap")


@needs_library
def test_a_failed_registration_leaves_no_mark() -> None:
    case = case_of("mean ragged float32")
    options = ort.SessionOptions()
    options.add_session_config_entry("lucid.bounds_check", "never")
    with pytest.raises(RuntimeError, match="never"):
        lucid_onnx.register(options)
    options.add_session_config_entry("lucid.bounds_check", "report")
    case.check(run(lucid_onnx.InferenceSession(model_of(case, "native"), options), case))


@needs_library
def test_options_of_cuda_serve_the_cpu_but_not_the_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    from lucid_onnx.runtime import session

    monkeypatch.setattr(session, "why_no_cuda", lambda: None)
    monkeypatch.setattr(session, "find_cuda_library", session.get_library_path)  # any library will do
    options = ort.SessionOptions()
    lucid_onnx.register(options, provider="cuda")
    lucid_onnx.register(options, provider="cpu")
    options = ort.SessionOptions()
    lucid_onnx.register(options, provider="cpu")
    with pytest.raises(ValueError, match="provider = 'cpu' then, 'cuda' now"):
        lucid_onnx.register(options, provider="cuda")


@needs_library
def test_options_with_the_library_that_register_knows_nothing_of() -> None:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    with pytest.raises(ValueError, match=r"were registered on these session options by register_custom_ops_library"):
        lucid_onnx.InferenceSession(model_of(case_of("mean ragged float32"), "native"), options)


@needs_library
def test_threads_that_share_session_options() -> None:
    case = case_of("sum ragged float32")
    data = model_of(case, "native").SerializeToString()
    options = ort.SessionOptions()
    wrong: list[BaseException] = []

    def work(_: int) -> None:
        try:
            for _ in range(10):
                case.check(run(lucid_onnx.InferenceSession(data, options), case))
        except BaseException as error:
            wrong.append(error)

    in_threads(8, work)
    assert wrong == []


@each_way
def test_the_arguments_are_onnxruntimes_and_our_own(form: str, native: bool) -> None:
    case = case_of("mean ragged float32")
    data = model_of(case, form).SerializeToString()
    cpu = ["CPUExecutionProvider"]

    def options() -> Any:
        made = ort.SessionOptions()
        made.logid = "bags"
        return made

    for arguments, keywords in (
        ((data, options()), {}),
        ((data, options(), cpu), {}),
        ((data, options(), cpu, [{}]), {}),
        ((data,), {"sess_options": options(), "providers": cpu, "provider_options": [{}]}),
        ((), {"path_or_bytes": data, "sess_options": options()}),
        ((data,), {"session_options": options(), "providers": cpu}),
        ((), {"model": data, "session_options": options()}),
    ):
        session = lucid_onnx.InferenceSession(*arguments, native=native, **keywords)
        assert session.get_session_options().logid == "bags"
        case.check(run(session, case))
    with pytest.raises(TypeError, match="got sess_options and session_options, which are the same argument"):
        lucid_onnx.InferenceSession(data, options(), session_options=options(), native=native)
    with pytest.raises(TypeError, match="got path_or_bytes and model, which are the same argument"):
        lucid_onnx.InferenceSession(data, model=data, native=native)
    with pytest.raises(TypeError, match="needs a model: path_or_bytes"):
        lucid_onnx.InferenceSession(native=native)


def test_the_signature_begins_as_onnxruntimes() -> None:
    own = list(inspect.signature(lucid_onnx.InferenceSession).parameters.values())
    theirs = [p for p in inspect.signature(ort.InferenceSession).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert [(p.name, p.kind) for p in own[: len(theirs)]] == [(p.name, p.kind) for p in theirs]
    assert [p.default for p in own[1 : len(theirs)]] == [p.default for p in theirs[1:]]
    assert own[-1].kind is own[-1].VAR_KEYWORD


@each_way
def test_what_else_onnxruntime_takes(form: str, native: bool, tmp_path: Path) -> None:
    """Its keywords, providers that options have, and every other way to run."""
    case = case_of("mean rows float32")
    model = model_of(case, form)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    session = lucid_onnx.InferenceSession(
        path,
        providers=[("CPUExecutionProvider", {"use_arena": "1"})],
        enable_fallback=0,
        disabled_optimizers={"ConstantFolding"},
        native=native,
    )
    case.check(run(session, case))
    names = [i.name for i in session.get_inputs()]
    feeds = {name: case.inputs[name] for name in names}
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    case.check(session.run_with_ort_values(None, values)[0].numpy())
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output")
    session.run_with_iobinding(binding)
    case.check(binding.copy_outputs_to_cpu()[0])
    done: queue.Queue[tuple[Any, str]] = queue.Queue()
    session.run_async(None, feeds, lambda results, _, error: done.put((results, error)), None)
    results, error = done.get(timeout=60)
    assert error == ""
    case.check(results[0])
    session.disable_fallback()
    session.enable_fallback()
    session.set_providers(["CPUExecutionProvider"])
    case.check(run(session, case))
    options = ort.SessionOptions()
    if hasattr(options, "has_providers"):
        options.add_provider_for_devices(
            [d for d in ort.get_ep_devices() if d.ep_name == "CPUExecutionProvider"][:1], {}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # onnxruntime warns where a session's providers replace those of its options
            case.check(run(lucid_onnx.InferenceSession(model, options, native=native), case))


# ---- Calls.


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_calls_take_lists_of_numbers_as_weights(dtype: str) -> None:
    """As torch's do: a list has no dtype of its own. An array has, and it must be the table's."""
    table = (np.arange(20) / 8).reshape(5, 4).astype(spec.BFLOAT16 if dtype == "bfloat16" else dtype)
    for x, offsets, weights in (([1, 2, 4], [0, 1], [0.5, 1, 2]), ([[1, 2], [4, 0]], None, [(0.5, 2), (1, 0)])):
        array = np.array(weights, table.dtype)
        pooled = lucid_onnx.embedding_bag(x, table, offsets, mode="sum", per_sample_weights=weights)
        expected = lucid_onnx.embedding_bag(x, table, offsets, mode="sum", per_sample_weights=array)
        np.testing.assert_array_equal(pooled, expected)
        grad = lucid_onnx.embedding_bag_grad(pooled, x, table, offsets, mode="sum", per_sample_weights=weights)
        np.testing.assert_array_equal(
            grad, lucid_onnx.embedding_bag_grad(pooled, x, table, offsets, mode="sum", per_sample_weights=array)
        )
        both = lucid_onnx.embedding_bag_collection(
            [x, x], [table] * 2, offsets and [offsets] * 2, mode="sum", per_sample_weights=[weights, array]
        )
        np.testing.assert_array_equal(both, np.concatenate([expected, expected], axis=1))
    packed = lucid_onnx.embedding_bag_collection(
        [1, 2, 4],
        [table, table],
        [0, 1, 3],
        packed=True,
        mode="sum",
        per_sample_weights=[0.5, 1, 2],
        include_last_offset=True,
    )
    assert packed.shape == (1, 8)
    with pytest.raises(TypeError, match="per_sample_weights has dtype int64"):
        lucid_onnx.embedding_bag([1], table, [0], mode="sum", per_sample_weights=np.array([1]))
    for bad in ([True], ["1"], [None]):
        with pytest.raises(TypeError, match="per_sample_weights has dtype"):
            lucid_onnx.embedding_bag([1], table, [0], mode="sum", per_sample_weights=bad)


def test_quantized_calls_take_lists_of_numbers_as_weights() -> None:
    table = lucid_onnx.QuantizedTable.quantize(np.arange(20, dtype=np.float32).reshape(5, 4))
    pooled = lucid_onnx.quantized_embedding_bag([1, 2], table, [0], mode="sum", per_sample_weights=[0.5, 2])
    weights = np.array([0.5, 2], np.float32)
    expected = lucid_onnx.quantized_embedding_bag([1, 2], table, [0], mode="sum", per_sample_weights=weights)
    np.testing.assert_array_equal(pooled, expected)


def test_calls_say_that_they_give_no_gradient() -> None:
    torch = pytest.importorskip("torch")
    table, weights = torch.ones(5, 4, requires_grad=True), torch.ones(1, requires_grad=True)
    message = r"requires a gradient, and this call gives NumPy arrays: give .*\.detach\(\), or call lucid_onnx.torch"
    with pytest.raises(TypeError, match=f"weight {message}"):
        lucid_onnx.embedding_bag([1], table, [0])
    with pytest.raises(TypeError, match=f"per_sample_weights {message}"):
        lucid_onnx.embedding_bag([1], table.detach(), [0], mode="sum", per_sample_weights=weights)
    with pytest.raises(TypeError, match=f"weight of table 1 {message}"):
        lucid_onnx.embedding_bag_collection([[1], [1]], [table.detach(), table], [[0], [0]])
    with pytest.raises(TypeError, match=f"grad_output {message}"):
        lucid_onnx.embedding_bag_grad(torch.ones(1, 4, requires_grad=True), [1], table.detach(), [0])


@each_way
def test_a_call_raises_its_error_and_logs_nothing(form: str, native: bool, capfd: pytest.CaptureFixture[str]) -> None:
    table = np.ones((5, 4), np.float32)
    ort.set_default_logger_severity(2)  # as onnxruntime has it
    try:
        lucid_onnx.embedding_bag([4], table, [0], max_norm=0.3, form=form, native=native)  # a session of its own
        with pytest.raises(IndexError, match=r"indices\[0\] = 9 is outside \[0, 5\)"):
            lucid_onnx.embedding_bag([9], table, [0], max_norm=0.3, form=form, native=native)
    finally:
        ort.set_default_logger_severity(3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ours", [True, False], ids=["default", "given"])
@each_way
def test_a_session_raises_its_error_and_logs_it_where_options_say_so(
    form: str, native: bool, ours: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    case = cases.make("logged", rows=5, mode="sum")
    model = model_of(case, form, constant=True)
    feed = {"indices": np.array([9]), "offsets": np.array([0])}
    ort.set_default_logger_severity(2)  # as onnxruntime has it
    try:
        session = lucid_onnx.InferenceSession(model, None if ours else ort.SessionOptions(), native=native)
        with pytest.raises(Exception, match=r"Non-zero status code returned while running .* node.*9 .*[0-5]"):
            session.run(None, feed)
        with pytest.raises(Exception, match=r"Non-zero status code returned while running .* node.*9 .*[0-5]"):
            session.run(None, feed, ort.RunOptions())
        model.graph.node[-1].output[0] = "another"
        with pytest.raises(Exception, match="output"):
            lucid_onnx.InferenceSession(model, None if ours else ort.SessionOptions(), native=native)
    finally:
        ort.set_default_logger_severity(3)
    out, err = capfd.readouterr()
    assert out == ""
    assert (err == "") == ours, err


def test_a_model_whose_external_data_was_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no folder; one of the same name in the current folder may be another model's."""
    case = cases.make("elsewhere", rows=500, mode="sum")
    path = tmp_path / "model.onnx"
    lucid_onnx.save(model_of(case, "portable", constant=True), path, external_data=True)
    light = onnx.load(path, load_external_data=False)
    message = "initializer 'weight' is external data that was not loaded: give the session the path of the model"
    for folder in (tmp_path.parent, tmp_path):
        monkeypatch.chdir(folder)
        with pytest.raises(ValueError, match=message):
            lucid_onnx.InferenceSession(light, native=False)
    case.check(run(lucid_onnx.InferenceSession(path, native=False), case))
    case.check(run(lucid_onnx.InferenceSession(onnx.load(path), native=False), case))
    inner = helper.make_model(
        helper.make_graph([helper.make_node("Constant", [], ["y"], value=light.graph.initializer[0])], "g", [], [])
    )
    with pytest.raises(ValueError, match=message):
        lucid_onnx.InferenceSession(inner, native=False)


#: What makes a model of a file, and leaves the tables in the file of external data.
REWRITES: dict[str, Callable[[Path], onnx.ModelProto]] = {
    "fuse": lambda path: lucid_onnx.fuse(path).model,
    "fuse of a result": lambda path: lucid_onnx.fuse(lucid_onnx.lower(path)).model,
    "fuse, merge_tables": lambda path: lucid_onnx.fuse(path, merge_tables=True).model,
    "lower": lucid_onnx.lower,
    "quantize": lambda path: lucid_onnx.quantize(path, min_bytes=2**30).model,
    "quantize to a file": lambda path: lucid_onnx.quantize(path, path.with_name("small.onnx"), min_bytes=2**30).model,
    "to_form": lambda path: lucid_onnx.to_form(lucid_onnx.fuse(path).model, "standard"),
}


def linked(path: Path) -> Path:
    """A model by links to files of other names, as download tools keep it."""
    folder = path.parent / "snapshots"
    folder.mkdir()
    for k, source in enumerate((path, path.with_name(path.name + ".data"))):
        source.rename(path.with_name(f"blob{k}"))
        (folder / source.name).symlink_to(f"../blob{k}")
    return folder / path.name


@pytest.mark.parametrize(
    ("rewrite", "has_entry", "layout"),
    [
        *((name, True, "plain") for name in REWRITES),
        ("fuse", True, "links"),
        ("fuse", False, "links"),
        ("lower", False, "plain"),
    ],
)
def test_results_in_memory_find_their_external_data(
    rewrite: str, has_entry: bool, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the current folder is; the path may be relative."""
    pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
    if not has_entry:
        monkeypatch.setattr(session_module, "_HAS_FOLDER_ENTRY", False)
    case = cases.make("elsewhere", layout="rows", rows=500, mode="sum")
    lucid_onnx.save(model_of(case, "portable", constant=True), tmp_path / "model.onnx", external_data=True)
    path = tmp_path / "model.onnx" if layout == "plain" else linked(tmp_path / "model.onnx")
    monkeypatch.chdir(path.parent)
    model = REWRITES[rewrite](Path(path.name))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [t.name for t in model.graph.initializer if t.raw_data] == []
    before = model.SerializeToString(deterministic=True)
    options = ort.SessionOptions()
    for arguments in ((model, options), (model, options)):
        case.check(run(lucid_onnx.InferenceSession(*arguments, native=False), case))
    assert model.SerializeToString(deterministic=True) == before
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with pytest.raises(ValueError, match="is external data that was not loaded"):  # with the same options, too
        lucid_onnx.InferenceSession(copy, options, native=False)
    session = lucid_onnx.InferenceSession(model, native=False)
    session.set_providers(["CPUExecutionProvider"])
    case.check(run(session, case))


def test_results_in_memory_read_nothing_outside_of_their_folder(tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
    case = cases.make("elsewhere", layout="rows", rows=500, mode="sum")
    (tmp_path / "in").mkdir()
    path, data = tmp_path / "in" / "model.onnx", tmp_path / "in" / "model.onnx.data"
    lucid_onnx.save(model_of(case, "portable", constant=True), path, external_data=True)
    model = lucid_onnx.fuse(path).model
    data.rename(tmp_path / "secret")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        lucid_onnx.InferenceSession(model, native=False)
    data.symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="outside of the model's folder"):
        lucid_onnx.InferenceSession(model, native=False)
    data.unlink()
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../secret"
    with pytest.raises(ValueError, match="outside of the model's folder"):
        lucid_onnx.InferenceSession(model, native=False)


def test_bytes_do_not_say_where_external_data_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.make("elsewhere", layout="rows", rows=500, mode="sum")
    path = tmp_path / "model.onnx"
    lucid_onnx.save(model_of(case, "portable", constant=True), path, external_data=True)
    content = path.read_bytes()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="the bytes of a model do not say where it is: give its path"):
        lucid_onnx.InferenceSession(content, native=False)
    monkeypatch.chdir(tmp_path)
    case.check(run(lucid_onnx.InferenceSession(content, native=False), case))


@pytest.mark.parametrize("name", ["nowhere/model.onnx", "m" * 300])
def test_errors_name_the_file_that_is_wanted(name: str, tmp_path: Path) -> None:
    """And no temporary one."""
    with pytest.raises(OSError) as raised:
        lucid_onnx.save(lucid_onnx.build_model(np.eye(3, dtype=np.float32)), tmp_path / name)
    assert raised.value.filename == str(tmp_path / name)
    assert raised.value.filename2 is None
    assert list(tmp_path.iterdir()) == []


def test_errors_of_a_large_model_name_no_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through a file where protobuf would not hold it; smaller ones here."""
    monkeypatch.setattr(session_module, "_LARGEST_IN_MEMORY", 0)
    model = lucid_onnx.build_model(np.eye(3, dtype=np.float32), form="native")
    with pytest.raises(Exception, match="is not a registered function/op") as raised:
        lucid_onnx.InferenceSession(model, native=False)
    assert type(raised.value).__module__.startswith("onnxruntime")
    assert "lucid_onnx" not in str(raised.value).replace("ai.lucid", "")
    assert ".onnx" not in str(raised.value)


def test_models_are_remembered_as_long_as_they_live(tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
    case = cases.make("elsewhere", layout="rows", rows=500, mode="sum")
    lucid_onnx.save(model_of(case, "portable", constant=True), tmp_path / "model.onnx", external_data=True)
    kept = [lucid_onnx.lower(tmp_path / "model.onnx") for _ in range(3)]
    del kept[1]
    for _ in range(3):
        lucid_onnx.lower(tmp_path / "model.onnx")
    assert all(origins.data_of(model) is not None for model in kept)
    assert {id(model) for model in kept} == set(origins._origins)
    kept.clear()
    assert origins.data_of(onnx.ModelProto()) is None
    assert not origins._origins


def test_options_that_say_where_external_data_is(tmp_path: Path) -> None:
    if tuple(int(x) for x in ort.__version__.split(".")[:2]) < (1, 24):
        pytest.skip("session.model_external_initializers_file_folder_path is of newer releases")
    case = cases.make("elsewhere", rows=500, mode="sum")
    lucid_onnx.save(model_of(case, "portable", constant=True), tmp_path / "model.onnx", external_data=True)
    light = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tmp_path))
    case.check(run(lucid_onnx.InferenceSession(light, options, native=False), case))


@each_way
def test_options_and_providers_are_honoured(form: str, native: bool, tmp_path: Path) -> None:
    case = case_of("mean ragged float32")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.logid = "bags"
    optimised = tmp_path / "optimised.onnx"
    options.optimized_model_filepath = str(optimised)
    session = lucid_onnx.InferenceSession(
        model_of(case, form), native=native, session_options=options, providers=[("CPUExecutionProvider", {})]
    )
    used = session.get_session_options()
    assert (used.intra_op_num_threads, used.logid) == (3, "bags")
    assert used.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert optimised.is_file()
    assert session.get_providers() == ["CPUExecutionProvider"]
    case.check(run(session, case))
    assert isinstance(session, ort.InferenceSession)
    assert lucid_onnx.InferenceSession(model_of(case, form), native=native).get_providers() == ["CPUExecutionProvider"]


# ---- Several bags in one model.


def _value(name: str, kind: int, shape: list[Any] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _everywhere() -> onnx.ModelProto:
    """Bags with different attributes side by side, in both branches of an If, in a Loop, and in a user's function."""
    table = numpy_helper.from_array(np.random.RandomState(1).standard_normal((12, 4)).astype(np.float32), "table")
    wide = numpy_helper.from_array(np.random.RandomState(2).standard_normal((9, 4)), "wide")
    node = lucid_onnx.make_node
    then = helper.make_graph(
        [node("table", "ids", "starts", "t", mode="max", padding_idx=-1)], "then", [], [_value("t", 1, None)]
    )
    otherwise = helper.make_graph(
        [node("table", "ids", "starts", "e", mode="sum", max_norm=1.5, norm_type=1.0)],
        "else",
        [],
        [_value("e", 1, None)],
    )
    # Each round pools the ids and adds what the rounds before made.
    body = helper.make_graph(
        [
            node("table", "ids", "ends", "pooled", mode="sum", per_sample_weights="weights", include_last_offset=True),
            helper.make_node("Add", ["pooled", "before"], ["after"]),
            helper.make_node("Identity", ["going"], ["go"]),
        ],
        "body",
        [_value("round", TensorProto.INT64, []), _value("going", TensorProto.BOOL, []), _value("before", 1, None)],
        [_value("go", TensorProto.BOOL, []), _value("after", 1, None)],
    )
    graph = helper.make_graph(
        [
            node("table", "ids", "starts", "mean", mode="mean", padding_idx=0),
            node("wide", "rows", None, "doubles", mode="max", weight_dtype="float64"),
            node("wide", "rows", None, "clipped", mode="mean", max_norm=0.7, norm_type=np.inf, weight_dtype="float64"),
            helper.make_node("If", ["flag"], ["branch"], then_branch=then, else_branch=otherwise),
            helper.make_node("Loop", ["rounds", "", "mean"], ["looped"], body=body),
            helper.make_node("Twice", ["table", "ids", "starts"], ["twice"], domain="my.own"),
        ],
        "everywhere",
        [
            _value("ids", TensorProto.INT64, ["n"]),
            _value("starts", TensorProto.INT64, ["b"]),
            _value("ends", TensorProto.INT64, ["b1"]),
            _value("weights", TensorProto.FLOAT, ["n"]),
            _value("rows", TensorProto.INT32, ["r", "l"]),
            _value("flag", TensorProto.BOOL, []),
            _value("rounds", TensorProto.INT64, []),
        ],
        [
            *(_value(name, TensorProto.FLOAT, ["b", 4]) for name in ("mean", "branch", "looped", "twice")),
            *(_value(name, TensorProto.DOUBLE, ["r", 4]) for name in ("doubles", "clipped")),
        ],
        [table, wide],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("ai.lucid", 1)]
    twice = helper.make_function(
        "my.own",
        "Twice",
        ["w", "i", "o"],
        ["y"],
        [
            node("w", "i", "o", "once", mode="sum"),
            node("w", "i", "o", "again", mode="mean", padding_idx=3),
            helper.make_node("Add", ["once", "again"], ["y"]),
        ],
        imports,
    )
    return helper.make_model(
        graph, opset_imports=[*imports, helper.make_opsetid("my.own", 1)], functions=[twice], ir_version=8
    )


def _feeds() -> Iterator[dict[str, np.ndarray]]:
    random = np.random.RandomState(3)
    for flag, rounds, lengths in ((True, 0, (3, 0, 4)), (False, 3, (1, 7)), (True, 2, (0,)), (False, 1, (150, 0, 40))):
        ends = np.cumsum([0, *lengths])
        yield {
            "ids": random.randint(0, 12, ends[-1]),
            "starts": ends[:-1],
            "ends": ends,
            "weights": random.standard_normal(ends[-1]).astype(np.float32),
            "rows": random.randint(0, 9, (2, 3)).astype(np.int32),
            "flag": np.array(flag),
            "rounds": np.array(rounds),
        }


def _everywhere_expected(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    bag = lucid_onnx.reference.embedding_bag
    tables = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    table, wide = tables["table"].astype(np.float64), tables["wide"]
    ids, starts, rows = feed["ids"], feed["starts"], feed["rows"]
    mean = bag(ids, table, starts, mode="mean", padding_idx=0)
    step = bag(
        ids, table, feed["ends"], mode="sum", per_sample_weights=feed["weights"].astype(float), include_last_offset=True
    )
    return {
        "mean": mean,
        "branch": bag(ids, table, starts, mode="max", padding_idx=-1)
        if feed["flag"]
        else bag(ids, table, starts, mode="sum", max_norm=1.5, norm_type=1.0),
        "looped": mean + int(feed["rounds"]) * step,
        "twice": bag(ids, table, starts, mode="sum") + bag(ids, table, starts, mode="mean", padding_idx=3),
        "doubles": bag(rows, wide, mode="max"),
        "clipped": bag(rows, wide, mode="mean", max_norm=0.7, norm_type=np.inf),
    }


@each_way
def test_bags_in_branches_loops_and_functions(form: Any, native: bool) -> None:
    model = _everywhere()
    converted = lucid_onnx.to_form(model, form)
    onnx.checker.check_model(converted, full_check=True)
    for level in LEVELS:
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        session = lucid_onnx.InferenceSession(converted, native=native, session_options=options)
        for feed in _feeds():
            expected = _everywhere_expected(model, feed)
            got = dict(zip((o.name for o in session.get_outputs()), session.run(None, feed), strict=True))
            assert got.keys() == expected.keys()
            for name, array in got.items():
                # Sums of up to 600 values of about 1 in float32, and cancellation: 1e-6 of 600 at worst.
                np.testing.assert_allclose(
                    array, expected[name], rtol=0, atol=6e-4 if array.dtype == np.float32 else 1e-12, err_msg=name
                )


@each_way
def test_what_runs_in_branches_loops_and_functions(form: Any, native: bool, tmp_path: Path) -> None:
    feed = next(f for f in _feeds() if f["rounds"] == 3)
    _, ran = profiled(lucid_onnx.to_form(_everywhere(), form), feed, native=native, folder=tmp_path)
    ours = {name: count for name, count in ran.items() if name in spec.VARIANTS}
    if native and form != "standard":
        # The mean, a branch, and two of the function; the loop's three; two over doubles.
        assert ours == {"EmbeddingBag": 4, "EmbeddingBagWeighted": 3, "EmbeddingBag2D": 2}
    else:
        assert ours == {}


def test_the_forms_turn_into_each_other() -> None:
    model = _everywhere()
    portable = lucid_onnx.to_form(model, "portable")
    native = lucid_onnx.to_form(portable, "native")
    assert lucid_onnx.to_form(native, "portable") == portable
    assert lucid_onnx.to_form(portable, "portable") == portable
    standard = lucid_onnx.to_form(portable, "standard")
    assert lucid_onnx.to_form(standard, "native") == standard
    assert "ai.lucid" not in str(standard)
    assert {f.name for f in portable.functions if f.domain == "ai.lucid"} == {
        "EmbeddingBag",
        "EmbeddingBagWeighted",
        "EmbeddingBag2D",
    }


# ---- The example models.


def _two_tower(tables: dict[str, np.ndarray], feed: dict[str, np.ndarray]) -> np.ndarray:
    bag = lucid_onnx.reference.embedding_bag
    user = bag(feed["history"], tables["item_table"], feed["history_offsets"], mode="mean", max_norm=1.0)
    item = bag(
        feed["words"],
        tables["word_table"],
        feed["word_offsets"],
        mode="sum",
        per_sample_weights=feed["word_weights"],
        padding_idx=0,
    )
    return user @ item.T


def _dlrm(tables: dict[str, np.ndarray], feed: dict[str, np.ndarray]) -> np.ndarray:
    bag = lucid_onnx.reference.embedding_bag
    parts = [
        np.maximum(feed["dense"] @ tables["bottom"], 0),
        bag(feed["brands"], tables["brand_table"], feed["brand_offsets"], mode="sum"),
        bag(feed["pages"], tables["page_table"], feed["page_offsets"], mode="max", padding_idx=-1),
        bag(feed["tags"], tables["tag_table"], mode="mean"),
    ]
    return 1 / (1 + np.exp(-(np.concatenate(parts, axis=1) @ tables["top"])))


def _two_tower_feed() -> dict[str, np.ndarray]:
    random = np.random.RandomState(4)
    return {
        "history": random.randint(0, 50, 40),
        "history_offsets": ints(0, 3, 3, 20),
        "words": random.randint(0, 200, 60),
        "word_offsets": ints(0, 1, 30, 30, 31),
        "word_weights": random.standard_normal(60).astype(np.float32),
    }


def _dlrm_feed() -> dict[str, np.ndarray]:
    random = np.random.RandomState(5)
    return {
        "dense": random.standard_normal((3, 4)).astype(np.float32),
        "brands": random.randint(0, 40, 20),
        "brand_offsets": ints(0, 0, 7),
        "pages": random.randint(0, 60, 9),
        "page_offsets": ints(0, 4, 5),
        "tags": random.randint(0, 30, (3, 3)),
    }


EXAMPLES: dict[str, tuple[Callable[..., np.ndarray], Callable[[], dict[str, np.ndarray]]]] = {
    "two_tower": (_two_tower, _two_tower_feed),
    "dlrm": (_dlrm, _dlrm_feed),
}


def test_every_example_has_an_expectation() -> None:
    assert {p.stem for p in (ROOT / "models" / "examples").glob("*.onnx")} == EXAMPLES.keys()


@each_way
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str, form: Any, native: bool) -> None:
    expected, feeds = EXAMPLES[name]
    model = onnx.load(ROOT / "models" / "examples" / f"{name}.onnx")
    tables = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    feed = feeds()
    session = lucid_onnx.InferenceSession(lucid_onnx.to_form(model, form), native=native)
    # A few dozen float32 roundings of values up to 10.
    np.testing.assert_allclose(session.run(None, feed)[0], expected(tables, feed), rtol=1e-5, atol=1e-5)


# ---- External data and files.


def _saved_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@each_way
def test_external_data(form: Any, native: bool, tmp_path: Path) -> None:
    random = np.random.RandomState(6)
    tables = [random.standard_normal(shape).astype(np.float32) for shape in ((1000, 3), (7, 5), (333, 64))]
    graph = helper.make_graph(
        [lucid_onnx.make_node(f"w{k}", "i", "o", f"y{k}", mode="sum") for k in range(3)],
        "g",
        [_value("i", TensorProto.INT64, ["n"]), _value("o", TensorProto.INT64, ["b"])],
        [_value(f"y{k}", TensorProto.FLOAT, ["b", t.shape[1]]) for k, t in enumerate(tables)],
        [numpy_helper.from_array(t, f"w{k}") for k, t in enumerate(tables)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8, doc_string="kept")
    model = lucid_onnx.to_form(model, form)
    before = model.SerializeToString(deterministic=True)
    progress: list[tuple[int, int]] = []
    lucid_onnx.save(model, tmp_path / "m.onnx", external_data=True, progress=lambda *p: progress.append(p))
    assert model.SerializeToString(deterministic=True) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert progress[-1][0] == sum(t.nbytes for t in tables if t.nbytes >= 4096)

    light = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for tensor, table in zip(light.graph.initializer, tables, strict=True):
        entries = {e.key: e.value for e in tensor.external_data}
        if table.nbytes < 4096:  # not worth a page
            assert not entries
            assert tensor.data_location == TensorProto.DEFAULT
            continue
        assert entries["location"] == "m.onnx.data"
        assert int(entries["offset"]) % 4096 == 0
        assert int(entries["length"]) == table.nbytes
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    loaded = onnx.load(tmp_path / "m.onnx")
    for tensor, table in zip(loaded.graph.initializer, model.graph.initializer, strict=True):
        assert numpy_helper.to_array(tensor).tobytes() == numpy_helper.to_array(table).tobytes()
        tensor.CopyFrom(table)  # onnx says with DEFAULT that it loaded a tensor
    assert loaded == model

    feed = {"i": random.randint(0, 7, 30), "o": ints(0, 10, 10)}
    moved = tmp_path / "elsewhere"  # the two files travel together
    moved.mkdir()
    for path in list(tmp_path.glob("m.onnx*")):
        shutil.move(path, moved / path.name)
    session = lucid_onnx.InferenceSession(moved / "m.onnx", native=native)
    for got, table in zip(session.run(None, feed), tables, strict=True):
        # 20 values of about 1.
        np.testing.assert_allclose(
            got, lucid_onnx.reference.embedding_bag(feed["i"], table, feed["o"], mode="sum"), atol=1e-5
        )


@each_way
@pytest.mark.parametrize("offset", [1, 3, 49, 64, 4097])
@pytest.mark.parametrize("name", ["everything ragged float32", "max rows float64", "weights ends float16"])
def test_a_table_at_any_byte_of_a_file(form: str, native: bool, offset: int, name: str, tmp_path: Path) -> None:
    case = case_of(name)
    model = model_of(case, form, constant=True)
    (tensor,) = (t for t in model.graph.initializer if t.name == "weight")
    data = tensor.raw_data
    (tmp_path / "table.bin").write_bytes(b"\x7f" * offset + data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "table.bin"), ("offset", offset), ("length", len(data))):
        tensor.external_data.add(key=key, value=str(value))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    case.check(run(lucid_onnx.InferenceSession(tmp_path / "m.onnx", native=native), case))


@needs_library
@pytest.mark.parametrize("name", ["everything ragged float32", "max ends float64", "mean rows float32"])
def test_bound_memory_at_any_byte(name: str) -> None:
    """Inputs and output that start anywhere, through an IoBinding."""
    case = case_of(name)
    session = lucid_onnx.InferenceSession(model_of(case, "native"))
    expected = run(session, case)
    case.check(expected)
    for shift in (1, 3, 49):
        binding = session.io_binding()
        kept = []
        for key, array in case.inputs.items():
            memory = np.full(array.nbytes + shift, 0xEE, np.uint8)
            memory[shift:] = np.frombuffer(array.tobytes(), np.uint8)
            kept.append(memory)
            binding.bind_input(key, "cpu", 0, array.dtype, array.shape, memory.ctypes.data + shift)
        memory = np.full(expected.nbytes + shift + 64, 0xEE, np.uint8)
        binding.bind_output("output", "cpu", 0, expected.dtype, expected.shape, memory.ctypes.data + shift)
        session.run_with_iobinding(binding)
        assert memory[shift : shift + expected.nbytes].tobytes() == expected.tobytes()
        assert (memory[:shift] == 0xEE).all()
        assert (memory[shift + expected.nbytes :] == 0xEE).all()


class _StopError(Exception):
    pass


def _stop(*_: int) -> None:
    raise _StopError


@pytest.mark.parametrize("existing", [False, True])
def test_a_save_that_fails_leaves_what_was_there(existing: bool, tmp_path: Path) -> None:
    old = lucid_onnx.build_model(np.ones((2000, 2), np.float32))
    new = lucid_onnx.build_model(np.zeros((3000, 2), np.float32), mode="sum")
    if existing:
        lucid_onnx.save(old, tmp_path / "m.onnx", external_data=True)
    before = _saved_bytes(tmp_path)
    with pytest.raises(_StopError):  # in the middle of the data
        lucid_onnx.save(new, tmp_path / "m.onnx", external_data=True, progress=_stop)
    assert _saved_bytes(tmp_path) == before
    broken = onnx.ModelProto()
    broken.CopyFrom(new)
    broken.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(ValueError) as caught:
        lucid_onnx.save(broken, tmp_path / "m.onnx")
    assert str(caught.value) == "initializer 'weight' is external data that was not loaded: use onnx.load first"
    assert _saved_bytes(tmp_path) == before
    if existing:
        session = lucid_onnx.InferenceSession(tmp_path / "m.onnx", native=False)
        assert session.run(None, {"indices": ints(1), "offsets": ints(0)})[0].tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("failing", "existing"), [("m.onnx.data", False), ("m.onnx.1.data", True), ("m.onnx", False), ("m.onnx", True)]
)
def test_a_save_that_fails_at_its_last_step(
    failing: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two files are one model: when one of them cannot take its place, the other must not have taken its own."""
    old = lucid_onnx.build_model(np.ones((2000, 2), np.float32))
    new = lucid_onnx.build_model(np.zeros((3000, 2), np.float32), mode="sum")
    if existing:
        lucid_onnx.save(old, tmp_path / "m.onnx", external_data=True)
    before = _saved_bytes(tmp_path)
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if Path(target).name == failing and Path(source).name.startswith(f".{failing}."):
            raise PermissionError(13, "no", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(PermissionError):
            lucid_onnx.save(new, tmp_path / "m.onnx", external_data=True)
    assert _saved_bytes(tmp_path) == before


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(OSError):
        lucid_onnx.save(lucid_onnx.build_model(np.ones((2000, 2), np.float32)), tmp_path / "m.onnx", external_data=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    with pytest.raises(FileNotFoundError):
        lucid_onnx.save(lucid_onnx.build_model(np.ones((2, 2), np.float32)), tmp_path / "none" / "m.onnx")


def test_what_save_writes_is_readable_like_any_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    lucid_onnx.save(lucid_onnx.build_model(np.ones((2000, 2), np.float32)), tmp_path / "m.onnx", external_data=True)
    wanted = (tmp_path / "plain").stat().st_mode
    assert [(tmp_path / n).stat().st_mode for n in ("m.onnx", "m.onnx.data")] == [wanted, wanted]


@pytest.mark.large
@pytest.mark.parametrize(("form", "native"), [("portable", True), ("standard", False)])
def test_a_table_over_2_gib(form: Any, native: bool, tmp_path: Path) -> None:
    """Saved, loaded and run: positions past 2**31 bytes and past 2**32 elements' worth of offsets are real.

    Once by the kernel and once by the graph: the other ways differ in what is around the table, and take as long.
    """
    rows, dim = 2**25 + 5, 16  # a little over 2 GiB of float32
    size = rows * dim * 4
    needed = {"memory": 4 * size, "disk": 2 * size}
    for what, free in (("memory", free_memory()), ("disk", shutil.disk_usage(tmp_path).free)):
        if free < needed[what]:
            pytest.skip(f"{free / 2**30:.1f} GiB of {what} free, {needed[what] / 2**30:.1f} GiB needed")
    weight = np.zeros((rows, dim), np.float32)
    marked = [0, 2**24 + 1, 2**25 - 1, 2**25, rows - 1]
    weight[marked] = np.arange(1, 6, dtype=np.float32)[:, None]
    model = lucid_onnx.build_model(weight, mode="sum", form=form)
    del weight
    path = tmp_path / "large.onnx"
    with pytest.raises(
        ValueError, match=r"^external_data = False, but \d+ bytes of tables do not fit one protobuf file$"
    ):
        lucid_onnx.save(model, path, external_data=False)
    assert list(tmp_path.iterdir()) == []
    began = time.monotonic()
    lucid_onnx.save(model, path)
    print(f"saved in {time.monotonic() - began:.1f} s")
    del model
    assert (tmp_path / "large.onnx.data").stat().st_size == size
    session = lucid_onnx.InferenceSession(path, native=native)
    got = session.run(None, {"indices": np.array(marked), "offsets": ints(0, 1, 3)})[0]
    assert got.tolist() == [[1] * dim, [5] * dim, [9] * dim]
    with pytest.raises(Exception, match=rf"{rows}\D"):
        session.run(None, {"indices": ints(rows), "offsets": ints(0)})
    # The table is the session's only through the file: that is gone, its memory stays.
    (tmp_path / "large.onnx.data").unlink()
    assert session.run(None, {"indices": ints(rows - 1), "offsets": ints(0)})[0].tolist() == [[5] * dim]
