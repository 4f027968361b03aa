"""What `lucid-onnx parity` compares by, tolerances and distances, and the frames in which arrays come to it."""

from __future__ import annotations

import dataclasses
import io
import math
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lucid_onnx.ops.embedding_bag import cases as bag_cases
from lucid_onnx.parity import measure, process, wire, work

# ---- Tolerances and distances.


@pytest.mark.parametrize(
    "name", ["sum_ragged_float32", "mean_ragged_float16", "everything_ends_bfloat16", "max_dim_33"]
)
def test_the_tolerance_is_the_cases_own(name: str) -> None:
    """A job with another tolerance than the operator's case would be caught at its edge, on either side."""
    case = bag_cases.all_cases()[name]
    (job,) = work.conformance(name)
    (expected,) = job.expected
    np.testing.assert_array_equal(expected.tolerance, case.tolerance)
    # In float64, so that no rounding decides.
    wide = dataclasses.replace(expected, rounded=expected.exact)
    for factor, kind in ((0.99, "equal"), (1.01, "value")):
        got = expected.exact + factor * case.tolerance
        assert measure.compare([got], [wide]).kind == kind
    planted_tolerance = dataclasses.replace(wide, tolerance=1000 * case.tolerance)
    assert measure.compare([expected.exact + 1.01 * case.tolerance], [planted_tolerance]).kind == "equal"


def expect(values: list[float], dtype: Any = np.float32, tolerance: float = 0.0) -> measure.Expected:
    exact = np.array(values, np.float64)
    return measure.Expected(exact.astype(dtype), exact, np.full(exact.shape, tolerance))


@pytest.mark.parametrize(
    ("got", "expected", "kind", "where"),
    [
        ([math.nan, 1], [math.nan, 1], "equal", ""),
        ([1, 1], [math.nan, 1], "NaN", "output[0] = 1, expected nan within 0.1"),
        ([math.nan, 1], [1, 1], "NaN", "output[0] = nan, expected 1 within 0.1"),
        ([1, math.inf], [1, -math.inf], "infinity", "output[1] = inf, expected -inf within 0.1"),
        ([1, 3e38], [1, math.inf], "infinity", "output[1] = 3.00000001e+38, expected inf"),
        ([1, 1.2], [1, 1], "value", "output[1] = 1.2"),
        ([1.05, 0.95], [1, 1], "equal", ""),
    ],
)
def test_kinds_of_differences(got: list[float], expected: list[float], kind: str, where: str) -> None:
    found = measure.compare([np.array(got, np.float32)], [expect(expected, tolerance=0.1)])
    assert found.kind == kind
    assert found.where.startswith(where)


def test_numbers_of_a_difference() -> None:
    one = np.float32(1)
    got = np.array([np.nextafter(one, one * 2), 2, -0.0, 5], np.float32)
    found = measure.compare([got], [expect([1, 2, 0, 4], tolerance=0.5)])
    assert found.max_abs == 1
    assert found.max_rel == 0.25
    assert found.margin == 2
    assert (found.wrong, found.size) == (1, 4)
    assert found.max_ulp == 2**21  # 5 - 4, in steps of 2^-21


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_ulps(dtype: Any) -> None:
    def array(*values: float) -> np.ndarray:
        return np.array(values, dtype)

    info = ml_dtypes.finfo(dtype)
    tiny, largest = info.smallest_subnormal, info.max
    assert measure.ulps(array(0.0), array(-0.0)) == 0
    assert measure.ulps(array(1.0), array(1 + float(info.eps))) == 1
    assert measure.ulps(np.array([tiny], dtype), np.array([-tiny], dtype)) == 2
    steps = int(np.array([largest], dtype).view(f"u{np.dtype(dtype).itemsize}")[0])
    assert measure.ulps(np.array([largest], dtype), np.array([-largest], dtype)) == 2 * steps


def test_outputs_of_another_number_or_shape() -> None:
    assert measure.compare([], [expect([1])]).where == "0 outputs, expected 1"
    found = measure.compare([np.ones((1, 1), np.float32)], [expect([1])])
    assert (found.kind, found.where) == ("shape", "output has shape [1, 1], expected [1]")
    integers = measure.Expected(np.array([1, 2]), np.array([1, 2]), np.zeros(2))
    assert measure.compare([np.array([1, 3])], [integers]).where == "output[1] = 3, expected 2"


# ---- Frames.


def test_frames_come_back() -> None:
    arrays = {
        "a": np.arange(6, dtype=np.int32).reshape(2, 3),
        "b": np.ones((0, 4), ml_dtypes.bfloat16),
        "c": np.array(True),
    }
    described, blobs = wire.describe(arrays)
    stream = io.BytesIO()
    wire.send(stream, {"inputs": described}, blobs)
    stream.seek(0)
    message = wire.receive(stream)
    assert message is not None
    assert wire.receive(stream) is None
    back = wire.arrays(message[0]["inputs"], message[1])
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize(
    "data",
    [
        b"hello, world",
        b"LXP1",
        b"LXP1\xff\xff\xff\xff{}",
        b"LXP1\x02\x00\x00\x00[]",
        b'LXP1\x0d\x00\x00\x00{"sizes":[9]}x',
        b'LXP1\x0e\x00\x00\x00{"sizes":[-1]}',
        b'LXP1\x0f\x00\x00\x00{"sizes":["1"]}x',
    ],
)
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(wire.BrokenFrameError):
        wire.receive(io.BytesIO(data))


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "a", "dtype": "object", "shape": [1]},
        {"name": "a", "dtype": "float32", "shape": [2]},
        {"name": "a", "dtype": "float32", "shape": ["x"]},
        {"dtype": "float32", "shape": [1]},
        None,
    ],
)
def test_what_is_no_array_is_refused(entry: Any) -> None:
    with pytest.raises(wire.BrokenFrameError):
        wire.arrays([entry], [b"1234"])


def test_a_process_that_talks_nonsense_has_crashed() -> None:
    command = [sys.executable, "-c", "print('no frame at all')"]
    with process.Worker(command) as worker, pytest.raises(process.CrashError, match="expected a frame"):
        worker.hello(60)
