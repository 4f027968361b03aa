"""The NumPy reference: `..embedding_bag.reference`, one table after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..attributes import takes
from ..embedding_bag import reference as pooling
from ..embedding_bag import spec as bags
from . import spec

if TYPE_CHECKING:
    from typing import Unpack


@takes(spec.Attributes)
def embedding_bag_collection(
    x: Sequence[npt.ArrayLike] | npt.ArrayLike,
    weights: Sequence[npt.ArrayLike],
    offsets: Sequence[npt.ArrayLike] | npt.ArrayLike | None = None,
    *,
    per_sample_weights: Sequence[npt.ArrayLike] | npt.ArrayLike | None = None,
    packed: bool = False,
    **attributes: Unpack[bags.Keywords],
) -> np.ndarray:
    """Pool rows of several tables, bag by bag, in NumPy.

    Args:
        x: the indices [N_t] or [B, L_t] of each table; with ``packed`` those of all, [N].
        weights: the tables [V_t, D_t], of one dtype.
        offsets: those of each table; with ``packed`` those of all, [T * B + 1].
        per_sample_weights: those of each table, or of all; mode "sum", or mean and sqrtn with a divisor.
        packed: one array has the indices of all tables. It needs include_last_offset.
        **attributes: those of `..embedding_bag.spec.Attributes`.

    Returns:
        [B, sum of D_t], of the tables' dtype.

    Raises:
        TypeError, IndexError, ValueError: see `spec.check_inputs`. What concerns one table says which.
    """
    meaning = spec.Attributes(**attributes)
    op, given = spec.arrange(x, weights, offsets, per_sample_weights, packed=packed)
    return pooled(op, given, meaning)


def pooled(op: spec.Variant, given: Mapping[str, np.ndarray], attributes: spec.Attributes) -> np.ndarray:
    """The result of a node, by its inputs' names; raises as `embedding_bag_collection`."""
    spec.check_inputs(op, given, attributes)
    outputs = []
    for t in range(op.num_tables):
        indices, starts, factors = (
            spec.of_table(op, given, t, name) for name in ("indices", "offsets", "per_sample_weights")
        )
        assert indices is not None
        if op.layout == "packed":
            starts = spec.bounds(op, given["offsets"], t)
            inside = slice(int(starts[0]), int(starts[-1]))
            starts, indices = starts - starts[0], indices[inside]
            factors = None if factors is None else factors[inside]
        outputs.append(
            pooling.embedding_bag(
                indices,
                given[f"weight_{t}"],
                starts,
                per_sample_weights=factors,
                **attributes.keywords,
            )
        )
    return np.concatenate(outputs, axis=1)
