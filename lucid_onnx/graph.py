"""One walk over a model's nodes, subgraphs and functions, for everything that reads ONNX protobufs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import onnx

from .ops.emit import reads, subgraphs

__all__ = ["free_prefixes", "node_lists", "node_lists_of", "reads", "subgraphs", "where"]


def node_lists(model: onnx.ModelProto) -> Iterator[Any]:
    """Every list of nodes in a model: those of its graph, of subgraphs and of functions. Inner ones come first."""
    yield from node_lists_of(model.graph.node)
    for function in model.functions:
        yield from node_lists_of(function.node)


def node_lists_of(nodes: Any) -> Iterator[Any]:
    """The lists of nodes in the subgraphs of ``nodes``, however deep, and then ``nodes`` itself."""
    for node in nodes:
        for graph in subgraphs(node):
            yield from node_lists_of(graph.node)
    yield nodes


def where(node: onnx.NodeProto) -> str:
    """How a message names a node: by its name, or by its outputs if it has none."""
    return f"node {node.name or ', '.join(node.output)!r}"


def free_prefixes(model: onnx.ModelProto) -> Iterator[str]:
    """Short prefixes ``b0_``, ``b1_``, ... that no name of a value in the model begins with."""
    names = {name for nodes in node_lists(model) for node in nodes for name in (*node.input, *node.output)}
    names.update(v.name for v in itertools.chain(model.graph.input, model.graph.initializer, model.graph.value_info))
    taken = {name.split("_")[0] for name in names}
    return (f"b{k}_" for k in itertools.count() if f"b{k}" not in taken)
