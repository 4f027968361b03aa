"""The bags of several tables on CUDA: each table gets the bits that it gets alone, and the CPU's error messages.

As in test_cuda.py, every test of the kernels runs emulated on the host, and again on a GPU where there is one.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lucid_onnx.ops.embedding_bag import cases as bags
from lucid_onnx.ops.embedding_bag_collection import cases, spec
from lucid_onnx.ops.embedding_bag_collection.cases import Case
from lucid_testing.cuda import (
    CollectionPlan,
    Emulated,
    collection_args,
    collection_shape,
    emulated_library,
    run,
    run_collection,
    session_with,
    tables_of,
)
from lucid_testing.hostile import MAX64, MIN64
from lucid_testing.kernels import Args, library, needs_library

CASES = cases.all_cases()


def on_cpu(case: Case, change: Callable[[list[Args]], None] | None = None) -> tuple[int, str, np.ndarray]:
    """The code, text and result of the CPU's kernel."""
    kept = []

    def place(array: np.ndarray) -> int | None:
        kept.append(np.ascontiguousarray(array))
        return int(kept[-1].ctypes.data)

    output = np.zeros(collection_shape(case), case.tables[0].weight.dtype)
    tables = tables_of(case, place)
    if change is not None:
        change(tables)
    args = collection_args(tables, case.layout == "packed", output.ctypes.data)
    message = ctypes.create_string_buffer(256)
    code = library().lucid_embedding_bag_collection(ctypes.byref(args), None, 1, message, ctypes.c_size_t(len(message)))
    return code, message.value.decode(), output


def alone(device: Any, case: Case) -> np.ndarray:
    """Each table's bags computed alone, then concatenated."""
    found = []
    for table in case.tables:
        code, message, got = run(device, table)
        assert (code, message) == (0, ""), table.name
        found.append(got)
    return np.concatenate(found, axis=1)


#: Around the ends of chunks and pieces.
LENGTHS = (1, 0, 63, 64, 65, 0, 129, 1023, 1025, 2, 2049, 0)


def mixed(layout: str, count: int = 5, *, dims: tuple[int, ...] = (8, 3, 16, 1, 20), **attributes: Any) -> Case:
    """Tables of several widths, with bags of each length; another number of rows each."""
    made = cases.make(
        f"mixed {layout} {count} {sorted(attributes.items())}",
        layout,
        dims=[dims[t % len(dims)] for t in range(count)],
        rows=[7 + 5 * t for t in range(count)],
        lengths=(70, 70, 70) if layout == "rows" else LENGTHS,
        **attributes,
    )
    return made


# ---- Right.


@needs_library
def test_every_case(device: Any) -> None:
    for case in CASES.values():
        code, message, got = run_collection(device, case)
        assert (code, message) == (0, ""), case.name
        case.check(got)
        assert got.tobytes() == on_cpu(case)[2].tobytes(), case.name
        # A packed case's tables have other positions by themselves, but the same bags.
        assert got.tobytes() == alone(device, case).tobytes(), case.name


@needs_library
@pytest.mark.parametrize("layout", spec.LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_tables_of_several_widths(device: Any, layout: str, dtype: str) -> None:
    for mode, count in (("sum", 3), ("mean", 5), ("max", 5)):
        case = mixed(layout, count, mode=mode, dtype=dtype, weighted=mode == "sum")
        code, message, got = run_collection(device, case)
        assert (code, message) == (0, "")
        case.check(got, slack=4)
        assert got.tobytes() == on_cpu(case)[2].tobytes()


@needs_library
@pytest.mark.parametrize("layout", spec.LAYOUTS)
def test_more_tables_than_the_parameters_of_a_launch_hold(device: Any, layout: str) -> None:
    """With tables of no columns among them, which another kernel checks."""
    case = cases.make(
        f"many {layout}", layout, dims=[(4, 1, 0, 8)[t % 4] for t in range(40)], rows=[3 + t for t in range(40)],
        lengths=(3, 3) if layout == "rows" else (2, 0, 70), mode="sum", padding_idx=-1, max_norm=1.0,
    )  # fmt: skip
    code, message, got = run_collection(device, case)
    assert (code, message) == (0, "")
    case.check(got, slack=4)
    assert got.tobytes() == alone(device, case).tobytes()


@needs_library
def test_wherever_the_arrays_lie(device: Any) -> None:
    for layout in ("ragged", "packed"):
        case = mixed(layout, 3, mode="sum", weighted=True)
        expected = on_cpu(case)[2].tobytes()
        for shift in (8, 16):
            assert run_collection(device, case, shift=shift)[2].tobytes() == expected


def test_the_same_bits_in_every_run(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for layout in ("ragged", "packed"):
        case = mixed(layout, mode="sum")
        expected = run_collection(device, case)[2].tobytes()
        for turn in range(1, 3 if device.name == "emulated" else 21):
            monkeypatch.setenv("LUCID_EMULATE_ORDER", str(turn))  # of blocks and warps
            assert run_collection(device, case, fill=turn)[2].tobytes() == expected


# ---- The plan.


def planned(emulated: Emulated, case: Case, change: Callable[[list[Args]], None] | None = None) -> Any:
    tables = tables_of(case, lambda array: 4096)
    if change is not None:
        change(tables)
    args = collection_args(tables, case.layout == "packed", 4096)
    plan, message = CollectionPlan(), ctypes.create_string_buffer(256)
    code = emulated.native.lucid_cuda_plan_collection(
        ctypes.byref(args), ctypes.byref(plan), message, len(message)
    )  # fmt: skip
    return plan if code == 0 else (code, message.value.decode())


def test_one_launch_for_all_tables_of_a_width(emulated: Emulated) -> None:
    for layout, most in (("ragged", 12), ("rows", 12), ("packed", 11)):
        case = cases.make("equal", layout, dims=(16,) * most, rows=(9,) * most, lengths=(20, 20), mode="sum")
        plan = planned(emulated, case)
        assert (plan.launches, plan.pool_launches) == (1, 1), layout
        # Bags of more than 64 positions meet in scratch memory; those of 20 need it for nothing.
        assert (plan.scratch_bytes == 0) == (layout != "packed")
        case = dataclasses.replace(case, tables=case.tables * 3)
        plan = planned(emulated, case)
        assert (plan.launches, plan.pool_launches) == (1 + -(-(most * 3 + (layout == "packed")) // 12), 1), layout
    widths = cases.make("widths", dims=(16, 3, 16, 0, 5), mode="mean", max_norm=1.0)
    plan = planned(emulated, widths)  # rows of 16 bytes, of 4, and none; and the norms before them
    assert (plan.launches, plan.pool_launches, plan.columns, plan.num_bags) == (4, 2, 40, 4)
    plan = planned(emulated, cases.make("nothing", dims=(0, 0), lengths=(), mode="max"))
    assert (plan.launches, plan.scratch_bytes) == (0, 0)


# ---- Safe.


def _bad(layout: str) -> Case:
    return mixed(layout, 4, mode="sum", dims=(8, 3, 0, 5))


@needs_library
@pytest.mark.parametrize("layout", spec.LAYOUTS)
def test_hostile_values_are_refused_as_the_cpu_refuses_them(
    device: Any,
    layout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LUCID_EMULATE_ORDER", "3")
    random = np.random.RandomState(17)
    seen = set()
    for turn in range(50):
        case = _bad(layout)
        tables = list(case.tables)
        for _ in range(random.randint(1, 4)):
            t = random.randint(len(tables))
            table = tables[t]
            indices, offsets = table.indices.copy(), None if table.offsets is None else table.offsets.copy()
            if offsets is None or (layout != "packed" and random.rand() < 0.5) or layout == "packed":
                value = random.choice([-1, len(table.weight), 2**31 - 1, -(2**31)])
                indices.flat[random.randint(indices.size)] = value
            else:
                value = random.choice([-1, indices.size + 1, 3, 2**31 - 1, -(2**31)])
                offsets[random.randint(len(offsets))] = value
            tables[t] = dataclasses.replace(table, indices=indices, offsets=offsets)
        case = dataclasses.replace(case, tables=tuple(tables))
        change = None
        if layout == "packed" and turn % 2:
            ends = np.array(case.call["offsets"])
            ends[random.randint(len(ends))] = random.choice([-1, 3, MAX64, MIN64, ends[-1] + 1])
            memory = device.allocate(ends.nbytes)
            device.write(memory, np.frombuffer(ends.tobytes(), np.uint8))
            where = device.address(memory)

            def change(found: list[Args], where: int = where) -> None:
                for args in found:
                    args.offsets = where

            def on_host(found: list[Args], where: int = ends.ctypes.data) -> None:
                for args in found:
                    args.offsets = where

            expected = on_cpu(case, on_host)[:2]
        else:
            expected = on_cpu(case)[:2]
        code, message, got = run_collection(device, case, change=change)
        assert (code, message) == expected
        seen.add((code, message.split("[")[0]))
        if code == 0:
            assert got.tobytes() == on_cpu(case, on_host if change else None)[2].tobytes()
    assert len(seen) >= (3 if layout != "packed" else 4), seen


def test_the_lowest_of_many_is_named_every_time(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _bad("ragged")
    tables = list(case.tables)
    for t in (1, 3):
        indices = tables[t].indices.copy()
        indices[700::13] = -5
        tables[t] = dataclasses.replace(tables[t], indices=indices)
    case = dataclasses.replace(case, tables=tuple(tables))
    for turn in range(4):
        monkeypatch.setenv("LUCID_EMULATE_ORDER", str(turn))
        assert run_collection(device, case)[:2] == (1, "table 1: indices[700] = -5 is outside [0, 12)")
    offsets = tables[3].offsets.copy()
    offsets[2] = -1
    tables[3] = dataclasses.replace(tables[3], offsets=offsets)
    case = dataclasses.replace(case, tables=tuple(tables))
    expected = f"table 3: offsets[2] = -1 is below offsets[1] = {offsets[1]}: offsets must not decrease"
    assert run_collection(device, case)[:2] == (1, expected)


@needs_library
def test_the_c_interface_refuses_what_the_cpus_does(emulated: Emulated) -> None:
    case = mixed("packed", 3, mode="sum")

    def changes(t: int, **fields: Any) -> Callable[[list[Args]], None]:
        def change(tables: list[Args]) -> None:
            for name, value in fields.items():
                setattr(tables[t], name, value)

        return change

    for change in (
        changes(1, size_bytes=8),
        changes(0, num_offsets=5),
        changes(0, include_last_offset=0),
        changes(2, mode=4),
        changes(2, weight_shape=(ctypes.c_int64 * 2)(-1, 3)),
        changes(2, padding_idx=99),
        changes(1, dtype=3, output_type=3),
    ):
        code, message, _ = on_cpu(case, change)
        assert code == 1
        assert run_collection(emulated, case, change=change)[:2] == (1, message)
    code, message, _ = run_collection(emulated, case, change=changes(1, weight=4098))
    assert (code, message) == (
        1,
        "table 1: weight is at 0x1002, which is not a multiple of the size of its elements, 4 bytes",
    )
    codes = changes(1, dtype=4, scale_stride=4, scale=4096)
    assert run_collection(emulated, case, change=codes)[:2] == (
        1, "table 1: dtype = 4 is quantized: collections on a GPU do not support quantized tables"
    )  # fmt: skip
    wide = changes(1, weight_shape=(ctypes.c_int64 * 2)(2**32, 3))
    assert planned(emulated, case, wide) == (1, "table 1: the call is too large for one launch on a GPU")
    one = cases.make("one", dims=(1,), lengths=())
    many = dataclasses.replace(one, tables=one.tables * (2**14 + 1))
    assert planned(emulated, many) == (1, "num_tables = 16385 is more than a call on a GPU supports, 16384")


# ---- The adapter, emulated as a library of the CPU's provider.


def test_the_adapter_runs_every_case(emulated: Emulated) -> None:
    pytest.importorskip("onnxruntime")
    path = str(emulated_library())
    for case in CASES.values():
        got = session_with(case, path).run(None, case.inputs)[0]
        case.check(got)
        assert got.tobytes() == run_collection(emulated, as_a_model_says_it(case))[2].tobytes()


def as_a_model_says_it(case: Case) -> Case:
    """With the attributes as they are in a node, where a float64 has 48 bits."""
    tables = []
    for table in case.tables:
        a = table.attributes
        max_norm = None if a.max_norm is None else sum(bags.spec.split_double(a.max_norm))
        tables.append(dataclasses.replace(table, attributes=dataclasses.replace(a, max_norm=max_norm)))
    return dataclasses.replace(case, tables=tuple(tables))


@pytest.mark.parametrize("when", ["report", "deferred"])
def test_the_adapter_reports(emulated: Emulated, when: str) -> None:
    pytest.importorskip("onnxruntime")
    case = mixed("ragged", 3, mode="sum")
    session = session_with(case, str(emulated_library()), when)
    indices = case.inputs["indices_2"].copy()
    indices[900] = 17
    bad = {**case.inputs, "indices_2": indices}
    if when == "deferred":
        session.run(None, bad)
    with pytest.raises(Exception, match=r"EmbeddingBagCollection: table 2: indices\[900\] = 17 is outside \[0, 17\)"):
        session.run(None, case.inputs if when == "deferred" else bad)
    case.check(session.run(None, case.inputs)[0], slack=4)
