"""A fixed number of bags, written out one after another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.rewrite.expressions import Expression, constant, first_input, number
from lucid_onnx.rewrite.normal_form import INT64_MAX, make

from .bag import Bag, Guess
from .shared import MODES, REDUCTIONS, read_bounds, sliced_at, sliced_weights


def unrolled(root: Expression) -> Iterator[Guess]:
    """A fixed number of bags, each a Slice of the indices, a Gather and a reduction, concatenated by a Concat.

    1. torch's TorchScript exporter writes nn.EmbeddingBag so at opset 10, and reads the bounds of each bag from the
       offsets. That is taken for what torch means, as in `torch_legacy`.
    2. A Python loop over bags has bounds that are numbers. The graph keeps its own meaning: a mean or a maximum over
       no rows, or a Slice past the end, is not what a bag computes.
    """
    if root.op != "Concat" or root.attributes.get("axis") != 0 or any(e is None for e in root.inputs):
        return
    parts = [_part(e) for e in root.inputs]
    first = parts[0]
    if first is None:
        return
    bounds = read_bounds(first.start)
    if bounds is not None:  # 1
        for bag in _bags_read_from(bounds, first):
            yield bag, _miscounted(bag, len(parts)) or _written(root, bag, bounds)
        return
    ends = [None if p is None else (number(p.start), number(p.end)) for p in parts]  # 2
    numbers = [(int(e[0]), int(e[1])) for e in ends if e is not None and e[0] is not None and e[1] is not None]
    if len(numbers) != len(parts):
        return
    flat = [numbers[0][0], *(end for _, end in numbers)]
    attributes = spec.Attributes(first.mode, include_last_offset=True)
    bag = Bag(first.weight, first.indices, constant(flat), first.weights, attributes)
    yield bag, _why_not_bags(numbers, first.mode, first.indices) or _written(root, bag, constant(flat))


class _Part(NamedTuple):
    """One bag that is written out."""

    mode: str
    weight: Expression
    indices: Expression
    weights: Expression | None
    start: Expression | None
    end: Expression | None


def _part(e: Expression | None) -> _Part | None:
    reduced = first_input(e) if e is not None and e.op == "Unsqueeze" else e
    rows = first_input(reduced)
    if reduced is None or reduced.op not in MODES or rows is None:
        return None
    weights = None
    if rows.op == "Mul" and len(rows.inputs) == 2:
        weights = sliced_weights(rows.inputs[1])
        if weights is None or rows.inputs[0] is None:
            return None
        rows = rows.inputs[0]
    at = rows.inputs[1] if rows.op == "Gather" else None
    if at is None or at.op != "Slice" or len(at.inputs) != 4:
        return None
    weight, indices = rows.inputs[0], at.inputs[0]
    if weight is None or indices is None or weight.rank != 2:
        return None
    return _Part(MODES[reduced.op], weight, indices, weights, at.inputs[1], at.inputs[2])


def _bags_read_from(bounds: Expression, part: _Part) -> Iterator[Bag]:
    """The bags whose bounds are those: offsets with the largest number behind them, or with their own end."""
    attributes = spec.Attributes(part.mode)
    last = bounds.inputs[1] if bounds.op == "Concat" and len(bounds.inputs) == 2 else None
    if number(last) == INT64_MAX and bounds.inputs[0] is not None:
        yield Bag(part.weight, part.indices, bounds.inputs[0], part.weights, attributes)
    bag = Bag(part.weight, part.indices, bounds, part.weights, attributes)
    yield bag.with_attributes(include_last_offset=True)


def _miscounted(bag: Bag, count: int) -> str | None:
    """Why the bags that are written out are not those of the offsets, or None."""
    assert bag.offsets is not None
    expected = count + bag.attributes.include_last_offset
    length = bag.offsets.dims[0] if bag.offsets.dims is not None and len(bag.offsets.dims) == 1 else None
    if length == expected:
        return None
    known = "unknown" if length is None else repr(length)
    return f"it has {count} bags, which takes {expected} offsets, and their number is {known}"


def _why_not_bags(bounds: Sequence[tuple[int, int]], mode: str, indices: Expression) -> str | None:
    """Why slices between these bounds are not the bags of one list of indices, or None."""
    if bounds[0][0] != 0:
        return f"its first bag begins at {bounds[0][0]}, not at 0"
    for k, (one, other) in enumerate(itertools.pairwise(bounds)):
        if one[1] != other[0]:
            return f"bag {k} ends at {one[1]}, and bag {k + 1} begins at {other[0]}"
    for k, (start, end) in enumerate(bounds):
        if end < start or (mode != "sum" and end == start):
            return f"bag {k} goes from {start} to {end}, and its {mode} is not a row of zeros to the model"
    count = indices.dims[0] if indices.dims is not None and len(indices.dims) == 1 else None
    if not isinstance(count, int) or count < bounds[-1][1]:
        known = "unknown" if count is None else repr(count)
        return f"its bags end at {bounds[-1][1]}, and the number of indices is {known}"
    return None


def _written(root: Expression, bag: Bag, bounds: Expression) -> Expression:
    """The bags written out, each with its axis kept by the reduction or put back behind it, as the graph does."""
    written = []
    for k, e in enumerate(root.inputs):
        at = [sliced_at(bounds, i) for i in (k, k + 1)]
        rows = make("Gather", bag.weight, make("Slice", bag.indices, *at, [0]))
        if bag.per_sample_weights is not None:
            rows = make("Mul", rows, make("Unsqueeze", make("Slice", bag.per_sample_weights, *at, [0]), [1]))
        keepdims = int(e is not None and e.op != "Unsqueeze")
        reduced = make(REDUCTIONS[bag.attributes.mode], rows, [0], keepdims=keepdims)
        written.append(reduced if keepdims else make("Unsqueeze", reduced, [0]))
    return make("Concat", *written, axis=0)
