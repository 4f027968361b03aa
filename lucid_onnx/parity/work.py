"""What is compared: the conformance cases, larger ones, single operators, and a user's model."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from lucid_onnx.builder import ExternalData, is_external, load, tensors, to_form
from lucid_onnx.builder.conformance import AnyCase, case_model
from lucid_onnx.ops import (
    OPERATOR_OF,
    OPERATORS,
    embedding_bag_collection,
    quantized_embedding_bag,
)
from lucid_onnx.ops.embedding_bag import cases, spec

from . import inputs as made_inputs
from . import oracle
from .job import Job
from .measure import Expected
from .operators import operators
from .runtime import Program

__all__ = [
    "MODEL_TOLERANCE",
    "CannotRunError",
    "Job",
    "case_expected",
    "case_job",
    "conformance",
    "model",
    "operators",
    "scale",
]

#: The largest error of a user's model, as a part of the output's largest magnitude. A model that is one bag has the
#: tolerance of a case. Other models may have matrices of any width, each of whose sums is off by up to n * 2^-24 in
#: float32, with n some hundreds.
MODEL_TOLERANCE = 2e-5
_LARGEST_MODEL = 2**31 - 2**24


def conformance(pattern: str = "*") -> list[Job]:
    """The cases of the conformance suite whose names match a pattern of `fnmatch`."""
    found = {name: case for operator in OPERATORS.values() for name, case in operator.cases.suite().items()}
    return [case_job(case, "conformance") for name, case in found.items() if fnmatch.fnmatchcase(name, pattern)]


def scale(pattern: str = "*") -> list[Job]:
    """Cases so large that threads, blocks and races matter."""
    return [case_job(case, "scale") for name, case in _large().items() if fnmatch.fnmatchcase(name, pattern)]


@functools.cache
def _large() -> dict[str, cases.Case]:
    random = np.random.RandomState(2026)
    skewed = tuple(int(n) for n in np.minimum(random.zipf(1.5, 1200), 6000))
    common: dict[str, Any] = {"rows": 5000, "dim": 32}
    made = (
        cases.make("scale_sum_skewed", mode="sum", lengths=skewed, **common),
        cases.make("scale_mean_skewed_float16", mode="mean", dtype="float16", lengths=skewed, **common),
        cases.make("scale_max_skewed_padding", mode="max", padding_idx=7, lengths=skewed, **common),
        cases.make("scale_weights_ends", mode="sum", weighted=True, layout="ends", lengths=skewed, **common),
        cases.make("scale_mean_rows_64x64", layout="rows", lengths=(64,) * 64, **common),
        # One bag over all threads: a scatter with a reduction fails here.
        cases.make("scale_sum_one_bag_of_100000", mode="sum", lengths=(100_000,), **common),
        cases.make("scale_max_norm_sum_skewed", mode="sum", max_norm=5.0, lengths=skewed, **common),
    )
    return {case.name: case for case in made}


def case_job(case: AnyCase, group: str) -> Job:
    """A case with its programs; a model is made when it is first needed."""
    attributes = case.attributes
    call: dict[str, Any] | None = None  # of a collection, which no other runtime has
    if not isinstance(case, embedding_bag_collection.cases.Case):
        operator = next(name for name, o in OPERATORS.items() if type(case).__module__ == o.cases.__name__)
        call = {"operator": operator, **case.keywords}
        call = {name: "inf" if value == np.inf else value for name, value in call.items()}
    if call is not None and isinstance(attributes, quantized_embedding_bag.spec.Attributes):
        call |= {"codes_type": attributes.codes_type, "embedding_dim": attributes.embedding_dim}

    @functools.cache
    def program(form: str) -> Program | None:
        if form == "given" or (form == "call" and call is None):
            return None
        if form == "call":
            return Program("call", call=call)
        return Program(form, case_model(case, form).SerializeToString(deterministic=True))

    return Job(case.name, group, _about(case), case.inputs, case_expected(case), program)


def case_expected(case: AnyCase) -> list[Expected]:
    """What a case expects of each output; a case of several outputs has tuples where others have arrays."""

    def outputs(of: Any) -> Sequence[np.ndarray]:
        return of if isinstance(of, (list, tuple)) else (of,)

    parts = zip(outputs(case.expected()), outputs(case.exact), outputs(case.tolerance), strict=True)
    return [Expected(rounded, exact, np.broadcast_to(limit, exact.shape)) for rounded, exact, limit in parts]


def _about(case: AnyCase) -> str:
    sizes = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in case.inputs.items())
    a = case.attributes
    return "; ".join(part for part in (a.mode, a.changed, sizes) if part)


class CannotRunError(ValueError):
    """A model that cannot be compared; the message says why."""


def model(
    path: Path, given: Mapping[str, np.ndarray], *, sets: int = 3, tolerance: float = MODEL_TOLERANCE
) -> list[Job]:
    """A user's model over ``given`` inputs, or over ``sets`` sets of random ones.

    A model with ``ai.lucid`` nodes is compared in all forms. In a model without them `fuse` looks for bags, and the
    fused model is compared with the model as it is.

    Args:
        tolerance: unless the model is one bag, the largest error, as a part of the output's largest magnitude.

    Raises:
        OSError: the file cannot be read.
        CannotRunError: the comparison cannot run it.
    """
    try:
        proto = load(path)
        data = ExternalData(path)
        external = [t for t in tensors(proto) if is_external(t)]
        if proto.ByteSize() + sum(data.region(t)[2] for t in external) > _LARGEST_MODEL:
            raise CannotRunError(f"{path}: with its tables it is over 2 GiB, which is too large to send to a worker")
        for tensor in external:
            data.read(tensor)
    except ValueError as error:
        raise CannotRunError(str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}") from error
    bags: onnx.ModelProto | None = proto
    reasons = ""
    try:
        if not any(node.domain == spec.DOMAIN for node in proto.graph.node):
            bags, reasons = _fused(proto)
        forms = {form: to_form(bags, form) for form in ("native", "portable", "standard")} if bags is not None else {}
    except ValueError as error:
        raise CannotRunError(f"{path}: {error}") from error
    programs = {form: Program(form, m.SerializeToString(deterministic=True)) for form, m in forms.items()}
    if bags is None or bags is not proto:
        programs["given"] = Program("given", proto.SerializeToString(deterministic=True))
    whole = bags if bags is not None else proto
    jobs = []
    for seed in range(1 if _complete(whole, given) else sets):
        try:
            arrays = made_inputs.random_inputs(whole, given, seed)
            results = oracle.outputs(whole, arrays)
        except made_inputs.NoInputsError as error:
            raise CannotRunError(f"{path}: {error}") from error
        except Exception as error:  # onnx.reference may raise anything over an operator that it lacks
            raise CannotRunError(f"{path}: the reference cannot run it: {type(error).__name__}: {error}") from error
        sizes = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items())
        name = path.stem if _complete(whole, given) else f"{path.stem}, inputs {seed}"
        expected = _bag_expected(whole, arrays) or [_expected(result, tolerance) for result in results]
        jobs.append(Job(name, "model", sizes + reasons, arrays, expected, programs.get))
    return jobs


def _complete(proto: onnx.ModelProto, given: Mapping[str, np.ndarray]) -> bool:
    initializers = {t.name for t in proto.graph.initializer}
    return all(v.name in given for v in proto.graph.input if v.name not in initializers)


def _fused(proto: onnx.ModelProto) -> tuple[onnx.ModelProto | None, str]:
    """The model with its bags as nodes, and a note on them; None if there are none, or `fuse` cannot be imported."""
    try:
        from lucid_onnx.rewrite import fuse
    except ImportError as error:
        return None, f"; no search for bags: {error}"
    report = fuse(proto, form="native")
    return (report.model, f"; {len(report.fused)} bags found by fuse") if report.fused else (None, "")


def _bag_expected(proto: onnx.ModelProto, arrays: Mapping[str, np.ndarray]) -> list[Expected] | None:
    """For a model that is one bag and nothing else, the outputs with the tolerance of the operator's own cases."""
    if len(proto.graph.node) != 1 or proto.graph.node[0].domain != spec.DOMAIN:
        return None
    node = proto.graph.node[0]
    operator = OPERATOR_OF[node.op_type]
    if operator is not OPERATORS["embedding_bag"]:
        return None
    op = spec.VARIANTS[node.op_type]
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    named = {n: {**constants, **arrays}[v] for n, v in zip(op.inputs, node.input, strict=True)}
    attributes = spec.Attributes.from_onnx({a.name: helper.get_attribute_value(a) for a in node.attribute})
    case = cases.Case(
        "model",
        named["weight"],
        named["indices"],
        named.get("offsets"),
        named.get("per_sample_weights"),
        attributes,
    )
    return case_expected(case)


def _expected(result: np.ndarray, tolerance: float) -> Expected:
    if result.dtype.kind not in "f" and result.dtype != spec.BFLOAT16:
        return Expected(result, result, np.zeros(result.shape))
    exact = result.astype(np.float64)
    largest = float(np.max(np.abs(exact), initial=0.0, where=np.isfinite(exact)))
    step = float(np.spacing(np.asarray(1, result.dtype)).astype(np.float64))  # coarser for 16-bit types
    allowed = max(tolerance, 4 * step) * largest
    return Expected(result, exact, np.where(np.isfinite(exact), allowed, np.inf))
