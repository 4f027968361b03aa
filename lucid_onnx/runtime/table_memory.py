"""Where a session would keep the tables of a model, as the native library decides it."""

from __future__ import annotations

import ctypes
import dataclasses

from .installation import native_library
from .model_info import Model, Node


@dataclasses.dataclass(frozen=True)
class TablePlace:
    """What a session would do with a constant table when it starts.

    ``plan`` is "stays", "in place" (huge pages are put under it), "copied" (to huge pages, unless another session of
    the process has copied it), "joined" (quantized values are copied, each row with its scale behind it, for every node
    that pools them) or "refused" (there is no memory for the copy).
    """

    name: str
    bytes: int
    external: bool
    plan: str
    copied_bytes: int
    huge_pages: int


@dataclasses.dataclass(frozen=True)
class TableMemory:
    """The tables of a model under one choice of table memory; ``free_bytes`` is None if unknown."""

    choice: str
    free_bytes: int | None
    tables: tuple[TablePlace, ...]


_PLANS = ("stays", "in place", "copied", "refused")
_HUGE_PAGE = 2 << 20
#: kLargeTable and kMostJoinedBytes of the library.
_LARGE_TABLE, _MOST_JOINED_BYTES = 8 << 20, 1024


def table_memory(found: Model, choice: str = "auto") -> TableMemory | None:
    """Where a session would keep the tables of a model; None without the native library.

    Free memory is compared with each table by itself, as if there were no others.

    Raises:
        OSError: as `library`.
        ValueError: an unknown choice.
    """
    found_at = native_library()
    if found_at is None:
        return None
    path, native = found_at
    try:
        native.lucid_free_memory.restype = ctypes.c_int64
        native.lucid_table_plan.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    except AttributeError as error:
        raise OSError(f"{path}: library version mismatch: {error}") from error
    if native.lucid_table_plan(choice.encode(), 0, 0, 0) < 0:
        raise ValueError(f"table memory {choice!r} is not one of 'auto', 'inplace', 'hugepage_copy', 'mmap'")
    free = native.lucid_free_memory()
    held = {n.table.name: n for n in found.nodes if n.table_bytes is not None}
    places = []
    for name, node in held.items():
        size = node.table_bytes or 0
        joined = _joined_bytes(node)
        if joined and choice in ("auto", "hugepage_copy"):
            large = joined >= _LARGE_TABLE
            if not large or _PLANS[native.lucid_table_plan(b"auto", True, joined, free)] == "copied":
                pages = -(-joined // _HUGE_PAGE) if large else 0
                copied = pages * _HUGE_PAGE if large else joined
                places.append(TablePlace(name, size, node.table_external, "joined", copied, pages))
                continue
        plan = _PLANS[native.lucid_table_plan(choice.encode(), node.table_external, size, free)]
        # A copy is made of whole pages; in place, those count that lie wholly within the table.
        pages = {"copied": -(-size // _HUGE_PAGE), "in place": size // _HUGE_PAGE}.get(plan, 0)
        copied = pages * _HUGE_PAGE if plan == "copied" else 0
        places.append(TablePlace(name, size, node.table_external, plan, copied, pages))
    return TableMemory(choice, None if free < 0 else free, tuple(places))


def _joined_bytes(node: Node) -> int:
    """The bytes of a quantized table with every row's scale and offset behind it; 0 for one that is not joined."""
    rows = node.table.shape[0] if node.table.shape else 0
    if node.table_bytes is None or node.numbers_bytes is None or not isinstance(rows, int) or rows == 0:
        return 0
    row_bytes = node.table_bytes // rows
    return node.table_bytes + node.numbers_bytes if 0 < row_bytes <= _MOST_JOINED_BYTES else 0
