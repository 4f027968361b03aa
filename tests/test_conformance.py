"""Every case, in every form, on every runtime that is in this process: one meaning, one result."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import numpy_helper

import lucid_onnx
from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops import OPERATORS
from lucid_onnx.ops.embedding_bag import reference
from lucid_onnx.ops.embedding_bag.cases import Case, all_cases
from lucid_onnx.ops.embedding_bag.spec import ATEN_MODES, BFLOAT16, DOMAIN
from lucid_testing.graphs import unread
from lucid_testing.models import torch_keywords

CASES = all_cases()
RUN = set(CASES.values())
SUITE = {name: case for operator in OPERATORS.values() for name, case in operator.cases.suite().items()}
MODELS = Path(__file__).resolve().parent.parent / "models"
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


model_of = functools.cache(case_model)


@functools.cache  # tests compare forms with each other; each runs once
def run(case: Case, form: str, *, native: bool) -> np.ndarray:
    session = lucid_onnx.InferenceSession(model_of(case, form), native=native)
    first, second = (session.run(None, case.inputs)[0] for _ in range(2))
    assert first.tobytes() == second.tobytes(), "the second run has its memory laid out by what the first one used"
    return first


@pytest.mark.parametrize("name", OPERATORS)
def test_every_node_is_read(name: str) -> None:
    """ONNX Runtime before 1.19 reuses the memory of an output without a reader, from the second run of a shape on."""
    for case, form in itertools.product(OPERATORS[name].cases.all_cases().values(), ("portable", "standard")):
        assert not unread(case_model(case, form)), f"{case.name}, {form}"


@every_case
def test_reference_agrees_with_itself_in_float64(case: Case) -> None:
    case.check(case.expected())


@pytest.mark.parametrize("p", [0.25, 0.5, 1.0, 2.0, 2.5, 3.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_references_powers_are_the_nearest_ones(dtype: type[np.floating], p: float) -> None:
    """So its norms, and the files of the suite, have the same bits on every processor, as NumPy's powers have not."""
    x = np.abs(np.random.RandomState(7).standard_normal(300)).astype(dtype)
    powers = reference._power(x, dtype(p))
    assert powers.dtype == dtype
    up, root = Fraction(p).as_integer_ratio()
    for value, power in zip(x, powers, strict=True):
        below, above = (
            (Fraction(float(power)) + Fraction(float(np.nextafter(power, dtype(end))))) / 2 for end in (0, np.inf)
        )
        assert below**root <= Fraction(float(value)) ** up <= above**root
    ends = reference._power(np.array([0, np.inf, np.nan], dtype), dtype(p))
    np.testing.assert_array_equal(ends, np.array([0, np.inf, np.nan], dtype))


@every_case
def test_native_form(case: Case, native: None) -> None:
    case.check(run(case, "native", native=True))


@every_case
def test_portable_form_with_the_library(case: Case, native: None) -> None:
    assert run(case, "portable", native=True).tobytes() == run(case, "native", native=True).tobytes()


@every_case
def test_portable_form_without_the_library(case: Case) -> None:
    case.check(run(case, "portable", native=False))


@every_case
def test_standard_form(case: Case) -> None:
    got = run(case, "standard", native=False)
    case.check(got)
    assert got.tobytes() == run(case, "portable", native=False).tobytes()


@every_case
@pytest.mark.parametrize("form", ["portable", "standard"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about the infinities that the cases hold
def test_onnx_reference(case: Case, form: str) -> None:
    case.check(np.asarray(onnx.reference.ReferenceEvaluator(model_of(case, form)).run(None, case.inputs)[0]))


@every_case
def test_call(case: Case, native: None) -> None:
    got = lucid_onnx.embedding_bag(
        case.indices, case.weight, case.offsets, per_sample_weights=case.per_sample_weights, **case.keywords
    )
    case.check(got)


def torch_has(case: Case) -> bool:
    """Whether torch has what the attributes ask for."""
    a = case.attributes
    return a.mode in ATEN_MODES and a.negative == "refuse" and a.divisor is None


def torch_can_judge(case: Case) -> str | None:
    """Why torch cannot be the oracle for a case, or None."""
    if not torch_has(case):
        return "torch has no sqrtn, skips no index, and takes weights with mode sum alone"
    if case.indices.ndim == 2 and case.indices.size == 0:
        return "torch raises on 2-D indices without entries"
    if case.attributes.include_last_offset and case.offsets is not None and case.offsets[-1] < len(case.indices):
        return "torch disagrees with itself about positions after the last offset (pytorch#191965)"
    if case.attributes.mode == "max" and not np.isfinite(case.weight.astype(np.float64)).all():
        return "in torch's max it depends on the order whether a NaN is seen"
    if case.weight.size == 0:
        return "torch refuses tables without elements"
    if case.weight.dtype.itemsize == 2 and case.attributes.mode == "mean":
        return "torch rounds a 16-bit mean before it divides"
    if case.attributes.max_norm is not None and case.weight.dtype.itemsize == 2:
        return "torch writes the clipped rows back in 16 bits"
    if case.offsets is not None and case.offsets.dtype != case.indices.dtype:
        return "torch wants offsets and indices of one dtype"
    if case.attributes.include_last_offset and case.offsets is not None and len(case.offsets) == 1:
        return "torch refuses include_last_offset with no bags"
    if case.per_sample_weights is not None and np.isnan(case.per_sample_weights.astype(np.float64)).any():
        return "torch multiplies the weights of padded positions in"
    return None


JUDGED = {name: case for name, case in CASES.items() if torch_can_judge(case) is None}


@pytest.mark.parametrize("case", JUDGED.values(), ids=JUDGED.keys())
def test_torch_agrees(case: Case) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")

    def tensor(array: np.ndarray | None) -> object:
        if array is None:
            return None
        if array.dtype == BFLOAT16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())  # a copy: max_norm writes into torch's weight

    got = torch.nn.functional.embedding_bag(
        tensor(case.indices),
        tensor(case.weight),
        tensor(case.offsets),
        per_sample_weights=tensor(case.per_sample_weights),
        **torch_keywords(case.attributes),
    )
    array = got.view(torch.int16).numpy().view(BFLOAT16) if got.dtype == torch.bfloat16 else got.numpy()
    # torch adds one row after another in float32, which is off by up to 2^-24 of the magnitudes a row.
    longest = max(np.diff(case.offsets, append=len(case.indices)), default=0) if case.offsets is not None else 0
    case.check(array, slack=max(1.0, longest * 2.0**-24 / 1e-6))


def test_torch_judges_most_cases() -> None:
    assert len(JUDGED) > 0.7 * sum(map(torch_has, CASES.values()))


def test_files_are_what_the_script_makes() -> None:
    result = subprocess.run(
        [sys.executable, str(MODELS / "make.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def same_arrays(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return list(a) == list(b) and all(
        (a[k].dtype, a[k].shape, a[k].tobytes()) == (b[k].dtype, b[k].shape, b[k].tobytes()) for k in a
    )


@pytest.mark.parametrize("folder", sorted((MODELS / "conformance").iterdir()), ids=lambda p: p.name)
def test_files_run(folder: Path) -> None:
    """The suite as a runtime's author meets it: files alone, read with onnx, with the tolerance of the case."""
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    case = SUITE[folder.name.removesuffix("_expanded")]
    expanded = folder.name.endswith("_expanded")
    assert expanded == all(entry.domain != DOMAIN for entry in model.opset_import)
    data = folder / "test_data_set_0"
    inputs = [numpy_helper.to_array(onnx.load_tensor(data / f"input_{k}.pb")) for k in range(len(model.graph.input))]
    form = "standard" if expanded else "portable"
    arrays = {v.name: a for v, a in zip(model.graph.input, inputs, strict=True)}
    if case in RUN and model == model_of(case, form) and same_arrays(arrays, case.inputs):
        got = [run(case, form, native=False)]  # the very same has run, or does now
    else:
        got = lucid_onnx.InferenceSession(str(folder / "model.onnx"), native=False).run(None, arrays)
    case.check(*got)
    outputs = (onnx.load_tensor(data / f"output_{k}.pb") for k in range(len(model.graph.output)))
    case.check(*(numpy_helper.to_array(output) for output in outputs))


def test_suite_is_small_and_complete() -> None:
    folders = {p.name for p in (MODELS / "conformance").iterdir()}
    assert folders == {name + suffix for name in SUITE for suffix in ("", "_expanded")}
    size = sum(p.stat().st_size for p in MODELS.rglob("*") if p.suffix in (".onnx", ".pb"))
    assert len(CASES) >= 200
    assert size <= 6_000_000
