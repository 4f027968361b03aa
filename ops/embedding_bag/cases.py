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
from typing import Any, Protocol, TypeVar, get_args

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
        weights = None if self.per_sample_weights is None else np.abs(self.per_sample_weights)
        magnitude = self._pooled(np.abs(self.weight), weights)
        if self.op.weighted and self.attributes.divides and self.attributes.divisor == "weights":
            magnitude = through_divisor(self, len(self.weight), magnitude)
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


class _Weighted(Protocol):
    @property
    def indices(self) -> np.ndarray: ...
    @property
    def offsets(self) -> np.ndarray | None: ...
    @property
    def per_sample_weights(self) -> np.ndarray | None: ...
    @property
    def attributes(self) -> spec.Attributes: ...
    @property
    def exact(self) -> np.ndarray: ...


def through_divisor(case: _Weighted, num_rows: int, magnitude: np.ndarray) -> np.ndarray:
    """The magnitude [B, D] of a result that was divided by a sum of weights, which may cancel.

    ``magnitude`` is of the sum, divided by the sum of the magnitudes of the weights. A relative error of the divisor
    is one of the result.
    """
    weights = case.per_sample_weights
    assert weights is not None
    found, largest = (
        np.abs(reference.divisors(case.indices, case.offsets, w.astype(np.float64), num_rows, case.attributes))
        for w in (weights, np.abs(weights))
    )
    with np.errstate(all="ignore"):
        return np.asarray((magnitude + np.abs(case.exact)) * (largest / found))


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


def suite() -> dict[str, Case]:
    """The cases that the conformance suite has files of: those of the first edition, and a few of what came later."""
    later = by_name(_later())
    return {name: case for name, case in all_cases().items() if name not in later or name in _LATER_IN_SUITE}


_LATER_IN_SUITE = (
    "sqrtn_padding_ragged_float32",
    "sqrtn_weights_rows_float32",
    "mean_weights_ends_float32",
    "mean_count_rows_float16",
    "skip_sum_ragged_float32",
    "skip_mean_padding_ends_float16",
    "skip_max_rows_float32",
    "skip_everything_rows_float64",
)


def _generate() -> Iterator[Case]:
    for dtype, mode, layout in itertools.product(_DTYPES, spec.ATEN_MODES, _LAYOUTS):
        if layout != "ends" or dtype == "float32":
            yield make(f"{mode}_{layout}_{dtype}", dtype=dtype, mode=mode, layout=layout)
    for dtype, layout in itertools.product(_DTYPES, ("ragged", "rows")):
        yield make(f"weights_{layout}_{dtype}", dtype=dtype, mode="sum", layout=layout, weighted=True)
    for dtype, mode, layout in itertools.product(("float32", "float16"), spec.ATEN_MODES, _LAYOUTS):
        row = 2 if mode == "mean" else -3
        yield make(f"padding_{mode}_{layout}_{dtype}", dtype=dtype, mode=mode, layout=layout, padding_idx=row)
    for dtype, mode in itertools.product(_DTYPES, spec.ATEN_MODES):
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
    for mode in spec.ATEN_MODES:
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
    yield from _later()


def _later() -> Iterator[Case]:
    yield from _skipping()
    yield from _sqrtn()
    for mode, divisor in itertools.product(("mean", "sqrtn"), get_args(spec.Divisor)):
        yield from _weighted(mode, divisor)
    # Weights whose sum is 0: infinite, or NaN where the rows cancel too. The count never is.
    base = make("mean_weights_sum_0", rows=3, lengths=(2, 2, 3, 0), weighted=True, divisor="weights", padding_idx=2)
    indices, weights = np.array([0, 1, 1, 1, 0, 2, 1], np.int64), np.array([1, -1, 2, -2, 1, 5, 3], np.float32)
    yield dataclasses.replace(base, indices=indices, per_sample_weights=weights)
    yield dataclasses.replace(
        base,
        name="sqrtn_weights_all_0",
        indices=indices,
        per_sample_weights=np.zeros(7, np.float32),
        attributes=dataclasses.replace(base.attributes, mode="sqrtn"),
    )


#: What every addition is tried with: float32 in each layout, the other dtypes in one.
_KINDS = (*itertools.product(("float32",), _LAYOUTS), ("float16", "rows"), ("bfloat16", "ragged"), ("float64", "rows"))


def _sqrtn() -> Iterator[Case]:
    for dtype, layout in _KINDS:
        yield make(f"sqrtn_{layout}_{dtype}", dtype=dtype, mode="sqrtn", layout=layout)
        if dtype == "float32":
            name = f"sqrtn_padding_{layout}_{dtype}"
            yield make(name, dtype=dtype, mode="sqrtn", layout=layout, padding_idx=-3, negative="skip")
    yield make("sqrtn_max_norm", mode="sqrtn", max_norm=1.3)
    yield make("sqrtn_all_padded", mode="sqrtn", rows=1, lengths=(3, 1), padding_idx=0)
    yield make("sqrtn_slack_after_last_offset", mode="sqrtn", layout="ends", slack=4)
    yield make("sqrtn_no_bags", mode="sqrtn", lengths=())
    yield make("sqrtn_empty_bags", mode="sqrtn", lengths=(0, 2, 0, 0, 1, 0))
    yield make("sqrtn_no_rows", mode="sqrtn", rows=0, lengths=(0, 0))
    yield make("sqrtn_no_columns", mode="sqrtn", dim=0)
    yield make("sqrtn_long_among_short", mode="sqrtn", dim=2, lengths=(1, 2, 1700, 0, 1, 333, *(1,) * 20))
    yield make("sqrtn_rows_of_150", mode="sqrtn", dim=1, layout="rows", lengths=(150,) * 4)
    for dim in (16, 17, 100):
        yield make(f"sqrtn_dim_{dim}", mode="sqrtn", dim=dim, lengths=(3, 1, 4))


def _weighted(mode: str, divisor: str) -> Iterator[Case]:
    given: dict[str, Any] = {"mode": mode, "divisor": divisor, "weighted": True}
    name = f"{mode}_{divisor}"
    for dtype, layout in _KINDS:
        yield make(f"{name}_{layout}_{dtype}", dtype=dtype, layout=layout, **given)
    for dtype, layout in (("float32", "ends"), ("bfloat16", "rows")):
        yield make(
            f"{name}_everything_{layout}_{dtype}",
            dtype=dtype,
            layout=layout,
            padding_idx=-2,
            max_norm=1.1,
            negative="skip",
            **given,
        )
    yield make(f"{name}_long_among_short", dim=2, lengths=(1, 2, 1700, 0, 1, 333, 65), padding_idx=1, **given)
    yield make(f"{name}_empty_bags", lengths=(0, 2, 0, 0, 1, 0), index_dtype="int32", **given)
    if divisor == "weights":
        yield make(f"{name}_rows_of_150", dim=3, layout="rows", lengths=(150,) * 3, **given)
        yield make(f"{name}_no_indices", lengths=(0, 0), **given)
        yield make(f"{name}_no_columns", dim=0, **given)
        yield make(f"{name}_dim_100", dim=100, lengths=(3, 1, 4), **given)
    base = make(f"{name}_nan_at_skipped", lengths=(4, 3, 2), padding_idx=1, negative="skip", **given)
    assert base.per_sample_weights is not None
    skipped = (base.indices == 1) | (base.indices < 0)
    weights = np.where(skipped, np.float32(np.nan), base.per_sample_weights)
    yield dataclasses.replace(base, per_sample_weights=weights)


def _skipping() -> Iterator[Case]:
    given: dict[str, Any] = {"negative": "skip"}
    for mode, layout in itertools.product(spec.ATEN_MODES, _LAYOUTS):
        yield make(f"skip_{mode}_{layout}_float32", mode=mode, layout=layout, **given)
    for mode in spec.ATEN_MODES:
        name = f"skip_{mode}_padding_ends_float16"
        yield make(name, dtype="float16", mode=mode, layout="ends", padding_idx=-2, slack=3, **given)
        yield make(f"skip_{mode}_int32", mode=mode, index_dtype="int32", offsets_dtype="int64", **given)
        yield make(f"skip_{mode}_no_rows", mode=mode, rows=0, lengths=(2, 0, 1), **given)
        yield make(f"skip_{mode}_long_among_short", mode=mode, dim=2, lengths=(1, 1500, 0, 333, 64), **given)
        yield make(f"skip_{mode}_rows_of_150", mode=mode, dim=1, layout="rows", lengths=(150,) * 3, **given)
    yield make("skip_no_columns", dim=0, **given)
    yield make("skip_one_row", rows=1, lengths=(3, 1, 0), **given)
    for dtype, layout in zip(_DTYPES, ("ends", "rows") * 2, strict=True):
        yield make(f"skip_mean_max_norm_{layout}_{dtype}", dtype=dtype, layout=layout, max_norm=1.1, **given)
        both: dict[str, Any] = {"padding_idx": 1, "max_norm": 1.1, "mode": "sum", "weighted": True, **given}
        yield make(f"skip_everything_{layout}_{dtype}", dtype=dtype, layout=layout, **both)
    for dtype in ("float32", "float64"):
        base = make(
            f"skip_weights_nan_{dtype}", dtype=dtype, mode="sum", lengths=(4, 3, 2, 1), weighted=True, negative="skip"
        )
        assert base.per_sample_weights is not None
        weights = np.where(base.indices < 0, np.array(np.nan, dtype), base.per_sample_weights)
        weight = base.weight.copy()
        weight[-1] = np.nan  # what -1 would read
        indices = np.where(base.indices == len(weight) - 1, 0, base.indices)
        yield dataclasses.replace(base, weight=weight, indices=indices, per_sample_weights=weights)


def _empty() -> Iterator[Case]:
    for mode in spec.ATEN_MODES:
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
    for mode in spec.ATEN_MODES:
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
    for mode in spec.ATEN_MODES:
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
    indices = (random.randint(0, rows, count) if count and rows else np.zeros(count)).astype(index_dtype)
    if padding_idx is not None:  # certainly somewhere, and as the whole of a bag
        indices[::3] = padding_idx % rows
    if attributes.get("negative") == "skip":  # likewise; -1, and far below what any row has as a negative number
        indices[:: 2 if rows else 1] = -1
        indices[4::6] = -rows - 3
    indices = np.concatenate([indices, np.full(slack, rows + 7, index_dtype)])
    weights = random.standard_normal(count + slack) if weighted else None
    if weights is not None and attributes.get("divisor") == "weights":  # most of them of one sign
        weights = np.where(np.arange(len(weights)) % 4 == 3, -0.25, 1) * (0.5 + np.abs(weights))
    weights = None if weights is None else weights.astype(table_dtype)
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
