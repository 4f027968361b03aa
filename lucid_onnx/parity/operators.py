"""Standard operators and functions alone, where runtimes are known to differ: what a model of bags must avoid."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from lucid_onnx.ops.embedding_bag import spec

from .job import Job
from .measure import Expected
from .runtime import Program


def operators(pattern: str = "*") -> list[Job]:
    """Standard operators and functions alone whose names match a pattern of `fnmatch`. They are of the form "given"."""
    # Whole numbers: any order of additions is exact, and whatever is off was lost.
    random = np.random.RandomState(7)
    updates = random.randint(-8, 9, (_COUNT, _DIM)).astype(np.float32)
    values = random.standard_normal((3, 40)).astype(np.float32)
    values[0, 3], values[1, 0], values[2, -1] = np.nan, np.nan, np.nan
    found = (*_races(updates), *_scatters(updates, values), *_others(values), *_functions())
    return [job for job in found if fnmatch.fnmatchcase(job.name, pattern)]


#: Updates to one target, so many that ONNX Runtime splits them over threads.
_COUNT, _DIM = 100_000, 32


def _races(updates: np.ndarray) -> Iterator[Job]:
    """Scatters with a reduction to one target, which race in ONNX Runtime on the CPU."""
    rising = np.cumsum(np.abs(updates), 0, np.float32)  # so that each update to a maximum counts
    for name, reduction, rows, result in (
        ("operator_scatter_nd_add", "add", updates, updates.sum(0, dtype=np.float64)),
        ("operator_scatter_nd_max", "max", rising, rising[-1].astype(np.float64)),
    ):
        yield _job(
            name,
            f"ScatterND with reduction {reduction} of 100,000 updates to one target",
            helper.make_node("ScatterND", ["data", "indices", "updates"], ["y"], reduction=reduction),
            {"data": np.zeros((2, _DIM), np.float32), "indices": np.ones((_COUNT, 1), np.int64), "updates": rows},
            np.stack([np.zeros(_DIM), result]),
            runs=100,  # a race does not show in every run, and on a busy machine in few
            seconds=2.0,
        )


def _scatters(updates: np.ndarray, values: np.ndarray) -> Iterator[Job]:
    """Scatters of 16 bits, and of no updates at all."""
    for dtype in (np.dtype(np.float16), spec.BFLOAT16):
        yield _job(
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
    yield _job(
        "operator_scatter_nd_nothing",
        "ScatterND of no updates at all",
        helper.make_node("ScatterND", ["data", "indices", "updates"], ["y"]),
        {"data": values[:, 5:9], "indices": np.zeros((0, 1), np.int64), "updates": np.zeros((0, 4), np.float32)},
        values[:, 5:9],
        open_shapes=True,
    )


def _others(values: np.ndarray) -> tuple[Job, ...]:
    """A maximum over NaN, a negative index, and NonZero."""
    return (
        _job(
            "operator_reduce_max_nan",
            "ReduceMax over rows with a NaN in them",
            helper.make_node("ReduceMax", ["data", "axes"], ["y"], keepdims=0),
            {"data": values, "axes": np.array([1], np.int64)},
            np.full(3, np.nan),
        ),
        _job(
            "operator_gather_minus_1",
            "Gather with an index of -1, which ONNX counts from the end",
            helper.make_node("Gather", ["data", "indices"], ["y"]),
            {"data": values[:, 5:9], "indices": np.array([0, -1, 1], np.int64)},
            values[[0, -1, 1], 5:9],
        ),
        _job(
            "operator_non_zero",
            "NonZero of five flags",
            helper.make_node("NonZero", ["data"], ["y"]),
            {"data": np.array([1, 1, 0, 1, 0], np.float32)},
            np.array([[0, 1, 3]], np.int64),
        ),
        _job(
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
    )


def _functions() -> tuple[Job, ...]:
    """Model-local functions with features that ours avoid, since not every runtime has them."""
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
        _job(
            "function_default",
            "a function whose attribute has a default of 3, and a node without that attribute",
            node("Scale", "y"),
            {"x": numbers},
            3 * numbers,
            functions=[function("Scale", ["y"], scale, attribute_protos=[helper.make_attribute("factor", 3.0)])],
        ),
        _job(
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
        _job(
            "function_fewer_outputs",
            "a function of two outputs, and a node that takes the first alone",
            node("Both", "y"),
            {"x": numbers},
            -numbers,
            functions=[function("Both", ["y", "z"], both)],
        ),
    )


def _job(
    name: str,
    about: str,
    nodes: onnx.NodeProto | Sequence[onnx.NodeProto],
    arrays: Mapping[str, np.ndarray],
    *exact: np.ndarray,
    open_shapes: bool = False,
    functions: Sequence[onnx.FunctionProto] = (),
    **limits: Any,
) -> Job:
    """A job of a few nodes whose outputs "y", "z" must be ``exact``, where float64 stands for float32.

    With ``open_shapes`` the lengths of the inputs are symbolic. ``limits`` are the job's ``runs`` and ``seconds``.
    """
    results = {n: e.astype(np.float32) if e.dtype == np.float64 else e for n, e in zip("yz", exact, strict=False)}
    axes = {n: a for n, a in arrays.items() if n == "axes"}  # a constant, as most runtimes require
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
    # The oldest version that suffices: 9 has attribute defaults, 10 has overloads.
    version = 10 if any(f.overload for f in functions) else 9 if functions else 8
    model = helper.make_model(graph, opset_imports=imports, ir_version=version, functions=functions)
    programs = {"given": Program("given", model.SerializeToString(deterministic=True))}
    expected = [Expected(r, r.astype(np.float64), np.zeros(r.shape)) for r in results.values()]
    return Job(name, "operators", about, inputs, expected, programs.get, **limits)
