"""Quantized bags whose weights, scales and biases are not finite, and a check of what comes out."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from lucid_onnx.ops.quantized_embedding_bag import cases, spec

_WEIGHTS = (np.inf, -np.inf, np.nan, 1.0, -2.0, 0.0, -0.0)
_NUMBERS = (1.0, np.inf, -np.inf, np.nan, -0.0, 0.5)


def not_finite(kind: str, second: str | None, dtype: str, dim: int = 37, longest: int = 1100) -> cases.Case:
    """Every weight with every scale and zero_point or bias, in bags of one, and longer bags with a few of them."""
    codes = spec.CODES_TYPES[kind]
    random = np.random.RandomState(5)
    rows = list(itertools.product(_NUMBERS, _NUMBERS))
    table = random.randint(codes.lowest, codes.highest + 1, (len(rows), dim)).astype(codes.dtype)
    scale, other = (np.array(numbers, dtype) for numbers in zip(*rows, strict=True))
    if second == "zero_point":
        other = np.arange(len(rows)).astype(dtype) % 7
    alone = list(itertools.product(range(len(rows)), _WEIGHTS))
    plain = [r for r, (s, o) in enumerate(rows) if np.isfinite(s) and (np.isfinite(o) or second != "bias")]
    lengths = [1] * len(alone) + [2, 3, 66, longest, 5]
    more = sum(lengths) - len(alone)
    indices = np.concatenate([[r for r, _ in alone], random.choice(plain, more)]).astype(np.int64)
    weights = np.concatenate([[w for _, w in alone], random.choice([1.0, -0.5], more)])
    weights[len(alone) + np.array([0, 3, 40, 80, 900])] = [np.inf, -np.inf, np.inf, np.inf, -np.inf]
    case = cases.make(f"{kind} {second}", kind, second, dtype, mode="sum", weighted=True, dim=dim)
    return dataclasses.replace(
        case,
        name=f"{kind} {second} {dtype} not finite",
        table=table,
        scale=scale,
        zero_point=other if second == "zero_point" else None,
        bias=other if second == "bias" else None,
        indices=indices,
        offsets=np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64),
        per_sample_weights=weights.astype(dtype),
    )


def check_class(case: cases.Case, got: np.ndarray) -> None:
    """Raise AssertionError unless ``got`` is NaN, infinite and finite where the reference is, with its values."""
    with np.errstate(invalid="ignore", over="ignore"):
        expected = case.expected()
    assert got.dtype == expected.dtype
    assert np.isnan(expected).any()
    assert np.isposinf(expected).any()
    assert np.isneginf(expected).any()
    np.testing.assert_allclose(
        got.astype(np.float64),
        expected.astype(np.float64),
        rtol=1e-5 if expected.dtype == np.float32 else 2e-3,
        atol=0.02,
        err_msg=case.name,
    )
