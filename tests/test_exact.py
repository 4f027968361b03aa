"""Integer-valued tables are summed without a rounding, so that a race or a lost row cannot hide in a tolerance."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

import lucid_onnx

THREADS = (1, 2, 8)
#: Runs per thread count: a race in a scatter showed in every run of some processes and in none of others.
RUNS = 50

LENGTHS = {
    "one bag of 200,000": [200_000],
    "64 bags, one of 100,000": [1000 + 13 * i for i in range(40)] + [100_000] + [i % 5 for i in range(23)],
}


def session(model: object, threads: int, native: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return lucid_onnx.InferenceSession(model, native=native, session_options=options)


@pytest.mark.parametrize("form", ["native", "portable", "standard"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_integers_are_exact(lengths: list[int], mode: str, form: str, native: None) -> None:
    random = np.random.RandomState(1)
    table = random.randint(-8, 9, (5000, 3)).astype(np.float32)
    indices = random.randint(0, len(table), sum(lengths))
    offsets = np.cumsum([0, *lengths[:-1]])
    expected = np.zeros((len(lengths), 3), np.float32)
    for i, (begin, length) in enumerate(zip(offsets, lengths, strict=True)):
        rows = table[indices[begin : begin + length]].astype(np.int64)
        if length:
            total = {"sum": rows.sum(0), "mean": rows.sum(0), "max": rows.max(0)}[mode]
            # The one rounding that a mean has: an exact float32 sum over an exact float32 count.
            expected[i] = np.float32(total) / np.float32(length if mode == "mean" else 1)
    model = lucid_onnx.build_model(table, mode=mode, form=form)
    feed = {"indices": indices, "offsets": offsets}
    for threads in THREADS:
        runner = session(model, threads, native=form == "native")
        for k in range(RUNS):
            got = runner.run(None, feed)[0]
            assert np.array_equal(got, expected), f"{threads} threads, run {k}"


@pytest.mark.parametrize("form", ["native", "portable"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bits_do_not_depend_on_threads(mode: str, form: str, native: None) -> None:
    random = np.random.RandomState(2)
    table = random.standard_normal((3000, 48)).astype(np.float32)
    lengths = np.concatenate([random.randint(0, 60, 700), [9000], random.randint(0, 4, 900), [1025, 1024, 1023]])
    indices = random.randint(0, len(table), lengths.sum())
    offsets = np.cumsum(lengths) - lengths
    model = lucid_onnx.build_model(table, mode=mode, form=form, max_norm=6.0)
    results = {
        session(model, threads, native=form == "native")
        .run(None, {"indices": indices, "offsets": offsets})[0]
        .tobytes()
        for threads in THREADS
        for _ in range(5)
    }
    assert len(results) == 1


def test_bits_of_a_bag_do_not_depend_on_its_neighbours(native: None) -> None:
    random = np.random.RandomState(3)
    table = random.standard_normal((500, 33)).astype(np.float32)
    bag = random.randint(0, len(table), 5000)
    before = random.randint(0, len(table), 777)
    alone = lucid_onnx.embedding_bag(bag, table, [0], mode="sum")
    among = lucid_onnx.embedding_bag(np.concatenate([before, bag, before]), table, [0, 777, 5777], mode="sum")
    assert alone[0].tobytes() == among[1].tobytes()


def test_a_long_bag_is_as_accurate_as_a_short_one(native: None) -> None:
    """All of one sign and a million positions: a plain running float32 sum is off by 1e-5 and more here."""
    random = np.random.RandomState(4)
    table = random.uniform(0.5, 1.0, (1000, 2)).astype(np.float32)
    indices = random.randint(0, len(table), 1_000_000)
    exact = table.astype(np.float64)[indices].sum(0)
    for form, native_kernel in (("native", True), ("standard", False)):
        got = lucid_onnx.embedding_bag(indices, table, [0], mode="sum", form=form, native=native_kernel)
        assert np.abs(got[0] / exact - 1).max() < 1e-6
