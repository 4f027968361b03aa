"""Rows that were gathered from a table, with the numbers and masks that they were multiplied or selected by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from lucid_onnx.rewrite.expressions import Dim, Expression, constant, from_array, number
from lucid_onnx.rewrite.normal_form import make
from lucid_onnx.rewrite.shapes import elements

from .bag import FLOATS
from .columns import column, expanded, filler_of, fits, is_filled_with, permuted, without_element
from .masks import padding_of
from .truth import all_of, offset_of

#: How far rows are followed to their Gather.
_DEPTH = 40
#: Operators that change rows in another way than by a number for each index.
_CHANGING = frozenset(("Pow", "Max", "Min", "Clip", "Concat", "ScatterND", "ScatterElements", "Relu", "LeakyRelu"))
_CHANGING |= {
    "Gelu",
    "Sigmoid",
    "Tanh",
    "Exp",
    "Log",
    "Sqrt",
    "Abs",
    "Softplus",
    "Erf",
    "Elu",
    "Selu",
    "PRelu",
    "Expand",
}


class Step(NamedTuple):
    """What was done to rows: a product with ``numbers``, or a choice of ``filler`` where ``numbers`` is false.

    Attributes:
        numbers: broadcast with the indices.
        padding: ``p`` where this keeps the rows whose index is not p, and no others.
        filler: what a row is replaced by.
        otherwise: where that is not zero, why the rows are then not those of a sum.
        is_added: the filler was added to rows; where it is so large that it swallows them, it replaces them.
    """

    selects: bool
    numbers: Expression
    padding: int | None
    filler: float = 0.0
    otherwise: str = ""
    is_added: bool = False


class Obstacle(NamedTuple):
    """Why rows are not those of a bag, and the rows before that."""

    reason: str
    rows: Rows | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of ``table`` at ``indices``, of which one axis is the table's columns.

    Attributes:
        axis: the axis of the table's columns, counted from the end; 0 if the table has one column and its axis was
            taken away.
        steps: what was done to the rows, the first one first.
        type: the type of the numbers now.
    """

    table: Expression
    indices: Expression
    axis: int
    type: ir.DataType
    steps: tuple[Step, ...] = ()

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return (self.indices.rank or 0) + (self.axis != 0)

    @property
    def place(self) -> int | None:
        """The axis of the table's columns, counted from the first; None if there is none."""
        return self.axis + self.rank if self.axis else None

    @property
    def width(self) -> Dim:
        """The number of the table's columns."""
        return self.table.dims[1] if self.table.dims is not None else None

    @property
    def dims(self) -> tuple[Dim, ...]:
        """The dimensions."""
        dims = tuple(self.indices.dims or ())
        return dims if self.place is None else (*dims[: self.place], self.width, *dims[self.place :])

    def column(self, e: Expression | None) -> Expression | None:
        """Of an expression that the rows are broadcast with: one number for each index, or None."""
        return e if self.axis == 0 else column(e, self.axis, self.width)

    @property
    def is_plain(self) -> bool:
        """Whether nothing was done to the rows."""
        return not self.steps

    def index_axis(self, axis: int) -> int:
        """The axis of the indices that an axis of the rows is; it is not that of the columns."""
        return axis - (self.place is not None and axis > self.place)

    def moved(self, move: Callable[[Expression], Expression], axis: int) -> Rows:
        """The rows after an operator that moves indices, and with them all numbers.

        Args:
            axis: where the table's columns are from then on.
        """
        shape = make("Shape", self.indices)
        steps = tuple(s._replace(numbers=move(expanded(s.numbers, shape))) for s in self.steps)
        return dataclasses.replace(self, indices=move(self.indices), axis=axis, steps=steps)

    def after(self, selects: bool, numbers: Expression, **filled: Any) -> Rows | Obstacle:
        """The rows after a step; ``filled`` are its further attributes."""
        indices = self.indices
        if not fits(numbers, indices):
            if numbers.rank is None or numbers.rank > (indices.rank or 0):
                return Obstacle(f"{numbers} has another number of dimensions than the indices")
            # The indices grow to the shape that the product has, and the numbers do where they are used.
            indices = make("Expand", indices, make("Shape", numbers))
        elif not selects and is_filled_with(numbers, 1):
            return self
        found = padding_of(numbers, indices)
        step = Step(selects, numbers, found.padding_idx if found is not None and found.kept else None, **filled)
        return dataclasses.replace(self, indices=indices, steps=(*self.steps, step))


def find_rows(
    e: Expression | None, seen: dict[int, Rows | Obstacle | None], depth: int = _DEPTH
) -> Rows | Obstacle | None:
    """The rows that an expression is; why it is not though rows are in it; None if there are none.

    Args:
        seen: what was found before, by the expressions' ids.
    """
    if e is None or depth == 0 or e.array is not None:
        return None
    if id(e) not in seen:
        seen[id(e)] = None
        rule = _RULES.get(e.op, _changed if e.op in _CHANGING else None)
        seen[id(e)] = None if rule is None else rule(e, lambda x: find_rows(x, seen, depth - 1))
    return seen[id(e)]


_Found = Rows | Obstacle | None
_Find = Callable[[Expression | None], _Found]


def _gather(e: Expression, find: _Find) -> _Found:
    table, indices = (*e.inputs, None)[:2]
    if table is None or indices is None or e.attributes.get("axis") != 0 or table.rank != 2 or table.type not in FLOATS:
        return None
    if indices.rank is None and indices.op == "Slice":
        return None  # of one bag in a Loop, which is looked at as a whole
    if indices.rank is None:
        return Obstacle(
            f"the number of dimensions of its indices, {indices}, is not known; declare a shape, and it may be a bag"
        )
    return Rows(table, indices, -1, table.type)


def _changed(e: Expression, find: _Find) -> _Found:
    """Rows that are changed in a way that a bag has no word for."""
    for operand in e.inputs:
        found = find(operand)
        if isinstance(found, Obstacle):
            return found
        if found is not None:
            return Obstacle(
                f"the rows go through {e.op} before they are pooled; a bag only multiplies each row by a number", found
            )
    return None


def _mul(e: Expression, find: _Find) -> _Found:
    obstacle: Obstacle | None = None
    for rows, factor in (e.inputs, e.inputs[::-1]):
        found = find(rows)
        if isinstance(found, Rows):
            numbers = found.column(factor)
            if numbers is not None:
                return found.after(False, numbers)
            obstacle = Obstacle(
                f"the rows are multiplied by something else than a number for each index, {factor}: of [.., 1], or "
                "known to repeat one number in all columns",
                found,
            )
        elif found is not None:
            obstacle = obstacle or found
    return obstacle


def _added(e: Expression, find: _Find) -> _Found:
    """Rows plus zero or one other number, which depends on a mask: ``rows + (mask - 1) * 1e9``."""
    for k in (0, 1) if e.op == "Add" else (0,):
        found, other = find(e.inputs[k]), e.inputs[1 - k] if len(e.inputs) == 2 else None
        offset = offset_of(found.column(other)) if isinstance(found, Rows) and found.is_plain else None
        value = 0.0 if offset is None else offset.value if e.op == "Add" else -offset.value
        changed = _changed(e, find)
        if offset is not None and value < 0 and isinstance(found, Rows) and isinstance(changed, Obstacle):
            return found.after(True, all_of(offset.kept), filler=value, otherwise=changed.reason, is_added=True)
    return _changed(e, find)


def _div(e: Expression, find: _Find) -> _Found:
    """By a constant, which is a product with its reciprocal up to the last bit."""
    found, divisor = find(e.inputs[0]), number(e.inputs[1]) if len(e.inputs) == 2 else None
    if not isinstance(found, Rows) or divisor is None or found.type.itemsize < 4:
        return _changed(e, find)
    c = np.asarray(divisor, found.type.numpy())
    with np.errstate(all="ignore"):
        inverse = np.asarray(1 / c, c.dtype)
    tiny = np.finfo(c.dtype).tiny
    if not (np.isfinite(c) and np.isfinite(inverse) and min(abs(c), abs(inverse)) >= tiny):
        return _changed(e, find)
    return found.after(False, from_array(inverse))


def _projected(e: Expression, find: _Find) -> _Found:
    """Rows that a layer changes; behind further ones it is a network, and not meant for a bag."""
    found = find(e.inputs[0]) if e.inputs else None
    if not isinstance(found, Rows):
        return None
    return _changed(e, lambda x: found if x is e.inputs[0] else None)


def _where(e: Expression, find: _Find) -> _Found:
    if len(e.inputs) != 3:
        return None
    condition, then, otherwise = e.inputs
    obstacle: Obstacle | None = None
    for rows, other, negated in ((then, otherwise, False), (otherwise, then, True)):
        found = find(rows)
        if not isinstance(found, Rows) or other is None:
            obstacle = obstacle or (found if isinstance(found, Obstacle) else None)
            continue
        filler, why = filler_of(other), f"the Where puts something else than zero in the place of rows, {other}"
        if filler is None or not _fits_rows(other, found):
            obstacle = Obstacle(why, found)
            continue
        mask = found.column(condition)
        if mask is None:
            obstacle = Obstacle(
                f"the Where selects rows by something else than one truth value for each index, {condition}", found
            )
            continue
        filled = {"filler": filler, "otherwise": why} if filler else {}
        return found.after(True, make("Not", mask) if negated else mask, **filled)
    return obstacle


def _fits_rows(e: Expression, rows: Rows) -> bool:
    """Whether a Where of this and rows has the rows' shape."""
    if e.dims is None or len(e.dims) > rows.rank:
        return False
    inner = rows.dims[rows.rank - len(e.dims) :]
    return all(a == 1 or (a is not None and a == b) for a, b in zip(e.dims, inner, strict=True))


def _neg(e: Expression, find: _Find) -> _Found:
    found = find(e.inputs[0])
    if not isinstance(found, Rows):
        return found
    return found.after(False, make("Cast", constant(-1), to=int(found.type)))


def _cast(e: Expression, find: _Find) -> _Found:
    """Between types of floats; rows of 16 bits are exact in wider ones."""
    found = find(e.inputs[0])
    if not isinstance(found, Rows):
        return found
    to = ir.DataType(e.attributes["to"])
    if to not in FLOATS or (to.itemsize <= found.type.itemsize):
        name = FLOATS.get(to, to.name.lower())
        return Obstacle(f"the rows are cast from {FLOATS[found.type]} to {name} before they are pooled", found)
    steps = tuple(s if s.selects else s._replace(numbers=make("Cast", s.numbers, to=int(to))) for s in found.steps)
    return dataclasses.replace(found, type=to, steps=steps)


# ---- What moves rows.


def _transpose(e: Expression, find: _Find) -> _Found:
    found = find(e.inputs[0])
    if not isinstance(found, Rows):
        return found
    perm = list(e.attributes.get("perm", reversed(range(found.rank))))
    if sorted(perm) != list(range(found.rank)):
        return None
    rest = [found.index_axis(p) for p in perm if p != found.place]
    axis = 0 if found.place is None else perm.index(found.place) - found.rank
    return found.moved(lambda x: permuted(x, rest), axis)


def _positions(e: Expression, rank: int) -> list[int] | None:
    axes = e.inputs[1] if len(e.inputs) == 2 else None
    if axes is None or axes.array is None:
        return None
    return sorted(int(a) + (rank if a < 0 else 0) for a in axes.array.reshape(-1))


def _unsqueeze(e: Expression, find: _Find) -> _Found:
    found = find(e.inputs[0])
    if not isinstance(found, Rows):
        return found
    axes = e.inputs[1].array if len(e.inputs) == 2 and e.inputs[1] is not None else None
    rank = found.rank + (0 if axes is None else axes.size)
    positions = _positions(e, rank)
    if positions is None:
        return None
    if found.place is None:
        return found.moved(lambda x: make("Unsqueeze", x, positions), 0)
    place = [k for k in range(rank) if k not in positions][found.place]
    inner = [a - (a > place) for a in positions]
    return found.moved(lambda x: make("Unsqueeze", x, inner), place - rank)


def _squeeze(e: Expression, find: _Find) -> _Found:
    found = find(e.inputs[0])
    if not isinstance(found, Rows):
        return found
    positions = _positions(e, found.rank)
    if positions is None or (found.place in positions and found.width != 1):
        return None
    inner = [found.index_axis(a) for a in positions if a != found.place]
    axis = 0
    if found.place is not None and found.place not in positions:
        axis = found.place - sum(a < found.place for a in positions) - (found.rank - len(positions))
    return found.moved(lambda x: make("Squeeze", x, inner) if inner else x, axis)


def _reshape(e: Expression, find: _Find) -> _Found:
    """Reshape to [.., D], which is one of the indices."""
    found = find(e.inputs[0])
    if not isinstance(found, Rows):
        return found
    target = e.inputs[1] if len(e.inputs) == 2 else None
    sizes = elements(target)
    if target is None or sizes is None or not sizes or found.axis not in (0, -1):
        return None
    if found.axis == 0:
        return found.moved(lambda x: make("Reshape", x, target, **e.attributes), 0)
    whole = sizes[-1] == -1 and _known_equal(sizes[:-1], found.dims[:-1])
    rest = without_element(target, -1)
    if rest is None or not (whole or (isinstance(sizes[-1], int) and sizes[-1] == found.width and found.width > 0)):
        return None
    return found.moved(lambda x: make("Reshape", x, rest, **e.attributes), -1)


def _known_equal(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    return len(a) == len(b) and all(x is not None and x == y for x, y in zip(a, b, strict=True))


def _slice(e: Expression, find: _Find) -> _Found:
    """Some of the indices."""
    found = find(e.inputs[0])
    if not isinstance(found, Rows):
        return found
    axes = None if len(e.inputs) < 4 or e.inputs[3] is None else e.inputs[3].array
    if axes is None:
        return None
    positions = [int(a) + (found.rank if a < 0 else 0) for a in axes.reshape(-1)]
    if found.place in positions:
        return None
    inner = constant([found.index_axis(a) for a in positions])
    rest = (*e.inputs[1:3], inner, *e.inputs[4:])
    return found.moved(lambda x: make("Slice", x, *rest), found.axis)


def _expand(e: Expression, find: _Find) -> _Found:
    found = find(e.inputs[0])
    sizes = elements(e.inputs[1] if len(e.inputs) == 2 else None)
    if isinstance(found, Rows) and sizes is not None and _known_equal(sizes, found.dims):
        return found
    return _changed(e, find)


_RULES: dict[str, Callable[[Expression, _Find], _Found]] = {
    "Add": _added,
    "Cast": _cast,
    "Div": _div,
    "Expand": _expand,
    "Gather": _gather,
    "Mul": _mul,
    "Neg": _neg,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _added,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
    **dict.fromkeys(("BatchNormalization", "Gemm", "LayerNormalization", "LpNormalization", "MatMul"), _projected),
}
