"""What several patterns share: reductions, and bags that lie between bounds."""

from __future__ import annotations

from collections.abc import Iterator

from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.rewrite import nodes
from lucid_onnx.rewrite.expressions import Expression, from_array, input_of, number
from lucid_onnx.rewrite.normal_form import make

from .bag import Bag

#: The mode of each reduction, and the reduction of each mode.
MODES = {"ReduceSum": "sum", "ReduceMean": "mean", "ReduceMax": "max"}
REDUCTIONS = {mode: op for op, mode in MODES.items()}


def without_cast(e: Expression) -> Expression:
    """``x`` of ``Cast(x)``; everything else as it is."""
    return input_of(e, "Cast") or e


def read_bounds(e: Expression | None) -> Expression | None:
    """``bounds`` of ``Unsqueeze(Gather(bounds, i))``."""
    return input_of(input_of(e, "Unsqueeze"), "Gather")


def sliced_at(bounds: Expression, i: Expression | int) -> Expression:
    """Bound ``i``, [1], as a Slice takes it."""
    return make("Unsqueeze", make("Gather", bounds, i), [0])


def sliced_weights(factors: Expression | None) -> Expression | None:
    """``weights`` of ``Unsqueeze(Slice(weights, ...))``: those of one bag, a column."""
    return input_of(input_of(factors, "Unsqueeze"), "Slice")


def bags_between(
    weight: Expression,
    indices: Expression,
    bounds: Expression,
    weights: Expression | None,
    mode: str,
    padding_idx: int | None,
) -> Iterator[Bag]:
    """The bags that torch's exporters may have written with flat indices and these bounds, the plainest first.

    1. Indices [B, L] (and weights) that were flattened.
    2. Offsets that an end was put behind, or whose last one was set to the end.
    3. The bounds are the offsets, the last one included.

    Flat indices that were flattened once more are read from before that.
    """
    attributes = spec.Attributes(mode, padding_idx=padding_idx)
    flat = (indices, weights)
    if all(e is None or e.op == "Reshape" for e in flat):  # 1
        matrix, factors = (None if e is None else e.inputs[0] for e in flat)
        if matrix is not None and matrix.rank == 2 and (factors is None or factors.rank == 2):
            yield Bag(weight, matrix, None, factors, attributes)
    indices, weights = _unflattened(indices), None if weights is None else _unflattened(weights)
    with_last = Bag(weight, indices, bounds, weights, attributes).with_attributes(include_last_offset=True)
    if bounds.op in ("Concat", "ScatterElements") and bounds.inputs[0] is not None:  # 2
        bag = Bag(weight, indices, bounds.inputs[0], weights, attributes)
        yield bag.with_attributes(include_last_offset=bounds.op == "ScatterElements")
    if bounds.array is not None and bounds.array.ndim == 1 and bounds.array.size:  # 2, computed by the exporter
        yield Bag(weight, indices, from_array(bounds.array[:-1]), weights, attributes)
    yield with_last  # 3


def _unflattened(e: Expression) -> Expression:
    """``x`` of ``Reshape(x, [-1])`` where x [N] is known to have one dimension; everything else as it is."""
    x = input_of(e, "Reshape")
    return x if x is not None and x.rank == 1 and number(e.inputs[1]) == -1 else e


def is_held(e: Expression) -> bool:
    """Whether the model holds the numbers of this: a constant, or an initializer that nobody can override."""
    value = e.value
    held = value is not None and value.is_initializer() and not value.is_graph_input()
    return e.array is not None or (held and e.op == "Value")


def is_all(e: Expression, what: float) -> bool:
    """Whether the model holds these numbers, and all of them are ``what``. External data, which is mapped, is read."""
    array = e.array
    if array is None and e.value is not None and is_held(e):
        array = nodes.table(e.value)
    return array is not None and bool((array == what).all())
