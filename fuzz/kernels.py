"""Random calls of the installed kernels: ``python fuzz/kernels.py --seconds 60``.

Compiles fuzz/kernels.cc, which says what it checks, and runs it over the native library of the installed lucid_onnx.
All arguments go to it (``--help`` lists them), and its exit code is 1 after a finding. It needs Linux and a C++17
compiler: $CXX, c++, g++ or clang++.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import lucid_onnx

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "fuzz" / "kernels.cc"


def compiler() -> list[str] | None:
    """The command of a C++ compiler; None without one."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return None if found is None else [found]


def build(folder: Path) -> Path:
    """The program, compiled into a folder.

    Raises:
        FileNotFoundError: no compiler was found.
        subprocess.CalledProcessError: it failed, and has said why on stderr.
    """
    command = compiler()
    if command is None:
        raise FileNotFoundError("a C++ compiler is needed: none of c++, g++ and clang++ was found")
    program = folder / "lucid_fuzz_kernels"
    # Without contraction the reference adds and multiplies as the contract of the kernels says.
    flags = ["-std=c++17", "-O2", "-g1", "-ffp-contract=off", f"-I{ROOT / 'cpp_ops'}"]
    subprocess.run([*command, *flags, str(SOURCE), "-o", str(program), "-pthread", "-ldl"], check=True)
    return program


def main() -> int:
    """The exit code of the program: 0, 1 after a finding, 2 if it was not told what to do."""
    with tempfile.TemporaryDirectory(prefix="lucid-onnx-fuzz") as folder:
        try:
            program = build(Path(folder))
        except FileNotFoundError as e:
            print(e, file=sys.stderr)
            return 2
        return subprocess.run([str(program), *sys.argv[1:], lucid_onnx.get_library_path()]).returncode


if __name__ == "__main__":
    sys.exit(main())
