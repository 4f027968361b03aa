"""What is compared: the conformance cases, larger ones, and a user's model."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from lucid_onnx.builder import to_form
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
from .measure import Expected
from .runtime import Program

#: How far the outputs of a user's whole model may be off, as a part of the output's largest magnitude. A bag alone
#: keeps its case's tolerance; behind it there may be matrices of any width, each of whose sums is off by up to
#: n * 2^-24 in float32, with n some hundreds.
MODEL_TOLERANCE = 2e-5
_LARGEST_MODEL = 2**31 - 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One thing to run everywhere.

    Attributes:
        name, group: the group is "conformance", "scale", "operators" or "model".
        about: one line for people.
        inputs: in the order of the model's inputs.
        expected: of each output.
        program: the program of a form, or None where this job has none of that form.
        runs, seconds: it runs so often, as far as so many seconds last, if the comparison's own limits are lower.
    """

    name: str
    group: str
    about: str
    inputs: Mapping[str, np.ndarray]
    expected: Sequence[Expected]
    program: Callable[[str], Program | None]
    runs: int = 0
    seconds: float = 0.0


def operators(pattern: str = "*") -> list[Job]:
    """Standard operators and functions alone, where runtimes are known to part: what a model of bags must get around.

    They are of the form "given". A scatter of this size with a reduction to one target races in ONNX Runtime on the
    CPU, its maximum drops NaN, and what a Gather makes of an index outside its data is every runtime's own.
    """
    random = np.random.RandomState(7)
    count, dim = 100_000, 32
    # Whole numbers: any order of additions is exact, and whatever is off was lost.
    updates = random.randint(-8, 9, (count, dim)).astype(np.float32)
    values = random.standard_normal((3, 40)).astype(np.float32)
    values[0, 3], values[1, 0], values[2, -1] = np.nan, np.nan, np.nan
    rising = np.cumsum(np.abs(updates), 0, np.float32)  # so that each update to a maximum counts
    scatters = (
        ("operator_scatter_nd_add", "add", updates, updates.sum(0, dtype=np.float64)),
        ("operator_scatter_nd_max", "max", rising, rising[-1].astype(np.float64)),
    )
    found = (
        *(
            _operator(
                name,
                f"ScatterND with reduction {reduction} of 100,000 updates to one target",
                helper.make_node("ScatterND", ["data", "indices", "updates"], ["y"], reduction=reduction),
                {"data": np.zeros((2, dim), np.float32), "indices": np.ones((count, 1), np.int64), "updates": rows},
                np.stack([np.zeros(dim), result]),
                runs=100,  # a race does not show in every run, and on a busy machine in few
                seconds=2.0,
            )
            for name, reduction, rows, result in scatters
        ),
        *(
            _operator(
                f"operator_scatter_nd_add_{dtype}",
                f"ScatterND with reduction add of {dtype}",
                helper.make_node("ScatterND", ["data", "indices", "updates"], ["y"], reduction="add"),
                {
                    "data": np.zeros((2, 4), dtype),
                    "indices": np.array([[1], [0], [1]], np.int64),
                    "updates": updates[:3, :4].astype(dtype),
                },
                np.stack([updates[1, :4], updates[0, :4] + updates[2, :4]]).astype(dtype),
            )
            for dtype in (np.dtype(np.float16), spec.BFLOAT16)
        ),
        _operator(
            "operator_scatter_nd_nothing",
            "ScatterND of no updates at all",
            helper.make_node("ScatterND", ["data", "indices", "updates"], ["y"]),
            {"data": values[:, 5:9], "indices": np.zeros((0, 1), np.int64), "updates": np.zeros((0, 4), np.float32)},
            values[:, 5:9],
            open_shapes=True,
        ),
        _operator(
            "operator_reduce_max_nan",
            "ReduceMax over rows with a NaN in them",
            helper.make_node("ReduceMax", ["data", "axes"], ["y"], keepdims=0),
            {"data": values, "axes": np.array([1], np.int64)},
            np.full(3, np.nan),
        ),
        _operator(
            "operator_gather_minus_1",
            "Gather with an index of -1, which ONNX counts from the end",
            helper.make_node("Gather", ["data", "indices"], ["y"]),
            {"data": values[:, 5:9], "indices": np.array([0, -1, 1], np.int64)},
            values[[0, -1, 1], 5:9],
        ),
        _operator(
            "operator_non_zero",
            "NonZero of five flags",
            helper.make_node("NonZero", ["data"], ["y"]),
            {"data": np.array([1, 1, 0, 1, 0], np.float32)},
            np.array([[0, 1, 3]], np.int64),
        ),
        _operator(
            "operator_non_zero_and_not",
            "NonZero of five flags, and of their opposites",
            [
                helper.make_node("NonZero", ["data"], ["y"]),
                helper.make_node("Not", ["data"], ["opposite"]),
                helper.make_node("NonZero", ["opposite"], ["z"]),
            ],
            {"data": np.array([False, False, False, False, True])},
            np.array([[4]], np.int64),
            np.array([[0, 1, 2, 3]], np.int64),
            open_shapes=True,
        ),
        *_functions(),
    )
    return [job for job in found if fnmatch.fnmatchcase(job.name, pattern)]


def _functions() -> tuple[Job, ...]:
    """Functions of a model's own in ways that ours avoid, since not every runtime follows them."""
    numbers = np.array([-1, 2, -3], np.float32)
    imports = [helper.make_opsetid("", spec.DEFAULT_OPSET)]

    def function(name: str, outputs: Sequence[str], nodes: Sequence[onnx.NodeProto], **more: Any) -> onnx.FunctionProto:
        return helper.make_function("local", name, ["x"], outputs, nodes, imports, **more)

    def node(name: str, output: str, **more: Any) -> onnx.NodeProto:
        return helper.make_node(name, ["x"], [output], domain="local", **more)

    factor = helper.make_node("Constant", [], ["factor"])
    kind = onnx.AttributeProto.FLOAT
    factor.attribute.append(onnx.AttributeProto(name="value_float", ref_attr_name="factor", type=kind))
    scale = [factor, helper.make_node("Mul", ["x", "factor"], ["y"])]
    negate, absolute = (helper.make_node(op, ["x"], ["y"]) for op in ("Neg", "Abs"))
    both = [negate, helper.make_node("Abs", ["x"], ["z"])]
    return (
        _operator(
            "function_default",
            "a function whose attribute has a default of 3, and a node without that attribute",
            node("Scale", "y"),
            {"x": numbers},
            3 * numbers,
            functions=[function("Scale", ["y"], scale, attribute_protos=[helper.make_attribute("factor", 3.0)])],
        ),
        _operator(
            "function_overload",
            "two functions of one name that their overload tells apart, and a node of each",
            [node("One", "y", overload="negated"), node("One", "z", overload="absolute")],
            {"x": numbers},
            -numbers,
            np.abs(numbers),
            functions=[
                function("One", ["y"], [negate], overload="negated"),
                function("One", ["y"], [absolute], overload="absolute"),
            ],
        ),
        _operator(
            "function_fewer_outputs",
            "a function of two outputs, and a node that takes the first alone",
            node("Both", "y"),
            {"x": numbers},
            -numbers,
            functions=[function("Both", ["y", "z"], both)],
        ),
    )


def _operator(
    name: str,
    about: str,
    nodes: onnx.NodeProto | Sequence[onnx.NodeProto],
    arrays: Mapping[str, np.ndarray],
    *exact: np.ndarray,
    open_shapes: bool = False,
    functions: Sequence[onnx.FunctionProto] = (),
    **limits: Any,
) -> Job:
    """A job of a few nodes whose outputs "y", "z" must be ``exact``; float32 for float64.

    With ``open_shapes`` the model does not say how long its inputs are. ``limits`` are the job's.
    """
    results = {n: e.astype(np.float32) if e.dtype == np.float64 else e for n, e in zip("yz", exact, strict=False)}
    axes = {n: a for n, a in arrays.items() if n == "axes"}  # a constant, which most runtimes ask for
    inputs = {n: a for n, a in arrays.items() if n not in axes}
    kind = helper.np_dtype_to_tensor_dtype

    def shape(name: str, array: np.ndarray) -> Sequence[int | str]:
        return [f"length of {name}", *array.shape[1:]] if open_shapes else array.shape

    graph = helper.make_graph(
        [nodes] if isinstance(nodes, onnx.NodeProto) else nodes,
        name,
        [helper.make_tensor_value_info(n, kind(a.dtype), shape(n, a)) for n, a in inputs.items()],
        [helper.make_tensor_value_info(n, kind(a.dtype), [None] * a.ndim) for n, a in results.items()],
        [onnx.numpy_helper.from_array(a, n) for n, a in axes.items()],
    )
    imports = [helper.make_opsetid("", spec.DEFAULT_OPSET), *(helper.make_opsetid(f.domain, 1) for f in functions[:1])]
    # The oldest that can say it: 9 has the defaults of attributes, 10 overloads.
    version = 10 if any(f.overload for f in functions) else 9 if functions else 8
    model = helper.make_model(graph, opset_imports=imports, ir_version=version, functions=functions)
    programs = {"given": Program("given", model.SerializeToString(deterministic=True))}
    expected = [Expected(r, r.astype(np.float64), np.zeros(r.shape)) for r in results.values()]
    return Job(name, "operators", about, inputs, expected, programs.get, **limits)


def conformance(pattern: str = "*") -> list[Job]:
    """The cases of the conformance suite whose names match a pattern of `fnmatch`."""
    found = {name: case for operator in OPERATORS.values() for name, case in operator.cases.suite().items()}
    return [case_job(case, "conformance") for name, case in found.items() if fnmatch.fnmatchcase(name, pattern)]


def scale(pattern: str = "*") -> list[Job]:
    """Cases of a size at which threads, blocks and races show."""
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
        # One bag over all threads: what a scatter with a reduction gets wrong.
        cases.make("scale_sum_one_bag_of_100000", mode="sum", lengths=(100_000,), **common),
        cases.make("scale_max_norm_sum_skewed", mode="sum", max_norm=5.0, lengths=skewed, **common),
    )
    return {case.name: case for case in made}


def case_job(case: AnyCase, group: str) -> Job:
    """A case with its programs; models are made when they are asked for."""
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
    """Of each output; an operator of several has tuples where others have arrays."""

    def outputs(of: Any) -> Sequence[np.ndarray]:
        return of if isinstance(of, (list, tuple)) else (of,)

    parts = zip(outputs(case.expected()), outputs(case.exact), outputs(case.tolerance), strict=True)
    return [Expected(rounded, exact, np.broadcast_to(limit, exact.shape)) for rounded, exact, limit in parts]


def _about(case: AnyCase) -> str:
    sizes = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in case.inputs.items())
    a = case.attributes
    extras = [f"padding_idx {a.padding_idx}"] if a.padding_idx is not None else []
    extras += [f"max_norm {a.max_norm} (p {a.norm_type:g})"] if a.max_norm is not None else []
    extras += ["include_last_offset"] if a.include_last_offset else []
    extras += ["scale_grad_by_freq"] if getattr(a, "scale_grad_by_freq", False) else []
    return "; ".join([a.mode, *extras, sizes])


class CannotRunError(ValueError):
    """A model that cannot be compared; the message says why."""


def model(
    path: Path, given: Mapping[str, np.ndarray], *, sets: int = 3, tolerance: float = MODEL_TOLERANCE
) -> list[Job]:
    """A user's model over ``given`` inputs, or over ``sets`` sets of made-up ones.

    A model with ``ai.lucid`` nodes is compared in all forms; in one without them `fuse` looks for bags, and what it
    finds is compared with the model as it is.

    Args:
        tolerance: of outputs that are no bag's, as a part of the output's largest magnitude.

    Raises:
        OSError: the file cannot be read.
        CannotRunError: what the comparison cannot do with it.
    """
    try:
        proto = onnx.load(path)
    except OSError:
        raise
    except Exception as error:  # protobuf's errors have no base that protobuf's versions share
        raise CannotRunError(f"{path}: no ONNX model: {error}") from error
    if proto.ByteSize() > _LARGEST_MODEL:
        raise CannotRunError(f"{path}: with its tables it is over 2 GiB, which no message to a worker can hold")
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
        except Exception as error:  # the reference may raise anything over what it has not
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
    """The model with its bags as nodes; None if there are none, or nothing here can find them."""
    try:
        from lucid_onnx.rewrite import fuse
    except ImportError:
        return None, "; bags not looked for: onnx-ir is not installed"
    report = fuse(proto, form="native")
    return (report.model, f"; {len(report.fused)} bags found by fuse") if report.fused else (None, "")


def _bag_expected(proto: onnx.ModelProto, arrays: Mapping[str, np.ndarray]) -> list[Expected] | None:
    """For a model that is one bag and nothing else, the tolerance of the operator's own cases."""
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
    step = float(np.spacing(np.asarray(1, result.dtype)).astype(np.float64))  # 16-bit types round coarser
    allowed = max(tolerance, 4 * step) * largest
    return Expected(result, exact, np.where(np.isfinite(exact), allowed, np.inf))
