"""Masks as the conditions that they stand for, so that two spellings of one mask compare equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lucid_onnx.rewrite.expressions import Expression, constant, difference, from_array, number
from lucid_onnx.rewrite.normal_form import make

from .bag import INTEGERS

#: How far a mask is followed.
_DEPTH = 30
#: Operators that move elements, or repeat them.
MOVES = frozenset(("Expand", "Flatten", "Gather", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"))
_COMPARE = {"Equal": np.equal, "Less": np.less, "Greater": np.greater}
_COMPARE |= {"LessOrEqual": np.less_equal, "GreaterOrEqual": np.greater_equal}
_SWAPPED = {"Equal": "Equal", "Less": "Greater", "Greater": "Less", "LessOrEqual": "GreaterOrEqual"}
_SWAPPED |= {"GreaterOrEqual": "LessOrEqual"}
_NOT = {"Less": "GreaterOrEqual", "Greater": "LessOrEqual", "LessOrEqual": "Greater", "GreaterOrEqual": "Less"}

#: Conditions that are true together.
Truth = tuple[Expression, ...]


def truth_of(e: Expression | None, depth: int = _DEPTH) -> Truth | None:
    """The conditions of an expression that is 1 (or true) where all of them are true, and 0 (or false) elsewhere.

    None for numbers that are not known to be 0 and 1 alone, as those of an input.
    """
    if e is None or depth == 0:
        return None
    if e.array is not None:
        if not ((e.array == 0) | (e.array == 1)).all():
            return None
        return (from_array(e.array.astype(bool)),)
    if e.type == ir.DataType.BOOL:
        return _conditions(e, depth)
    if e.op in MOVES:
        inner = truth_of(e.inputs[0], depth - 1)
        return None if inner is None else tuple(moved(e, t) for t in inner)
    if e.op == "Cast" and e.inputs[0] is not None:
        return truth_of(e.inputs[0], depth - 1)
    if e.op == "Mul" and len(e.inputs) == 2:
        one, other = (truth_of(i, depth - 1) for i in e.inputs)
        return None if one is None or other is None else (*one, *other)
    if e.op == "Sub" and number(e.inputs[0]) == 1:
        inner = truth_of(e.inputs[1], depth - 1)
        return None if inner is None else _negated(inner)
    if e.op == "Where" and len(e.inputs) == 3 and e.inputs[0] is not None:
        chosen = tuple(number(i) for i in e.inputs[1:])
        if chosen in ((1, 0), (0, 1)):
            inner = _conditions(e.inputs[0], depth - 1)
            return inner if chosen == (1, 0) else _negated(inner)
    return None


def _conditions(e: Expression, depth: int) -> Truth:
    """Those of truth values; what is not looked into is one condition."""
    first, second = (*e.inputs, None, None)[:2]
    if depth == 0 or e.array is not None or first is None:
        return (e,)
    if e.op in MOVES and first.type == ir.DataType.BOOL:
        return tuple(moved(e, t) for t in _conditions(first, depth - 1))
    if e.op == "And" and second is not None:
        return (*_conditions(first, depth - 1), *_conditions(second, depth - 1))
    if e.op == "Cast":
        found = truth_of(first, depth - 1)
        if found is not None:
            return found
        return (is_not(first, 0),) if first.type is not None and first.type != ir.DataType.STRING else (e,)
    if e.op == "Not":
        if first.op in ("Or", "Cast") or (first.op == "Equal" and first.inputs[0] is not None):
            inner = _conditions(first, depth - 1)
            if first.op == "Or":
                return (
                    *_conditions(make("Not", first.inputs[0]), depth - 1),
                    *_conditions(make("Not", first.inputs[1]), depth - 1),
                )
            return (e,) if len(inner) == 1 and inner[0] is first else _negated(inner)
        if first.op in _NOT and all(i is not None and i.type in INTEGERS for i in first.inputs):  # no NaN
            return (make(_NOT[first.op], *first.inputs),)
        return (e,) if first.op not in MOVES else _negated(_conditions(first, depth - 1))
    if e.op in _COMPARE and second is not None:
        return _compared(e, first, second, depth)
    return (e,)


def _compared(e: Expression, first: Expression, second: Expression, depth: int) -> Truth:
    """A mask compared with a number is the mask, or its opposite."""
    op, x, limit = e.op, first, second
    if number(x) is not None:
        op, x, limit = _SWAPPED[op], limit, x
    value = number(limit)
    if value is None or (limit.array is not None and limit.array.ndim > (x.rank or 0)):
        return (e,)
    inner = truth_of(x, depth - 1)
    if inner is None or x.array is not None:
        return (e,)
    zero, one = (bool(_COMPARE[op](bit, value)) for bit in (0, 1))
    return (e,) if zero == one else inner if one else _negated(inner)


def integers_of(e: Expression | None, depth: int = _DEPTH) -> Expression | None:
    """The integers that numbers of 32 bits or more were cast from, so that they are finite; None for other numbers."""
    if e is None or depth == 0 or e.type not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return None
    if e.op in MOVES:
        inner = integers_of(e.inputs[0], depth - 1)
        return None if inner is None else moved(e, inner)
    source = e.inputs[0] if e.op == "Cast" else None
    return source if source is not None and source.type in INTEGERS else None


class Offset(NamedTuple):
    """A number that is 0 where all of ``kept`` are true, and ``value`` elsewhere."""

    kept: Truth
    value: float


def offset_of(e: Expression | None, depth: int = _DEPTH) -> Offset | None:
    """Of numbers such as ``(1 - mask) * -1e9``, which are added to rows or scores."""
    if e is None or depth == 0:
        return None
    first, second = (*e.inputs, None, None)[:2]
    if e.op in MOVES:
        inner = offset_of(first, depth - 1)
        return None if inner is None else inner._replace(kept=tuple(moved(e, t) for t in inner.kept))
    if e.op == "Neg":
        inner = offset_of(first, depth - 1)
        return None if inner is None else inner._replace(value=-inner.value)
    if e.op == "Where" and len(e.inputs) == 3 and first is not None:
        then, otherwise = (number(i) for i in e.inputs[1:])
        if then == 0 and otherwise is not None:
            return Offset(_conditions(first, depth - 1), float(otherwise))
        return Offset(_negated(_conditions(first, depth - 1)), float(then)) if otherwise == 0 and then else None
    if e.op == "Sub" and number(second) == 1:  # mask - 1
        kept = truth_of(first, depth - 1)
        return None if kept is None else Offset(kept, -1.0)
    if e.op == "Mul" and len(e.inputs) == 2:
        for x, factor in (e.inputs, e.inputs[::-1]):
            value, mask = number(factor), truth_of(x, depth - 1)
            inner = Offset(_negated(mask), 1.0) if mask is not None else offset_of(x, depth - 1)
            if value is not None and inner is not None and (x is None or x.array is None):
                return inner._replace(value=float(np.asarray(inner.value * value)))
    return None


def is_not(e: Expression, value: int) -> Expression:
    """Where numbers are not one number."""
    return make("Not", make("Equal", e, make("Cast", constant(value), to=int(e.type or ir.DataType.INT64))))


def _negated(truth: Truth) -> Truth:
    return (make("Not", all_of(truth)),)


def all_of(truth: Sequence[Expression]) -> Expression:
    """One condition: that all of them are true."""
    first, *rest = truth
    for other in rest:
        first = make("And", first, other)
    return first


def moved(by: Expression, e: Expression) -> Expression:
    return make(by.op, e, *by.inputs[1:], **by.attributes)


def are_same(a: Sequence[Expression], b: Sequence[Expression]) -> bool:
    """Whether both are the same conditions, in any order and however often."""
    return all(is_among(x, b) for x in a) and all(is_among(y, a) for y in b)


def is_among(x: Expression, others: Sequence[Expression]) -> bool:
    """Whether a condition is one of others."""
    return any(difference(x, y) is None for y in others)


def are_at_least_0(x: Expression, indices: Expression) -> bool:
    """Whether a condition says no less of an index than that it is not below zero."""
    if x.op not in ("Greater", "GreaterOrEqual") or difference(x.inputs[0], indices) is not None:
        return False
    limit = number(x.inputs[1])
    return limit is not None and limit >= (-1 if x.op == "Greater" else 0)
