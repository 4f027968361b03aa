"""The conformance suite for authors of runtimes: its cases, the pytest plugin, and ONNX's backend runner."""

from __future__ import annotations

import importlib.resources
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lucid_onnx import pytest_plugin
from lucid_onnx.parity import suite
from lucid_testing.models import bags_of_a_user

ROOT = Path(__file__).resolve().parent.parent


def test_a_case_of_the_suite_checks() -> None:
    case = suite.case("sum_ragged_float32")
    assert all(o.domain == "" for o in case.model.opset_import)
    assert case.dtypes == {"float32", "int64"}
    case.check(case.expected)
    case.check(case.expected[0])
    case.check({"output": case.expected[0]})
    with pytest.raises(AssertionError, match=r"sum_ragged_float32 \(standard\): output\[0, 0\] = \S+, expected"):
        case.check(case.expected[0] + 1)
    with pytest.raises(AssertionError, match="output has dtype float64, expected float32"):
        case.check(case.expected[0].astype(np.float64))
    assert len(suite.suite("*")) == len(suite.names())
    with pytest.raises(ValueError, match="has no form 'given'"):
        suite.case("sum_ragged_float32", "given")


#: What docs/authors.md tells them to write: the fixture's example, and the one for ONNX's runner.
FIXTURE, RUNNER = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "authors.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, str]]:
    """A virtual environment with this package in it as it is installed, and a project of a runtime's author."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder = tmp_path_factory.mktemp("author")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=120)
    interpreter = folder / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([interpreter, "-c", query], capture_output=True, text=True, check=True).stdout.strip())
    source = importlib.resources.files("lucid_onnx")
    shutil.copytree(str(source), site / "lucid_onnx", ignore=shutil.ignore_patterns("__pycache__"))
    toml = (ROOT / "pyproject.toml").read_text()
    points = re.search(r"\[project.entry-points.pytest11\]\n((?:.+\n)+)", toml)
    assert points
    info = site / "lucid_onnx-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lucid-onnx\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[pytest11]\n" + points[1].replace('"', ""))
    # What it depends on is where it is for these tests.
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in paths))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    environment["PYTHON"] = str(interpreter)
    project = folder / "project"
    project.mkdir()
    (project / "test_mine.py").write_text(FIXTURE)
    return project, environment


def author(installed: tuple[Path, Mapping[str, str]], *arguments: str) -> str:
    project, environment = installed
    done = subprocess.run(
        [environment["PYTHON"], "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=project,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.stdout + done.stderr


def test_three_lines_of_an_author_run(installed: tuple[Path, Mapping[str, str]]) -> None:
    """And fail over a wrong runtime, and are nothing to who does not use them."""
    (installed[0] / "test_wrong.py").write_text(
        "def test_wrong(parity):\n    parity.check([e * 1.5 for e in parity.expected])\n"
    )
    (installed[0] / "test_other.py").write_text(
        "import sys\nimport pytest\n\nEARLY = {'numpy', 'onnx', 'lucid_onnx.parity'} & set(sys.modules)\n\n"
        "@pytest.fixture(params=[1, 2])\ndef parity(request):\n    return request.param\n\n"
        "def test_own_fixture(parity):\n    assert parity in (1, 2)\n    assert not EARLY\n"
    )
    forms = ("--lucid-parity-form", "portable", "--lucid-parity-form", "standard")
    # What does not use the fixture comes first: it must find nothing imported.
    files = ("test_other.py", "test_mine.py", "test_wrong.py")
    output = author(installed, "-v", "--lucid-parity-cases", "sum_dim_?", *forms, *files)
    assert "test_mine.py::test_my_runtime[sum_dim_7-portable] PASSED" in output, output
    assert "test_mine.py::test_my_runtime[sum_dim_7-standard] PASSED" in output
    assert "sum_dim_1 (standard): output[0, 0] = " in output
    assert "test_wrong.py::test_wrong[sum_dim_1-portable] FAILED" in output
    assert "4 failed, 6 passed" in output


def test_an_authors_model_runs(installed: tuple[Path, Mapping[str, str]]) -> None:
    onnx.save(bags_of_a_user(), installed[0] / "two.onnx")
    output = author(installed, "-v", "--lucid-parity", "two.onnx", "test_mine.py")
    assert "test_my_runtime[two-inputs2-standard] PASSED" in output, output
    assert "3 passed" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--lucid-parity": ["none.onnx"]}, "--lucid-parity none.onnx: no such file"),
        ({"--lucid-parity-cases": "none*"}, r"--lucid-parity-cases none\*: no case matches"),
    ],
)
def test_what_the_plugin_refuses(options: Mapping[str, Any], message: str) -> None:
    given = {"--lucid-parity": [], "--lucid-parity-cases": "*", "--lucid-parity-form": None, **options}
    metafunc = types.SimpleNamespace(
        fixturenames=["lucid_parity_case"], config=types.SimpleNamespace(getoption=given.__getitem__)
    )
    with pytest.raises(pytest.UsageError, match=message):
        pytest_plugin.pytest_generate_tests(metafunc)  # type: ignore[arg-type]


def test_onnxs_runner_of_an_author_runs(installed: tuple[Path, Mapping[str, str]]) -> None:
    names = ("sum_dim_7", "sum_dim_7_expanded", "max_nan_inf_expanded", "int4_bias_max_ragged_float32")
    for name in names:
        target = installed[0] / "models" / "conformance" / name
        shutil.copytree(ROOT / "models" / "conformance" / name, target)
    wrong = installed[0] / "models" / "conformance" / "sum_dim_1"
    shutil.copytree(ROOT / "models" / "conformance" / "sum_dim_1", wrong)
    (wrong / "test_data_set_0" / "output_0.pb").write_bytes(
        onnx.numpy_helper.from_array(np.zeros((3, 1), np.float32)).SerializeToString()
    )
    (installed[0] / "test_backend.py").write_text(RUNNER)
    output = author(installed, "-v", "test_backend.py")
    for name in names:
        assert re.search(rf"test_backend.py::\w+::test_lucid_{name}_cpu PASSED", output), output
    assert re.search(r"test_lucid_sum_dim_1_cpu FAILED", output), output
    assert re.search(r"1 failed, 4 passed, 5 skipped", output), output  # those for CUDA
