"""Build the wheels of five platforms on one machine, and check what is in them: ``python tools/wheels.py --out dist``.

Every library is compiled by the clang of PyPI's ``ziglang``, which brings the C libraries of all platforms. No compiler
of the machine is used. A wheel has the same bytes wherever the same tree is built with the same tools, as ``--twice``
checks. It needs scikit-build-core, cmake, ninja, ziglang, lief and, for Linux, auditwheel.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import io
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 8 * 10**6
#: 2025-01-01, as the times of files in a zip begin in 1980.
EPOCH = "1735689600"
TOOLCHAIN = Path("tools") / "zig.cmake"
_PACKAGE = (
    "lib/cmake/lucid_onnx/lucid_onnx-config.cmake",
    "lib/cmake/lucid_onnx/lucid_onnx-config-version.cmake",
    "lib/pkgconfig/lucid_onnx.pc",
)


@dataclasses.dataclass(frozen=True)
class Platform:
    """A platform: its wheel's tag, zig's name, its libraries, and those of the system that they may need."""

    tag: str
    target: str
    libraries: tuple[str, ...]
    needed: frozenset[str]


_GLIBC = frozenset({"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"})
_WINDOWS = frozenset({"kernel32.dll", "ntdll.dll", "msvcrt.dll"})
PLATFORMS = {
    "linux-x86_64": Platform(
        "manylinux_2_17_x86_64",
        "x86_64-linux-gnu.2.17",
        ("liblucid_onnx_ops.so",),
        _GLIBC | {"ld-linux-x86-64.so.2"},
    ),
    "linux-aarch64": Platform(
        "manylinux_2_17_aarch64",
        "aarch64-linux-gnu.2.17",
        ("liblucid_onnx_ops.so",),
        _GLIBC | {"ld-linux-aarch64.so.1"},
    ),
    "macos-arm64": Platform(
        "macosx_11_0_arm64",
        "aarch64-macos.11.0",
        ("liblucid_onnx_ops.dylib",),
        frozenset({"/usr/lib/libSystem.B.dylib"}),
    ),
    "macos-x86_64": Platform(
        "macosx_11_0_x86_64",
        "x86_64-macos.11.0",
        ("liblucid_onnx_ops.dylib",),
        frozenset({"/usr/lib/libSystem.B.dylib"}),
    ),
    "windows-x64": Platform(
        "win_amd64", "x86_64-windows-gnu", ("lucid_onnx_ops.dll", "liblucid_onnx_ops.dll.a"), _WINDOWS
    ),
}


class WheelError(Exception):
    """A wheel that is not what it should be."""


def tracked_files() -> list[str]:
    """The project's files: those that git knows, or of an sdist all."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())
    return sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.is_file())


def build(platform: Platform, files: Iterable[str], jobs: int, folder: Path) -> Path:
    """Build a platform's wheel in a folder, from a copy of ``files``.

    What is compiled stays in its subfolder build, and is not compiled again as long as it does not change.
    """
    source, out = folder / "source", folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    for name in files:
        data, copy = (ROOT / name).read_bytes(), source / name
        if not copy.is_file() or copy.read_bytes() != data:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(data)
    for path in source.rglob("*"):
        if path.is_file() and path.relative_to(source).as_posix() not in files:
            path.unlink()
    zig = Path(importlib.util.find_spec("ziglang").origin).parent / ("zig.exe" if os.name == "nt" else "zig")  # type: ignore[union-attr,arg-type]
    settings = {
        "build-dir": str(folder / "build"),
        "wheel.tags": f"py3-none-{platform.tag}",
        "wheel.reproducible": "true",
        "cmake.define.CMAKE_TOOLCHAIN_FILE": str(source / TOOLCHAIN),
        "cmake.define.LUCID_ZIG": str(zig),
        "cmake.define.LUCID_ZIG_TARGET": platform.target,
        "cmake.define.LUCID_CUDA": "OFF",
        "cmake.define.LUCID_BUILD_TESTS": "OFF",  # which tools/emulate.py asks for in the same folder
        "install.strip": "false",  # by the linker, as the strip of this machine knows one platform
    }
    environment = {
        **os.environ,
        "SOURCE_DATE_EPOCH": EPOCH,
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
        "ZIG_LOCAL_CACHE_DIR": str(folder / "zig"),  # the C libraries stay in zig's global one
    }
    for name in ("CXX", "CXXFLAGS", "CFLAGS", "LDFLAGS", "CMAKE_ARGS", "CMAKE_GENERATOR"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out)]
    for name, value in settings.items():
        command += ["-C", f"{name}={value}"]
    done = subprocess.run([*command, str(source)], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise WheelError(f"{platform.tag}: the build failed\n{done.stdout[-4000:]}{done.stderr[-8000:]}")
    (wheel,) = out.glob("*.whl")
    return wheel


# ---- What is in a wheel.


def expected_files(platform: Platform, files: Iterable[str], version: str) -> set[str]:
    """The names of the files that a wheel must have."""
    python = {name for name in files if name.startswith("lucid_onnx/")}
    python |= {f"lucid_onnx/{name}" for name in files if name.startswith("ops/")}
    library = {f"lucid_onnx/lib/{name}" for name in platform.libraries}
    headers = re.findall(r"foreach\(_header (.+)\)", (ROOT / "cpp_ops" / "package.cmake").read_text())[0].split()
    interface = {f"lucid_onnx/include/lucid_onnx/{name}" for name in headers}
    package = {f"lucid_onnx/{name}" for name in _PACKAGE}
    metadata = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    return python | library | interface | package | {f"lucid_onnx-{version}.dist-info/{name}" for name in metadata}


def _fail_if(condition: object, message: str) -> None:
    if condition:
        raise WheelError(message)


def check_archive(wheel: Path, platform: Platform, files: Iterable[str]) -> dict[str, bytes]:
    """Check a wheel's name, size, files, times, modes and RECORD.

    Returns:
        Its files by name.

    Raises:
        WheelError: it is not as it should be.
    """
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    _fail_if(wheel.name != f"lucid_onnx-{version}-py3-none-{platform.tag}.whl", f"the name is {wheel.name}")
    size = wheel.stat().st_size
    _fail_if(size > LARGEST, f"{wheel.name} has {size} bytes, more than {LARGEST}")
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
        content = {entry.filename: archive.read(entry) for entry in entries}
    expected = expected_files(platform, files, version)
    _fail_if(len(entries) != len(content), f"{wheel.name} has a name twice")
    missing, more = sorted(expected - content.keys()), sorted(content.keys() - expected)
    _fail_if(missing or more, f"{wheel.name} lacks {missing} and has {more}")
    when = time.gmtime(int(EPOCH))[:6]
    _fail_if({entry.date_time for entry in entries} != {when}, f"{wheel.name} has other times than {when}")
    modes = {oct(entry.external_attr >> 16 & 0o7777) for entry in entries}
    _fail_if(not modes <= {"0o644", "0o755"}, f"{wheel.name} has the modes {sorted(modes)}")

    info = f"lucid_onnx-{version}.dist-info"
    recorded = {row[0]: row[1:] for row in csv.reader(io.StringIO(content[f"{info}/RECORD"].decode())) if row}
    _fail_if(recorded.keys() != content.keys(), "RECORD lists other files")
    for name, data in content.items():
        digest = "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        wanted = ["", ""] if name == f"{info}/RECORD" else [digest, str(len(data))]
        _fail_if(recorded[name] != wanted, f"RECORD has {recorded[name]} for {name}, not {wanted}")
    tags = re.findall(r"^Tag: (.+)$", content[f"{info}/WHEEL"].decode(), re.MULTILINE)
    _fail_if(tags != [f"py3-none-{platform.tag}"], f"WHEEL has the tags {tags}")
    return content


@dataclasses.dataclass(frozen=True)
class Symbols:
    """What a library shows, and what it needs."""

    exported: frozenset[str]
    needed: frozenset[str]


def read_symbols(data: bytes) -> Symbols:
    """What a shared library of any of the platforms exports, and the libraries that it names."""
    import lief

    lief.logging.disable()
    binary = lief.parse(io.BytesIO(data))
    if isinstance(binary, lief.MachO.FatBinary):
        binary = binary.at(0)
    if isinstance(binary, lief.PE.Binary):
        exported = {str(entry.name) for entry in binary.get_export().entries}
        return Symbols(frozenset(exported), frozenset(name.lower() for name in binary.libraries))
    if isinstance(binary, lief.ELF.Binary):
        return Symbols(frozenset(str(s.name) for s in binary.exported_symbols), frozenset(map(str, binary.libraries)))
    if isinstance(binary, lief.MachO.Binary):
        # Of its linker's own: where the image begins.
        exported = {str(s.name).removeprefix("_") for s in binary.exported_symbols} - {
            "__dso_handle",
            "_mh_dylib_header",
        }
        needed = {str(library.name) for library in binary.libraries}
        own = {str(c.name) for c in binary.commands if c.command == lief.MachO.LoadCommand.TYPE.ID_DYLIB}  # type: ignore[attr-defined]
        return Symbols(frozenset(exported), frozenset(needed - own))
    raise WheelError("the library is not in a format that is known here")


def c_functions() -> set[str]:
    """The functions that c_api.h declares, and the one that ONNX Runtime calls."""
    declared = re.findall(
        r"^LUCID_EXPORT [^;(]*?(lucid_\w+)\(", (ROOT / "cpp_ops" / "c_api.h").read_text(), re.MULTILINE
    )
    return {*declared, "RegisterCustomOps"}


def check_library(name: str, data: bytes, platform: Platform, private: Iterable[str]) -> Symbols:
    """Check that a library exports the C interface alone, needs the system alone and names no ``private`` path.

    Raises:
        WheelError: it does not.
    """
    symbols = read_symbols(data)
    wanted = c_functions()
    _fail_if(
        symbols.exported != wanted,
        f"{name} exports {sorted(symbols.exported - wanted)} and lacks {sorted(wanted - symbols.exported)}",
    )
    windows = {n for n in symbols.needed if n.startswith("api-ms-win-crt-")}  # the C library that Windows 10 brings
    others = symbols.needed - platform.needed - (windows if platform.tag.startswith("win") else set())
    _fail_if(others, f"{name} needs {sorted(others)}")
    for path in private:
        _fail_if(path.encode() in data, f"{name} has the path {path}")
    return symbols


def check_mac(name: str, data: bytes, target: str) -> None:
    """Check the load commands of a library for macOS.

    Raises:
        WheelError: it is for another processor or system, has a path in its name, or arm64 has no signature.
    """
    import lief

    fat = lief.MachO.parse(io.BytesIO(data))
    _fail_if(fat is None or len(fat) != 1, f"{name} is not a Mach-O file of one architecture")
    binary = fat.at(0)  # type: ignore[union-attr]
    machine, wanted = str(binary.header.cpu_type).rpartition(".")[2], "ARM64" if "aarch64" in target else "X86_64"  # type: ignore[union-attr]
    _fail_if(machine != wanted, f"{name} is for {machine}")
    version = binary.build_version.minos if binary.has_build_version else binary.version_min.version  # type: ignore[union-attr]
    _fail_if(list(version)[:2] != [11, 0], f"{name} wants macOS {version}")
    (own,) = (c.name for c in binary.commands if c.command == lief.MachO.LoadCommand.TYPE.ID_DYLIB)  # type: ignore[union-attr]
    _fail_if(own != "@rpath/liblucid_onnx_ops.dylib", f"{name} calls itself {own}")
    # macOS runs no arm64 code without a signature, were it one of nobody.
    _fail_if(wanted == "ARM64" and not binary.has_code_signature, f"{name} has no code signature")  # type: ignore[union-attr]


def check_linux(wheel: Path, tag: str) -> None:
    """Ask auditwheel whether a wheel may have its tag.

    Raises:
        WheelError: it may not.
    """
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    said = subprocess.run(command, capture_output=True, text=True)
    text = " ".join((said.stdout + said.stderr).split())
    _fail_if(
        said.returncode != 0 or f'consistent with the following platform tag: "{tag}"' not in text,
        f"auditwheel: {text}",
    )


def check(wheel: Path, platform: Platform, files: Iterable[str], private: Iterable[str]) -> int:
    """All checks of a wheel.

    Returns:
        The bytes of its library.

    Raises:
        WheelError: one of them fails.
    """
    content = check_archive(wheel, platform, files)
    library = f"lucid_onnx/lib/{platform.libraries[0]}"
    check_library(library, content[library], platform, private)
    if "macos" in platform.target:
        check_mac(library, content[library], platform.target)
    if "linux" in platform.target:
        check_linux(wheel, platform.tag)
    return len(content[library])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("platforms", nargs="*", choices=[[], *PLATFORMS], help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="build in a subfolder of this one for each platform, and leave it")
    parser.add_argument("--twice", action="store_true", help="build each in two folders, which must give equal bytes")
    options = parser.parse_args()
    files = tracked_files()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.platforms or PLATFORMS:
        platform, wheels = PLATFORMS[name], []
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with contextlib.ExitStack() as stack:
            first, second = (stack.enter_context(tempfile.TemporaryDirectory(prefix="lucid-onnx-")) for _ in range(2))
            if options.keep:
                first = str(options.keep.resolve() / name)
                Path(first).mkdir(parents=True, exist_ok=True)
            for folder in (first, second)[: 1 + options.twice]:
                wheels.append(build(platform, files, options.jobs, Path(folder)))
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            private = [str(ROOT), str(Path.home()), first, second, str(Path(sys.prefix)), "/ziglang/"]
            size = check(wheels[0], platform, files, private)
            if options.twice and wheels[0].read_bytes() != wheels[1].read_bytes():
                raise WheelError(f"{name}: two builds have different bytes")
            target = options.out / wheels[0].name
            shutil.copyfile(wheels[0], target)
        seconds = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / len(wheels)
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        print(
            f"{target.name}: {target.stat().st_size / 1e6:.2f} MB, library {size / 1e6:.2f} MB, "
            f"{seconds:.0f} CPU seconds{', two equal builds' if options.twice else ''}, sha256 {digest}",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except WheelError as error:
        sys.exit(f"wheels: {error}")
