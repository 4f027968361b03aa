"""The native libraries as they were built: what the linker sees of them, and what a mistake in them could do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lucid_testing import elf
from lucid_testing.kernels import library_path, needs_library

pytestmark = [needs_library, pytest.mark.skipif(sys.platform != "linux", reason="ELF is Linux's format")]


@pytest.fixture(params=["liblucid_onnx_ops.so", "liblucid_onnx_ops_cuda.so"])
def library(request: pytest.FixtureRequest) -> elf.Library:
    path = Path(str(library_path())).parent / request.param
    if not path.is_file():
        pytest.skip(f"there is no {request.param}")
    found = elf.read(path)
    if any(name.startswith(("__asan_", "__tsan_", "__ubsan_")) for name in found.imported):
        pytest.skip("built with a sanitizer, which needs other settings")
    return found


def test_only_the_c_interface_is_exported(library: elf.Library) -> None:
    assert "RegisterCustomOps" in library.exported
    assert [n for n in library.exported if n != "RegisterCustomOps" and not n.startswith("lucid_")] == []
    assert "lucid_embedding_bag" in library.exported


def test_what_the_loader_fills_in_is_read_only(library: elf.Library) -> None:
    """Full RELRO: all symbols are bound at the start, and their table cannot be written to afterwards."""
    assert [s for s in library.segments if s.kind == elf.PT_GNU_RELRO]
    assert library.flag(elf.DT_FLAGS, elf.DF_BIND_NOW) or library.flag(elf.DT_FLAGS_1, elf.DF_1_NOW)
    assert elf.DT_TEXTREL not in library.dynamic


def test_the_stack_is_guarded_and_holds_no_code(library: elf.Library) -> None:
    assert "__stack_chk_fail" in library.imported
    stacks = [s for s in library.segments if s.kind == elf.PT_GNU_STACK]
    assert stacks
    assert not any(s.flags & elf.EXECUTABLE for s in stacks)


def test_calls_that_write_know_the_room(library: elf.Library) -> None:
    """_FORTIFY_SOURCE, which glibc has."""
    if "libc.so.6" not in library.needed:
        pytest.skip("another C library than glibc")
    assert [n for n in library.imported if n.startswith("__") and n.endswith("_chk")]


def test_another_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"MZ" + bytes(100))
    with pytest.raises(ValueError, match="is not a 64-bit little-endian ELF file"):
        elf.read(tmp_path / "x.so")
