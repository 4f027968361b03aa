"""Run what tools/wheels.py built for another processor or system, in an emulator.

    python tools/emulate.py linux-aarch64 --keep build/wheels          the C++ tests under qemu-user
    python tools/emulate.py windows-x64 --keep build/wheels            the C++ tests under wine
    python tools/emulate.py linux-aarch64 --wheel <wheel> --root build/arm64    the conformance suite, in Python
    python tools/emulate.py windows-x64 --wheel <wheel> --headers <folder>      a session of ONNX Runtime

``--keep`` is the folder that was given to tools/wheels.py. Needed are Debian's qemu-user and libc6-arm64-cross, or its
wine64.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("embedding_bag", "embedding_bag_grad", "embedding_bag_collection", "table_memory", "c_api", "threads")
#: What Python of Debian 12 needs to start and to load its modules.
DEBIAN = (
    *("libbz2-1.0", "libc6", "libcrypt1", "libexpat1", "libffi8", "libgcc-s1", "liblzma5", "libsqlite3-0", "libssl3"),
    *("libpython3.11-minimal", "libpython3.11-stdlib", "libstdc++6", "libuuid1", "zlib1g"),
    *("python3.11", "python3.11-minimal"),
)
#: qemu shows programs the machine's own /proc/cpuinfo, in which onnxruntime finds no processor of its kind.
CPUINFO = """processor : 0
BogoMIPS : 243.75
Features : fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer : 0x41
CPU architecture: 8
CPU variant : 0x3
CPU part : 0xd0c
CPU revision : 1
"""
ONNXRUNTIME = "onnxruntime==1.32.0"


def run(command: Sequence[object], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command, whose failure ends this program with what it said."""
    words = [str(word) for word in command]
    done: subprocess.CompletedProcess[str] = subprocess.run(words, text=True, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        sys.exit(f"{done.stdout or ''}{done.stderr or ''}\nemulate: {' '.join(words)}: exit code {done.returncode}")
    return done


def emulator(platform: str, root: Path | None = None) -> list[str]:
    """The command that runs a program of a platform."""
    if platform == "linux-aarch64":
        return [_tool("qemu-aarch64"), "-L", str(root or "/usr/aarch64-linux-gnu")]
    return [_tool("wine64", "/usr/lib/wine/wine64", "wine")]


def _tool(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        sys.exit(f"emulate: there is no {names[0]}: apt-get install qemu-user libc6-arm64-cross wine64")
    return found


def cpp_tests(platform: str, keep: Path, *, short: bool, jobs: int) -> None:
    """The C++ tests, of the same objects that are in the wheel."""
    build = keep.resolve() / platform / "build"
    command = ";".join(emulator(platform))
    run(["cmake", "-DLUCID_BUILD_TESTS=ON", f"-DCMAKE_CROSSCOMPILING_EMULATOR={command}", build], capture_output=True)
    targets = [f"{name}_test" for name in TESTS]
    run(["cmake", "--build", build, "--parallel", jobs, "--target", *targets], capture_output=True)
    variables = {"LUCID_EMULATED": "1", "WINEPATH": str(build), "WINEDEBUG": "-all"}
    if short:
        variables["LUCID_SHORT_TESTS"] = "1"
    wanted = "|".join(TESTS)
    run(["ctest", "--test-dir", build, "-R", f"^({wanted})$", "--verbose"], env={**os.environ, **variables})


def conformance(wheel: Path, root: Path, arguments: Sequence[str]) -> None:
    """The conformance suite in Debian's Python for aarch64, with PyPI's wheels. ``root`` is filled if it is empty."""
    if not (root / "usr").exists():
        debian_root(root)
    site = root / "site"
    if not (site / "onnxruntime").exists():
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 26, 17)]
        options = ["-q", "--python-version=3.11", "--only-binary=:all:", "--platform=manylinux2014_aarch64", *platforms]
        packages = [ONNXRUNTIME, *["numpy", "onnx", "ml_dtypes", "onnx-ir", "pytest", "pytest-timeout", "hypothesis"]]
        run([sys.executable, "-m", "pip", "install", "--target", site, *options, *packages])
    shutil.rmtree(site / "lucid_onnx", ignore_errors=True)
    zipfile.ZipFile(wheel).extractall(site)
    python = [*emulator("linux-aarch64", root), str(root / "usr" / "bin" / "python3.11")]
    environment = {**os.environ, "PYTHONPATH": str(site), "QEMU_CPU": "neoverse-n1"}
    arguments = arguments or ["tests/test_conformance.py"]
    run(
        [*python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=0", *arguments],
        env=environment,
        cwd=ROOT,
    )


def debian_root(root: Path) -> None:
    """Unpack Debian's Python for arm64 into a folder, with lists of packages of its own."""
    for name in ("lists/partial", "cache/archives/partial", "packages"):
        (root / name).mkdir(parents=True, exist_ok=True)
    settings = {"APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State::status": "/dev/null"}
    settings |= {"Dir::State::lists": str(root.resolve() / "lists"), "Dir::Cache": str(root.resolve() / "cache")}
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    run(["apt-get", *options, "update"], capture_output=True)
    run(["apt-get", *options, "download", *DEBIAN], capture_output=True, cwd=root / "packages")
    for package in (root / "packages").glob("*.deb"):
        run(["dpkg-deb", "-x", package, root])
    (root / "proc").mkdir()
    (root / "proc" / "cpuinfo").write_text(CPUINFO)


def windows_session(wheel: Path, headers: Path) -> None:
    """examples/cpp/serve.cc, with the DLLs of the wheel and of onnxruntime's wheel for Windows."""
    zig = Path(importlib.util.find_spec("ziglang").origin).parent / "zig"  # type: ignore[union-attr,arg-type]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ["-q", "--no-deps", "--platform=win_amd64", "--python-version=3.11", "--only-binary=:all:"]
        run([sys.executable, "-m", "pip", "download", *options, "-d", folder, ONNXRUNTIME])
        for archive in (*folder.glob("*.whl"), wheel):
            with zipfile.ZipFile(archive) as content:
                for member in content.namelist():
                    if member.endswith(".dll"):
                        (folder / Path(member).name).write_bytes(content.read(member))
        (folder / "onnxruntime.def").write_text("LIBRARY onnxruntime.dll\nEXPORTS\nOrtGetApiBase\n")
        run([zig, "dlltool", "-m", "i386:x86-64", "-d", "onnxruntime.def", "-l", "onnxruntime.lib"], cwd=folder)
        flags = ["-target", "x86_64-windows-gnu", "-O1", "-std=c++17", "-I", headers.resolve(), "-o", "serve.exe"]
        flags.append("-D_Return_type_success_(x)=")  # an annotation that MinGW's headers lack
        run([zig, "c++", *flags, ROOT / "examples" / "cpp" / "serve.cc", "onnxruntime.lib"], cwd=folder)
        model, expected = _bag(folder)
        command = [*emulator("windows-x64"), "serve.exe", model, "lucid_onnx_ops.dll"]
        said = run(command, cwd=folder, capture_output=True, env={**os.environ, "WINEDEBUG": "-all"}).stdout
    print(said)
    lines = said.splitlines()
    if lines[:2] != expected or "indices[2] = 1000000 is outside [0, 10)" not in lines[2]:
        sys.exit(f"emulate: expected {expected} and the error of a bad index")


def _bag(folder: Path) -> tuple[str, list[str]]:
    """A model of one bag, and what serve must print of it."""
    import numpy as np

    import lucid_onnx

    table = np.arange(40, dtype=np.float32).reshape(10, 4)
    lucid_onnx.save(lucid_onnx.build_model(table, mode="sum", form="native"), folder / "bag.onnx")
    return "bag.onnx", [" ".join(f"{x:g}" for x in row) for row in (table[3] + table[1], table[4])]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("platform", choices=["linux-aarch64", "windows-x64"])
    parser.add_argument("--keep", type=Path, help="run the C++ tests of what tools/wheels.py built there")
    parser.add_argument("--short", action="store_true", help="a tenth of the C++ tests' cases")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--wheel", type=Path, help="run this wheel")
    parser.add_argument("--root", type=Path, help="with --wheel: the folder for Debian's arm64 packages")
    parser.add_argument("--headers", type=Path, help="with --wheel: the folder of onnxruntime_cxx_api.h")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="what pytest gets instead; comes last")
    options = parser.parse_args()
    if options.keep:
        cpp_tests(options.platform, options.keep, short=options.short, jobs=options.jobs)
    if options.wheel and options.platform == "linux-aarch64":
        conformance(options.wheel, options.root or parser.error("--wheel needs --root"), options.pytest)
    elif options.wheel:
        windows_session(options.wheel, options.headers or parser.error("--wheel needs --headers"))


if __name__ == "__main__":
    main()
