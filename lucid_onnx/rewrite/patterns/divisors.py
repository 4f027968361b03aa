"""What a sum of rows is divided by: the number of its rows, its weights, or the square root of either."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lucid_onnx.rewrite.expressions import Expression, difference, number
from lucid_onnx.rewrite.shapes import elements

from .bag import Bag
from .columns import column, is_filled_with, same_shape
from .finite import Magnitudes
from .masks import counted, padding_of, rooted, without_casts
from .pooled import WIDE, Found, Pooled, bag_of
from .truth import Truth, are_same, truth_of


class Mean(NamedTuple):
    """A bag that is divided.

    Attributes:
        needs_rows: over no columns the graph has 0 / 0, and the bag zeros.
        may_divide_by_0: where weights add up to 0, the graph divides by it, and so does the bag.
    """

    pooled: Pooled
    bag: Bag
    needs_rows: bool = False
    may_divide_by_0: bool = False


def mean_of(pooled: Pooled | None, divisor: Expression | None, magnitudes: Magnitudes) -> Mean | None:
    """The bag of a sum that is divided by

    1. the number of rows that are left, or by a number above zero and up to one where none are,
    2. the number of all rows,
    3. the sum of weights,
    4. the square root of one of these, or of the sum of squares of weights.
    """
    n = _per_bag(divisor, pooled) if pooled is not None and divisor is not None else None
    if pooled is None or n is None or pooled.mode != "sum" or pooled.rows.type not in WIDE:
        return None
    found = bag_of(pooled, magnitudes)
    if isinstance(found, Found) and (count := counted(n)) is not None and _is_count(count.n, pooled, found):  # 1
        return Mean(pooled, _divided(found.bag, "count", is_root=count.is_root))
    found = bag_of(pooled, magnitudes, as_weights=True)
    if not isinstance(found, Found):
        return None
    root = rooted(n)  # 4
    if _is_number_of_all(n if root is None else root, pooled):  # 2
        return Mean(pooled, _divided(found.bag, "count", is_root=root is not None), needs_rows=True)
    summed = _summed(without_casts(n if root is None else root), pooled)
    if summed is None or found.bag.per_sample_weights is None:
        return None
    factors = _factors(summed)
    mine = [f for s in pooled.rows.steps for f in _factors(s.numbers)]
    if root is not None:
        mine = [f for f in mine for _ in range(1 if isinstance(f, tuple) else 2)]
    if not _are_same_factors(factors, mine):
        return None
    return Mean(  # 3
        pooled, _divided(found.bag, "weights", is_root=root is not None), needs_rows=True, may_divide_by_0=True
    )


def _divided(bag: Bag, divisor: str, *, is_root: bool) -> Bag:
    weighted = bag.per_sample_weights is not None
    return bag.with_attributes(mode="sqrtn" if is_root else "mean", divisor=divisor if weighted else None)


def _per_bag(divisor: Expression, pooled: Pooled) -> Expression | None:
    """A number for each bag: without the axes of size 1, and that of the columns; in the order of the indices' axes."""
    layout = pooled.layout
    n: Expression | None = divisor
    if (divisor.rank or 0) > len(layout):
        return None
    for place, label in enumerate(layout):
        if not isinstance(label, int) and n is not None:
            n = column(n, place - len(layout), pooled.rows.width if label == "D" else 1)
    kept = [label for label in layout if isinstance(label, int)]
    return n if kept == sorted(kept) else None


def _summed(n: Expression, pooled: Pooled) -> Expression | None:
    """What a sum over the bag's own axes adds up, in the shape of the indices."""
    if n.op != "ReduceSum" or n.attributes["keepdims"]:
        return None
    x, axes = (*n.inputs, None)[:2]
    if x is None or axes is None or axes.array is None or x.rank is None or x.rank != pooled.rows.indices.rank:
        return None
    over = sorted(int(a) + (x.rank if a < 0 else 0) for a in axes.array.reshape(-1))
    return x if over == sorted(pooled.reduced) and same_shape(x, pooled.rows.indices) else None


def _is_count(n: Expression, pooled: Pooled, found: Found) -> bool:
    """Whether this is the number of rows that a bag keeps."""
    mask = _summed(n, pooled)
    padding_idx, indices = found.bag.attributes.padding_idx, pooled.rows.indices
    if mask is None or not found.kept:
        return False
    if padding_idx is not None:
        of = padding_of(mask, indices)
        return of is not None and of.kept and of.padding_idx == padding_idx
    truth = truth_of(mask)
    return truth is not None and are_same(truth, found.kept)


def _is_number_of_all(n: Expression, pooled: Pooled) -> bool:
    """Whether this is the product of the lengths of the axes that are reduced."""
    summed = _summed(without_casts(n), pooled)
    if summed is not None:
        return is_filled_with(summed, 1)
    dims = pooled.rows.indices.dims or ()
    lengths = [dims[k] for k in pooled.reduced if k < len(dims)]
    value = number(n)
    if value is not None:
        fixed = [d for d in lengths if isinstance(d, int)]
        return len(fixed) == len(pooled.reduced) and math.prod(fixed) == value
    sizes = elements(without_casts(n))
    return sizes is not None and len(sizes) == 1 and lengths == list(sizes) and sizes[0] is not None


# ---- Products.

_Factor = Expression | Truth


def _factors(e: Expression, depth: int = 20) -> list[_Factor]:
    """What a product is of: expressions, and the conditions of masks."""
    truth = truth_of(e)
    if truth is not None:
        return [truth]
    if depth and e.op == "Mul" and len(e.inputs) == 2:
        return [f for i in e.inputs if i is not None for f in _factors(i, depth - 1)]
    if depth and e.op == "Pow" and number(e.inputs[1]) == 2 and e.inputs[0] is not None:
        return 2 * _factors(e.inputs[0], depth - 1)
    return [e]


def _are_same_factors(a: Sequence[_Factor], b: Sequence[_Factor]) -> bool:
    """Whether two products are equal; a mask is the same however often it is a factor."""
    masks = [[c for f in side if isinstance(f, tuple) for c in f] for side in (a, b)]
    numbers = [[f for f in side if isinstance(f, Expression)] for side in (a, b)]
    if not are_same(*masks) or len(numbers[0]) != len(numbers[1]):
        return False
    rest = numbers[1]
    for e in numbers[0]:
        match = next((k for k, other in enumerate(rest) if difference(e, other) is None), None)
        if match is None:
            return False
        rest = [other for k, other in enumerate(rest) if k != match]
    return True
