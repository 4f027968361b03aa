"""The standard form on ONNX Runtime's CUDA provider: it has a kernel for every node, as docs/cuda.md says.

tests/cuda_provider_kernels.json is the provider's registry, taken from a release that the file names.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, defs, helper

from lucid_onnx.builder.conformance import case_model
from lucid_onnx.ops import OPERATORS
from lucid_testing.graphs import scopes

REGISTRY = json.loads((Path(__file__).parent / "cuda_provider_kernels.json").read_text())
_NAMES = {number: name.lower() for name, number in TensorProto.DataType.items()}
#: Operators that ONNX Runtime replaces by others before it looks for kernels: initializers, and a Cast.
_REPLACED = {"Constant": None, "CastLike": "Cast"}


@functools.cache
def has_kernel(op: str, opset: int, types: tuple[tuple[str, str], ...]) -> bool:
    """Whether the provider has a kernel of an operator for the types of its schema's constraints."""
    bound = dict(types)
    for first, last, constraints in REGISTRY["kernels"].get(op, []):
        if first <= opset <= (last or opset) and all(
            bound[name] in allowed.split() for name, allowed in constraints.items() if name in bound
        ):
            return True
    return False


def without_kernel(model: onnx.ModelProto) -> list[str]:
    """The nodes that the provider has no kernel for, those of subgraphs too."""
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)

    found = []
    known: list[dict[str, str]] = [{}]  # of the graphs around, outermost first
    for scope in scopes(inferred.graph):
        del known[len(scope) :]
        known.append(known[-1] | _types(scope[-1]))
        types = known[-1]
        for node in scope[-1].node:
            op = _REPLACED.get(node.op_type, node.op_type)
            if op is None:
                continue
            bound: dict[str, str] = {}
            for formal, names in zip(_constraints(node.op_type, opset), (node.input, node.output), strict=True):
                for k, name in enumerate(names):
                    if name:
                        bound.setdefault(formal[min(k, len(formal) - 1)], types[name])
            if not has_kernel(op, opset, tuple(sorted(bound.items()))):
                found.append(f"{op} of {bound}")
    return found


def _types(graph: onnx.GraphProto) -> dict[str, str]:
    """The element types of what a graph itself holds, by name."""
    values = [*graph.input, *graph.value_info, *graph.output]
    types = {v.name: _NAMES[v.type.tensor_type.elem_type] for v in values}
    return types | {tensor.name: _NAMES[tensor.data_type] for tensor in graph.initializer}


@functools.cache
def _constraints(op: str, opset: int) -> tuple[list[str], list[str]]:
    """The names of the type constraints of an operator's inputs and outputs."""
    schema = defs.get_schema(op, opset)
    return [formal.type_str for formal in schema.inputs], [formal.type_str for formal in schema.outputs]


def models(operator: str) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The standard form of every case, once for cases that differ in nothing but sizes and values."""
    seen = set()
    for name, case in importlib.import_module(f"lucid_onnx.ops.{operator}.cases").all_cases().items():
        inputs = tuple((n, a.dtype.name, a.ndim) for n, a in case.inputs.items())
        a = case.attributes
        choices = tuple(value is None if isinstance(value, float | None) else value for value in vars(a).values())
        signature = (
            repr(case.op),
            choices,
            a.padding_idx is None,
            inputs,
            case.table.dtype.name if hasattr(case, "table") else "",
        )
        if signature not in seen:
            seen.add(signature)
            yield name, case_model(case, "standard")


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_node_of_the_standard_form_has_a_kernel(operator: str) -> None:
    count = 0
    for name, model in models(operator):
        assert without_kernel(model) == [], name
        count += 1
    assert count >= 15


def test_a_node_without_a_kernel_is_found() -> None:
    """Maxima of bfloat16 have none, and are not in the standard form for it; nor has Det any."""
    for op, dtype, expected in (
        ("ReduceMax", TensorProto.BFLOAT16, ["ReduceMax of {'T': 'bfloat16'}"]),
        ("ReduceMax", TensorProto.FLOAT, []),
        ("Det", TensorProto.FLOAT, ["Det of {'T': 'float'}"]),
    ):
        value = [helper.make_tensor_value_info(name, dtype, None) for name in ("x", "y")]
        graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "one", value[:1], value[1:])
        assert without_kernel(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])) == expected
