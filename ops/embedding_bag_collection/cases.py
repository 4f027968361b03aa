"""Named examples of the operator: those of `..embedding_bag.cases`, several to a call."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..embedding_bag import cases as embedding_bag
from ..embedding_bag import spec as bags
from . import reference, spec


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One call: the bags of each table, and how they are laid out."""

    name: str
    tables: tuple[embedding_bag.Case, ...]
    layout: str

    @property
    def attributes(self) -> spec.Attributes:
        return spec.Attributes(**self.tables[0].keywords)

    @property
    def op(self) -> spec.Variant:
        weighted = self.tables[0].per_sample_weights is not None
        return spec.variant(num_tables=len(self.tables), layout=self.layout, weighted=weighted)

    @functools.cached_property
    def call(self) -> dict[str, Any]:
        """The arguments of the call."""
        weights: Any = [t.per_sample_weights for t in self.tables]
        indices: Any = [t.indices for t in self.tables]
        offsets: Any = [t.offsets for t in self.tables]
        if self.layout == "packed":
            indices, weights = _packed(self.tables, indices), _packed(self.tables, weights)
            before = np.cumsum([0, *(t.offsets[-1] for t in self.tables[:-1] if t.offsets is not None)])
            ends = [o[1:] + b for o, b in zip(offsets, before, strict=True)]
            offsets = np.concatenate([offsets[0][:1], *ends]).astype(offsets[0].dtype)
        return {
            "x": indices,
            "weights": [t.weight for t in self.tables],
            "offsets": None if self.layout == "rows" else offsets,
            "per_sample_weights": weights if self.op.weighted else None,
            "packed": self.layout == "packed",
            **self.tables[0].keywords,
        }

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The arrays by input name, in the operator's order."""
        op, given = spec.arrange(**{k: v for k, v in self.call.items() if k not in self.tables[0].keywords})
        return {name: given[name] for name in op.inputs}

    def expected(self) -> np.ndarray:
        """The reference's result, rounded to the tables' dtype."""
        return reference.embedding_bag_collection(**self.call)

    @functools.cached_property
    def exact(self) -> np.ndarray:
        """The result before it is rounded, [B, sum of D] float64."""
        return np.concatenate([t.exact for t in self.tables], axis=1)

    @functools.cached_property
    def tolerance(self) -> np.ndarray:
        """The largest error that each element may have, [B, sum of D] float64."""
        return np.concatenate([t.tolerance for t in self.tables], axis=1)

    def check(self, got: np.ndarray, *, slack: float = 1.0) -> None:
        """Raise AssertionError if ``got`` is not this case's result; see `..embedding_bag.cases.Case.check`."""
        if got.shape != self.exact.shape:
            raise AssertionError(f"{self.name}: got {list(got.shape)}, expected {list(self.exact.shape)}")
        ends = np.cumsum([t.weight.shape[1] for t in self.tables])
        for table, part in zip(self.tables, np.split(got, ends[:-1], axis=1), strict=True):
            table.check(part, slack=slack)


def _packed(tables: Sequence[embedding_bag.Case], arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """What belongs to bags of each array; of the last one all of it."""
    found = [
        array if table is tables[-1] or table.offsets is None else array[: table.offsets[-1]]
        for table, array in zip(tables, arrays, strict=True)
        if array is not None
    ]
    return np.concatenate(found) if found else None


@functools.cache
def all_cases() -> dict[str, Case]:
    """Every case by name."""
    return embedding_bag.by_name(_generate())


def suite() -> dict[str, Case]:
    """The cases that the conformance suite has files of: none, for a file has the functions of its bags as well.

    The suite is at its limit of bytes, and what a collection means is what its bags mean, of which it has files.
    """
    return {}


def _generate() -> Iterator[Case]:
    yield make("collection_packed_weights_padding", "packed", dims=(2, 4), mode="sum", weighted=True, padding_idx=-2)
    for layout, mode in itertools.product(spec.LAYOUTS, bags.ATEN_MODES):
        yield make(f"collection_{layout}_{mode}", layout, mode=mode, max_norm=1.1, padding_idx=1, slack=2)
    for layout, dtype in itertools.product(spec.LAYOUTS, ("float16", "bfloat16", "float64")):
        yield make(f"collection_{layout}_{dtype}", layout, mode="sum", dtype=dtype, weighted=True)
    for layout in spec.LAYOUTS:
        for mode, divisor in itertools.product(("mean", "sqrtn"), ("count", "weights")):
            given: dict[str, Any] = {"mode": mode, "divisor": divisor, "weighted": True}
            yield make(f"collection_{layout}_{mode}_{divisor}", layout, padding_idx=1, negative="skip", **given)
        for mode in bags.MODES:
            yield make(f"collection_{layout}_skip_{mode}", layout, mode=mode, padding_idx=2, negative="skip")
        yield make(f"collection_{layout}_int32", layout, index_dtype="int32")
        yield make(f"collection_{layout}_no_bags", layout, lengths=(), length=2)
        yield make(f"collection_{layout}_no_columns", layout, dims=(0, 2, 0), mode="max")
        yield make(f"collection_{layout}_one_table", layout, dims=(6,))
    yield make("collection_ends", include_last_offset=True, slack=3)
    yield make("collection_packed_no_indices", "packed", lengths=(0, 0))
    yield make("collection_no_rows", rows=(0, 3, 0), lengths=(0, 0))
    yield make("collection_long_bags", "packed", dims=(1, 2), lengths=(1500, 0, 3), mode="sum")


def make(
    name: str,
    layout: str = "ragged",
    *,
    dims: Sequence[int] = (4, 1, 7),
    rows: Sequence[int] | None = None,
    lengths: Sequence[int] = (3, 0, 5, 1),
    include_last_offset: bool = False,
    slack: int = 0,
    index_dtype: str = "int64",
    **attributes: Any,
) -> Case:
    """A case with random values; ``attributes`` as in `..embedding_bag.cases.make`, and so the lengths of bags.

    Args:
        dims, rows: D and V of each table.
        slack: positions after the last offset, out of the table's range.
    """
    ends = layout == "packed" or include_last_offset
    tables = []
    for t, dim in enumerate(dims):
        turned = (
            tuple(np.roll(lengths, t).tolist()) if lengths else ()
        )  # the same number of bags, others of each length
        tables.append(
            embedding_bag.make(
                f"{name}_{t}",
                layout="rows" if layout == "rows" else "ends" if ends else "ragged",
                dim=dim,
                rows=7 + t if rows is None else rows[t],
                lengths=turned,
                slack=slack if ends and (layout != "packed" or t == len(dims) - 1) else 0,
                # Each table has a type of its own where they need not share one.
                index_dtype="int32" if layout != "packed" and t == 1 else index_dtype,
                **attributes,
            )
        )
    return Case(name, tuple(tables), layout)
