"""Random poolings of an embedding, as people write them: found, right, or left with a reason; and near misses.

A few run by default. ``LUCID_SWEEP_POOLINGS=1000 LUCID_SWEEP_MISSES=1000 pytest -s tests/test_poolings.py`` runs as
many as are asked for and prints how many were fused; the first ones are always the same ones.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_onnx.ops.embedding_bag import spec

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from lucid_onnx.torch import UnfusedWarning  # noqa: E402  # needs torch
from lucid_testing import poolings  # noqa: E402  # needs torch
from lucid_testing.poolings import EXPORTERS, Exported, Pooling  # noqa: E402  # needs torch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

POOLINGS = int(os.environ.get("LUCID_SWEEP_POOLINGS", "30"))
MISSES = int(os.environ.get("LUCID_SWEEP_MISSES", "29"))
#: How many are exported together.
TOGETHER = 8
#: Calls of other sizes than the exported one, of exports whose sizes are open.
SIZES = [(3, 4), (5, 9), (1, 1)]


def groups(count: int) -> list[tuple[str, list[int]]]:
    """The exporter and the seeds of poolings that are exported together."""
    seeds = {exporter: list(range(k, count, len(EXPORTERS))) for k, exporter in enumerate(EXPORTERS)}
    return [(e, found[k : k + TOGETHER]) for e, found in seeds.items() for k in range(0, len(found), TOGETHER)]


def fused(drawn: list[Pooling], path: Path) -> tuple[Exported, onnx.ModelProto, dict[str, str]]:
    """The export, the model with its bags, and what is left, by node, with the reason."""
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = poolings.export(drawn, path)
    report = lucid_onnx.fuse(path)
    left = {u.where: u.reason for u in report.unfused}
    for warning in said:
        if warning.category is UnfusedWarning:
            left |= dict(line.strip().split(": ", 1) for line in str(warning.message).splitlines()[1:])
    return made, report.model, left


def runs(model: onnx.ModelProto) -> bool:
    """Whether ONNX Runtime takes a model; it has few operators of bfloat16, and fewer of float16."""
    try:
        lucid_onnx.InferenceSession(model)
    except Exception as error:
        if "NOT_IMPLEMENTED" not in str(error):
            raise
        return False
    return True


def check(made: Exported, model: onnx.ModelProto) -> None:
    """Every output is what eager torch computes, to the tolerance of each."""
    if runs(model):
        check_outputs(made, model, range(len(made.outputs)))
        return
    for k, module in enumerate(made.modules):  # those that ONNX Runtime has operators for
        names = [v.name for v in model.graph.input if v.name in made.inputs[k]]
        part = onnx.utils.Extractor(model).extract_model(names, [made.outputs[k]])
        if runs(part):
            check_outputs(made, part, [k])
        else:
            assert module.drawn.dtype in poolings.SHORT, str(module.drawn)


def check_outputs(made: Exported, model: onnx.ModelProto, which: Sequence[int]) -> None:
    session = lucid_onnx.InferenceSession(model)
    static = made.modules[0].drawn.exporter == "dynamo static"
    for seed, (batch, length) in enumerate(SIZES[:1] if static else SIZES):
        taken = {value.name for value in model.graph.input}
        feed = {name: value for name, value in made.feed(batch, length, seed).items() if name in taken}
        results = session.run([made.outputs[k] for k in which], feed)
        for module, got in zip([made.modules[k] for k in which], results, strict=True):
            call = module.drawn.call(batch, length, seed).values()
            with torch.no_grad():
                expected, size = (first(module.exact(absolute=a)(*widened(call, a))) for a in (False, True))
            assert (got.dtype, got.shape) == (np_dtype(module.drawn), expected.shape), str(module.drawn)
            off = np.abs(got.astype(np.float64) - expected)
            # What is not a number in torch is none here; the smallest numbers of float16 are 2 ** -24.
            fine = off <= module.drawn.tolerance * np.abs(size) + 2.0**-24
            fine |= (got == expected) | (np.isnan(got) & np.isnan(expected))
            assert fine.all(), f"{module.drawn}, call {batch} x {length}: {got[~fine][:3]} for {expected[~fine][:3]}"


def widened(call: Any, absolute: bool) -> list[Any]:
    wide = [v.double() if v.is_floating_point() else v for v in call]
    return [v.abs() if absolute and v.is_floating_point() else v for v in wide]


def first(result: Any) -> np.ndarray:
    return poolings.array(result[0] if isinstance(result, tuple) else result)


def np_dtype(drawn: Pooling) -> np.dtype:
    return spec.BFLOAT16 if drawn.dtype == "bfloat16" else np.dtype(drawn.dtype)


#: By exporter: how many poolings were fused, and how many there were.
COUNTS: dict[str, Counter[str]] = {exporter: Counter() for exporter in EXPORTERS}


@pytest.mark.parametrize(("exporter", "seeds"), groups(POOLINGS))
def test_random_poolings(exporter: str, seeds: list[int], tmp_path: Path, translations: None) -> None:
    drawn = [Pooling.random(seed, exporter) for seed in seeds]
    made, model, left = fused(drawn, tmp_path / "poolings.onnx")
    check(made, model)
    for one, output in zip(drawn, made.outputs, strict=True):
        nodes = poolings.behind(model, output)
        found = any(node.domain == spec.DOMAIN for node in nodes)
        COUNTS[exporter]["fused" if found else "left"] += 1
        if not found:
            reasons = {reason for node in nodes for where, reason in left.items() if repr(node.name) in where}
            print(f"\nnot fused: {one}: {reasons}; {[n.op_type for n in reversed(nodes)]}")
            assert reasons, f"nothing says why this is not fused: {one}"


def test_how_many_are_fused() -> None:
    total = sum(COUNTS.values(), Counter())
    if not total:
        pytest.skip("no pooling was exported")
    for exporter, count in COUNTS.items():
        print(f"\n{exporter}: {count['fused']} of {count.total()} fused", end="")
    print(f"\nall: {total['fused']} of {total.total()} fused, {100 * total['fused'] / total.total():.1f} %")
    assert total["fused"] >= 0.98 * total.total()


@pytest.mark.parametrize(("exporter", "seeds"), groups(MISSES))
def test_near_misses(exporter: str, seeds: list[int], tmp_path: Path, translations: None) -> None:
    """Whatever becomes of them, the numbers stay."""
    drawn = [Pooling.near_miss(seed, exporter) for seed in seeds]
    made, model, _ = fused(drawn, tmp_path / "misses.onnx")
    check(made, model)


def test_every_near_miss_is_another_number() -> None:
    """The twist of each changes what torch itself says, for one call at least: else it would test nothing."""
    same: Counter[str] = Counter()
    for seed in range(4 * len(poolings.TWISTS)):
        twisted = Pooling.near_miss(seed, "lucid")
        plain = dataclasses.replace(twisted, twist="none")
        for k, (batch, length) in enumerate(SIZES):
            with torch.no_grad():
                a, b = (first(one.build()(*one.call(batch, length, k).values())) for one in (twisted, plain))
            if a.shape != b.shape or not np.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True):
                break
        else:
            same[twisted.twist] += 1
    assert all(count < 4 for count in same.values()), same
