"""EmbeddingBagGrad: the gradient of EmbeddingBag, with respect to its table and its per_sample_weights.

With the names of `..embedding_bag.spec`, ``g[i]`` the row of ``grad_output`` for bag ``i``, ``k`` a position of
``rows(i)``, ``x = indices[k]``, ``clipped(k) = weight[x] * clip(x)``, and ``d(i)`` what the bag's sum is divided by
(n(i) for a mean, its square root for sqrtn, else 1), position ``k`` gives row ``x`` ::

    sum, mean, sqrtn: value(k) = g[i] / d(i) * per_sample_weights[k]
    max:  value(k) = g[i] in the columns where k is the first of rows(i) whose clipped(k) is the maximum, else 0
          (a NaN is the maximum, and of several the first)

    with scale_grad_by_freq, value(k) is divided by how many positions of all rows(i) have the index x

    dense:   grad_weight[r] = sum of value(k) over the positions with indices[k] = r; a row of zeros if there are none
    sparse:  rows = the indices[k], values = the value(k), of every k in any rows(i), in the order of positions
             (of [B, L] row by row): duplicates stay apart
    dot(k) = sum over the columns of g[i] / d(i) * clipped(k)
    grad_per_sample_weights[k] = dot(k), and 0 for a k that is in no rows(i)
    where divisor is "weights", d(i) is made of them too, and with
    c(i) = sum of per_sample_weights[j] * dot(j) / d(i) over j in rows(i)
    mean:  grad_per_sample_weights[k] = dot(k) - c(i)
    sqrtn: grad_per_sample_weights[k] = dot(k) - c(i) * per_sample_weights[k] / d(i)

So the clip itself is not differentiated, as in PyTorch, which writes clipped rows back into its table before it
looks them up: ``grad_weight`` is not multiplied by it, and ``clipped`` is not replaced by the table's own rows.
Skipped positions, and those that belong to no bag, are neither read nor written to: nothing is multiplied by 0,
so that a NaN or an infinity reaches the rows of its own bag alone.

Arithmetic: float16 and bfloat16 accumulate in float32, and every number of an output is rounded once, at the end:
of the dense form the whole sum of a row, of the sparse form each entry. ``clipped`` is compared as a number of the
accumulation type. The additions into one row have one order, by position, that depends on the inputs alone.

Inputs and outputs, in order; which of them there are is told by the operator's name (`VARIANTS`):

======================= ============================ ===========================================================
grad_output             T                            [B, D]
weight                  T: as EmbeddingBag's         [V, D]
indices                 int32, int64                 [N], or [B, L] for the names with 2D
offsets                 int32, int64                 as EmbeddingBag's, not for the names with 2D
per_sample_weights      T                            as indices, for the names with Weighted
======================= ============================ ===========================================================

======================= ============================ ===========================================================
grad_weight             T                            [V, D], of the dense names
rows                    int64                        [M], of the sparse names: M positions that count
values                  T                            [M, D], of the sparse names
grad_per_sample_weights T                            as indices, of the names with Weighted
======================= ============================ ===========================================================

Every output is on every node. The attributes are EmbeddingBag's, all written on every node, and

================== ==== ====== ==========================================================================
attribute          type values meaning
================== ==== ====== ==========================================================================
scale_grad_by_freq INT  0 or 1 the gradient of a row is divided by how often its index occurs in the bags
================== ==== ====== ==========================================================================

The errors are EmbeddingBag's, and those of a ``grad_output`` of another dtype than the table's or of another shape than
[B, D]. Of several errors, those of dtypes and shapes come first, and grad_output's last among these.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from ..attributes import Flag, attribute
from ..embedding_bag import spec as embedding_bag
from ..variants import BaseVariant, Value

DOMAIN, VERSION = embedding_bag.DOMAIN, embedding_bag.VERSION


@dataclasses.dataclass(frozen=True)
class Variant(BaseVariant):
    """One operator name: which inputs it takes and which outputs it has, in order."""

    name: str
    sparse: bool
    two_d: bool
    weighted: bool
    graph = "embedding_bag_grad"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("grad_output", *self.bag.inputs)

    @property
    def bag(self) -> embedding_bag.Variant:
        """The operator that it is the gradient of."""
        return embedding_bag.variant(two_d=self.two_d, weighted=self.weighted)

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (
            *(("rows", "values") if self.sparse else ("grad_weight",)),
            *(("grad_per_sample_weights",) if self.weighted else ()),
        )

    def values(self, attributes: embedding_bag.Attributes, shapes: Mapping[str, Sequence[int]]) -> dict[str, Value]:
        found = self.bag.values(attributes, shapes)
        table = found["weight"]
        return {
            **found,
            "grad_output": found["output"],
            "grad_weight": Value("rows", table.dims),
            "rows": Value("row_indices", ("num_entries",), np.dtype(np.int64)),
            "values": Value("rows", ("num_entries", table.dims[1])),
            "grad_per_sample_weights": found["per_sample_weights"],
        }


def _name(sparse: bool, two_d: bool, weighted: bool) -> str:
    return f"EmbeddingBag{'Sparse' if sparse else ''}Grad{'2D' if two_d else ''}{'Weighted' if weighted else ''}"


#: The closed set of operator names.
VARIANTS: Mapping[str, Variant] = {
    _name(*key): Variant(_name(*key), *key) for key in itertools.product((False, True), repeat=3)
}


def variant(*, sparse: bool, two_d: bool, weighted: bool) -> Variant:
    """The operator name for a dense or sparse gradient, 1-D or 2-D indices, with or without per_sample_weights.

    Raises:
        TypeError: ``sparse``, which comes from a caller, is not a bool.
    """
    if not isinstance(sparse, (bool, np.bool_)):
        raise TypeError(f"sparse = {sparse!r} must be a bool")
    return VARIANTS[_name(sparse, two_d, weighted)]


@dataclasses.dataclass(frozen=True)
class Attributes(embedding_bag.Attributes):
    """The parameters of a bag's gradient, checked. See `..embedding_bag.spec.Attributes`."""

    scale_grad_by_freq: bool = attribute(
        Flag(), False, "the gradient of a row is divided by how often its index occurs in the bags"
    )


class Keywords(embedding_bag.Keywords, total=False):
    """The attributes as calls and builders take them, for type checkers; `Attributes` declares them."""

    scale_grad_by_freq: bool


def check_inputs(
    grad_output: np.ndarray,
    weight: np.ndarray,
    indices: np.ndarray,
    offsets: np.ndarray | None,
    per_sample_weights: np.ndarray | None,
    attributes: Attributes,
) -> None:
    """Raise the operator's errors: those of `check_shapes`, then those of `..embedding_bag.spec`.

    Raises:
        TypeError, IndexError, ValueError: as `..embedding_bag.spec.check_inputs`.
    """
    check_shapes(grad_output, weight, indices, offsets, per_sample_weights, attributes)
    embedding_bag.check_inputs(weight, indices, offsets, per_sample_weights, attributes)


def check_shapes(
    grad_output: np.ndarray,
    weight: np.ndarray,
    indices: np.ndarray,
    offsets: np.ndarray | None,
    per_sample_weights: np.ndarray | None,
    attributes: embedding_bag.Attributes,
) -> None:
    """The part of `check_inputs` that looks at dtypes and shapes alone: EmbeddingBag's inputs, then grad_output."""
    embedding_bag.check_table(weight)
    embedding_bag.check_layout(indices, offsets, per_sample_weights, weight.dtype, attributes)
    if grad_output.dtype != weight.dtype:
        raise TypeError(f"grad_output has dtype {grad_output.dtype}, weight has {weight.dtype}: they must be equal")
    bags = len(indices) if offsets is None else len(offsets) - attributes.include_last_offset
    expected = [bags, weight.shape[1]]
    if list(grad_output.shape) != expected:
        raise ValueError(f"grad_output has shape {list(grad_output.shape)}, expected {expected}")
