"""Fusing what either of torch's exporters wrote: what both have in common."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import lucid_onnx
from lucid_testing.models import changed_numbers, results
from lucid_testing.torch_exports import DYNAMO, FLAT, LEGACY

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.mark.parametrize("exporter", ["legacy", "dynamo"])
@pytest.mark.parametrize("name", ["sum", "mean", "max"])
def test_the_original_gives_the_same_where_it_gives_torchs(
    request: pytest.FixtureRequest, exporter: str, name: str
) -> None:
    """On the sizes that it was exported with; the Loop of a legacy export fails or gives NaN on empty bags."""
    export = request.getfixturevalue(exporter)(name if exporter == "dynamo" else f"{name}-17")
    expected = results(onnx.load(export.path), FLAT, native=False)[0]
    np.testing.assert_allclose(results(lucid_onnx.fuse(export.path).model, FLAT)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("exporter", "name"),
    [
        *(("legacy", n) for n in ("sum-11", "mean-17", "weights-17", "last-sum")),
        *(("dynamo", n) for n in ("sum", "mean-plain", "weights-padded", "matrix-mean", "norm")),
    ],
)
def test_a_changed_number_is_seen(request: pytest.FixtureRequest, exporter: str, name: str) -> None:
    """With any one number changed, a graph stays, or is fused to a bag that gives what the changed graph gives.

    Except for indices behind the last offset with include_last_offset, which the export and the bag treat differently.
    """
    export = request.getfixturevalue(exporter)(name)
    feed = (LEGACY if exporter == "legacy" else DYNAMO)[name][1]
    changed = fused = 0
    for what, model in changed_numbers(onnx.load(export.path)):
        changed += 1
        report = None
        with contextlib.suppress(ValueError):  # onnx.checker refuses some, and so do we
            report = lucid_onnx.fuse(model)
        if report is None or not report.fused:
            continue
        fused += 1
        if report.fused[0].include_last_offset and name == "mean-plain":
            continue
        expected = None  # where the changed graph does not run; onnxruntime crashes on some
        with contextlib.suppress(Exception):
            expected = ReferenceEvaluator(model).run(None, feed)[0]
        if expected is not None:
            found = results(report.model, feed, native=False)[0]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=what)
    assert changed >= 15
    assert fused < changed / 2
