"""Which nodes of a model run on the native kernels and which as functions, and how long each takes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import onnx

from lucid_onnx.graph import node_lists_of
from lucid_onnx.ops import OPERATOR_OF
from lucid_onnx.ops.embedding_bag import spec


@dataclasses.dataclass(frozen=True)
class Placement:
    """The nodes of a model by what runs them, but for standard operators.

    Attributes:
        native: the ``ai.lucid`` nodes that the native kernels run.
        functions: the nodes that a function of the model runs, which onnxruntime writes out in standard operators.
    """

    native: tuple[str, ...]
    functions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class NodeTime:
    """What a node took in one run, without the nodes within it.

    Attributes:
        name: of the node; for a function, of the nodes that call it.
        op: its operator, or the function.
        by: "native", "function" or "standard".
        count: how many kernels ran.
        milliseconds: of all of them together.
    """

    name: str
    op: str
    by: str
    count: int
    milliseconds: float


def placement(model: onnx.ModelProto, *, native: bool) -> Placement:
    """What runs each node of a model that is more than a standard operator.

    A node is named by its name, or by its first output if it has none.

    Args:
        native: the native kernels are registered.
    """
    found: dict[bool, list[str]] = {True: [], False: []}
    functions = _functions(model)
    for node in _called(model, native):
        if native and _is_ours(node):
            found[True].append(_name(node))
        elif (node.domain, node.op_type) in functions:
            found[False].append(_name(node))
    return Placement(tuple(found[True]), tuple(found[False]))


def _called(model: onnx.ModelProto, native: bool) -> Iterator[onnx.NodeProto]:
    """The nodes of the graph, and of the functions that are run in the place of a node, each function once."""
    functions = _functions(model)
    waiting, seen = [model.graph.node], set()
    while waiting:
        for node in itertools.chain.from_iterable(node_lists_of(waiting.pop())):
            yield node
            key = (node.domain, node.op_type)
            if key in functions and key not in seen and not (native and _is_ours(node)):
                seen.add(key)
                waiting.append(functions[key].node)


def _functions(model: onnx.ModelProto) -> dict[tuple[str, str], onnx.FunctionProto]:
    return {(function.domain, function.name): function for function in model.functions}


def _is_ours(node: onnx.NodeProto) -> bool:
    return bool(node.domain == spec.DOMAIN) and node.op_type in OPERATOR_OF


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or next((name for name in node.output if name), ""))


# ---- Times.

#: What onnxruntime puts before the names of a function's nodes, and before the function's name; and before the names
#: of some nodes of an If that it decides when a session starts.
_INLINED, _DECIDED = "_inlfunc_", "_if_"
_EVENT = "_kernel_time"


def name_nodes(model: onnx.ModelProto) -> None:
    """Give the nodes of functions names, in place: by them onnxruntime's profile tells them from those of the graph."""
    for function in model.functions:
        for node in itertools.chain.from_iterable(node_lists_of(function.node)):
            node.name = _name(node)


def node_times(profile: str | os.PathLike[str], model: onnx.ModelProto) -> list[NodeTime]:
    """What each node took in the last run of a profile, the longest first; a function is one for all nodes in it.

    Args:
        profile: the file that ``session.end_profiling()`` names.
        model: what the session ran, after `name_nodes`.
    """
    with open(profile, encoding="utf-8") as file:
        events = json.load(file)
    begin = max(event["ts"] for event in events if event.get("name") == "model_run")
    functions = sorted((function.name for function in model.functions), key=len, reverse=True)
    with_ifs = [f.name for f in model.functions if any(map(_has_if, node_lists_of(f.node)))]
    decided = with_ifs[0] if len(with_ifs) == 1 and not any(map(_has_if, node_lists_of(model.graph.node))) else None
    callers: dict[str, list[str]] = {}
    for node in _called(model, native=False):
        callers.setdefault(node.op_type, []).append(_name(node))
    counts: dict[tuple[str, str, str], int] = {}
    times: dict[tuple[str, str, str], float] = {}
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_EVENT) and e["ts"] >= begin]
    for event, microseconds in _own_times(kernels):
        name, op = event["name"].removesuffix(_EVENT), event["args"]["op_name"]
        function = next((f for f in functions if name.startswith(f"{_INLINED}{f}_")), None)
        if name.startswith(_DECIDED):
            function = decided
        if op in OPERATOR_OF:
            key = (name.removeprefix(_INLINED), op, "native")
        elif function is not None:
            key = (", ".join(callers.get(function, ())), function, "function")
        else:
            key = (name, op, "standard")
        counts[key] = counts.get(key, 0) + 1
        times[key] = times.get(key, 0) + microseconds
    found = [NodeTime(*key, counts[key], times[key] / 1e3) for key in counts]
    return sorted(found, key=lambda node: -node.milliseconds)


def _has_if(nodes: Iterable[onnx.NodeProto]) -> bool:
    return any(node.op_type == "If" for node in nodes)


def _own_times(events: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each event with its microseconds, less those of the events within it: a Loop has what runs in it."""
    open_events: list[tuple[dict[str, Any], float]] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while open_events and open_events[-1][0]["ts"] + open_events[-1][0]["dur"] <= event["ts"]:
            yield open_events.pop()
        if open_events:
            outer, own = open_events[-1]
            open_events[-1] = (outer, own - event["dur"])
        open_events.append((event, float(event["dur"])))
    while open_events:
        yield open_events.pop()
