"""examples/cpp: compiled and run against the installed library, as its CMake package and pkg-config file tell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lucid_onnx
from lucid_onnx.runtime import library
from lucid_testing import pages

EXAMPLES = pages.ROOT / "examples" / "cpp"
POOLED = "11 22, 100 200\n"
#: The folder of ONNX Runtime's official C++ headers.
HEADERS = os.environ.get("LUCID_ORT_CXX_HEADERS", "")

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.skipif(sys.platform != "linux", reason="the commands are those of Linux"),
]


def run(*command: object, folder: Path, **variables: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def program(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"there is no {' or '.join(names)}")
    return found


@pytest.fixture
def package() -> Path:
    """The folder of the CMake package."""
    try:
        return Path(library.get_cmake_dir()).resolve()
    except FileNotFoundError:
        pytest.skip("this installation is the library alone, without its package")


def test_the_program_in_c(package: Path, tmp_path: Path) -> None:
    """With the system's compiler, and the headers and the library as they are installed."""
    lib = package.parent.parent
    headers = lib.parent / "include"
    flags = ["-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", "-I", headers, f"-Wl,-rpath,{lib}", "-o", "pool"]
    run(program("cc", "gcc"), EXAMPLES / "pool.c", *flags, lucid_onnx.get_library_path(), folder=tmp_path)
    assert run(tmp_path / "pool", folder=tmp_path) == POOLED


def test_the_interface_is_c_plus_plus_too(package: Path, tmp_path: Path) -> None:
    headers = package.parent.parent.parent / "include"
    (tmp_path / "x.cc").write_text("#include <lucid_onnx/c_api.h>\nint main() { return lucid_isa_count() < 1; }\n")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", headers, lucid_onnx.get_library_path()]
    run(program("c++", "g++"), "x.cc", *flags, f"-Wl,-rpath,{package.parent.parent}", "-o", "x", folder=tmp_path)
    run(tmp_path / "x", folder=tmp_path)


def test_the_program_in_c_by_pkg_config(package: Path, tmp_path: Path) -> None:
    folder = str(package.parent.parent / "pkgconfig")
    asked = program("pkg-config", "pkgconf"), "--cflags", "--libs", "lucid_onnx"
    flags = run(*asked, folder=tmp_path, PKG_CONFIG_PATH=folder).split()
    run(program("cc", "gcc"), EXAMPLES / "pool.c", *flags, "-o", "pool", folder=tmp_path)
    assert run(tmp_path / "pool", folder=tmp_path) == POOLED


def test_the_page_shows_the_program() -> None:
    (shown,) = (
        b.code for b in pages.blocks(pages.ROOT / "docs" / "serving.md") if b.language == "c" and "main" in b.code
    )
    assert shown == (EXAMPLES / "pool.c").read_text()


def built(package: Path, folder: Path, **defines: object) -> Path:
    """examples/cpp built by CMake in ``folder``; its programs are in the folder that comes back."""
    settings = {"lucid_onnx_DIR": package, **defines}
    cmake = program("cmake")
    run(cmake, "-S", EXAMPLES, "-B", "build", *(f"-D{k}={v}" for k, v in settings.items()), folder=folder)
    run(cmake, "--build", "build", folder=folder)
    return folder / "build"


def test_the_program_in_c_by_cmake(package: Path, tmp_path: Path) -> None:
    asked = run(sys.executable, "-m", "lucid_onnx", "--cmake-dir", folder=tmp_path).strip()
    assert Path(asked).resolve() == package
    assert run(built(package, tmp_path) / "pool", folder=tmp_path) == POOLED


@pytest.mark.skipif(not HEADERS, reason="LUCID_ORT_CXX_HEADERS does not name the folder of onnxruntime_cxx_api.h")
def test_the_program_with_onnxruntime(package: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    (runtime,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.1*")
    folder = built(package, tmp_path, ONNXRUNTIME_INCLUDE_DIR=HEADERS, ONNXRUNTIME_LIBRARY=runtime)
    table = np.random.default_rng(0).integers(-9, 9, (10, 4)).astype(np.float32)
    lucid_onnx.save(lucid_onnx.build_model(table, mode="sum"), tmp_path / "bag.onnx")
    # A program asks for it by its soname, and a wheel of onnxruntime has it under its full version.
    (tmp_path / "libonnxruntime.so.1").symlink_to(runtime)
    found = {"LD_LIBRARY_PATH": str(tmp_path)}
    said = run(folder / "serve", "bag.onnx", lucid_onnx.get_library_path(), folder=tmp_path, **found).splitlines()
    assert [list(map(float, line.split())) for line in said[:2]] == [list(table[3] + table[1]), list(table[4])]
    assert "indices[2] = 1000000 is outside [0, 10)" in said[2]
