"""Masks that say which indices are the padding_idx, and counts of those that are not."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from lucid_onnx.rewrite.expressions import Expression, difference, number

from .bag import INTEGERS

#: How far a mask is followed to the indices.
_DEPTH = 30
#: Whole numbers up to this are exact in a type of floats.
_EXACT = {
    ir.DataType.FLOAT16: 2**11,
    ir.DataType.BFLOAT16: 2**8,
    ir.DataType.FLOAT: 2**24,
    ir.DataType.DOUBLE: 2**53,
}
_SWAPPED = {"Equal": "Equal", "Less": "Greater", "Greater": "Less", "LessOrEqual": "GreaterOrEqual"}
_SWAPPED |= {"GreaterOrEqual": "LessOrEqual"}


class Padding(NamedTuple):
    """A mask of numbers 0 and 1, or of truth values: true where an index is not ``padding_idx``, or where it is."""

    padding_idx: int
    kept: bool

    def negated(self) -> Padding:
        """The opposite mask."""
        return self._replace(kept=not self.kept)


def padding_of(mask: Expression | None, indices: Expression, depth: int = _DEPTH) -> Padding | None:
    """Of which index a mask over indices [..] is, or None. Indices are not below zero, since a bag rejects those."""
    if mask is None or depth == 0 or mask.array is not None:
        return None
    first, second = (*mask.inputs, None, None)[:2]
    if mask.op == "Cast":
        if ir.DataType(mask.attributes["to"]) == ir.DataType.BOOL and is_same(first, indices):
            return Padding(0, True)  # whether an index is not 0
        return padding_of(first, indices, depth - 1)
    if mask.op == "Not":
        found = padding_of(first, indices, depth - 1)
        return None if found is None else found.negated()
    if mask.op == "Sign" and first is not None and first.type in INTEGERS and is_same(first, indices):
        return Padding(0, True)
    if mask.op in _SWAPPED and len(mask.inputs) == 2:
        return _compared(mask, indices, depth)
    if mask.op == "Sub" and number(first) == 1:
        found = padding_of(second, indices, depth - 1)
        return None if found is None or mask.type == ir.DataType.BOOL else found.negated()
    if mask.op == "Where" and len(mask.inputs) == 3:
        chosen = tuple(number(i) for i in mask.inputs[1:])
        found = padding_of(first, indices, depth - 1) if chosen in ((1, 0), (0, 1)) else None
        return None if found is None else found if chosen == (1, 0) else found.negated()
    return None


def _compared(mask: Expression, indices: Expression, depth: int) -> Padding | None:
    """A comparison of indices, or of a mask of them, with a number."""
    op, (x, limit) = mask.op, mask.inputs
    if number(x) is not None:
        op, x, limit = _SWAPPED[op], limit, x
    value = number(limit)
    if value is None or x is None or limit is None or (limit.array is not None and limit.array.ndim > (x.rank or 0)):
        return None
    if _is_same_number(x, indices, value):
        if op == "Equal" and float(value).is_integer() and value >= 0:
            return Padding(int(value), False)
        if (op, value) in (("Greater", 0), ("GreaterOrEqual", 1)):
            return Padding(0, True)
        return Padding(0, False) if (op, value) in (("Less", 1), ("LessOrEqual", 0)) else None
    found = padding_of(x, indices, depth - 1)
    if found is None:
        return None
    # Of 0 and 1: which of them pass?
    compare = {"Equal": np.equal, "Less": np.less, "Greater": np.greater}
    compare |= {"LessOrEqual": np.less_equal, "GreaterOrEqual": np.greater_equal}
    zero, one = (bool(compare[op](bit, value)) for bit in (0, 1))
    return None if zero == one else found if one else found.negated()


def _is_same_number(x: Expression, indices: Expression, value: float) -> bool:
    """Whether an index compared with a number is the same as ``x`` compared with it."""
    if x.op == "Cast" and x.type in _EXACT:
        return abs(value) < _EXACT[x.type] and is_same(x.inputs[0], indices)
    return is_same(x, indices)


def is_same(x: Expression | None, indices: Expression) -> bool:
    """Whether these are the indices, in one of the types that indices have."""
    return x is not None and difference(_without_casts(x), _without_casts(indices)) is None


def _without_casts(e: Expression) -> Expression:
    while e.op == "Cast" and e.inputs[0] is not None and {e.type, e.inputs[0].type} <= set(INTEGERS):
        e = e.inputs[0]
    return e


def means_negatives(mask: Expression, indices: Expression) -> bool:
    """Whether a mask tells indices below zero from others, so that a model has them."""
    waiting, steps = [mask], 0
    while waiting and steps < 100:
        e, steps = waiting.pop(), steps + 1
        if e.op in _SWAPPED and len(e.inputs) == 2:
            for x, limit, op in ((*e.inputs, e.op), (*e.inputs[::-1], _SWAPPED[e.op])):
                value = number(limit)
                if value is None or x is None or not is_same(x, indices):
                    continue
                if value < 0 or (value == 0 and op in ("Less", "GreaterOrEqual")):
                    return True
        if e.op != "Gather":
            waiting += [i for i in e.inputs if i is not None and i.array is None]
    return False


# ---- Counts.


#: Types that have every count up to 2 ** 24.
_COUNTING = (ir.DataType.FLOAT, ir.DataType.DOUBLE, *INTEGERS)


class Count(NamedTuple):
    """``n``, or its square root."""

    n: Expression
    is_root: bool


def counted(divisor: Expression | None, depth: int = 8) -> Count | None:
    """``n`` of a divisor that is n (or its root) where n is 1 or more, and another finite number than 0 where it is 0.

    1. ``Max(n, c)`` and ``Clip(n, c)`` for 0 < c <= 1.
    2. ``n + c`` for a c that is lost when it is added to 1.
    3. ``Where(n == 0, c, n)``.
    4. A Cast of one of these.
    5. The square root of one of these, or one of these over the square root of n.

    A sum over no rows is 0, and divided by any such number it is the 0 of a bag.
    """
    if divisor is None or depth == 0 or divisor.type not in _COUNTING:
        return None
    found = None
    if divisor.op == "Cast":  # 4
        return counted(divisor.inputs[0], depth - 1)
    if (root := rooted(divisor)) is not None:  # 5
        inner = counted(root, depth - 1)
        return None if inner is None or inner.is_root else inner._replace(is_root=True)
    if divisor.op == "Clip" and len(divisor.inputs) == 2:
        found = divisor.inputs[0] if _is_least(divisor.inputs[1]) else None
    elif divisor.op in ("Max", "Add") and len(divisor.inputs) == 2:
        for n, least in (divisor.inputs, divisor.inputs[::-1]):
            if _is_least(least) and (divisor.op == "Max" or _is_lost(least)):
                found = n
    elif divisor.op == "Where" and len(divisor.inputs) == 3:
        condition, other, n = divisor.inputs
        if is_zero(condition, n) and _is_finite_nonzero(other):
            found = n
    while found is not None and found.op == "Cast" and found.type in _COUNTING:
        found = found.inputs[0]
    if found is None or found.type not in _COUNTING:
        return None
    root = rooted(found)  # 5
    return Count(found, False) if root is None else Count(without_casts(root), True)


def rooted(e: Expression | None) -> Expression | None:
    """``x`` of a square root of x."""
    if e is None or not e.inputs:
        return None
    is_power = e.op == "Pow" and len(e.inputs) == 2 and number(e.inputs[1]) == 0.5
    return e.inputs[0] if e.op == "Sqrt" or is_power else None


def is_zero(condition: Expression | None, n: Expression | None) -> bool:
    """Whether a condition says that n is 0."""
    if condition is None or condition.op != "Equal" or n is None:
        return False
    both = (condition.inputs, condition.inputs[::-1])
    return any(number(zero) == 0 and difference(side, n) is None for side, zero in both)


def without_casts(e: Expression) -> Expression:
    """A count without its casts to other types that have it."""
    while e.op == "Cast" and e.inputs[0] is not None and {e.type, e.inputs[0].type} <= set(_COUNTING):
        e = e.inputs[0]
    return e


def _is_least(e: Expression | None) -> bool:
    value = number(e)
    return value is not None and 0 < value <= 1


def _is_lost(e: Expression | None) -> bool:
    """Whether 1 + c is 1, and so n + c is n, in the type of c."""
    if e is None or e.array is None or e.array.dtype.kind != "f":
        return False
    c = e.array.reshape(-1)[0]
    return bool(c.dtype.type(1) + c == c.dtype.type(1))


def _is_finite_nonzero(e: Expression | None) -> bool:
    value = number(e)
    return value is not None and value != 0 and bool(np.isfinite(value))
