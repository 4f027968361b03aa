"""A reader of shared libraries in ELF, as far as the tests ask: program headers, dynamic entries and symbols."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

PT_LOAD, PT_DYNAMIC, PT_GNU_STACK, PT_GNU_RELRO = 1, 2, 0x6474E551, 0x6474E552
SHT_DYNSYM = 11
DT_NEEDED, DT_STRTAB, DT_SYMTAB, DT_TEXTREL, DT_FLAGS, DT_FLAGS_1 = 1, 5, 6, 22, 30, 0x6FFFFFFB
DF_BIND_NOW, DF_1_NOW = 8, 1
EXECUTABLE = 1


@dataclasses.dataclass(frozen=True)
class Segment:
    """A program header."""

    kind: int
    flags: int
    offset: int
    address: int
    size: int


@dataclasses.dataclass(frozen=True)
class Library:
    """What a 64-bit little-endian shared library says of itself."""

    segments: list[Segment]
    dynamic: dict[int, list[int]]
    needed: list[str]
    exported: list[str]
    imported: list[str]

    def flag(self, entry: int, bit: int) -> bool:
        """Whether a bit of a dynamic entry is set; False where there is no such entry."""
        return any(value & bit for value in self.dynamic.get(entry, []))


def read(path: str | Path) -> Library:
    """Read a library.

    Raises:
        ValueError: the file is not a 64-bit little-endian ELF file.
    """
    data = Path(path).read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} is not a 64-bit little-endian ELF file")
    header_offset, section_offset = struct.unpack_from("<QQ", data, 32)
    header_size, header_count, section_size, section_count = struct.unpack_from("<HHHH", data, 54)
    segments = []
    for i in range(header_count):
        kind, flags, offset, address, _, size = struct.unpack_from("<IIQQQQ", data, header_offset + i * header_size)
        segments.append(Segment(kind, flags, offset, address, size))

    def at(address: int) -> int:
        for s in segments:
            if s.kind == PT_LOAD and s.address <= address < s.address + s.size:
                return address - s.address + s.offset
        raise ValueError(f"{path}: no segment has the address {address:#x}")

    dynamic: dict[int, list[int]] = {}
    for s in segments:
        if s.kind == PT_DYNAMIC:
            for tag, value in struct.iter_unpack("<qQ", data[s.offset : s.offset + s.size // 16 * 16]):
                dynamic.setdefault(tag, []).append(value)
    strings, symbols = at(dynamic[DT_STRTAB][0]), at(dynamic[DT_SYMTAB][0])

    def text(offset: int) -> str:
        return data[strings + offset : data.index(b"\0", strings + offset)].decode()

    # Only the section header says how many symbols there are.
    count = 0
    for i in range(section_count):
        kind, _, _, _, size = struct.unpack_from("<IQQQQ", data, section_offset + i * section_size + 4)
        if kind == SHT_DYNSYM:
            count = size // 24
    exported, imported = [], []
    for i in range(1, count):
        name, info, _, section, _, _ = struct.unpack_from("<IBBHQQ", data, symbols + i * 24)
        if info >> 4 == 0:  # local
            continue
        (imported if section == 0 else exported).append(text(name))
    return Library(segments, dynamic, [text(n) for n in dynamic.get(DT_NEEDED, [])], exported, imported)
