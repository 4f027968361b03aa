"""fuzz/sessions.py: a short run, and that it finds a fault of each kind."""

from __future__ import annotations

import collections
import contextlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import lucid_onnx
from lucid_onnx.ops.embedding_bag import cases, lowering, reference, spec
from lucid_onnx.ops.embedding_bag_grad import lowering as gradient_lowering
from lucid_onnx.ops.embedding_bag_grad import reference as gradient_reference
from lucid_onnx.ops.emit import Emitter
from lucid_onnx.ops.quantized_embedding_bag import reference as quantized_reference
from lucid_testing import scripts

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    return scripts.load(Path(__file__).resolve().parent.parent / "fuzz" / "sessions.py")


def test_a_short_run(fuzz: ModuleType, native: None) -> None:
    report = fuzz.run(0, cases=400)
    assert [failure.why for failure in report.failures] == []
    assert set(report.cases) == set(fuzz.OPERATORS)
    assert report.cases.total() >= 400
    assert report.rejected > 0


def test_calls_of_every_operator_are_broken(fuzz: ModuleType) -> None:
    rejected = collections.Counter[Any]()
    for number in range(160):
        plan, r = fuzz.plan_of(0, number), np.random.RandomState(number)
        for _ in range(4):
            case = fuzz.call_of(plan, r, [fuzz.table_of(plan, r) for _ in plan.index_dtypes], broken=1.0)
            assert case.inputs
            with contextlib.suppress(fuzz.UndecidedError):  # a few are valid all the same
                rejected[plan.operator, plan.layout] += fuzz.expected_of(case) is None
    layouts = ("ragged", "ends", "rows")
    expected = {*itertools.product(fuzz.OPERATORS, layouts), ("embedding_bag_collection", "packed")}
    assert {key for key, count in rejected.items() if count > 3} == expected


def test_no_infinity_times_what_underflows(fuzz: ModuleType) -> None:
    ordinary, tiny = np.float32([[1.0, -0.0, 1e-6, np.nan]]), np.float32([[1e25, -1e-30, np.inf, 0.0]])
    assert not fuzz._may_underflow(ordinary)
    assert fuzz._may_underflow(tiny)
    assert not fuzz._may_underflow(tiny.astype(np.float64))
    assert fuzz._may_underflow(np.array([[1e200, 1e-200]]))
    assert not fuzz._may_underflow(np.zeros((0, 3), np.float16))


def test_a_plan_and_its_calls_follow_from_their_numbers(fuzz: ModuleType) -> None:
    def drawn(number: int) -> tuple[Any, list[bytes]]:
        plan, r = fuzz.plan_of(3, number), np.random.RandomState(number)
        case = fuzz.call_of(plan, r, [fuzz.table_of(plan, r) for _ in plan.index_dtypes])
        return plan, [array.tobytes() for array in case.inputs.values()]

    assert [drawn(n) for n in range(8)] == [drawn(n) for n in range(8)]
    plans = [fuzz.plan_of(3, n) for n in range(400)]
    for field, count in (
        ("operator", 4),
        ("dtype", 4),
        ("layout", 4),
        ("opset", fuzz.newest_opset() - 15),
        ("codes_type", 4),
        ("second", 3),
    ):
        assert len({getattr(plan, field) for plan in plans}) == count, field
    assert {plan.opset for plan in plans} == set(range(16, fuzz.newest_opset() + 1))
    assert {plan.keywords["mode"] for plan in plans} == set(spec.MODES)
    assert {plan.keywords["divisor"] for plan in plans if plan.weighted and plan.keywords["mode"] != "sum"} == {
        "count",
        "weights",
    }
    assert {plan.keywords["negative"] for plan in plans} == {"refuse", "skip"}
    assert {plan.ragged.way for plan in plans} == set(lowering.RAGGED)


# ---- Planted faults. Each takes something of the kind away that was once missing, or might be.


def _drops_nan(e: Emitter, blocks: str, axis: int = 1, keepdims: int = 0) -> str:
    return e.reduce("ReduceMax", blocks, axis, keepdims)


def _divides_by_nothing(e: Emitter, op: Any, pooled: str, count: Any, dim: Any) -> str:
    return str(e.Slice(pooled, [0], dim(e), [1]))  # behind them may be a sum of weights


def _no_ties(e: Emitter, weight: str, index: str, *, ties: bool = False) -> str:
    return _ROWS(e, weight, index)


def _nearly(x: np.ndarray, p: np.floating) -> np.ndarray:
    return _POWER(x, p) * x.dtype.type(1.001)


def _last_maximum(rows: np.ndarray) -> np.ndarray:
    return len(rows) - 1 - _FIRST(rows[::-1])


def _no_zero_point(codes: np.ndarray, scale: np.ndarray, zero_point: Any = None, bias: Any = None) -> np.ndarray:
    return _DEQUANTIZE(codes, scale, None, bias)


def _takes_everything(e: Emitter, flags: str, **name: str) -> str:
    return e.int64([0])


_ROWS, _POWER, _FIRST = gradient_lowering._rows, reference._power, gradient_reference._first_maximum
_DEQUANTIZE = quantized_reference.dequantize


@pytest.mark.parametrize(
    ("module", "name", "fault", "operator"),
    [
        (lowering, "_maximum", _drops_nan, "embedding_bag"),
        (lowering, "_divided", _divides_by_nothing, "embedding_bag_collection"),
        (lowering, "refusal", _takes_everything, "embedding_bag"),
        (reference, "_power", _nearly, "embedding_bag"),
        (gradient_lowering, "_rows", _no_ties, "embedding_bag_grad"),
        (gradient_reference, "_first_maximum", _last_maximum, "embedding_bag_grad"),
        (quantized_reference, "dequantize", _no_zero_point, "quantized_embedding_bag"),
    ],
    ids=lambda value: value.__name__.lstrip("_") if callable(value) else None,
)
def test_a_planted_fault_is_found(
    fuzz: ModuleType,
    native: None,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    name: str,
    fault: Callable[..., Any],
    operator: str,
) -> None:
    monkeypatch.setattr(module, name, fault)
    # It takes a maximum of rows that are clipped, repeated, and of an odd length: start near one.
    first = 61 if fault is _no_ties else 0
    report = fuzz.run(0, cases=900, operators=(operator,), first_plan=first)
    assert len(report.failures) == 1, str(report)


def test_a_failure_is_code_to_paste(
    fuzz: ModuleType, native: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lowering, "_divided", _divides_by_nothing)
    (failure,) = fuzz.run(0, operators=("embedding_bag",), cases=900).failures
    case = failure.case
    assert len(case.exact) == 1, "one bag is enough"
    assert case.weight.shape[1] == 1 or failure.plan.constant
    found: dict[str, Any] = {}
    exec(failure.code(), found)
    assert "expected" in capsys.readouterr().out
    assert isinstance(found["case"], cases.Case)
    assert {n: a.tobytes() for n, a in found["case"].inputs.items()} == {n: a.tobytes() for n, a in case.inputs.items()}
    got = found["session"].run(None, found["feed"])
    with pytest.raises(AssertionError, match=r"output\[0, 0\]"):
        case.check(*got)
    monkeypatch.undo()
    case.check(*lucid_onnx.InferenceSession(fuzz.case_model(case, "standard"), native=False).run(None, case.inputs))


def test_the_command(
    fuzz: ModuleType, native: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sessions.py", "--cases", "1", "--operators", "embedding_bag"])
    assert fuzz.main() == 0
    assert "0 failed" in capsys.readouterr().out
    monkeypatch.setattr(lowering, "_divided", _divides_by_nothing)
    monkeypatch.setattr(sys, "argv", ["sessions.py", "--cases", "900", "--operators", "embedding_bag"])
    assert fuzz.main() == 1
    out = capsys.readouterr().out
    assert "# --seed 0 --plan" in out
    assert "1 failed" in out
