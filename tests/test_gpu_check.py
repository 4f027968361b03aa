"""tools/gpu_check.py, rehearsed: with the emulated kernels, a driver of the host's memory, and small sizes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lucid_testing import scripts
from lucid_testing.cuda import emulated_library

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def library() -> str:
    path = emulated_library()
    if path is None:
        pytest.skip("there is no C++ compiler to build the emulated kernels with")
    return path


@pytest.fixture(scope="module")
def check() -> Any:
    return scripts.load(ROOT / "tools" / "gpu_check.py")


def rehearse(out: Path, library: str, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """The exit code, what was printed, and the results."""
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--emulate", "--library", library]
    command += ["--out", str(out), "--table-bytes", "2000000", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert (out / "results.json").exists(), done.stdout + done.stderr
    return done.returncode, done.stdout, json.loads((out / "results.json").read_text())


def test_the_parts_run_and_tell(library: str, tmp_path: Path) -> None:
    parts = ["machine", "graphs", "bags", "others"]
    code, printed, results = rehearse(tmp_path, library, "--parts", ",".join(parts))
    states = {name: part["state"] for name, part in results["parts"].items()}
    assert states == dict.fromkeys(parts, "done"), printed
    assert code == 0
    assert list(results["parts"]) == parts
    found = {name: part["results"] for name, part in results["parts"].items()}
    assert found["machine"][0]["name"] == "emulated"
    assert [one["bad"] for one in found["graphs"][:2]] == ["", "indices[900] = 1000 is outside [0, 1000)"]
    measured = found["bags"][1:]
    assert {one["dtype"] for one in measured} == {"float32", "float16", "bfloat16", "int8", "int4"}
    assert {16, 50, 67, 1024} <= {one["dim"] for one in measured}
    assert results["summary"]["of_gather"]["of"] >= 10
    assert [one["what"] for one in found["others"]] == ["collection"] * 2 + ["dense gradient"] * 3
    page = (tmp_path / "report.md").read_text()
    assert "A rehearsal in emulation" in page
    assert all(f"## {name}" in page for name in parts)


def test_no_part_ends_the_others(library: str, tmp_path: Path) -> None:
    """One is stopped at its limit, another lacks what it needs, and no time is left for the last."""
    code, printed, results = rehearse(tmp_path, library, "--parts", "cases,memcheck", "--limit", "2")
    assert code == 1
    states = [part["state"] for part in results["parts"].values()]
    assert states[0] == "stopped after 2 s", printed
    assert states[1] != "not run: no time was left"
    code, printed, results = rehearse(tmp_path, library, "--parts", "cases,machine", "--minutes", "0.02")
    assert code == 1
    assert results["parts"]["machine"]["state"] == "not run: no time was left", printed
    assert "| machine | not run: no time was left |" in (tmp_path / "report.md").read_text()


def test_a_failing_part_says_why(check: Any, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = check.Setting(tmp_path, True, library, 1 << 20)

    def fails(_: Any) -> Any:
        yield {"first": 1}
        raise RuntimeError("other numbers")

    def skips(_: Any) -> Any:
        yield {"first": 2}
        raise check.SkippedError("there is none")

    monkeypatch.setattr(check, "_RUN", {"a": fails, "b": skips})
    assert check.run_part("a", setting) == 1
    assert (tmp_path / "a.jsonl").read_text() == '{"first": 1}\n{"error": "RuntimeError: other numbers"}\n'
    assert check.run_part("b", setting) == 3
    assert (tmp_path / "b.jsonl").read_text().endswith('{"skipped": "there is none"}\n')
    assert check._parsed('{"half') == {"cut_off": '{"half'}


def test_the_page_has_the_means(check: Any) -> None:
    bags = [
        {"dim": 64, "dtype": "float32", "length": 20, "of_gather": 0.9},
        {"dim": 64, "dtype": "float32", "length": 20, "of_gather": 0.4},
        {"dim": 64, "dtype": "float32", "length": 5, "of_gather": 0.1},  # too short
        {"dim": 64, "dtype": "float16", "length": 20, "of_gather": 0.1},  # rows of 128 bytes
        {"dim": 50, "dtype": "float32", "length": 20},
    ]
    parts = {
        "bags": {"state": "done", "seconds": 1.0, "results": bags},
        "torch": {"state": "done", "seconds": 1.0, "results": [{"times_torch": 2.0}, {"times_torch": 8.0}]},
    }
    found = check.summary(parts)
    assert found["of_gather"] == {"geometric_mean": pytest.approx(0.6), "least": 0.4, "of": 2, "aim": 0.85}
    assert found["times_torch"]["geometric_mean"] == pytest.approx(4.0)
    page = check.report({"emulated": False, "parts": parts, "summary": found})
    assert "of_gather: 0.60 in geometric mean, 0.40 at least, of 2 (aim 0.85)" in page
    assert "rehearsal" not in page


def test_all_parts_fit_into_ten_minutes(check: Any) -> None:
    assert set(check.PARTS) == set(check._RUN)
    assert sum(check.PARTS.values()) <= 600


def test_the_ceilings_kernel_assembles(tmp_path: Path) -> None:
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        pytest.skip("there is no ptxas")
    for arch in ("sm_75", "sm_90"):
        command = [ptxas, f"-arch={arch}", str(ROOT / "tools" / "gather.ptx"), "-o", str(tmp_path / "gather.cubin")]
        assert subprocess.run(command, timeout=60, check=False).returncode == 0
