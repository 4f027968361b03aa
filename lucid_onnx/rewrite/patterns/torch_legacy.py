"""nn.EmbeddingBag as torch.onnx.export(dynamo=False) writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lucid_onnx.rewrite.expressions import Expression, constant
from lucid_onnx.rewrite.normal_form import INT64_MAX, loop, make

from .bag import Bag, Guess
from .shared import MODES, REDUCTIONS, bags_between, read_bounds, sliced_at, sliced_weights


def torch_legacy(root: Expression) -> Iterator[Guess]:
    """nn.EmbeddingBag as torch's TorchScript exporter writes it: a Loop over the bags that stacks what each gives.

    It is taken for what torch means. The Loop fails, or gives NaN, on an empty bag in mode mean or max, and reads the
    last row for an index of -1; a bag gives zeros, and rejects a negative index as torch does.
    """
    if root.op != "Loop" or root.output != 0 or len(root.inputs) != 2 or root.body is None:
        return
    if len(root.body.results) != 2:
        return
    reduced = root.body.results[1]
    if reduced is None or reduced.op not in MODES:
        return
    rows, weights = reduced.inputs[0], None
    if rows is not None and rows.op == "Mul":
        rows, factors = rows.inputs
        weights = sliced_weights(factors)
        if weights is None:
            return
    if rows is None or rows.op != "Gather" or rows.inputs[1] is None or rows.inputs[1].op != "Slice":
        return
    weight, indices = rows.inputs[0], rows.inputs[1].inputs[0]
    bounds = read_bounds(rows.inputs[1].inputs[1])
    if weight is None or indices is None or bounds is None:
        return
    for bag in bags_between(weight, indices, bounds, weights, MODES[reduced.op], None):
        yield bag, _written(bag)


def _written(bag: Bag) -> Expression:
    """How the exporter writes a bag."""
    indices, offsets, weights = bag.indices, bag.offsets, bag.per_sample_weights
    if offsets is None:
        shape = make("Shape", indices)
        offsets = make("Range", 0, make("ReduceProd", shape, keepdims=0), make("Gather", shape, 1))
        indices = make("Reshape", indices, [-1])
        weights = None if weights is None else make("Reshape", weights, [-1])
    bounds = offsets
    if not bag.attributes.include_last_offset:
        end = make("Unsqueeze", make("Gather", make("Shape", indices), 0), [0])
        bounds = make("Concat", offsets, end, axis=0)
    ends = make("Slice", bounds, [1], [INT64_MAX], [0], [1])
    true = constant(True, np.bool_)

    def body(i: Expression, _: Expression) -> Sequence[Expression]:
        at = [sliced_at(b, i) for b in (bounds, ends)]
        rows = make("Gather", bag.weight, make("Slice", indices, *at, [0]))
        if weights is not None:
            rows = make("Mul", rows, make("Unsqueeze", make("Slice", weights, *at, [0]), [1]))
        return true, make(REDUCTIONS[bag.attributes.mode], rows, [0], keepdims=0)

    return loop(make("Gather", make("Shape", ends), 0), true, [], body)
