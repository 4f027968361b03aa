"""Named examples of the operator, made from those of `..embedding_bag.cases` by giving them a gradient."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterator
from typing import Any, get_args

import ml_dtypes
import numpy as np

from ..embedding_bag import cases as embedding_bag
from ..embedding_bag import spec as bags
from . import reference, spec

#: How far a result may be from the exact one, relative to the sum of the magnitudes that went into it: accumulation in
#: float32 or float64, in blocks of up to 64 positions and blocks of those. A bag that repeats a row adds equal numbers
#: to it, whose roundings can all go one way, so that here two rounds of 64 additions of half an ulp each are allowed.
_RELATIVE = {"float32": 2.0**-17, "float16": 2.0**-17, "bfloat16": 2.0**-17, "float64": 1e-12}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One call: arrays and attributes, and what may come out."""

    name: str
    grad_output: np.ndarray
    weight: np.ndarray
    indices: np.ndarray
    offsets: np.ndarray | None
    per_sample_weights: np.ndarray | None
    attributes: spec.Attributes
    sparse: bool = False

    @property
    def op(self) -> spec.Variant:
        return spec.variant(
            sparse=self.sparse, two_d=self.indices.ndim == 2, weighted=self.per_sample_weights is not None
        )

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The arrays by input name, in the operator's order."""
        return {name: getattr(self, name) for name in self.op.inputs}

    @property
    def keywords(self) -> dict[str, Any]:
        """The attributes as keyword arguments of the call."""
        return {**self.attributes.keywords, "sparse": self.sparse}

    def expected(self) -> tuple[np.ndarray, ...]:
        """The reference's outputs, rounded to the table's dtype."""
        return reference.embedding_bag_grad(
            self.grad_output,
            self.indices,
            self.weight,
            self.offsets,
            per_sample_weights=self.per_sample_weights,
            **self.keywords,
        )

    def _entries(self, grad_output: np.ndarray, weight: np.ndarray, *, magnitudes: bool = False) -> reference.Entries:
        return reference.entries(
            grad_output,
            self.indices,
            weight,
            self.offsets,
            self.per_sample_weights,
            self.attributes,
            magnitudes=magnitudes,
        )

    def _outputs(self, found: reference.Entries, values: np.ndarray) -> tuple[np.ndarray, ...]:
        """The outputs from entries with ``values`` in place of theirs."""
        found = found._replace(values=values)
        first = (found.rows, values) if self.sparse else (reference.dense(found, len(self.weight)),)
        return first if self.per_sample_weights is None else (*first, found.per_sample_weights)

    @functools.cached_property
    def exact(self) -> tuple[np.ndarray, ...]:
        """The outputs before they are rounded to the table's dtype: float64, and int64 for ``rows``."""
        found = self._entries(self.grad_output, self.weight)
        with np.errstate(invalid="ignore"):
            return self._outputs(found, found.values)

    @functools.cached_property
    def tolerance(self) -> tuple[np.ndarray, ...]:
        """The largest error that each element may have, float64; infinite where the result is not finite."""
        # The weights' gradient is a dot product: its magnitude is that of two positive sides. (Positive rows may have
        # other maxima, and so other values, which is why those are taken from the case itself.)
        found = self._entries(np.abs(self.grad_output), np.abs(self.weight), magnitudes=True)
        values = np.abs(self._entries(self.grad_output, self.weight).values)
        sizes = self._outputs(found, values if self.attributes.mode == "max" else np.abs(found.values))
        allowed = []
        for name, exact, size in zip(self.op.outputs, self.exact, sizes, strict=True):
            if name == "rows":
                allowed.append(np.zeros(exact.shape))
                continue
            error = _RELATIVE[self.weight.dtype.name] * size
            if self.weight.dtype.itemsize == 2:  # the one rounding at the end
                info = ml_dtypes.finfo(self.weight.dtype)
                error = error + 0.5 * float(info.eps) * np.abs(exact) + 0.5 * float(info.smallest_subnormal)
            allowed.append(np.where(np.isfinite(error), error, np.inf))
        return tuple(allowed)

    def check(self, *got: np.ndarray, slack: float = 1.0) -> None:
        """Raise AssertionError if ``got``, an array for each output, is not this case's result.

        Args:
            slack: how many tolerances the values may be off, for a backend that is known to sum less exactly.
        """
        if len(got) != len(self.op.outputs):
            raise AssertionError(f"{self.name}: {len(got)} outputs, expected {', '.join(self.op.outputs)}")
        for name, array, exact, tolerance in zip(self.op.outputs, got, self.exact, self.tolerance, strict=True):
            dtype = exact.dtype if name == "rows" else self.weight.dtype
            if array.dtype != dtype or array.shape != exact.shape:
                raise AssertionError(
                    f"{self.name}: {name} is {array.dtype} {list(array.shape)}, expected {dtype} {list(exact.shape)}"
                )
            value = array.astype(exact.dtype)
            with np.errstate(invalid="ignore"):
                same = (np.isnan(value) & np.isnan(exact)) | (value == exact)
                close = np.isfinite(value) & np.isfinite(exact) & (np.abs(value - exact) <= slack * tolerance)
            wrong = np.argwhere(~(same | close))
            if len(wrong):
                k = tuple(int(i) for i in wrong[0])
                raise AssertionError(
                    f"{self.name}: {name}{list(k)} = {value[k].item()!r}, expected {exact[k].item()!r} "
                    f"within {slack * tolerance[k]:.3g} ({len(wrong)} of {value.size} elements are off)"
                )


@functools.cache
def all_cases() -> dict[str, Case]:
    """Every case by name."""
    return embedding_bag.by_name(_generate())


def suite() -> dict[str, Case]:
    """The cases that the conformance suite has files of: what can differ between runtimes, once."""
    names = ("grad_weights_dense_float32", "grad_max_sparse_ends_everything_float32")
    return {name: all_cases()[name] for name in names}


def _generate() -> Iterator[Case]:
    dtypes = [d.name for d in bags.TABLE_DTYPES]
    for dtype, mode in itertools.product(dtypes, bags.ATEN_MODES):
        yield make(f"grad_{mode}_ragged_{dtype}", dtype=dtype, mode=mode)
        yield make(f"grad_{mode}_sparse_rows_{dtype}", dtype=dtype, mode=mode, layout="rows", sparse=True)
    for dtype, sparse in itertools.product(dtypes, (False, True)):
        kind, layout = ("sparse", "rows") if sparse else ("dense", "ends")
        yield make(
            f"grad_weights_{kind}_{dtype}",
            dtype=dtype,
            mode="sum",
            layout=layout,
            weighted=True,
            sparse=sparse,
            padding_idx=2,
            max_norm=1.6,
            freq=True,
        )
    for mode, sparse in itertools.product(bags.ATEN_MODES, (False, True)):
        kind = "sparse" if sparse else "dense"
        skip: dict[str, Any] = {"mode": mode, "sparse": sparse, "negative": "skip"}
        yield make(f"grad_{mode}_skip_{kind}_ragged", **skip)
        yield make(f"grad_{mode}_skip_{kind}_ends", layout="ends", slack=3, padding_idx=-2, freq=True, **skip)
        yield make(f"grad_{mode}_skip_{kind}_rows", layout="rows", dtype="float64", max_norm=1.3, **skip)
        if not sparse:
            yield make(f"grad_{mode}_skip_{kind}_no_rows", rows=0, lengths=(2, 0, 1), **skip)
            yield make(f"grad_{mode}_skip_{kind}_int32", index_dtype="int32", lengths=(1, 700, 0, 333), **skip)
    for dtype, sparse in itertools.product(dtypes, (False, True)):
        kind = "sparse_rows" if sparse else "ragged"
        name = f"grad_sqrtn_{kind}_{dtype}"
        yield make(name, mode="sqrtn", dtype=dtype, layout="rows" if sparse else "ragged", sparse=sparse, padding_idx=2)
    for mode, divisor in itertools.product(("mean", "sqrtn"), get_args(bags.Divisor)):
        weighted: dict[str, Any] = {"mode": mode, "divisor": divisor, "weighted": True}
        name = f"grad_{mode}_{divisor}"
        for dtype in ("float32", "float16"):
            yield make(f"{name}_ragged_{dtype}", dtype=dtype, **weighted)
        both: dict[str, Any] = {"padding_idx": -3, "max_norm": 1.3, "freq": True, "negative": "skip", **weighted}
        yield make(f"{name}_sparse_ends_everything", layout="ends", slack=3, sparse=True, **both)
        yield make(f"{name}_rows_everything", layout="rows", **both)
        yield make(f"{name}_sparse_rows_float64", layout="rows", sparse=True, dtype="float64", **weighted)
        yield make(f"{name}_long_among_short", dim=2, lengths=(1, 1500, 0, 333, 30, *(1,) * 9), **weighted)
        if divisor == "weights":
            yield make(f"{name}_no_indices", lengths=(0, 0), **weighted)
            yield make(f"{name}_no_columns", dim=0, **weighted)
            yield make(f"{name}_no_rows", rows=0, lengths=(2, 0, 1), negative="skip", **weighted)
    for dtype, sparse in itertools.product(dtypes, (False, True)):
        name = f"grad_skip_weights_{'sparse' if sparse else 'dense'}_{dtype}"
        yield make(name, mode="sum", dtype=dtype, weighted=True, sparse=sparse, negative="skip", padding_idx=1)
    for mode in bags.ATEN_MODES:
        everything: dict[str, Any] = {"mode": mode, "padding_idx": -3, "max_norm": 1.3, "freq": True}
        yield make(f"grad_{mode}_ends_everything_float32", layout="ends", slack=3, **everything)
        yield make(f"grad_{mode}_sparse_ends_everything_float32", layout="ends", slack=3, sparse=True, **everything)
        yield make(f"grad_{mode}_rows_padding_int32", mode=mode, layout="rows", padding_idx=1, index_dtype="int32")
        yield make(f"grad_{mode}_duplicates", mode=mode, rows=2, lengths=(5, 1, 8), freq=True)
        yield make(f"grad_{mode}_all_padded", mode=mode, rows=1, lengths=(3, 1), padding_idx=0)
        yield make(f"grad_{mode}_long_among_short", mode=mode, dim=2, lengths=(1, 700, 0, 333, 30, *(1,) * 40))
        yield make(f"grad_{mode}_one_row", mode=mode, rows=1, dim=3, lengths=(40, 0, 900, 7))
        for kind, sparse in (("dense", False), ("sparse", True)):
            empty: dict[str, Any] = {"mode": mode, "sparse": sparse, "freq": sparse}
            yield make(f"grad_{mode}_{kind}_no_bags", lengths=(), **empty)
            yield make(f"grad_{mode}_{kind}_no_bags_ends", lengths=(), layout="ends", **empty)
            yield make(f"grad_{mode}_{kind}_no_indices", lengths=(0, 0, 0), **empty)
            yield make(f"grad_{mode}_{kind}_empty_bags", lengths=(0, 2, 0, 0, 1, 0), **empty)
            yield make(f"grad_{mode}_{kind}_no_rows", rows=0, lengths=(0, 0), **empty)
            yield make(f"grad_{mode}_{kind}_no_columns", dim=0, **empty)
            yield make(f"grad_{mode}_{kind}_rows_3x0", layout="rows", lengths=(0,) * 3, length=0, **empty)
            yield make(f"grad_{mode}_{kind}_rows_0x3", layout="rows", lengths=(), length=3, **empty)
    for p, sparse in itertools.product((1.0, 3.0, 0.5, np.inf), (False, True)):
        name = f"grad_max_norm_p{'inf' if np.isinf(p) else str(p).replace('.', '_')}_{'sparse' if sparse else 'dense'}"
        limit = 9.7 if p == 0.5 else 1.3
        yield make(f"{name}_max", mode="max", max_norm=limit, norm_type=p, sparse=sparse, dtype="float64")
        yield make(f"{name}_weights", mode="sum", weighted=True, max_norm=limit, norm_type=p, sparse=sparse)
    yield make("grad_weights_no_indices", mode="sum", lengths=(0, 0), weighted=True)
    yield make("grad_weights_no_columns", mode="sum", dim=0, weighted=True, max_norm=1.0)
    yield make("grad_weights_indices_int32_offsets_int64", mode="sum", index_dtype="int32", offsets_dtype="int64")
    yield from _not_finite()
    yield from _ties()


def _not_finite() -> Iterator[Case]:
    """NaN and infinity in the gradient, in the table and beside padding: they stay in their own bag."""
    for mode in bags.ATEN_MODES:
        base = make(f"grad_{mode}_nan_inf", mode=mode, rows=8, dim=6, lengths=(3, 2, 4, 2, 3, 0), padding_idx=7)
        gradient, weight = base.grad_output.copy(), base.weight.copy()
        gradient[1, :2], gradient[5] = (np.nan, np.inf), np.nan
        weight[1, :3], weight[3], weight[7] = (np.nan, np.inf, -np.inf), -np.inf, np.nan
        # A bag with a NaN among others, one of padding with a NaN, two NaNs in a bag, only -inf; finite beside them.
        indices = np.array([4, 1, 5, 7, 0, 2, 1, 4, 1, 3, 3, 7, 7, 6], np.int64)
        yield dataclasses.replace(base, grad_output=gradient, weight=weight, indices=indices)
    # Unclipped for the NaN in another column, the first row of each bag has the largest numbers.
    name = "grad_max_norm_pinf_nan"
    base = make(name, mode="max", rows=4, dim=4, lengths=(2, 3), max_norm=0.4, norm_type=np.inf, sparse=True)
    weight = np.abs(base.weight) + np.float32(0.5)
    weight[1, 0] = weight[2, 3] = np.nan
    yield dataclasses.replace(base, weight=weight, indices=np.array([1, 0, 2, 3, 0], np.int64))
    base = make("grad_weights_nan_at_padding", mode="sum", lengths=(4, 3, 2), weighted=True, padding_idx=1)
    weights = base.per_sample_weights
    assert weights is not None
    yield dataclasses.replace(base, per_sample_weights=np.where(base.indices == 1, np.float32(np.nan), weights))


def _ties() -> Iterator[Case]:
    """Rows of few whole numbers: most columns have several maxima, and the first of them takes all."""
    for name, sparse in (("grad_max_ties", False), ("grad_max_sparse_ties", True)):
        base = make(name, mode="max", rows=6, dim=9, lengths=(7, 0, 12, 1, 40), sparse=sparse)
        yield dataclasses.replace(base, weight=np.round(base.weight))
    # Of odd lengths, where a sum over a row may depend on where the row begins. All rows are above max_norm.
    for p, dim, sparse in itertools.product((1.0, 2.0, 3.0, 0.5), (5, 9, 17), (False, True)):
        kind = "equal_rows" if not sparse else "sparse_repeated_rows"
        name = f"grad_max_norm_p{str(p).replace('.', '_')}_{kind}_{dim}"
        lengths = (6, 0, 9, 3, 11, 40)
        base = make(name, mode="max", rows=4, dim=dim, lengths=lengths, max_norm=0.3, norm_type=p, sparse=sparse)
        yield base if sparse else dataclasses.replace(base, weight=np.tile(base.weight[:1], (4, 1)))


def make(name: str, *, sparse: bool = False, freq: bool = False, dtype: str = "float32", **arguments: Any) -> Case:
    """A case with random values.

    Args:
        freq: scale_grad_by_freq.
        arguments: as those of `..embedding_bag.cases.make`.
    """
    bag = embedding_bag.make(name, dtype=dtype, **arguments)
    random = np.random.RandomState(zlib.crc32(f"{name} gradient".encode()))
    num_bags = len(bag.indices) if bag.offsets is None else len(bag.offsets) - bag.attributes.include_last_offset
    gradient = random.standard_normal((num_bags, bag.weight.shape[1])).astype(bag.weight.dtype)
    attributes = spec.Attributes(**bag.attributes.keywords, scale_grad_by_freq=freq)
    return Case(name, gradient, bag.weight, bag.indices, bag.offsets, bag.per_sample_weights, attributes, sparse=sparse)
