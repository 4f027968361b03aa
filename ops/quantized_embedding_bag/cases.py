"""Named examples of the operator, made from those of `..embedding_bag.cases` by quantizing their table."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..embedding_bag import cases as embedding_bag
from ..embedding_bag import reference as pooling
from . import reference, spec

#: How far a result may be from the exact one, relative to the sum of the magnitudes that went into it: those of the
#: products and of the bias, which may cancel. float32 accumulation in some order.
_RELATIVE = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One call: arrays and attributes, and what may come out."""

    name: str
    table: np.ndarray  #: [V, D], a code an element
    scale: np.ndarray
    zero_point: np.ndarray | None
    bias: np.ndarray | None
    indices: np.ndarray
    offsets: np.ndarray | None
    per_sample_weights: np.ndarray | None
    attributes: spec.Attributes

    @property
    def codes(self) -> np.ndarray:
        """The table as the operator takes it."""
        return spec.pack(self.table)

    @property
    def op(self) -> spec.Variant:
        second = "zero_point" if self.zero_point is not None else "bias" if self.bias is not None else None
        return spec.variant(second=second, two_d=self.indices.ndim == 2, weighted=self.per_sample_weights is not None)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The arrays by input name, in the operator's order."""
        return {name: getattr(self, name) for name in self.op.inputs}

    @property
    def keywords(self) -> dict[str, Any]:
        """The attributes as keyword arguments of the call."""
        return self.attributes.keywords

    def expected(self) -> np.ndarray:
        """The reference's result, rounded to the dtype of scale."""
        return reference.quantized_embedding_bag(
            self.indices,
            self.table,
            self.scale,
            self.offsets,
            zero_point=self.zero_point,
            bias=self.bias,
            per_sample_weights=self.per_sample_weights,
            **self.keywords,
        )

    def _pooled(self, table: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        return pooling.pooled(self.indices, table, self.offsets, weights, self.attributes, np.float32)

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        return reference.dequantize(self.table, self.scale, self.zero_point, self.bias)

    @functools.cached_property
    def exact(self) -> np.ndarray:
        """The result before it is rounded to the dtype of scale, [B, D] float64."""
        weights = None if self.per_sample_weights is None else self.per_sample_weights.astype(np.float64)
        return self._pooled(self._rows, weights)

    @functools.cached_property
    def tolerance(self) -> np.ndarray:
        """The largest error that each element may have, [B, D] float64."""
        size = np.abs(self._rows)
        if self.bias is not None:
            size = np.abs(self._rows - self.bias[:, None]) + np.abs(self.bias[:, None])
        weights = None if self.per_sample_weights is None else np.abs(self.per_sample_weights.astype(np.float64))
        magnitude = self._pooled(size, weights)
        if self.op.weighted and self.attributes.divides and self.attributes.divisor == "weights":
            magnitude = embedding_bag.through_divisor(self, len(self.table), magnitude)
        allowed = _RELATIVE * magnitude
        if self.scale.dtype == np.float16:  # the one rounding at the end
            allowed = allowed + 2.0**-11 * np.abs(self.exact) + 2.0**-25
        return allowed

    def check(self, got: np.ndarray, *, slack: float = 1.0) -> None:
        """Raise AssertionError if ``got`` is not this case's result.

        Args:
            slack: how many tolerances the values may be off, for a backend that is known to sum less exactly.
        """
        exact, allowed = self.exact, self.tolerance
        if got.dtype != self.scale.dtype or got.shape != exact.shape:
            raise AssertionError(
                f"{self.name}: got {got.dtype} {list(got.shape)}, expected {self.scale.dtype} {list(exact.shape)}"
            )
        wrong = np.argwhere(~(np.abs(got.astype(np.float64) - exact) <= slack * allowed))
        if len(wrong):
            i, d = (int(k) for k in wrong[0])
            raise AssertionError(
                f"{self.name}: output[{i}, {d}] = {got[i, d]!r}, expected {exact[i, d]!r} "
                f"within {slack * allowed[i, d]:.3g} ({len(wrong)} of {got.size} elements are off)"
            )


@functools.cache
def all_cases() -> dict[str, Case]:
    """Every case by name."""
    return embedding_bag.by_name(_generate())


def suite() -> dict[str, Case]:
    """The cases that the conformance suite has files of: what can differ between runtimes, once."""
    names = (
        "int8_zero_point_mean_rows_float16",
        "int4_bias_max_ragged_float32",
        "uint4_zero_point_weights_ends_float32",
    )
    return {name: all_cases()[name] for name in names}


def _generate() -> Iterator[Case]:
    for kind, second, dtype in itertools.product(
        spec.CODES_TYPES, (None, *spec.SECOND_NUMBERS), ("float32", "float16")
    ):
        prefix = kind if second is None else f"{kind}_{second}"
        for mode, layout in (("sum", "ragged"), ("mean", "rows"), ("max", "ragged"))[dtype == "float16" :]:
            yield make(f"{prefix}_{mode}_{layout}_{dtype}", kind, second, dtype, mode=mode, layout=layout)
        name = f"{prefix}_weights_ends_{dtype}"
        yield make(name, kind, second, dtype, mode="sum", layout="ends", weighted=True, slack=2)
    for kind, dim in itertools.product(spec.CODES_TYPES, (0, 1, 2, 4, 8, 15, 16, 17, 33)):
        yield make(f"{kind}_dim_{dim}", kind, "bias", dim=dim, mode="max" if dim % 2 else "sum")
    for kind, second in itertools.product(spec.CODES_TYPES, spec.SECOND_NUMBERS):
        for p in (2.0, 1.0, 3.0, np.inf):
            name = f"{kind}_{second}_max_norm_p{'inf' if np.isinf(p) else int(p)}"
            yield make(name, kind, second, max_norm=1.3, norm_type=p, padding_idx=-2)
    for kind, layout in itertools.product(spec.CODES_TYPES, ("ragged", "rows")):
        yield make(
            f"{kind}_{layout}_weights_padding", kind, None, mode="sum", layout=layout, weighted=True, padding_idx=1
        )
        yield make(f"{kind}_{layout}_no_bags", kind, "zero_point", lengths=(), layout=layout, length=3)
        yield make(f"{kind}_{layout}_no_rows", kind, "bias", rows=0, lengths=(0, 0), layout=layout, length=0)
    for kind in spec.CODES_TYPES:
        yield make(f"{kind}_long_among_short", kind, "bias", dim=3, lengths=(1, 0, 700, 2, *(1,) * 20))
    # Of what came later each kind has another part.
    later = (
        ("mean", "weights", "mean"),
        ("sqrtn", "count", "sum"),
        ("mean", "count", "max"),
        ("sqrtn", "weights", "sqrtn"),
    )
    for kind, (mode, divisor, skipping) in zip(spec.CODES_TYPES, later, strict=True):
        given: dict[str, Any] = {"mode": mode, "divisor": divisor, "weighted": True, "padding_idx": 1}
        yield make(f"{kind}_{mode}_{divisor}", kind, "bias", layout="rows", negative="skip", **given)
        yield make(f"{kind}_{mode}_{divisor}_float16", kind, "zero_point", "float16", **given)
        yield make(f"{kind}_{mode}_{divisor}_long", kind, None, dim=33, lengths=(1500, 0, 70), **given)
        yield make(f"{kind}_skip_{skipping}", kind, "bias", mode=skipping, padding_idx=2, negative="skip")
        name = f"{kind}_skip_weights"
        yield make(name, kind, "zero_point", mode="sum", layout="rows", weighted=True, negative="skip")
    for kind in spec.CODES_TYPES:
        yield make(f"{kind}_int32", kind, "zero_point", mode="sum", index_dtype="int32", offsets_dtype="int64")


def make(name: str, kind: str, second: str | None, dtype: str = "float32", **arguments: Any) -> Case:
    """A case with random quantized values.

    Args:
        kind: of the codes, a key of `spec.CODES_TYPES`.
        second: "zero_point", "bias" or None.
        dtype: of scale.
        arguments: as those of `..embedding_bag.cases.make`.
    """
    bags = embedding_bag.make(name, dtype=dtype, **arguments)
    num_rows, dim = bags.weight.shape
    codes = spec.CODES_TYPES[kind]
    random = np.random.RandomState(zlib.crc32(f"{name} codes".encode()))
    table = random.randint(codes.lowest, codes.highest + 1, (num_rows, dim)).astype(codes.dtype)
    scale = np.asarray(random.standard_normal(num_rows) / codes.highest, dtype)
    zero_point = bias = None
    if second == "zero_point":
        zero_point = np.asarray(random.randint(codes.lowest, codes.highest + 1, num_rows), dtype)
    elif second == "bias":
        bias = np.asarray(random.standard_normal(num_rows), dtype)
    attributes = spec.Attributes(**bags.attributes.keywords, codes_type=kind, embedding_dim=dim)
    return Case(name, table, scale, zero_point, bias, bags.indices, bags.offsets, bags.per_sample_weights, attributes)
