"""Where a session would keep the tables of a model, as the native library decides it."""

from __future__ import annotations

import ctypes
import dataclasses

from lucid_onnx.ops import OPERATOR_OF

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
        native.lucid_joined_table_plan.argtypes = (
            *(ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int64),
            ctypes.POINTER(ctypes.c_int64),
        )
    except AttributeError as error:
        raise OSError(f"{path}: library version mismatch: {error}") from error
    if native.lucid_table_plan(choice.encode(), 0, 0, 0) < 0:
        raise ValueError(f"table memory {choice!r} is not one of 'auto', 'inplace', 'hugepage_copy', 'mmap'")
    free = native.lucid_free_memory()
    held = {n.table.name: n for n in found.nodes if n.table_bytes is not None}
    places = []
    for name, node in held.items():
        size = node.table_bytes or 0
        rows = node.table.shape[0] if node.table.shape else None
        if node.numbers_bytes is not None and isinstance(rows, int) and rows > 0:
            copied = ctypes.c_int64()
            joined = native.lucid_joined_table_plan(choice.encode(), rows, size // rows, _numbers(node), free, copied)
            if joined > 0:
                pages = copied.value // _HUGE_PAGE if joined == 2 else 0
                places.append(TablePlace(name, size, node.table_external, "joined", copied.value, pages))
                continue
        plan = _PLANS[native.lucid_table_plan(choice.encode(), node.table_external, size, free)]
        # A copy is made of whole pages; in place, those count that lie wholly within the table.
        pages = {"copied": -(-size // _HUGE_PAGE), "in place": size // _HUGE_PAGE}.get(plan, 0)
        copied_bytes = pages * _HUGE_PAGE if plan == "copied" else 0
        places.append(TablePlace(name, size, node.table_external, plan, copied_bytes, pages))
    return TableMemory(choice, None if free < 0 else free, tuple(places))


def _numbers(node: Node) -> int:
    """How many numbers a row of a quantized table has beside its values: a scale, and maybe a zero_point or bias."""
    return OPERATOR_OF[node.op].spec.VARIANTS[node.op].inputs.index("indices") - 1
