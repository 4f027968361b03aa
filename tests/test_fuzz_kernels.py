"""fuzz/kernels.cc: a short run, and that it finds a fault of each kind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lucid_testing import kernels, scripts

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [kernels.needs_library, pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer needs Linux")]


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """fuzz/kernels.py, which is not installed."""
    return scripts.load(ROOT / "fuzz" / "kernels.py")


@pytest.fixture(scope="module")
def program(fuzz: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if fuzz.compiler() is None:
        pytest.skip("no C++ compiler")
    built = fuzz.build(tmp_path_factory.mktemp("fuzz"))
    assert isinstance(built, Path)
    return built


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = kernels.library_path()
    assert path is not None
    return subprocess.run([str(program), *arguments, path], capture_output=True, text=True, timeout=300)


def test_a_short_run(program: Path) -> None:
    done = run(program, "--cases", "20000", "--jobs", "2", "--limit", "60")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("20000 cases of seed 0 from 0 on in ")
    assert line.endswith("; 0 failed")
    for kind, least in (("embedding_bag", 9000), ("collection", 3000), ("gradient", 6000), ("bad calls", 1000)):
        found = re.search(rf"(\d+) {kind}[,;]", line)
        assert found is not None, line
        assert int(found[1]) > least
    # What the contract leaves open must not be where the numbers are.
    found = re.search(r"(\d+) numbers, (\d+) of them left open", line)
    assert found is not None, line
    assert int(found[2]) < int(found[1]) / 100


#: Faults that stand between the kernels and the fuzzer, and what it says of them.
PLANTS = {
    "number": r"output\[0\] = \S+, expected \[",
    "last_bit": r"differs from that of baseline",
    "threads": r"(differs from that of baseline|expected) .*3 threads\)",
    "nan": r"is a NaN with other bits",
    "unwritten": r"output\[\d+\] = \S+, expected ",
    "write_behind": r"a write beside an output",
    "write_before": r"(a write beside an output|byte -1 of the output)",
    "write_input": r"Segmentation fault at \S+: byte 0 of indices",
    "read_behind": r"Segmentation fault at \S+: byte (\d+) of indices, which has \1 bytes",
    "read_before": r"Segmentation fault at \S+: byte -1 of indices",
    "accepts": r"status 0, not 1",
    "rejects": r"status 1, not 0",
    "message": r"the message 'indices\[.*' has no 'indices\[",
    "touches": r"a rejected call wrote to its output",
    "entries": r"\d+ entries, not \d+",
    "hangs": r"it takes too long",
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_found(program: Path, plant: str) -> None:
    if plant == "last_bit" and len(kernels.isas()) < 2:
        pytest.skip("one instruction set has none to be compared with")
    options = ("--plant", plant, "--limit", "1" if plant == "hangs" else "60")
    done = run(program, "--cases", "2000", *options)
    assert done.returncode == 1, done.stdout
    assert re.search(rf"^case \d+: .*{PLANTS[plant]}", done.stderr), done.stderr
    assert "\ntable: weight [" in done.stderr
    # The line that runs the case again does that, and finds the same.
    again = re.search(r"^again: (--seed 0 --first \d+ --cases 1)$", done.stderr, re.MULTILINE)
    assert again is not None, done.stderr
    alone = run(program, *again[1].split(), *options)
    assert alone.returncode == 1
    assert without_addresses(alone.stderr) == without_addresses(done.stderr)


def without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", text)


def test_every_plant_has_a_test(program: Path) -> None:
    done = run(program, "--help")
    assert done.returncode == 0
    listed = re.search(r"--plant KIND .*: none (.*)", done.stdout)
    assert listed is not None
    # Only ThreadSanitizer sees a race: nox -s tsan.
    assert set(listed[1].split()) == {*PLANTS, "race"}


@pytest.mark.parametrize("arguments", [("--cases",), ("--cases", "x"), ("--jobs", "0"), ("--nothing", "1"), ("one",)])
def test_wrong_arguments(program: Path, arguments: tuple[str, ...]) -> None:
    done = run(program, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
