"""Weighted means, sqrtn and skipped positions, compared with what others say of them.

TensorFlow's numbers are those of the pages of ``tf.nn.embedding_lookup_sparse`` and
``tf.nn.safe_embedding_lookup_sparse`` (https://www.tensorflow.org/api_docs/python/tf/nn/embedding_lookup_sparse, of
TensorFlow 2.21), and of the tests ``testMissingInSparseIds`` and ``test_safe_embedding_lookup_sparse_*`` in
tensorflow/python/kernel_tests/nn_ops/embedding_ops_test.py (commit 00ee1a9deea6). A safe lookup prunes ids below zero,
and of a mean or sqrtn also those whose weight is not above zero.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

import lucid_onnx
from lucid_onnx.builder import convert
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops.embedding_bag import cases, spec
from lucid_onnx.ops.embedding_bag.lowering import Ragged
from lucid_onnx.ops.embedding_bag_grad import cases as gradients
from lucid_testing import kernels
from lucid_testing.kernels import needs_library

CALLS: dict[str, Any] = {
    "reference": lucid_onnx.reference.embedding_bag,
    "native": lambda *a, **k: lucid_onnx.embedding_bag(*a, **k, form="native"),
    "standard": lambda *a, **k: lucid_onnx.embedding_bag(*a, **k, form="standard", native=False),
}
calls = pytest.mark.parametrize(
    "call", [pytest.param(CALLS[name], id=name, marks=needs_library if name == "native" else ()) for name in CALLS]
)

#: Row r of the table is [r, 10 r, ...] + 1.
TABLE = (np.arange(10)[:, None] * [1, 10, 100, 1000] + 1).astype(np.float32)

#: The page's first two examples: ids, weights, where each row of sp_ids begins; outputs as the page prints them.
PARAMS = np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32)
PARAM_IDS, PARAM_WEIGHTS = np.array([0, 1, 3, 2]), np.array([0.1, 1.0, 0.5, 2.0], np.float32)
PARAM_STARTS = np.array([0, 2, 3])


@calls
def test_tensorflows_examples(call: Any) -> None:
    got = call(PARAM_IDS, PARAMS, PARAM_STARTS, mode="sum")
    np.testing.assert_allclose(got, [[4.0, 6.0], [7.0, 8.0], [5.0, 6.0]], rtol=1e-6)
    got = call(PARAM_IDS, PARAMS, PARAM_STARTS, mode="sum", per_sample_weights=PARAM_WEIGHTS)
    np.testing.assert_allclose(got, [[3.1, 4.2], [3.5, 4.0], [10.0, 12.0]], rtol=1e-6)


@calls
@pytest.mark.parametrize("mode", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("weighted", [False, True])
def test_tensorflows_rows_without_ids(call: Any, mode: str, weighted: bool) -> None:
    given: dict[str, Any] = {"per_sample_weights": np.ones(2, np.float32), "divisor": "weights"} if weighted else {}
    got = call(np.array([0, 2]), np.ones((4, 5), np.float32), np.array([0, 0, 1, 1]), mode=mode, **given)
    np.testing.assert_array_equal(got, np.repeat([[0], [1], [0], [1]], 5, axis=1))


# The page's last example: ids 1 and 3 with the weights 2.0 and 0.5, id 0 with 1.0, id 1 with 3.0.
IDS, WEIGHTS, STARTS = np.array([1, 3, 0, 1]), np.array([2.0, 0.5, 1.0, 3.0], np.float32), np.array([0, 2, 3])


@calls
@pytest.mark.parametrize(
    ("mode", "rows"),
    [
        ("sum", [2 * TABLE[1] + 0.5 * TABLE[3], TABLE[0], 3 * TABLE[1]]),
        ("mean", [(2 * TABLE[1] + 0.5 * TABLE[3]) / (2 + 0.5), TABLE[0], TABLE[1]]),
        ("sqrtn", [(2 * TABLE[1] + 0.5 * TABLE[3]) / math.sqrt(2**2 + 0.5**2), TABLE[0], TABLE[1]]),
    ],
)
def test_tensorflows_combiners(call: Any, mode: str, rows: list[np.ndarray]) -> None:
    got = call(IDS, TABLE, STARTS, mode=mode, divisor="weights", per_sample_weights=WEIGHTS)
    np.testing.assert_allclose(got, rows, rtol=1e-6)


@calls
@pytest.mark.parametrize(
    ("mode", "first"),
    [("sum", TABLE[1] + TABLE[3]), ("mean", (TABLE[1] + TABLE[3]) / 2), ("sqrtn", (TABLE[1] + TABLE[3]) / 2**0.5)],
)
def test_tensorflows_combiners_without_weights(call: Any, mode: str, first: np.ndarray) -> None:
    got = call(IDS, TABLE, STARTS, mode=mode)
    np.testing.assert_allclose(got, [first, TABLE[0], TABLE[1]], rtol=1e-6)


# Row 0: two valid ids and an invalid one. Row 1: invalid ids alone. Row 2: no ids. Row 3: one id. Row 4: weights that
# are not above zero.
SAFE_IDS, SAFE_STARTS = np.array([0, 1, -1, -1, 2, 0, 1]), np.array([0, 3, 4, 4, 5])
SAFE_WEIGHTS = np.array([1.0, 2.0, 1.0, 1.0, 3.0, 0.0, -0.5], np.float32)
NONE = np.zeros(4, np.float32)


@calls
def test_tensorflows_safe_lookup(call: Any) -> None:
    pruned = np.where(SAFE_WEIGHTS > 0, SAFE_IDS, -1)
    got = call(
        *(pruned, TABLE, SAFE_STARTS),
        mode="mean",
        divisor="weights",
        per_sample_weights=SAFE_WEIGHTS,
        negative="skip",
    )
    np.testing.assert_allclose(got, [(TABLE[0] + 2 * TABLE[1]) / 3, NONE, NONE, TABLE[2], NONE], rtol=1e-6)
    got = call(SAFE_IDS, TABLE, SAFE_STARTS, mode="mean", negative="skip")
    both = (TABLE[0] + TABLE[1]) / 2
    np.testing.assert_allclose(got, [both, NONE, NONE, TABLE[2], both], rtol=1e-6)
    # A sum keeps the ids whose weight is not above zero.
    got = call(SAFE_IDS, TABLE, SAFE_STARTS, mode="sum", per_sample_weights=SAFE_WEIGHTS, negative="skip")
    np.testing.assert_allclose(got, [TABLE[0] + 2 * TABLE[1], NONE, NONE, 3 * TABLE[2], -0.5 * TABLE[1]], rtol=1e-6)


@calls
def test_tensorflows_safe_lookup_with_a_default_id(call: Any) -> None:
    """Of the page: an entry without ids is the row of default_id = 0, which standard nodes choose behind the bag."""
    ids, weights = np.array([1, 3, -1, 1]), np.array([2.0, 0.5, 1.0, 3.0], np.float32)
    given: dict[str, Any] = {"mode": "mean", "divisor": "weights", "per_sample_weights": weights, "negative": "skip"}
    got = call(ids, TABLE, np.array([0, 2, 3]), **given)
    got = np.where(np.array([[False], [True], [False]]), TABLE[0], got)
    np.testing.assert_allclose(got, [(2 * TABLE[1] + 0.5 * TABLE[3]) / (2 + 0.5), TABLE[0], TABLE[1]], rtol=1e-6)


@calls
def test_a_divisor_of_zero_is_ieees(call: Any) -> None:
    table = np.array([[1.0, 0.0], [3.0, 0.0]], np.float32)
    weights = np.array([[1, -1]], np.float32)
    given: dict[str, Any] = {"per_sample_weights": weights, "mode": "mean"}
    got = call(np.array([[0, 1]]), table, divisor="weights", **given)
    assert np.isneginf(got[0, 0])
    assert np.isnan(got[0, 1])
    np.testing.assert_array_equal(call(np.array([[0, 1]]), table, divisor="count", **given), [[-1, 0]])


def test_without_a_divisor_weights_need_a_sum() -> None:
    for mode in ("mean", "sqrtn", "max"):
        with pytest.raises(ValueError, match=f"per_sample_weights needs mode 'sum', got mode = '{mode}'"):
            lucid_onnx.embedding_bag(IDS, TABLE, STARTS, mode=mode, per_sample_weights=WEIGHTS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="per_sample_weights needs mode 'sum', got mode = 'max'"):
        lucid_onnx.embedding_bag(IDS, TABLE, STARTS, mode="max", per_sample_weights=WEIGHTS, divisor="count")
    with pytest.raises(ValueError, match="divisor = 'number' is not one of 'count', 'weights'"):
        lucid_onnx.embedding_bag(IDS, TABLE, STARTS, divisor="number")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative = 'wrap' is not one of 'refuse', 'skip'"):
        lucid_onnx.embedding_bag(IDS, TABLE, STARTS, negative="wrap")  # type: ignore[arg-type]


_COMBINATIONS = [
    (mode, divisor, negative)
    for mode, divisor, negative in itertools.product(spec.MODES, (None, "count", "weights"), ("refuse", "skip"))
    if (mode in ("mean", "sqrtn") or divisor is None)
]


@needs_library
@pytest.mark.parametrize(("mode", "divisor", "negative"), _COMBINATIONS)
@pytest.mark.parametrize("native", [True, False])
def test_float64_is_torchs_arithmetic_and_autograd(mode: str, divisor: str | None, negative: str, native: bool) -> None:
    torch = pytest.importorskip("torch")
    from lucid_onnx.torch import embedding_bag

    random = np.random.RandomState(5)
    bounds = np.cumsum([0, 3, 0, 70, 5, 2])
    indices = random.randint(0, 9, bounds[-1])
    indices[:3] = 4, 4, 1  # a row twice in a bag
    padding, skips = 2, negative == "skip"
    if skips:
        indices[1:80:3] = -1
        indices[-2:] = -7  # a bag without positions
    weighted = divisor is not None or mode == "sum"
    weights = torch.tensor(random.uniform(0.5, 2, len(indices)) * np.where(np.arange(len(indices)) % 5, 1, -0.3))
    table = torch.tensor(random.standard_normal((9, 6)))
    gradient = torch.tensor(random.standard_normal((len(bounds) - 1, 6)))

    def plain(table: Any, weights: Any) -> Any:
        bags = []
        for begin, end in itertools.pairwise(bounds):
            kept = [k for k in range(begin, end) if indices[k] != padding and indices[k] >= 0]
            if not kept:
                bags.append(table.new_zeros(6))
                continue
            rows, by = table[indices[kept]], weights[kept]
            products = rows * by[:, None] if weighted else rows
            count = torch.tensor(float(len(kept)), dtype=torch.float64)
            total = count
            if divisor == "weights":
                total = by.sum() if mode == "mean" else (by * by).sum()
            bags.append(
                products.max(dim=0).values
                if mode == "max"
                else products.sum(dim=0) / {"sum": 1, "mean": total, "sqrtn": total.sqrt()}[mode]
            )
        return torch.stack(bags)

    def ours(table: Any, weights: Any) -> Any:
        return embedding_bag(
            *(torch.tensor(indices), table, torch.tensor(bounds)),
            mode=mode,  # type: ignore[arg-type]
            include_last_offset=True,
            padding_idx=padding,
            per_sample_weights=weights if weighted else None,
            negative=negative,
            divisor=divisor,
            native=native,
        )

    results = []
    for function in (plain, ours):
        leaves = [table.clone().requires_grad_(), weights.clone().requires_grad_()]
        output = function(*leaves)
        used = leaves if weighted else leaves[:1]
        results.append([output.detach(), *torch.autograd.grad(output, used, gradient)])
    for expected, got in zip(*results, strict=True):
        np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=1e-10, atol=1e-10)


def test_made_up_inputs_have_positions_to_skip() -> None:
    from lucid_onnx.parity.inputs import random_inputs

    for negative, two_d in itertools.product(("refuse", "skip"), (False, True)):
        model = lucid_onnx.build_model(TABLE, negative=negative, two_d=two_d)  # type: ignore[arg-type]
        assert (random_inputs(model, {})["indices"] < 0).any() == (negative == "skip")


def _drawn(random: np.random.RandomState, name: str) -> dict[str, Any]:
    """What `cases.make` is told, any of it."""

    def one(*values: Any) -> Any:
        return values[random.randint(len(values))]

    mode, divisor, layout = one(*spec.MODES), one(None, "count", "weights"), one("ragged", "ends", "rows")
    takes_weights = mode == "sum" or (mode != "max" and divisor is not None)
    lengths = [one(0, 1, 2, 5, 30, 64, 65, 130, 1030, 2100) for _ in range(random.randint(6))]
    return {
        "name": name,
        "mode": mode,
        "divisor": divisor,
        "negative": one("refuse", "skip"),
        "weighted": takes_weights and one(False, True, True),
        "dtype": one("float32", "float16", "bfloat16", "float64"),
        "index_dtype": one("int32", "int64"),
        "layout": layout,
        "lengths": (*lengths, 3)[:1] * 3 if layout == "rows" else lengths,
        "rows": random.randint(1, 30),
        "dim": one(1, 3, 8, 16, 33, 64, 100),
        "padding_idx": one(None, 0),
        "max_norm": one(None, None, 1.2),
    }


@needs_library
@pytest.mark.parametrize("seed", range(4))
def test_any_combination_has_one_result(seed: int) -> None:
    """The reference's, with the same bits on every instruction set and at any thread count; and so its gradients."""
    random = np.random.RandomState(seed)
    ways = [*itertools.product(kernels.isas(), (1, 3)), *((kernels.isas()[-1], threads) for threads in (2, 4, 8))]
    for k in range(30):
        drawn = _drawn(random, f"drawn {seed} {k}")
        case = cases.make(**drawn)
        pooled = [kernels.pool(case, isa, threads) for isa, threads in ways]
        case.check(pooled[0])
        assert len({array.tobytes() for array in pooled}) == 1, drawn
        freq, sparse = bool(random.randint(2)), bool(random.randint(2))
        back = gradients.make(**{**drawn, "lengths": drawn["lengths"][:3]}, freq=freq, sparse=sparse)
        given = [kernels.gradient(back, isa, threads) for isa, threads in ways]
        back.check(*given[0])
        assert len({tuple(kernels.bits(outputs)) for outputs in given}) == 1, drawn


@pytest.mark.parametrize("form", ["portable", "blocks", "padded", "loop"])
@pytest.mark.parametrize("mode", ["mean", "sqrtn"])
def test_standard_operators_have_the_same_bits_at_any_thread_count(form: str, mode: str) -> None:
    """Long bags and short ones, some of their positions skipped, divided by their weights."""
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    given: dict[str, Any] = {"mode": mode, "divisor": "weights", "negative": "skip", "weighted": True}
    case = cases.make(f"threads {mode}", lengths=[700, 3, 0, 300, 1, *[7] * 60], rows=90, dim=33, **given)
    model = case_model(case, "portable" if form == "portable" else "native")
    if form != "portable":
        convert(model, "standard", Ragged(form, 700 if form == "padded" else None))
    found = set()
    for threads in (1, 2, 3, 4, 8):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        (got,) = lucid_onnx.InferenceSession(model, native=False, session_options=options).run(None, case.inputs)
        case.check(got)
        found.add(got.tobytes())
    assert len(found) == 1
