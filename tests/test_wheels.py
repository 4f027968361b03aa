"""tools/wheels.py: what its checks of a wheel find. Nothing is compiled here; ``nox -s wheels`` builds."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lucid_testing import elf, pages, scripts
from lucid_testing.kernels import library_path, needs_library

pytest.importorskip("tomllib", reason="tools/wheels.py needs Python 3.11")


@pytest.fixture(scope="module")
def wheels() -> Any:
    return scripts.load(pages.ROOT / "tools" / "wheels.py")


SOURCES = ["lucid_onnx/__init__.py", "ops/__init__.py", "README.md", "cpp_ops/c_api.h"]
TAG = "manylinux_2_17_x86_64"
INFO = "lucid_onnx-0.1.0.dist-info"


def write(wheels: Any, folder: Path, change: Callable[[dict[str, bytes]], None], **entry: Any) -> Path:
    """A wheel for Linux after ``change``, with a RECORD of what it has; ``entry`` is set for every file of the zip."""
    names = wheels.expected_files(wheels.PLATFORMS["linux-x86_64"], SOURCES, "0.1.0")
    content = {name: name.encode() for name in sorted(names)}
    content[f"{INFO}/WHEEL"] = f"Tag: py3-none-{TAG}\n".encode()
    rows = io.StringIO()
    for name, data in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record = name == f"{INFO}/RECORD"
        csv.writer(rows, lineterminator="\n").writerow(
            [name, "", ""] if record else [name, f"sha256={digest}", len(data)]
        )
    content[f"{INFO}/RECORD"] = rows.getvalue().encode()
    change(content)
    path = folder / f"lucid_onnx-0.1.0-py3-none-{TAG}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            info = zipfile.ZipInfo(name, time.gmtime(int(wheels.EPOCH))[:6])
            info.external_attr = 0o644 << 16
            for key, value in entry.items():
                setattr(info, key, value)
            archive.writestr(info, data)
    return path


def test_a_wheel_that_is_right(wheels: Any, tmp_path: Path) -> None:
    found = wheels.check_archive(write(wheels, tmp_path, lambda _: None), wheels.PLATFORMS["linux-x86_64"], SOURCES)
    assert set(found) >= {"lucid_onnx/__init__.py", "lucid_onnx/ops/__init__.py", "lucid_onnx/lib/liblucid_onnx_ops.so"}
    assert not [name for name in found if "README" in name or "cpp_ops" in name]


def _more(content: dict[str, bytes]) -> None:
    content["lucid_onnx/notes.txt"] = b"x"


def _less(content: dict[str, bytes]) -> None:
    del content["lucid_onnx/ops/__init__.py"]


def _other(content: dict[str, bytes]) -> None:
    content["lucid_onnx/__init__.py"] = b"another"


def _tag(content: dict[str, bytes]) -> None:
    content[f"{INFO}/WHEEL"] = b"Tag: py3-none-any\n"


@pytest.mark.parametrize(
    ("change", "entry", "message"),
    [
        (_more, {}, r"has \['lucid_onnx/notes.txt'\]"),
        (_less, {}, r"lacks \['lucid_onnx/ops/__init__.py'\]"),
        (_other, {}, "RECORD has .* for lucid_onnx/__init__.py"),
        (_tag, {}, "RECORD has .* for .*WHEEL"),
        (lambda _: None, {"date_time": (2026, 1, 1, 0, 0, 0)}, "has other times"),
        (lambda _: None, {"external_attr": 0o600 << 16}, "has the modes"),
    ],
)
def test_a_wheel_that_is_wrong(wheels: Any, tmp_path: Path, change: Any, entry: dict[str, Any], message: str) -> None:
    path = write(wheels, tmp_path, change, **entry)
    with pytest.raises(wheels.WheelError, match=message):
        wheels.check_archive(path, wheels.PLATFORMS["linux-x86_64"], SOURCES)


def test_a_wheel_for_another_platform(wheels: Any, tmp_path: Path) -> None:
    with pytest.raises(wheels.WheelError, match="the name is"):
        wheels.check_archive(write(wheels, tmp_path, lambda _: None), wheels.PLATFORMS["linux-aarch64"], SOURCES)


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="ELF is Linux's format")
def test_the_functions_that_a_library_must_export(wheels: Any) -> None:
    """The declarations of c_api.h, as this installation's library was built from them."""
    assert set(elf.read(str(library_path())).exported) == wheels.c_functions()


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="ELF is Linux's format")
def test_what_a_library_shows(wheels: Any) -> None:
    """By lief, which ``nox -s wheels`` installs."""
    pytest.importorskip("lief", reason="lief is not installed")
    path = Path(str(library_path()))
    found = wheels.read_symbols(path.read_bytes())
    assert found.exported == set(elf.read(path).exported)
    assert found.needed == set(elf.read(path).needed)
