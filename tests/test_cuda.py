"""The CUDA kernels: right, with the CPU's bits, deterministic, and safe against any offset and index.

Every test of the kernels runs emulated on the host, and again on a GPU where there is one.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lucid_onnx
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops.embedding_bag import cases, spec
from lucid_onnx.ops.quantized_embedding_bag import cases as quantized
from lucid_testing.cuda import (
    CASES,
    Changing,
    Emulated,
    Machine,
    Plan,
    emulated_library,
    gpu_library,
    host_arguments,
    installed,
    load,
    result_dtype,
    run,
    session_with,
    why_no_gpu,
)
from lucid_testing.hostile import (
    BAD_STRUCTS,
    MAX64,
    MIN64,
    SLACK,
    bad_indices,
    bad_offsets,
    contents_in_turn,
    garbage_cases,
)
from lucid_testing.kernels import call, large_cases, needs_library, num_bags
from lucid_testing.processes import run_script
from lucid_testing.quantized import check_class, not_finite


def on_cpu(case: Any) -> tuple[int, str, np.ndarray]:
    """The code, text and result of the CPU's kernel."""
    codes = case.codes if isinstance(case, quantized.Case) else None
    dim = case.weight.shape[1] if codes is None else case.table.shape[1]
    output = np.zeros((max(num_bags(case), 0), dim), result_dtype(case))
    args = host_arguments(case, output)
    if codes is not None:
        args.weight = codes.ctypes.data
    return *call(args), output


def same_bits(case: Any) -> bool:
    """Whether cuda.h promises the CPU's bits."""
    a = case.attributes
    powers = a.max_norm is not None and a.norm_type not in (1.0, 2.0, np.inf)
    skips = a.padding_idx is not None or a.negative == "skip"
    return not powers and (not skips or a.mode == "max")


def ragged(name: str, lengths: list[int], **arguments: Any) -> cases.Case:
    return cases.make(name, lengths=lengths, **arguments)


#: Around the ends of chunks and pieces.
LENGTHS = [1, 0, 63, 64, 65, 0, 127, 128, 129, 1, 1023, 1024, 1025, 2, 2049, 0, 0, 5000, 1]


def test_there_is_a_gpu() -> None:
    """Skipped is what this says: that the kernels ran emulated only."""
    why = why_no_gpu()
    if why is not None:
        pytest.skip(why)


# ---- Right.


@needs_library
def test_every_case(device: Any) -> None:
    equal = 0
    for case in CASES.values():
        code, message, got = run(device, case)
        assert (code, message) == (0, ""), case.name
        case.check(got)
        if same_bits(case):
            equal += 1
            assert got.tobytes() == on_cpu(case)[2].tobytes(), case.name
    assert equal > len(CASES) // 2


@needs_library
@pytest.mark.parametrize("dim", [1, 4, 20, 32, 67])
@pytest.mark.parametrize("mode", spec.MODES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_bags_around_the_ends_of_chunks(device: Any, dtype: str, mode: str, dim: int) -> None:
    case = ragged(
        f"{dtype} {mode} {dim}", LENGTHS, dtype=dtype, mode=mode, dim=dim, rows=50, weighted=mode == "sum" and dim > 4
    )
    code, message, got = run(device, case)
    assert (code, message) == (0, "")
    case.check(got, slack=SLACK)
    assert got.tobytes() == on_cpu(case)[2].tobytes()


@needs_library
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_weights_of_bags_around_the_ends_of_chunks_and_pieces(device: Any, dtype: str) -> None:
    """Their sums have the CPU's order of additions, piece by piece; skipped ones are in none of them."""
    for mode, dim in (("mean", 1), ("sqrtn", 20)):
        given: dict[str, Any] = {"dtype": dtype, "mode": mode, "dim": dim, "rows": 50, "weighted": True}
        case = ragged(f"weights {mode} {dtype}", LENGTHS, divisor="weights", **given)
        code, message, got = run(device, case)
        assert (code, message) == (0, "")
        case.check(got, slack=SLACK)
        assert got.tobytes() == on_cpu(case)[2].tobytes()
        case = ragged(f"skipped {mode} {dtype}", LENGTHS, divisor="weights", negative="skip", **given)
        code, message, got = run(device, case)
        assert (code, message) == (0, "")
        case.check(got, slack=SLACK)


@needs_library
@pytest.mark.parametrize("kind", ["int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize("dim", [3, 8, 32])
def test_quantised_bags_around_the_ends_of_chunks(device: Any, kind: str, dim: int) -> None:
    for second, mode, dtype in (
        ("bias", "sum", "float16"),
        ("zero_point", "max", "float32"),
        (None, "mean", "float32"),
    ):
        case = quantized.make(f"{kind} {second}", kind, second, dtype, mode=mode, dim=dim, rows=50, lengths=LENGTHS)
        code, message, got = run(device, case)
        assert (code, message) == (0, "")
        case.check(got, slack=SLACK)
        assert got.tobytes() == on_cpu(case)[2].tobytes(), case.name


@needs_library
@pytest.mark.parametrize("kind", ["int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize("second", [None, "zero_point", "bias"])
def test_quantised_numbers_that_are_not_finite(device: Any, second: str | None, kind: str) -> None:
    for dtype in ("float32", "float16"):
        case = not_finite(kind, second, dtype, dim=9)
        code, message, got = run(device, case)
        assert (code, message) == (0, "")
        check_class(case, got)
        assert got.tobytes() == on_cpu(case)[2].tobytes(), case.name


def test_padded_positions_in_long_bags(device: Any) -> None:
    """Here the order of additions is not the CPU's, so only the value is held."""
    for mode in spec.MODES:
        case = ragged(f"padded {mode}", LENGTHS, mode=mode, dim=8, rows=7, padding_idx=3)
        code, message, got = run(device, case)
        assert (code, message) == (0, "")
        case.check(got, slack=SLACK)


@needs_library
def test_large_cases(device: Any) -> None:
    for case in large_cases():
        if device.name == "emulated" and (case.weight.shape[1] > 1 or case.weight.dtype != np.float32):
            continue  # seconds each, and the tests above have the other types and widths
        code, message, got = run(device, case)
        assert (code, message) == (0, "")
        case.check(got)


def test_every_position_counts_once(device: Any) -> None:
    """Sums of distinct whole numbers are exact in any order, so one lost, doubled or misplaced row shows."""
    random = np.random.RandomState(5)
    for seed in range(12):
        lengths = np.concatenate([random.randint(0, 200, 30), random.choice([0, 64, 1024, 3000, 70], 6)])
        random.shuffle(lengths)
        count = int(lengths.sum())
        weight = np.arange(1, count + 1, dtype=np.float64)[:, None] * [[1.0, -3.0]]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        indices = random.permutation(count)
        last = seed % 2 == 0
        case = cases.Case(
            f"positions {seed}",
            weight,
            indices,
            ends if last else ends[:-1],
            None,
            spec.Attributes("sum", include_last_offset=last),
        )
        code, message, got = run(device, case)
        assert (code, message) == (0, "")
        expected = np.add.reduceat(np.append(indices + 1.0, 0.0), np.minimum(ends[:-1], count)) * (lengths > 0)
        np.testing.assert_array_equal(got, expected[:, None] * [[1.0, -3.0]])


@pytest.mark.parametrize(
    ("bags", "length", "dim"),
    [(1, 20000, 2), (3000, 1, 4), (2, 65, 3), (5, 1024, 1), (1, 64, 300), (0, 7, 3), (7, 0, 3)],
)
def test_rows_of_indices(device: Any, bags: int, length: int, dim: int) -> None:
    for mode in spec.MODES:
        case = cases.make(
            f"{bags}x{length}", mode=mode, layout="rows", lengths=(length,) * bags, length=length, dim=dim, rows=40
        )
        code, message, got = run(device, case)
        assert (code, message) == (0, "")
        case.check(got, slack=SLACK)


@needs_library
def test_wherever_the_arrays_lie(device: Any) -> None:
    """Every width that a row can be read in, by addresses and by sizes of rows."""
    for dtype, dim in (("float32", 8), ("float16", 16), ("bfloat16", 9), ("float64", 4)):
        case = ragged(f"at {dtype}", LENGTHS[:9], dtype=dtype, mode="sum", dim=dim, rows=9, weighted=True)
        size = case.weight.itemsize
        expected = on_cpu(case)[2].tobytes()
        for weight, output in ((0, 0), (size, 0), (0, size), (2 * size, 3 * size)):
            where = {"weight": weight, "output": output, "per_sample_weights": size, "indices": 8, "offsets": 8}
            code, message, got = run(device, case, shift=where)
            assert (code, message) == (0, "")
            assert got.tobytes() == expected, where
    case = quantized.make("at", "uint8", "bias", "float16", mode="sum", dim=32, rows=9, lengths=[3, 70, 1])
    for weight in (0, 1, 2, 4, 8):
        assert (
            run(device, case, shift={"weight": weight, "output": 2 * weight})[2].tobytes() == on_cpu(case)[2].tobytes()
        )


@needs_library
@pytest.mark.parametrize(
    ("dtype", "dim", "width"),
    [
        ("float32", 12, 16), ("float32", 50, 8), ("float32", 7, 4), ("float16", 24, 16), ("float16", 20, 8),
        ("float16", 6, 4), ("float16", 3, 2), ("bfloat16", 12, 8), ("float64", 2, 16), ("float64", 3, 8),
        ("int8", 32, 16), ("uint8", 40, 8), ("int8", 12, 4), ("uint8", 6, 1), ("int4", 16, 8), ("uint4", 12, 2),
        ("int4", 5, 1),
    ],
)  # fmt: skip
def test_every_width_that_a_row_is_read_in(device: Any, emulated: Emulated, dtype: str, dim: int, width: int) -> None:
    case: Any
    if "int" in dtype:
        case = quantized.make("width", dtype, "bias", "float32", mode="sum", dim=dim, rows=9, lengths=[3, 70, 1])
    else:
        case = ragged("width", [3, 70, 1], dtype=dtype, mode="sum", dim=dim, rows=9, weighted=True)
    args = host_arguments(case)
    args.weight, args.output = 256, 256
    assert planned(emulated.native, args)[2].vector_bytes == width
    code, message, got = run(device, case)
    assert (code, message) == (0, "")
    assert got.tobytes() == on_cpu(case)[2].tobytes()


# ---- The same every time.


def _skewed(dtype: str = "float32") -> cases.Case:
    random = np.random.RandomState(6)
    lengths = [int(x) for x in random.zipf(1.3, 300).clip(0, 9000)]
    return ragged("skewed", lengths, dtype=dtype, mode="sum", dim=4, rows=1000)


def test_the_same_bits_in_every_run(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in ("float32", "float64"):
        case = _skewed(dtype)
        code, message, expected = run(device, case)
        assert (code, message) == (0, "")
        case.check(expected, slack=SLACK)
        for turn in range(1, 5 if device.name == "emulated" else 21):
            monkeypatch.setenv("LUCID_EMULATE_ORDER", str(turn))  # of blocks and warps
            assert run(device, case, fill=turn)[2].tobytes() == expected.tobytes()


# ---- Safe.


def test_garbage(device: Any) -> None:
    for case, refusal in garbage_cases(range(3000, 3150)):
        code, message, got = run(device, case)
        if refusal is None:
            assert (code, message) == (0, ""), case.name
            case.check(got, slack=SLACK)
        else:
            assert (code, message) == (1, refusal), case.name


def _hostile() -> Iterator[tuple[cases.Case, str]]:
    base = ragged("hostile", [5, 0, 70, 1, 1100, 3], mode="sum", rows=10)
    count = len(base.indices)
    values = (-1, 10, 11, MIN64, MAX64, 2**32, 2**32 + 3, -(2**32))
    for indices, text in bad_indices(base.indices, 10, values, (0, 1, 5, 68, 74, 76, 1100, count - 1)):
        yield dataclasses.replace(base, indices=indices), text
    indices = np.full(count, 10)
    yield dataclasses.replace(base, indices=indices), "indices[0] = 10 is outside [0, 10)"
    assert base.offsets is not None
    for offsets, text in bad_offsets(base.offsets, count):
        yield dataclasses.replace(base, offsets=offsets, indices=indices), text  # both wrong: offsets come first
    falling = np.arange(6)[::-1].copy() * 100
    yield dataclasses.replace(base, offsets=falling), "offsets[0] = 500 must be 0"


def test_hostile_values_are_refused_and_touch_nothing(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUCID_EMULATE_ORDER", "3")
    for case, text in _hostile():
        assert run(device, case)[:2] == (1, text)
        narrow = all(abs(int(v)) < 2**31 for a in (case.indices, case.offsets) for v in a)  # type: ignore[union-attr]
        if narrow:
            as_int32 = {n: getattr(case, n).astype(np.int32) for n in ("indices", "offsets")}
            assert run(device, dataclasses.replace(case, **as_int32))[:2] == (1, text)
    good = ragged("good", [5, 70], mode="sum")
    good.check(run(device, good)[2])


def test_the_lowest_of_many_is_named_every_time(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ragged("many", [100] * 60, mode="mean", rows=10, dim=4)
    indices = case.indices.copy()
    indices[777::13] = -5
    case = dataclasses.replace(case, indices=indices)
    for turn in range(10):
        monkeypatch.setenv("LUCID_EMULATE_ORDER", str(turn))
        assert run(device, case)[:2] == (1, "indices[777] = -5 is outside [0, 10)")


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_inputs_that_change_during_a_run_touch_nothing(emulated: Emulated, mode: str) -> None:
    """Whatever another thread makes of them: fences and AddressSanitizer see what else is touched."""
    case = ragged(f"changing {mode}", LENGTHS, mode=mode, dim=8, rows=40, weighted=mode == "sum", max_norm=1.0)
    assert case.offsets is not None
    count = len(case.indices)
    for contents in (
        contents_in_turn(case.indices, 40, ascending=False),
        contents_in_turn(case.offsets, count + 1, ascending=True),
    ):
        for _ in range(5):
            with Changing(str(emulated_library()), [contents]) as device:
                code, message, _ = run(device, case)
            assert code in (0, 1), message


def test_two_dimensional_indices_are_named_by_row_and_column(device: Any) -> None:
    case = cases.make("rows", mode="sum", layout="rows", lengths=(70,) * 4, length=70, rows=10)
    case.indices[2, 66] = 10
    assert run(device, case)[:2] == (1, "indices[2, 66] = 10 is outside [0, 10)")


# ---- The C interface and the plan, on the host.


def planned(native: ctypes.CDLL, args: Any) -> tuple[int, str, Plan]:
    plan = Plan()
    message = ctypes.create_string_buffer(256)
    code = native.lucid_cuda_plan(ctypes.byref(args), ctypes.byref(plan), message, len(message))
    return code, message.value.decode(), plan


@pytest.mark.parametrize(("overrides", "message"), [row for row in BAD_STRUCTS if row[1] is not None])
def test_the_c_interface_refuses_what_the_cpus_does(
    emulated: Emulated, overrides: dict[str, Any], message: str
) -> None:
    case = cases.make("weights", mode="sum", weighted=True)
    assert run(emulated, case, **overrides)[:2] == (1, message)


@pytest.mark.parametrize(
    ("name", "shift", "size"),
    [("weight", 2, 4), ("indices", 4, 8), ("offsets", 4, 8), ("per_sample_weights", 1, 4), ("output", 2, 4)],
)
def test_misaligned_elements_are_refused(emulated: Emulated, name: str, shift: int, size: int) -> None:
    case = cases.make("weights", mode="sum", weighted=True)
    code, message, _ = run(emulated, case, shift={name: shift})
    assert code == 1
    assert message.startswith(f"{name} is at 0x")
    assert message.endswith(f"which is not a multiple of the size of its elements, {size} bytes")


@pytest.mark.parametrize(
    "overrides",
    [
        {"indices_shape": (2**40, 2**40), "indices_rank": 2},
        {"weight_shape": (10, 2**50)},
        {"weight_shape": (2**32, 5)},
        {"num_offsets": 2**48},
        {"indices_shape": (2**46, 0)},
    ],
)
def test_what_no_launch_can_hold_is_refused(emulated: Emulated, overrides: dict[str, Any]) -> None:
    args = host_arguments(cases.make("sum", mode="sum"))
    for name, value in overrides.items():
        setattr(args, name, type(getattr(args, name))(*value) if isinstance(value, tuple) else value)
    assert planned(emulated.native, args)[:2] == (1, "the call is too large for one launch on a GPU")


def test_scratch_that_does_not_suffice_is_refused(emulated: Emulated) -> None:
    case = ragged("long", [100], mode="sum")
    args = host_arguments(case, np.zeros((1, 5), np.float32))
    plan = planned(emulated.native, args)[2]
    message = ctypes.create_string_buffer(256)
    scratch = emulated.allocate(plan.scratch_bytes)

    def launch(where: int | None, size: int, error: int | None) -> tuple[int, str]:
        native = emulated.native
        code = native.lucid_cuda_embedding_bag(ctypes.byref(args), where, size, error, None, message, len(message))
        return code, message.value.decode()

    at, size, error = emulated.address(scratch), plan.scratch_bytes, emulated.address(emulated.allocate(56))
    assert launch(at, size - 1, error) == (
        1,
        f"scratch_bytes = {size - 1} is less than the {size} that the plan asks for",
    )
    assert launch(at + 8, size, error)[1].endswith("which is not a multiple of 256")
    assert launch(at, size, None)[1].startswith("error is at")
    assert launch(at, size, error + 4)[1].endswith("which is not a multiple of 8")


def test_a_plan_covers_every_vector_of_every_chunk_once(emulated: Emulated) -> None:
    random = np.random.RandomState(8)
    for _ in range(60):
        dtype = str(random.choice(["float32", "float16", "bfloat16", "float64"]))
        dim = int(random.choice([1, 2, 3, 8, 64, 100, 256, 300, 1024, 3000]))
        bags, length = int(random.choice([1, 2, 100, 700])), int(random.choice([0, 1, 20, 64, 65, 300]))
        two_d = random.rand() < 0.5
        args = host_arguments(
            cases.make("plan", dtype=dtype, dim=dim, mode="sum", layout="rows" if two_d else "ragged")
        )
        args.weight = 256 + int(random.choice([0, 8, 16]))
        args.output = 256
        args.indices_shape = (bags, length) if two_d else (bags * length, 0)
        args.num_offsets = 0 if two_d else bags
        code, message, p = planned(emulated.native, args)
        assert (code, message) == (0, "")
        size = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}[dtype]
        assert p.vectors * p.vector_bytes == dim * size
        assert p.vector_elements * size == p.vector_bytes
        assert args.weight % p.vector_bytes == 0
        assert p.chunks == (bags * max(1, -(-length // 64)) if two_d else bags * length // 64 + bags)
        # Chunk and vector of every thread, as the kernel finds them.
        block, thread = np.divmod(np.arange(p.blocks * p.block_threads, dtype=np.int64), p.block_threads)
        in_block = thread // p.block_vectors
        chunk = block // p.column_blocks * p.block_chunks + in_block
        vector = block % p.column_blocks * p.block_vectors + thread - in_block * p.block_vectors
        used = (in_block < p.block_chunks) & (chunk < p.chunks) & (vector < p.vectors)
        number = np.sort(chunk[used] * p.vectors + vector[used])
        np.testing.assert_array_equal(number, np.arange(p.chunks * p.vectors))
        assert p.block_threads % 32 == 0
        assert p.block_threads <= 256
        if length * (1 if two_d else bags) <= 64:
            assert p.scratch_bytes == p.zeroed_bytes == 0  # one launch
        else:
            places = [0, p.counts_at, p.piece_counts_at, p.partials_at, p.scratch_bytes]
            assert places == sorted(places)
            assert not [x for x in places if x % 256]


def test_the_other_chunks_of_bags_fit(emulated: Emulated) -> None:
    """Any offsets: number B + e belongs to the last bag with offsets[i] // 64 <= e, and every chunk has one."""
    random = np.random.RandomState(9)
    for _ in range(200):
        lengths = random.choice([0, 1, 30, 63, 64, 65, 128, 129, 1000], random.randint(1, 50))
        ends = np.concatenate([[0], np.cumsum(lengths)])
        owners = np.searchsorted(ends[:-1] // 64, np.arange(ends[-1] // 64), side="right") - 1
        others = np.bincount(owners, minlength=len(lengths))
        assert (others >= np.maximum(0, -(-lengths // 64) - 1)).all()
        # Rows of scratch memory, of chunks and of pieces with their bag, are of one long bag each.
        begin, chunks = ends[:-1], -(-lengths // 64)
        pieces = -(-chunks // 16)
        many = lengths > 64
        rows = [b // 32 + k for b, c in zip(begin[many], chunks[many], strict=True) for k in range(c)]
        assert len(rows) == len(set(rows))
        assert max(rows, default=0) < ends[-1] // 32 + 2
        rows = [b // 64 + k for b, p in zip(begin[many], pieces[many], strict=True) for k in range(p + (p > 1))]
        assert len(rows) == len(set(rows))
        assert max(rows, default=0) < ends[-1] // 64 + 2


# ---- The adapter, emulated as a library of the CPU's provider.


def _answer(session: Any, inputs: dict[str, np.ndarray]) -> np.ndarray | str:
    """The result, or the message of the error."""
    try:
        return session.run(None, inputs)[0]  # type: ignore[no-any-return]
    except Exception as error:
        return str(error).split("EmbeddingBag: ", 1)[1].strip()


def test_the_adapter_runs_every_case(emulated: Emulated) -> None:
    pytest.importorskip("onnxruntime")
    path = str(emulated_library())
    for case in list(CASES.values())[::4]:
        got = session_with(case, path).run(None, case.inputs)[0]
        case.check(got)


def test_the_adapter_reports_in_the_same_run(emulated: Emulated) -> None:
    pytest.importorskip("onnxruntime")
    case = ragged("reported", [3, 70, 1100], mode="sum")
    session = session_with(case, str(emulated_library()), "report")
    bad = dict(case.inputs, indices=np.where(np.arange(1173) == 900, 10, case.indices))
    assert _answer(session, bad) == "indices[900] = 10 is outside [0, 10)"
    case.check(_answer(session, case.inputs))  # type: ignore[arg-type]
    assert _answer(session, dict(case.inputs, offsets=np.array([0, 9, 4]))) == (
        "offsets[2] = 4 is below offsets[1] = 9: offsets must not decrease"
    )
    case.check(_answer(session, case.inputs))  # type: ignore[arg-type]


def test_the_adapter_reports_in_the_next_run_if_deferred(emulated: Emulated) -> None:
    pytest.importorskip("onnxruntime")
    case = ragged("deferred", [3, 70], mode="sum")
    session = session_with(case, str(emulated_library()), "deferred")
    bad = dict(case.inputs, indices=np.where(np.arange(73) == 40, -1, case.indices))
    assert isinstance(_answer(session, bad), np.ndarray)
    assert _answer(session, case.inputs) == "indices[40] = -1 is outside [0, 10)"
    case.check(_answer(session, case.inputs))  # type: ignore[arg-type]


def test_another_way_to_check_is_refused(emulated: Emulated) -> None:
    pytest.importorskip("onnxruntime")
    case = cases.make("sum", mode="sum")
    with pytest.raises(Exception, match=r"lucid\.bounds_check = never is not report, deferred or run"):
        session_with(case, str(emulated_library()), "never")


# ---- What a machine may do to it: see Machine.


def _with_bad_index(case: cases.Case, at: int = 40, value: int = -1) -> dict[str, np.ndarray]:
    return dict(case.inputs, indices=np.where(np.arange(len(case.indices)) == at, value, case.indices))


def test_what_no_run_reports_can_be_asked_for(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after replays of a CUDA graph, which run no node."""
    ort = pytest.importorskip("onnxruntime")
    case = ragged("asked", [3, 70], mode="sum")
    with installed(monkeypatch):
        sessions = []
        for _ in range(2):
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.add_session_config_entry("lucid.bounds_check", "deferred")
            lucid_onnx.register(options, provider="cuda")
            sessions.append(lucid_onnx.InferenceSession(case_model(case, "native"), options))
        session, other = sessions
        for run_it in (session, other):
            run_it.run(None, case.inputs)
            run_it.check_bounds()
        session.run(None, _with_bad_index(case))
        other.check_bounds()  # it is not this one's
        with pytest.raises(Exception, match=r"^EmbeddingBag: indices\[40\] = -1 is outside \[0, 10\)$") as raised:
            session.check_bounds()
        assert type(raised.value).__name__ == "InvalidArgument"
        session.check_bounds()  # forgotten
        case.check(session.run(None, case.inputs)[0])
        # For other hosts: all sessions of the process.
        native, message = emulated.native, ctypes.create_string_buffer(256)
        native.lucid_cuda_check_bounds.argtypes = (ctypes.c_int64, ctypes.c_char_p, ctypes.c_size_t)
        other.run(None, _with_bad_index(case, 41))
        assert native.lucid_cuda_check_bounds(0, message, len(message)) == 1
        assert message.value == b"EmbeddingBag: indices[41] = -1 is outside [0, 10)"
        assert native.lucid_cuda_check_bounds(0, message, len(message)) == 0
    lucid_onnx.InferenceSession(case_model(case, "native")).check_bounds()  # of the CPU: there is nothing to ask


def _two_bags(case: cases.Case) -> Any:
    """A model whose two nodes have indices of their own, ``indices`` and ``indices_2``."""
    model = case_model(case, "native")
    node = model.graph.node[0]
    second = model.graph.node.add()
    second.CopyFrom(node)
    second.name = "second"
    output = model.graph.output.add()
    output.CopyFrom(model.graph.output[0])
    second.output[0] = output.name = "second"
    indices = model.graph.input.add()
    indices.CopyFrom(next(i for i in model.graph.input if i.name == "indices"))
    indices.name = "indices_2"
    second.input[list(second.input).index("indices")] = "indices_2"
    return model


def test_a_session_asks_once_a_run(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its nodes do not wait for the device."""
    ort = pytest.importorskip("onnxruntime")
    case = ragged("once", [3, 70], mode="sum")
    good = {**case.inputs, "indices_2": case.indices}
    bad = {**good, "indices_2": _with_bad_index(case)["indices"]}
    expected = r"^EmbeddingBag: indices\[40\] = -1 is outside \[0, 10\)$"
    with installed(monkeypatch) as machine:
        session = lucid_onnx.InferenceSession(_two_bags(case))
        before = machine["waits"]
        for _ in range(3):
            for got in session.run(None, good):
                case.check(got)
        assert machine["waits"] == before
        binding = session.io_binding()
        for name, array in bad.items():
            binding.bind_cpu_input(name, array)
        for name in ("y", "second"):
            binding.bind_output(session.get_outputs()[name == "second"].name)
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in bad.items()}
        for run_it in (
            lambda: session.run(None, bad),
            lambda: session.run_with_iobinding(binding),
            lambda: session.run_with_ort_values(None, values),
        ):
            with pytest.raises(Exception, match=expected):
                run_it()
            for got in session.run(None, good):  # it was reported once
                case.check(got)
        done: list[tuple[Any, str]] = []
        finished = threading.Event()

        def callback(results: Any, _: Any, error: str) -> None:
            done.append((results, error))
            finished.set()

        session.run_async(None, bad, callback, None)
        assert finished.wait(60)
        assert re.match(expected, done[0][1])
        # A run that fails of something else leaves nothing for the next one.
        wrong = {**_with_bad_index(case), "indices_2": case.indices.astype(np.int64)[:, None]}
        with pytest.raises(Exception, match="indices_2"):
            session.run(None, wrong)
        session.run(None, good)


def test_every_thread_hears_of_its_own_runs(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread takes the stream next, before the first one has asked."""
    pytest.importorskip("onnxruntime")
    case = ragged("threads", [3, 70], mode="sum")
    with installed(monkeypatch):
        session = lucid_onnx.InferenceSession(case_model(case, "native"))
        raw = super(lucid_onnx.InferenceSession, session)
        raw.run(None, _with_bad_index(case))  # nobody has asked yet
        wrong: list[BaseException] = []

        def other() -> None:
            try:
                for _ in range(3):
                    case.check(session.run(None, case.inputs)[0])
            except BaseException as error:
                wrong.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert not wrong
        with pytest.raises(Exception, match=r"indices\[40\] = -1"):
            session.run(None, case.inputs)
        session.run(None, case.inputs)


def test_deferred_runs_keep_their_scratch_memory(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the provider would hand out to other streams while the kernels run: right results after growth."""
    pytest.importorskip("onnxruntime")
    with installed(monkeypatch):
        sizes = ([70, 3], [300, 70], [90, 1], [5000, 2], [70, 3])
        made = [ragged(f"kept {n}", list(n), mode="sum", rows=10, weighted=False) for n in sizes]
        session = lucid_onnx.InferenceSession(case_model(made[0], "native"))
        for case in (*made, *made):
            got = session.run(None, dict(case.inputs, weight=case.weight))[0]
            case.check(got, slack=SLACK)


def test_nothing_disturbs_a_recording(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is created, and runs that need more memory are done, while another thread records a CUDA graph."""
    pytest.importorskip("onnxruntime")
    case = ragged("recording", [3, 70], mode="sum")
    machine = Machine(emulated.native)
    machine["capturing"] = 1
    try:
        session = session_with(case, str(emulated_library()), "report")
        del session
        assert machine["invalidated"] == 0
        args = host_arguments(case, np.zeros((2, 5), np.float32))
        plan = planned(emulated.native, args)[2]
        assert plan.zeroed_bytes > 0
        # The default stream itself would disturb it, which is why no node uses it for its own memory.
        assert run(emulated, case)[0] != 0
        assert machine["invalidated"] == 1
    finally:
        machine["capturing"] = machine["invalidated"] = 0


def test_an_error_is_told_once(emulated: Emulated) -> None:
    """A failed allocation is not taken for an error of the next launch."""
    pytest.importorskip("onnxruntime")
    case = ragged("stale", [3, 70], mode="sum")
    machine = Machine(emulated.native)
    machine["failing_mallocs"] = 1
    with pytest.raises(Exception, match="CUDA, allocating on the device: out of memory"):
        session_with(case, str(emulated_library()))
    assert machine["failing_mallocs"] == 0
    code, message, got = run(emulated, case)
    assert (code, message) == (0, "")
    case.check(got)


def test_memory_lies_on_the_providers_device(emulated: Emulated) -> None:
    """Whatever device is current when a session is created, and it stays current."""
    pytest.importorskip("onnxruntime")
    case = ragged("device", [3, 70], mode="sum")
    machine = Machine(emulated.native)
    machine["devices"] = 2
    before = machine.choose_device(1)
    try:
        session = session_with(case, str(emulated_library()), "report")
        there = machine["other_devices"]
        assert there > 0
        bad = _with_bad_index(case)
        for _ in range(2):
            assert _answer(session, bad) == "indices[40] = -1 is outside [0, 10)"
            case.check(_answer(session, case.inputs))  # type: ignore[arg-type]
        assert machine["other_devices"] == there  # the provider's is device 0
        assert machine["device_switches"] == 2  # there and back
        assert machine.choose_device(0) == 1
    finally:
        machine.choose_device(before)
        machine["devices"] = 1
        machine["other_devices"] = machine["device_switches"] = 0


@pytest.mark.parametrize(
    ("numbers", "number", "why"),
    [
        ({}, 0, None),
        ({"devices": 2}, 1, None),
        ({"devices": 2}, 2, "device_id = 2 is outside [0, 2)"),
        ({"devices": 0}, 0, "the CUDA driver lists no device"),
        (
            {"kernel_images": 0},
            0,
            "no kernel image for this GPU: device 0 is of compute capability 7.0 (no kernel image is available)",
        ),
        (
            {"driver": 12040},
            0,
            "CUDA, counting devices: this library was built with CUDA 13.0, which needs driver 580 or later; the "
            "driver here is for CUDA 12.4",
        ),
        (
            {"driver": 11080, "toolkit": 12090},
            0,
            "CUDA, counting devices: this library was built with CUDA 12.9, which needs driver 525 or later; the "
            "driver here is for CUDA 11.8",
        ),
    ],
)
def test_a_machine_that_lacks_something_is_told_of_it(
    emulated: Emulated, numbers: dict[str, int], number: int, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lucid_onnx.runtime import library

    with installed(monkeypatch) as machine:
        for name, value in numbers.items():
            machine[name] = value
        assert library.why_no_cuda(number) == why
        # What failed is no error of the next call.
        assert run(emulated, ragged("after", [3, 70], mode="sum"))[0] == 0


def test_what_the_library_was_built_with_is_told(
    emulated: Emulated, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lucid_onnx.cli import show
    from lucid_onnx.runtime import installation, library

    with installed(monkeypatch):
        assert library.cuda_toolkit() == ("13.0", 580)
        monkeypatch.setattr(installation, "find_cuda_library", lambda: "there.so")
        found = installation.installation()
        assert found.cuda_library is not None
        assert found.cuda_library.toolkit == ("13.0", 580)
        show.show_installation(show.Console(width=200), found)
    assert "built with CUDA 13.0, which needs NVIDIA driver 580 or later" in capsys.readouterr().out


# ---- The library that is installed.


needs_cuda_library = pytest.mark.skipif(
    gpu_library() is None, reason="lucid_onnx was built without its CUDA library (no nvcc)"
)


@needs_cuda_library
def test_the_library_loads_without_a_gpu_and_says_so() -> None:
    native = load(str(gpu_library()))
    message = ctypes.create_string_buffer(256)
    count = native.lucid_cuda_device_count(message, len(message))
    assert (count == 0) == message.value.startswith(b"CUDA, counting devices: ")
    case = ragged("host", [3, 70], mode="sum")
    args = host_arguments(case, np.zeros((2, 5), np.float32))
    assert planned(native, args)[:2] == (0, "")
    args.mode = 7
    assert planned(native, args)[:2] == (1, "mode = 7 is not 0 (sum), 1 (mean), 2 (max) or 3 (sqrtn)")
    assert native.RegisterCustomOps


@needs_cuda_library
def test_a_cpu_session_with_both_sets_of_kernels() -> None:
    pytest.importorskip("onnxruntime")
    for name in ("sum_ragged_float32", "everything_rows_float16", "mean_ragged_bfloat16"):
        case = CASES[name]
        case.check(session_with(case, str(gpu_library())).run(None, case.inputs)[0])


_WITHOUT_GPU = """
import sys, numpy, lucid_onnx
try:
    lucid_onnx.embedding_bag([0], numpy.eye(2, dtype=numpy.float32), [0], provider="cuda")
except RuntimeError as error:
    print(error)
"""


def test_without_a_gpu_the_provider_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    if why_no_gpu() is None:
        pytest.skip("there is a GPU here")
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    done = run_script(_WITHOUT_GPU, tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("provider = 'cuda', but ")


def test_tensors_in_and_out_without_a_copy() -> None:
    torch = pytest.importorskip("torch", reason="torch, whose tensors these are, is not installed")
    ort = pytest.importorskip("onnxruntime")
    if not hasattr(ort.OrtValue, "from_dlpack"):
        pytest.skip(f"onnxruntime {ort.__version__} knows no DLPack")
    for name in ("sum_ragged_float32", "mean_ragged_bfloat16", "everything_rows_float64"):
        case = CASES[name]
        session = lucid_onnx.InferenceSession(case_model(case, "native"))
        bits = {n: a.view(np.uint16) if a.dtype == spec.BFLOAT16 else a for n, a in case.inputs.items()}
        tensors = {n: torch.from_numpy(np.array(a)) for n, a in bits.items()}
        for n in tensors:
            if case.inputs[n].dtype == spec.BFLOAT16:
                tensors[n] = tensors[n].view(torch.bfloat16)
        (value,) = session.run_dlpack(None, tensors)
        got = torch.from_dlpack(value)
        assert got.data_ptr() == value.data_ptr()
        case.check(got.view(torch.uint16).numpy().view(spec.BFLOAT16) if got.dtype == torch.bfloat16 else got.numpy())
    with pytest.raises(TypeError, match="input 'weight' is a list, which has no __dlpack__"):
        session.run_dlpack(None, {"weight": [1.0]})


def test_register_refuses_another_provider() -> None:
    ort = pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match="provider = 'tpu' is not one of 'cpu', 'cuda'"):
        lucid_onnx.register(ort.SessionOptions(), provider="tpu")


def test_a_session_that_cannot_have_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ort = pytest.importorskip("onnxruntime")
    from lucid_onnx.runtime import session

    monkeypatch.setattr(session, "why_no_cuda", lambda device=0: None if device == 3 else "the fans are off")
    with pytest.raises(RuntimeError, match="provider = 'cuda', but the fans are off"):
        lucid_onnx.register(ort.SessionOptions(), provider="cuda")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.warns(RuntimeWarning, match="the bags of this session run on the CPU: the fans are off"):
        assert session._provider([("CUDAExecutionProvider", {}), "CPUExecutionProvider"]) == "cpu"
    third = {"device_id": "3"}
    assert session._provider([("CUDAExecutionProvider", third)]) == "cuda"
    assert session._provider(["CPUExecutionProvider", "CUDAExecutionProvider"], [{}, third]) == "cuda"
    monkeypatch.setattr(session, "why_no_cuda", lambda device=0: None)
    assert session._provider(["CUDAExecutionProvider"]) == "cuda"
    assert session._provider(["CPUExecutionProvider"]) == "cpu"


def test_the_plugin_provider_is_rejected_by_name() -> None:
    pytest.importorskip("onnxruntime")
    case = cases.make("sum", mode="sum")
    for plugin in ("CudaPluginExecutionProvider", ("CudaPluginExecutionProvider", {})):
        with pytest.raises(ValueError, match=r"CudaPlugin\w+ is not supported.*use CUDAExecutionProvider"):
            lucid_onnx.InferenceSession(case_model(case, "native"), providers=[plugin, "CPUExecutionProvider"])


def test_a_plugin_provider_that_was_chosen_elsewhere_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    case = cases.make("sum", mode="sum")
    found = ["CudaPluginExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(lucid_onnx.InferenceSession, "get_providers", lambda self: found)
    with pytest.warns(RuntimeWarning, match="run on the CPU: lucid_onnx has no kernels for CudaPluginExecution"):
        lucid_onnx.InferenceSession(case_model(case, "native"))
