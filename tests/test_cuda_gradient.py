"""The gradient on CUDA: right, with the CPU's bits, the same in every run, and safe against any offset and index.

As in test_cuda.py, every test of the kernels runs emulated on the host, where a sort of the C++ library stands in for
CUB's, and again on a GPU where there is one.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from lucid_onnx.ops.embedding_bag import cases as bags
from lucid_onnx.ops.embedding_bag_grad import cases, spec
from lucid_onnx.ops.embedding_bag_grad.cases import Case
from lucid_testing.cuda import Changing, Emulated, GradPlan, emulated_library, grad_args, run_gradient, session_with
from lucid_testing.hostile import MAX64, MIN64, bad_indices, bad_offsets, contents_in_turn
from lucid_testing.kernels import as_a_model_says_it, bits, gradient, needs_library

pytestmark = needs_library  # the CPU's kernel is what these are held against

CASES = cases.all_cases()


def powers(case: Case) -> bool:
    """Whether norms are sums of powers, whose last bits are the library's of the GPU."""
    a = case.attributes
    return a.max_norm is not None and a.norm_type not in (1.0, 2.0, np.inf)


def make(name: str, *, sparse: bool, by_frequency: bool = False, grad_dim: int | None = None, **arguments: Any) -> Case:
    """A case of `bags.make` with a gradient."""
    bag = bags.make(name, **arguments)
    random = np.random.RandomState(5)
    count = len(bag.indices) if bag.offsets is None else len(bag.offsets) - bag.attributes.include_last_offset
    grad = random.standard_normal((count, bag.weight.shape[1])).astype(bag.weight.dtype)
    attributes = spec.Attributes(**dataclasses.asdict(bag.attributes), scale_grad_by_freq=by_frequency)
    return Case(name, grad, bag.weight, bag.indices, bag.offsets, bag.per_sample_weights, attributes, sparse)


def skewed(dtype: str, mode: str, dim: int, *, sparse: bool, by_frequency: bool) -> Case:
    """Rows that no, one, 63 to 65, and thousands of positions look up; bags from empty to long."""
    random = np.random.RandomState(9)
    lengths = np.array([0, 1, 63, 64, 65, 2, 700, 0, 1500, 1025, 3] + [5] * 60)
    random.shuffle(lengths)
    count = int(lengths.sum())
    times = [63, 64, 65, 128, 1, 1023, 1024, 1025]
    indices = np.concatenate([np.full(n, 3 * r) for r, n in enumerate(times)])[:count]
    indices = np.concatenate([indices, random.randint(30, 90, count - len(indices))])
    random.shuffle(indices)
    weights = random.standard_normal(count) if mode == "sum" else None
    table = bags.spec.BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    return Case(
        f"skewed {dtype} {mode} {dim} {sparse}",
        random.standard_normal((len(lengths), dim)).astype(table),
        random.standard_normal((91, dim)).astype(table),
        indices,
        np.concatenate([[0], np.cumsum(lengths)[:-1]]),
        None if weights is None else weights.astype(table),
        spec.Attributes(mode, padding_idx=30 if by_frequency else None, scale_grad_by_freq=by_frequency),
        sparse,
    )


# ---- Right.


def test_every_case(device: Any) -> None:
    equal = 0
    for case in CASES.values():
        code, message, got = run_gradient(device, case)
        assert (code, message) == (0, ""), case.name
        case.check(*got)
        if not powers(case):
            equal += 1
            assert bits(got) == bits(gradient(case)), case.name
    assert equal > len(CASES) * 3 // 4


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_rows_of_many_positions(device: Any, dtype: str, mode: str) -> None:
    """Around the ends of chunks and pieces, in every width that a row is read in."""
    for turn, dim in enumerate({"float64": (1, 4)}.get(dtype, (1, 2, 8))):
        for sparse in (False, True):
            case = skewed(dtype, mode, dim, sparse=sparse, by_frequency=(turn + sparse) % 2 == 0)
            code, message, got = run_gradient(device, case)
            assert (code, message) == (0, "")
            assert bits(got) == bits(gradient(case)), case.name


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_tables_of_many_more_rows_than_positions(
    device: Any, emulated: Emulated, dtype: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the rows that occur are summed: some once, some in several chunks and pieces, and padded ones not at all."""
    rows = 8000
    for turn, dim in enumerate((1, 2, 6, 8)):
        case = make(
            f"many rows {dtype} {mode} {dim}", sparse=False, by_frequency=turn % 2 == 1, dtype=dtype, mode=mode,
            dim=dim, rows=rows, lengths=[1500, 0, 700, 1, 64, 65], weighted=mode == "sum", padding_idx=3,
        )  # fmt: skip
        random = np.random.RandomState(turn)
        hot = random.choice([3, 0, rows - 1, 17, 18], len(case.indices), p=[0.1, 0.03, 0.1, 0.7, 0.07])
        once = random.rand(len(hot)) < 0.2
        hot[once] = random.permutation(rows)[: once.sum()]
        case = dataclasses.replace(case, indices=hot)
        plan = GradPlan()
        message = ctypes.create_string_buffer(256)
        args = grad_args(case, dict.fromkeys((*case.inputs, *case.op.outputs), 4096))
        assert emulated.native.lucid_cuda_plan_grad(ctypes.byref(args), ctypes.byref(plan), message, 256) == 0
        assert plan.row_bags == len(hot)
        monkeypatch.setenv("LUCID_EMULATE_ORDER", str(turn))
        code, text, got = run_gradient(device, case)
        assert (code, text) == (0, "")
        assert bits(got) == bits(gradient(case)), case.name


def test_columns_of_several_blocks(device: Any) -> None:
    for dtype, mode in (("float32", "sum"), ("float16", "mean"), ("float64", "max")):
        case = make(f"wide {dtype}", sparse=False, dtype=dtype, mode=mode, dim=300, rows=3, lengths=[3, 70, 0, 1])
        assert bits(run_gradient(device, case)[2]) == bits(gradient(case))


def test_every_position_counts_once(device: Any) -> None:
    """Sums of distinct whole numbers are exact in any order, so one lost, doubled or misplaced position shows."""
    random = np.random.RandomState(5)
    for turn in range(6):
        lengths = random.choice([0, 1, 5, 64, 700], 40)
        count = int(lengths.sum())
        rows = int(random.choice([1, 7, 5000]))
        indices = random.randint(0, rows, count)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        case = make("positions", sparse=turn % 2 == 1, mode="sum", layout="ends", dtype="float64", dim=2, rows=rows)
        grad = np.stack([np.arange(1.0, 41.0), -np.arange(1.0, 41.0)], axis=1)
        case = dataclasses.replace(case, grad_output=grad, indices=indices, offsets=ends, weight=np.zeros((rows, 2)))
        code, message, got = run_gradient(device, case)
        assert (code, message) == (0, "")
        if case.sparse:
            np.testing.assert_array_equal(got[0], indices)
            np.testing.assert_array_equal(got[1], np.repeat(grad, lengths, axis=0))
        else:
            expected = np.zeros((rows, 2))
            np.add.at(expected, indices, np.repeat(grad, lengths, axis=0))
            np.testing.assert_array_equal(got[0], expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_shapes_without_positions_or_columns(device: Any, sparse: bool) -> None:
    for arguments in (
        {"lengths": (), "layout": "ragged"},
        {"lengths": (0, 0), "layout": "ends"},
        {"lengths": (0, 0), "layout": "rows"},
        {"lengths": (), "layout": "rows", "length": 3},
        {"dim": 0, "layout": "ends", "slack": 2, "padding_idx": 3},
        {"dim": 0, "layout": "rows", "lengths": (2, 2)},
        {"layout": "ends", "slack": 5},
        {"layout": "ends", "slack": 5, "padding_idx": -2},
    ):
        for mode in ("sum", "mean", "max"):
            for by_frequency in (False, True):
                case = make(
                    str(arguments), sparse=sparse, by_frequency=by_frequency, mode=mode, weighted=mode == "sum",
                    **arguments,
                )  # fmt: skip
                code, message, got = run_gradient(device, case)
                assert (code, message) == (0, ""), arguments
                assert bits(got) == bits(gradient(case)), (arguments, mode)


def test_wherever_the_arrays_lie(device: Any) -> None:
    for dtype, dim in (("float32", 8), ("float16", 16), ("bfloat16", 9), ("float64", 4)):
        case = make(f"at {dtype}", sparse=False, dtype=dtype, mode="sum", dim=dim, rows=9, weighted=True, max_norm=1.0)
        size = case.weight.itemsize
        for sparse in (False, True):
            placed = dataclasses.replace(case, sparse=sparse)
            expected = bits(gradient(placed))
            for grad, weight, out in ((0, size, 0), (size, 0, 0), (0, 0, size), (2 * size, size, 3 * size)):
                where = {"grad_output": grad, "weight": weight, "grad_weight": out, "values": out, "indices": 8}
                where |= {"rows": 8, "per_sample_weights": size, "grad_per_sample_weights": size, "offsets": 8}
                assert bits(run_gradient(device, placed, shift=where)[2]) == expected, where


# ---- The same every time.


def test_the_same_bits_in_every_run(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, sparse in (("sum", False), ("mean", False), ("max", True)):
        case = skewed("float32", mode, 4, sparse=sparse, by_frequency=mode == "mean")
        expected = bits(run_gradient(device, case)[2])
        for turn in range(1, 4 if device.name == "emulated" else 21):
            monkeypatch.setenv("LUCID_EMULATE_ORDER", str(turn))  # of blocks and warps
            assert bits(run_gradient(device, case, fill=turn)[2]) == expected


# ---- Safe.


def _hostile() -> Iterator[tuple[Case, str]]:
    base = make("hostile", sparse=False, mode="sum", rows=10, dim=2, lengths=[5, 0, 70, 1, 300, 3], weighted=True)
    count = len(base.indices)
    values = (-1, 10, MIN64, MAX64, 2**32, 2**32 + 3, -(2**32))
    for indices, text in bad_indices(base.indices, 10, values, (0, 5, 74, count - 1)):
        yield dataclasses.replace(base, indices=indices), text
    indices = np.full(count, 10)
    yield dataclasses.replace(base, indices=indices), "indices[0] = 10 is outside [0, 10)"
    assert base.offsets is not None
    for offsets, text in bad_offsets(base.offsets, count):
        yield dataclasses.replace(base, offsets=offsets, indices=indices), text
    yield dataclasses.replace(base, offsets=np.arange(6)[::-1].copy() * 100), "offsets[0] = 500 must be 0"


def test_hostile_values_are_refused_and_touch_nothing(
    device: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LUCID_EMULATE_ORDER", "3")
    for turn, (case, text) in enumerate(_hostile()):
        mode = ("sum", "mean", "max")[turn % 3]
        attributes = dataclasses.replace(
            case.attributes, mode=mode, padding_idx=3 if turn % 2 else None, max_norm=1.0 if turn % 5 else None,
            scale_grad_by_freq=turn % 4 == 0,
        )  # fmt: skip
        weights = case.per_sample_weights if mode == "sum" else None
        case = dataclasses.replace(case, attributes=attributes, per_sample_weights=weights)
        for sparse in (False, True):
            assert run_gradient(device, dataclasses.replace(case, sparse=sparse))[:2] == (1, text)
    good = make("good", sparse=False, mode="sum")
    good.check(*run_gradient(device, good)[2])


def test_the_lowest_of_many_is_named_every_time(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("many", sparse=False, mode="mean", rows=10, dim=4, lengths=[100] * 9)
    case.indices[777::13] = -5
    for turn in range(5):
        monkeypatch.setenv("LUCID_EMULATE_ORDER", str(turn))
        assert run_gradient(device, case)[:2] == (1, "indices[777] = -5 is outside [0, 10)")


@pytest.mark.parametrize("mode", ["sum", "max"])
@pytest.mark.parametrize("sparse", [False, True])
def test_inputs_that_change_during_a_run_touch_nothing(emulated: Emulated, sparse: bool, mode: str) -> None:
    """Whatever another thread makes of them: fences and AddressSanitizer see what else is touched."""
    lengths = [1, 0, 63, 64, 700, 3, 1100, 0, 5]
    case = make("changing", sparse=sparse, mode=mode, rows=40, dim=8, lengths=lengths, weighted=mode == "sum")
    assert case.offsets is not None
    count = len(case.indices)
    for contents in (
        contents_in_turn(case.indices, 40, ascending=False),
        contents_in_turn(case.offsets, count + 1, ascending=True),
    ):
        for _ in range(5):
            with Changing(str(emulated_library()), [contents]) as device:
                code, message, _ = run_gradient(device, case)
            assert code in (0, 1), message


def test_another_number_of_entries_is_refused(device: Any) -> None:
    case = make("entries", sparse=True, mode="sum", padding_idx=2, lengths=[9, 4], slack=3, layout="ends")
    count = len(gradient(case)[0])
    for entries in (0, count - 1, count + 1, 16):
        assert run_gradient(device, case, entries=entries)[:2] == (1, f"num_entries = {entries} is not {count}")
    for entries in (-1, 17):
        text = f"num_entries = {entries} is not in [0, N] for N = 16"
        assert run_gradient(device, case, entries=max(entries, 0), num_entries=entries)[:2] == (1, text)
    case = make("entries", sparse=True, mode="sum", lengths=[9, 4])
    assert run_gradient(device, case, entries=12)[:2] == (1, "num_entries = 12 is not 13")


# ---- The C interface and the plan, on the host.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sparse": 2}, "sparse = 2 is not 0 or 1"),
        ({"scale_grad_by_freq": -1}, "scale_grad_by_freq = -1 is not 0 or 1"),
        (
            {"dtype": 4, "scale_stride": 4, "scale": 256, "output_type": 0},
            "dtype = 4 is quantized: a quantized table has no",
        ),
        ({"grad_output_shape": (3, 5)}, "grad_output has shape [3, 5], expected [4, 5]"),
        ({"mode": 2, "grad_per_sample_weights": 256}, "grad_per_sample_weights needs mode 'sum'"),
        ({"mode": 4}, "mode = 4 is not 0 (sum), 1 (mean), 2 (max) or 3 (sqrtn)"),
        ({"row_stride": 64}, "row_stride = 64 must be 0 on a GPU"),
        ({"num_offsets": 2**31 + 1, "grad_output_shape": (2**31 + 1, 5)}, "the call is too large for one launch"),
        ({"indices_shape": (2**31, 0)}, "the call is too large for one launch"),
        ({"weight_shape": (2**32, 5)}, "the call is too large for one launch"),
        ({"grad_output": 258}, "grad_output is at 0x102, which is not a multiple of the size of its elements, 4 bytes"),
        ({"grad_weight": 257}, "grad_weight is at 0x101, which is not a multiple of the size of its elements, 4 bytes"),
        ({"indices": 260}, "indices is at 0x104, which is not a multiple of the size of its elements, 8 bytes"),
    ],
)
def test_the_c_interface_refuses(emulated: Emulated, overrides: dict[str, Any], message: str) -> None:
    args = grad_args(make("host", sparse=False, mode="sum"), dict.fromkeys(("weight", "grad_output", "grad_weight")))
    for name, value in overrides.items():
        where = args if name in {f[0] for f in GradPlanArgs} else args.forward
        setattr(where, name, (ctypes.c_int64 * 2)(*value) if isinstance(value, tuple) else value)
    plan, text = GradPlan(), ctypes.create_string_buffer(256)
    assert emulated.native.lucid_cuda_plan_grad(ctypes.byref(args), ctypes.byref(plan), text, len(text)) == 1
    assert text.value.decode().startswith(message)


GradPlanArgs = type(grad_args(make("fields", sparse=False), {}))._fields_


def test_a_plan_sorts_only_what_must_be(emulated: Emulated) -> None:
    def planned(**arguments: Any) -> tuple[int, int, int]:
        case = make("plan", mode="sum", **arguments)
        args, plan, text = grad_args(case, {}), GradPlan(), ctypes.create_string_buffer(256)
        code = emulated.native.lucid_cuda_plan_grad(ctypes.byref(args), ctypes.byref(plan), text, len(text))
        assert (code, text.value) == (0, b"")
        return plan.num_entries, plan.row_sort, plan.entry_sort

    assert planned(sparse=False) == (9, 1, 0)
    assert planned(sparse=True) == (9, 0, 0)
    assert planned(sparse=True, by_frequency=True) == (9, 1, 0)
    assert planned(sparse=True, padding_idx=1) == (-1, 0, 1)
    assert planned(sparse=True, padding_idx=1, by_frequency=True) == (-1, 1, 1)
    assert planned(sparse=True, layout="ends") == (-1, 0, 1)
    assert planned(sparse=True, layout="rows", lengths=(2, 2)) == (4, 0, 0)
    assert planned(sparse=True, padding_idx=1, lengths=()) == (0, 0, 0)


# ---- The adapter, emulated as a library of the CPU's provider.


def test_the_adapter_runs_every_case(emulated: Emulated) -> None:
    path = str(emulated_library())
    for case in CASES.values():
        got = session_with(case, path).run(None, case.inputs)
        case.check(*got)
        expected = run_gradient(emulated, as_a_model_says_it(case))[2]
        assert bits(map(np.asarray, got)) == bits(expected), case.name


def _refusals(session: Any, feeds: Iterable[dict[str, np.ndarray]]) -> list[str]:
    """The error message of each run, empty without one."""
    found = []
    for feed in feeds:
        try:
            session.run(None, feed)
            found.append("")
        except Exception as error:
            found.append(str(error).rsplit("Grad: ", 1)[1].strip())
    return found


@pytest.mark.parametrize("sparse", [False, True])
def test_the_adapter_reports(emulated: Emulated, sparse: bool) -> None:
    case = make("reported", sparse=sparse, mode="sum", padding_idx=1, lengths=[3, 70])
    bad = dict(case.inputs, indices=np.where(np.arange(73) == 40, 10, case.indices))
    text = "indices[40] = 10 is outside [0, 10)"
    feeds = [case.inputs, bad, case.inputs, case.inputs]
    session = session_with(case, str(emulated_library()), "report")
    assert _refusals(session, feeds) == ["", text, "", ""]
    case.check(*session.run(None, case.inputs))
    session = session_with(case, str(emulated_library()), "deferred")
    assert _refusals(session, feeds) == ["", "", text, ""]
    case.check(*session.run(None, case.inputs))
    # The number of entries is asked for, and what the offsets refuse with it.
    assert _refusals(
        session_with(case, str(emulated_library()), "report"), [dict(case.inputs, offsets=np.array([0, -1]))]
    )[0].startswith("offsets[1] = -1 is below")
