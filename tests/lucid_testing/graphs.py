"""The tests' walk over a graph and its subgraphs.

It is their own, so that the package's walk is not tested by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

Graph = onnx.GraphProto | onnx.FunctionProto


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs in a node's attributes."""
    return [g for a in node.attribute for g in (*([a.g] if a.HasField("g") else []), *a.graphs)]


def scopes(graph: Graph, outer: tuple[Graph, ...] = ()) -> Iterator[tuple[Graph, ...]]:
    """A graph or function and every graph inside of it, each as the path to it: outermost first, itself last."""
    scope = (*outer, graph)
    yield scope
    for node in graph.node:
        for inner in subgraphs(node):
            yield from scopes(inner, scope)


def graphs(graph: Graph) -> list[Graph]:
    """A graph or function, and every graph inside of it."""
    return [scope[-1] for scope in scopes(graph)]


def nodes(graph: Graph) -> list[onnx.NodeProto]:
    """Every node of a graph or function and of its subgraphs."""
    return [node for inner in graphs(graph) for node in inner.node]


def unread(model: onnx.ModelProto) -> list[str]:
    """The operators of the nodes that have no reader, anywhere in the model."""
    found = [graph for owner in (model.graph, *model.functions) for graph in graphs(owner)]
    read = {name for graph in found for node in graph.node for name in node.input}
    read |= {getattr(output, "name", output) for graph in found for output in graph.output}  # a function's are names
    return [node.op_type for graph in found for node in graph.node if not read.intersection(node.output)]
