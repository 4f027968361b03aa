"""fuzz/soak.py: what its requests answer, and that it finds what grows and what is wrong."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import lucid_onnx
from lucid_testing import scripts
from lucid_testing.kernels import needs_library

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

pytestmark = [
    needs_library,
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="no /proc to read the memory from"),
]
MIB = 2**20


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    folder = Path(__file__).resolve().parent.parent / "fuzz"
    sys.path.insert(0, str(folder))  # for the sessions of fuzz/sessions.py
    try:
        return scripts.load(folder / "soak.py")
    finally:
        sys.path.remove(str(folder))


def readings(count: int = 100, **series: Any) -> list[dict[str, Any]]:
    """A reading every 10 s, of a process whose memory goes up and down by 4 MiB."""
    r = np.random.RandomState(0)
    memory = 400 * MIB + r.randint(-4 * MIB, 4 * MIB, count)
    found: dict[str, Any] = {
        "live": memory / 2,
        "anonymous": memory,
        "pss": memory + 70 * MIB,
        "fds": 9,
        "threads": 180,
        "copies": 2,
    }
    found |= {name: found[name] + np.asarray(extra) for name, extra in series.items()}
    values = {name: np.broadcast_to(value, count) for name, value in found.items()}
    return [{"seconds": 10.0 * k, **{name: int(value[k]) for name, value in values.items()}} for k in range(count)]


RAMP = np.linspace(0, 1, 100)


@pytest.mark.parametrize(
    ("series", "words"),
    [
        ({}, []),
        ({"anonymous": 200 * MIB * np.minimum(1, 5 * RAMP)}, []),  # all of it in the first quarter
        ({"fds": [0, 3, 5, 1] * 25, "threads": [9, 0, 0, 0] * 25}, []),  # which come and go
        ({"anonymous": 20 * MIB * RAMP}, []),  # the allocator's
        ({"anonymous": 60 * MIB * RAMP}, ["anonymous grew by 4"]),
        ({"live": 60 * MIB * RAMP}, ["live grew by 4"]),
        ({"pss": 60 * MIB * RAMP}, ["pss grew by 4"]),
        ({"anonymous": 60 * MIB * (RAMP > 0.6)}, ["anonymous grew by"]),
        ({"fds": np.arange(100) // 20}, ["fds grew from at most"]),
        ({"threads": 4 * (RAMP > 0.6), "copies": RAMP > 0.6}, ["threads grew", "copies grew from at most 2 to at l"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_grows_is_told(soak: ModuleType, series: dict[str, Any], words: list[str]) -> None:
    found = soak.complaints(readings(**series))
    assert len(found) == len(words), found
    for complaint, part in zip(found, words, strict=True):
        assert part in complaint


def test_too_few_readings_prove_nothing(soak: ModuleType) -> None:
    assert soak.complaints(readings(6)) == ["too few readings to see anything grow"]


@pytest.fixture(scope="module")
def served(soak: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return soak.Soak(0, tmp_path_factory.mktemp("soak"), plans=4)


def test_every_kind_of_request_is_answered(soak: ModuleType, served: Any) -> None:
    r = np.random.RandomState(0)
    for kind in soak.KINDS:
        for _ in range(3):
            assert served.answer(kind, r) is None, kind
    assert sorted(file.name for file in served.folder.iterdir()) == ["big.onnx", "big.onnx.data"]


def test_every_kind_of_request_looks_at_its_answer(
    soak: ModuleType, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lucid_onnx.InferenceSession.run

    def off(self: Any, names: Any, feeds: Any) -> Any:
        try:
            return [array + 1000 if array.size else np.zeros(3) for array in run(self, names, feeds)]
        except Exception:
            return [np.zeros((1, 1), np.float32)]

    monkeypatch.setattr(lucid_onnx.InferenceSession, "run", off)
    for kind in soak.KINDS:
        r = np.random.RandomState(1)
        assert any(served.answer(kind, r) is not None for _ in range(4)), kind


def test_a_leak_is_found(soak: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "KINDS", {"large": 1, "limit": 1})

    def found() -> list[str]:
        _, wrong = soak.run(seconds=3, every=0.1, threads=2, plans=0, warm=0)
        return [complaint.split(" ")[0] for complaint in wrong]

    assert found() == []
    request = soak.Soak.request
    memory: list[Any] = []

    def leaks(self: Any, thread: int, number: int) -> None:
        request(self, thread, number)
        memory.append(np.ones(2**18, np.uint8))  # a quarter of a MiB

    monkeypatch.setattr(soak.Soak, "request", leaks)
    assert found() == [*(["live"] if soak.live_bytes() else []), "anonymous", "pss"]
    memory.clear()

    with contextlib.ExitStack() as files:

        def keeps_files(self: Any, thread: int, number: int) -> None:
            request(self, thread, number)
            if number % 20 == 0:
                files.enter_context(Path("/dev/null").open())

        monkeypatch.setattr(soak.Soak, "request", keeps_files)
        assert found() == ["fds"]
