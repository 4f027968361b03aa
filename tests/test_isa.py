"""Every instruction set of the native library gives the same bits, at any number of threads, and a forced one runs."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lucid_onnx.ops.embedding_bag import cases, spec
from lucid_testing.kernels import (
    KNOWN_ISAS,
    all_isas,
    arguments,
    call,
    isas,
    large_cases,
    library,
    library_path,
    need,
    needs_library,
    pool,
)
from lucid_testing.processes import run_script

CASES = cases.all_cases()


@needs_library
def test_the_mirror_has_the_size_that_the_library_expects() -> None:
    case = cases.make("sum", mode="sum")
    output = np.zeros(case.expected().shape, np.float32)
    assert call(arguments(case, output)) == (0, "")
    assert call(arguments(case, output, size_bytes=128)) == (1, "size_bytes = 128 is not 184")


@needs_library
def test_the_list_of_instruction_sets() -> None:
    native = library()
    machine = platform.machine().lower()
    expected = {"x86_64": ["baseline", "avx2", "avx512"], "amd64": ["baseline", "avx2", "avx512"]}
    expected |= {"aarch64": ["baseline", "neon"], "arm64": ["baseline", "neon"]}
    assert all_isas() == expected.get(machine, ["baseline"])
    assert isas()[0] == "baseline"
    for i in (-1, -(2**31), native.lucid_isa_count(), 2**31 - 1):
        assert native.lucid_isa_name(i) is None
        assert native.lucid_isa_supported(i) == 0
        assert native.lucid_isa_runs(i) == 0


@needs_library
@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="this system has no /proc/cpuinfo to compare with")
def test_the_supported_ones_are_those_that_the_system_lists() -> None:
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    if found is None:
        pytest.skip("/proc/cpuinfo lists no flags")
    flags = set(found[1].split())
    needed = {
        "baseline": set(),
        "avx2": {"avx2", "f16c"},
        "avx512": {"avx2", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "neon": {"asimd"},
    }
    assert isas() == [name for name in all_isas() if needed[name] <= flags]


@needs_library
@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_every_case_is_right(isa: str) -> None:
    need(isa)
    for case in CASES.values():
        case.check(pool(case, isa))


@needs_library
@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_bits_are_those_of_the_baseline(isa: str) -> None:
    need(isa)
    for case in CASES.values():
        expected = pool(case, "baseline").tobytes()
        for threads in (1, 2, 8):
            assert pool(case, isa, threads).tobytes() == expected, f"{case.name} with {threads} threads"


@needs_library
def test_bits_of_large_cases_do_not_depend_on_isa_or_threads() -> None:
    for case in large_cases():
        expected = pool(case, "baseline")
        case.check(expected)
        for isa in isas():
            for threads in (1, 2, 8):
                got = pool(case, isa, threads)
                assert got.tobytes() == expected.tobytes(), f"{case.name} on {isa} with {threads} threads"


@needs_library
def test_a_bag_has_the_same_bits_whatever_stands_beside_it() -> None:
    random = np.random.RandomState(21)
    weight = random.standard_normal((100, 33)).astype(np.float32)
    bag = random.randint(0, 100, 5000)
    alone = cases.Case("alone", weight, bag, np.array([0]), None, spec.Attributes("sum"))
    among = cases.Case(
        "among",
        weight,
        np.concatenate([random.randint(0, 100, 37), bag, random.randint(0, 100, 9000)]),
        np.array([0, 37, 5037, 5037, 5040]),
        None,
        spec.Attributes("sum"),
    )
    expected = pool(alone)[0].tobytes()
    for isa in isas():
        for threads in (1, 2, 8):
            assert pool(among, isa, threads)[1].tobytes() == expected, f"{isa} with {threads} threads"


@needs_library
@pytest.mark.parametrize("isa", KNOWN_ISAS)
def test_misaligned_pointers(isa: str) -> None:
    need(isa)
    everything = {"mode": "sum", "weighted": True, "padding_idx": -2, "max_norm": 1.1}
    for case in (
        *(cases.make(f"all {t}", dtype=t, dim=67, **everything) for t in ("float32", "float16", "bfloat16", "float64")),
        cases.make("ends", layout="ends", mode="max", dtype="float64"),
        cases.make("rows", layout="rows", mode="mean", index_dtype="int32"),
    ):
        expected = pool(case, isa).tobytes()
        for shift in (1, 3, 49):
            moved = {}
            for name, array in case.inputs.items():
                memory = np.zeros(array.nbytes + shift, np.uint8)
                memory[shift:] = np.frombuffer(array.tobytes(), np.uint8)
                moved[name] = memory[shift:]
            output = np.zeros(len(expected) + shift, np.uint8)
            args = arguments(case, output[shift:], **{name: array.ctypes.data for name, array in moved.items()})
            assert call(args, isa) == (0, "")
            assert output[shift:].tobytes() == expected, f"{case.name} at byte {shift}"


_FORCED = """
import ctypes, sys
import numpy as np
import lucid_onnx
native = ctypes.CDLL(lucid_onnx.get_library_path())
native.lucid_isa_name.restype = native.lucid_isa_active.restype = ctypes.c_char_p
native.lucid_isa_runs.restype = ctypes.c_int64
runs = lambda: {native.lucid_isa_name(i).decode(): native.lucid_isa_runs(i) for i in range(native.lucid_isa_count())}
before = runs()
session = lucid_onnx.InferenceSession(lucid_onnx.build_model(np.eye(4, dtype=np.float32), mode="sum"))
for _ in range(3):
    got, = session.run(None, {"indices": np.array([0, 1, 3]), "offsets": np.array([0, 2])})
    assert got.tolist() == [[1, 1, 0, 0], [0, 0, 0, 1]], got
after = runs()
print(native.lucid_isa_active().decode(), *(f"{name}={after[name] - before[name]}" for name in after))
"""


def _python(script: str, folder: Path, isa: str | None) -> subprocess.CompletedProcess[str]:
    """Run a script with an instruction set forced, or none."""
    environment = {k: v for k, v in os.environ.items() if k != "LUCID_FORCE_ISA"}
    if isa is not None:
        environment["LUCID_FORCE_ISA"] = isa
    return run_script(script, folder, environment=environment)


@needs_library
@pytest.mark.parametrize("isa", [*KNOWN_ISAS, "", None])
def test_a_session_runs_the_forced_one_and_no_other(isa: str | None, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    if isa:
        need(isa)
    chosen = isa or isas()[-1]  # without a wish, and with an empty one, the best
    done = _python(_FORCED, tmp_path, isa)
    assert done.returncode == 0, done.stderr
    expected = [f"{name}={3 if name == chosen else 0}" for name in all_isas()]
    assert done.stdout.split() == [chosen, *expected]


_REFUSED = """
import numpy as np
import lucid_onnx, onnxruntime
calls = (
    lambda: lucid_onnx.register(onnxruntime.SessionOptions()),
    lambda: lucid_onnx.InferenceSession(lucid_onnx.build_model(np.eye(4, dtype=np.float32))),
    lambda: lucid_onnx.embedding_bag([0], np.eye(4, dtype=np.float32), [0]),
)
for call in calls:
    try:
        call()
    except Exception as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
    else:
        print("nothing was raised")
try:
    print(lucid_onnx.embedding_bag([1], np.eye(2, dtype=np.float32), [0], native=False).tolist())
except Exception as error:
    print(type(error).__name__, error)
"""


@needs_library
@pytest.mark.parametrize("isa", [*KNOWN_ISAS, "AVX2", "sse9", "avx2 ", "x" * 4000, "%s%s%n"])
def test_what_cannot_be_forced_is_refused(isa: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    if isa in isas():
        pytest.skip(f"{isa} runs here")
    able = ", ".join(isas())
    if isa in all_isas():
        text = f"LUCID_FORCE_ISA: this CPU does not support {isa}; it supports: {able}"
    else:
        text = f'LUCID_FORCE_ISA: unknown instruction set "{isa[:40]}"; this CPU supports: {able}'
    done = _python(_REFUSED, tmp_path, isa)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines[:3]:
        assert line.startswith(f"RuntimeError {library_path()}: ")
        assert line.endswith(text)
    assert lines[3] == "[[0.0, 1.0]]"  # what needs no library is not concerned


@needs_library
def test_the_c_interface_refuses_unknown_names_too() -> None:
    case = cases.make("sum", mode="sum")
    output = np.full(case.expected().shape, 5, np.float32)
    able = ", ".join(isas())
    for isa in ("", "sse9", "Baseline"):
        text = f'unknown instruction set "{isa}"; this CPU supports: {able}'
        assert call(arguments(case, output), isa) == (1, text)
    for threads in (0, -1):
        text = f"num_threads = {threads} must be >= 1"
        assert call(arguments(case, output), threads=threads) == (1, text)
    assert (output == 5).all()
