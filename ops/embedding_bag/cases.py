"""Named examples of the operator: one list that feeds every backend's test, the conformance suite and the tools.

Values come from the case's name through NumPy's frozen ``RandomState`` generators, so that a case is the same
arrays on every machine and in every NumPy.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from . import reference, spec

#: How far a result may be from the exact one, relative to the sum of the magnitudes that went into it:
#: float32 accumulation in some order, or float64's.
_RELATIVE = {"float32": 1e-6, "float16": 1e-6, "bfloat16": 1e-6, "float64": 1e-12}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One call: arrays and attributes, and what may come out."""

    name: str
    weight: np.ndarray
    indices: np.ndarray
    offsets: np.ndarray | None
    per_sample_weights: np.ndarray | None
    attributes: spec.Attributes

    @property
    def op(self) -> spec.Variant:
        return spec.variant(two_d=self.indices.ndim == 2, weighted=self.per_sample_weights is not None)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The arrays by input name, in the operator's order."""
        return {name: getattr(self, name) for name in self.op.inputs}

    @property
    def keywords(self) -> dict[str, Any]:
        """The attributes as keyword arguments of the call."""
        return self.attributes.keywords

    def expected(self) -> np.ndarray:
        """The reference's result, rounded to the table's dtype."""
        return reference.embedding_bag(
            self.indices, self.weight, self.offsets, per_sample_weights=self.per_sample_weights, **self.keywords
        )

    def _pooled(self, weight: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        return reference.pooled(self.indices, weight, self.offsets, weights, self.attributes)

    @functools.cached_property
    def exact(self) -> np.ndarray:
        """The result before it is rounded to the table's dtype, [B, D] float64."""
        return self._pooled(self.weight, self.per_sample_weights)

    @functools.cached_property
    def tolerance(self) -> np.ndarray:
        """The largest error that each element may have, [B, D] float64; infinite where the result is not finite."""
        weights = self.per_sample_weights
        magnitude = self._pooled(np.abs(self.weight), None if weights is None else np.abs(weights))
        dtype = self.weight.dtype
        allowed = _RELATIVE[dtype.name] * magnitude
        if dtype.itemsize == 2:  # the one rounding at the end
            import ml_dtypes

            info = ml_dtypes.finfo(dtype)
            half = 0.5 * float(info.eps) * np.abs(self.exact)
            allowed = allowed + half + 0.5 * float(info.smallest_subnormal)
        return np.where(np.isfinite(allowed), allowed, np.inf)

    def check(self, got: np.ndarray, *, slack: float = 1.0) -> None:
        """Raise AssertionError if ``got`` is not this case's result: dtype, shape, NaN, infinity, values.

        Args:
            slack: how many tolerances the values may be off, for a backend that is known to sum less exactly.
        """
        exact = self.exact
        if got.dtype != self.weight.dtype or got.shape != exact.shape:
            raise AssertionError(
                f"{self.name}: got {got.dtype} {list(got.shape)}, expected {self.weight.dtype} {list(exact.shape)}"
            )
        value = got.astype(np.float64)
        with np.errstate(invalid="ignore"):
            same = (np.isnan(value) & np.isnan(exact)) | (value == exact)
            close = np.isfinite(value) & np.isfinite(exact) & (np.abs(value - exact) <= slack * self.tolerance)
        wrong = np.argwhere(~(same | close))
        if len(wrong):
            i, d = (int(k) for k in wrong[0])
            raise AssertionError(
                f"{self.name}: output[{i}, {d}] = {value[i, d]!r}, expected {exact[i, d]!r} "
                f"within {slack * self.tolerance[i, d]:.3g} ({len(wrong)} of {value.size} elements are off)"
            )


_DTYPES = [d.name for d in spec.TABLE_DTYPES]
_LAYOUTS = ("ragged", "ends", "rows")  # offsets, offsets with include_last_offset, 2-D


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_AnyCase = TypeVar("_AnyCase", bound=_Named)


def by_name(generated: Iterable[_AnyCase]) -> dict[str, _AnyCase]:
    """An operator's cases by their names, no two of which may be equal."""
    cases: dict[str, _AnyCase] = {}
    for case in generated:
        if case.name in cases:
            raise AssertionError(f"two cases are called {case.name}")
        cases[case.name] = case
    return cases


@functools.cache
def all_cases() -> dict[str, Case]:
    """Every case by name."""
    return by_name(_generate())


#: The cases that the conformance suite has files of.
suite = all_cases


def _generate() -> Iterator[Case]:
    for dtype, mode, layout in itertools.product(_DTYPES, spec.MODES, _LAYOUTS):
        if layout != "ends" or dtype == "float32":
            yield make(f"{mode}_{layout}_{dtype}", dtype=dtype, mode=mode, layout=layout)
    for dtype, layout in itertools.product(_DTYPES, ("ragged", "rows")):
        yield make(f"weights_{layout}_{dtype}", dtype=dtype, mode="sum", layout=layout, weighted=True)
    for dtype, mode, layout in itertools.product(("float32", "float16"), spec.MODES, _LAYOUTS):
        row = 2 if mode == "mean" else -3
        yield make(f"padding_{mode}_{layout}_{dtype}", dtype=dtype, mode=mode, layout=layout, padding_idx=row)
    for dtype, mode in itertools.product(_DTYPES, spec.MODES):
        # The norm is taken in float32 for all but double, so the 16-bit types add nothing to the other p.
        for p in (2.0,) if dtype in ("float16", "bfloat16") else (2.0, 1.0, 3.0, 0.5, np.inf):
            name = f"max_norm_p{'inf' if np.isinf(p) else str(p).replace('.', '_')}_{mode}_{dtype}"
            # 0.5 is the sum of square roots, squared: the same rows have much larger norms.
            limit = 9.7 if p == 0.5 else 1.3
            yield make(name, dtype=dtype, mode=mode, max_norm=limit, norm_type=p)
    for dtype, layout in itertools.product(_DTYPES, ("ends", "rows")):
        yield make(
            f"everything_{layout}_{dtype}",
            dtype=dtype,
            mode="sum",
            layout=layout,
            weighted=True,
            padding_idx=-2,
            max_norm=1.1,
        )
    for dtype, layout in itertools.product(("float32", "float64"), _LAYOUTS):
        name = f"weights_padding_{layout}_{dtype}"
        yield make(name, dtype=dtype, mode="sum", layout=layout, weighted=True, padding_idx=-1)
        name = f"mean_max_norm_padding_{layout}_{dtype}"
        yield make(name, dtype=dtype, mode="mean", layout=layout, max_norm=1.6, padding_idx=3)
    for index, offset in itertools.product(("int32", "int64"), ("int32", "int64")):
        yield make(f"mean_indices_{index}_offsets_{offset}", mode="mean", index_dtype=index, offsets_dtype=offset)
    for mode in spec.MODES:
        yield make(f"{mode}_duplicates", mode=mode, rows=2, lengths=(5, 1, 8))
        yield make(f"{mode}_all_padded", mode=mode, rows=1, lengths=(3, 1), padding_idx=0)
        yield make(f"{mode}_slack_after_last_offset", mode=mode, layout="ends", slack=4)
    yield make("max_norm_zero", mode="sum", max_norm=0.0)
    yield make("max_norm_rows_int32", mode="max", layout="rows", max_norm=0.8, index_dtype="int32")
    yield make("mean_rows_int32", layout="rows", index_dtype="int32")
    yield from _empty()
    yield from _not_finite()
    yield from _long()
    for dim in (1, 2, 7, 15, 16, 17, 33):
        mode = "max" if dim in (2, 16, 33) else "sum"
        yield make(f"{mode}_dim_{dim}", mode=mode, dim=dim, lengths=(3, 1, 4))


def _empty() -> Iterator[Case]:
    for mode in spec.MODES:
        for layout in ("ragged", "ends"):
            yield make(f"{mode}_{layout}_no_bags", mode=mode, layout=layout, lengths=())
            yield make(f"{mode}_{layout}_no_indices", mode=mode, layout=layout, lengths=(0, 0, 0))
            yield make(f"{mode}_{layout}_empty_bags", mode=mode, layout=layout, lengths=(0, 2, 0, 0, 1, 0))
            yield make(f"{mode}_{layout}_no_rows", mode=mode, layout=layout, rows=0, lengths=(0, 0))
            yield make(f"{mode}_{layout}_no_columns", mode=mode, layout=layout, dim=0)
        for bags, length in ((0, 3), (3, 0)):
            yield make(
                f"{mode}_rows_{bags}x{length}", mode=mode, layout="rows", lengths=(length,) * bags, length=length
            )
        yield make(f"{mode}_rows_no_columns", mode=mode, layout="rows", dim=0)
        yield make(f"{mode}_rows_no_rows", mode=mode, layout="rows", rows=0, lengths=(0, 0), length=0)
    yield make("weights_no_indices", mode="sum", lengths=(0, 0), weighted=True)
    yield make("weights_no_bags", mode="sum", lengths=(), weighted=True)
    yield make("max_norm_no_columns", mode="sum", dim=0, max_norm=1.0)
    yield make("max_norm_inf_no_columns", mode="sum", dim=0, max_norm=1.0, norm_type=np.inf)


def _not_finite() -> Iterator[Case]:
    for mode in spec.MODES:
        base = make(f"{mode}_nan_inf", mode=mode, rows=8, dim=6, lengths=(3, 2, 4, 2, 3, 0))
        weight = base.weight.copy()
        weight[1, :3] = np.nan, np.inf, -np.inf
        weight[2, 1:4] = -np.inf, np.inf, np.inf
        weight[3] = -np.inf
        # NaN last, first and in the middle; opposite infinities; only -inf; finite bags beside them.
        indices = np.array([4, 5, 1, 1, 4, 5, 2, 1, 6, 3, 3, 4, 6, 7], np.int64)
        yield dataclasses.replace(base, weight=weight, indices=indices)
        padded = weight.copy()
        padded[3] = np.nan
        yield dataclasses.replace(
            base,
            name=f"{mode}_nan_in_padded_row",
            weight=padded,
            indices=np.array([3, 4, 3, 3, 3, 5, 3, 3, 6, 4, 3, 3, 3, 7], np.int64),
            attributes=dataclasses.replace(base.attributes, padding_idx=3),
        )
    for p in (2.0, np.inf):
        # A NaN in the first column, in the middle and in the last, in rows that are above max_norm without it.
        base = make(
            f"max_norm_p{p:.0f}_nan_inf", mode="sum", rows=8, dim=6, lengths=(2, 1, 3, 1, 0), max_norm=0.4, norm_type=p
        )
        weight = base.weight.copy()
        weight[1, 0] = weight[2, 3] = weight[3, 5] = np.nan
        weight[4, 1], weight[5, 2:4] = np.inf, (-np.inf, np.nan)
        yield dataclasses.replace(base, weight=weight, indices=np.array([1, 6, 2, 3, 7, 5, 4], np.int64))
    # A norm that overflows float32 leaves nothing of its row.
    base = make("max_norm_overflows", mode="sum", rows=4, dim=3, lengths=(2, 1), max_norm=0.4)
    weight = base.weight.copy()
    weight[1, 2] = 1e25
    yield dataclasses.replace(base, weight=weight, indices=np.array([0, 1, 1], np.int64))
    weighted = make(
        "weights_nan_at_padding", mode="sum", lengths=(4, 3, 2), weighted=True, padding_idx=1, dtype="float64"
    )
    weights = weighted.per_sample_weights
    assert weights is not None
    yield dataclasses.replace(weighted, per_sample_weights=np.where(weighted.indices == 1, np.nan, weights))


def _long() -> Iterator[Case]:
    for mode in spec.MODES:
        # One, two and three rounds of blocks; a few long bags among many short ones.
        yield make(f"{mode}_one_bag_of_1000", mode=mode, dim=2, lengths=(1000,))
        yield make(
            f"{mode}_long_among_short", mode=mode, dim=2, lengths=(1, 2, 700, 0, 1, 333, 1, 1, 1, 30) + (1,) * 40
        )
        yield make(f"{mode}_lengths_around_blocks", mode=mode, dim=1, lengths=(*range(14, 35), 63, 64, 65, 66))
        yield make(f"{mode}_three_rounds", mode=mode, dim=1, lengths=(1500,) + (1,) * 60 + (40, 300))
        yield make(f"{mode}_rows_of_150", mode=mode, dim=1, layout="rows", lengths=(150,) * 4)


def make(
    name: str,
    *,
    dtype: str = "float32",
    layout: str = "ragged",
    rows: int = 10,
    dim: int = 5,
    lengths: Sequence[int] = (3, 0, 5, 1),
    length: int | None = None,
    slack: int = 0,
    weighted: bool = False,
    index_dtype: str = "int64",
    offsets_dtype: str | None = None,
    padding_idx: int | None = None,
    **attributes: Any,
) -> Case:
    """A case with random values.

    Args:
        lengths: of the bags. With the layout "rows" all are the first one's.
        length: of the bags of "rows" where there are none to tell.
        slack: positions after the last offset, out of the table's range.
        padding_idx, attributes: of the operator, all but include_last_offset, which the layout "ends" sets.
    """
    random = np.random.RandomState(zlib.crc32(name.encode()))
    table_dtype = spec.BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    if layout == "rows":
        length = length if length is not None else lengths[0]
        lengths = (length,) * len(lengths)
    weight = random.standard_normal((rows, dim)).astype(table_dtype)
    count = sum(lengths)
    indices = (random.randint(0, rows, count) if count else np.zeros(0)).astype(index_dtype)
    if padding_idx is not None:  # certainly somewhere, and as the whole of a bag
        indices[::3] = padding_idx % rows
    indices = np.concatenate([indices, np.full(slack, rows + 7, index_dtype)])
    weights = random.standard_normal(count + slack).astype(table_dtype) if weighted else None
    offsets = None
    if layout == "rows":
        assert length is not None
        shape = (len(lengths), length)
        indices = indices.reshape(shape)
        weights = None if weights is None else weights.reshape(shape)
    else:
        bounds = np.cumsum([0, *lengths])
        offsets = (bounds if layout == "ends" else bounds[:-1]).astype(offsets_dtype or index_dtype)
    return Case(
        name,
        weight,
        indices,
        offsets,
        weights,
        spec.Attributes(**attributes, padding_idx=padding_idx, include_last_offset=layout == "ends"),
    )
