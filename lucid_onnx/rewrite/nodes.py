"""What the modules here share of onnx_ir: names of nodes and values, subgraphs, and nodes in the place of another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

#: The key in the meta of an initializer for where its external data is: path, offset and length. Without it nothing
#: is read: onnx_ir would look in the current folder, and follow any link.
REGION = "lucid_onnx.region"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def table(value: ir.Value) -> np.ndarray | None:
    """The rows of an initializer of floats, mapped if they are external data; None where they are not to be had."""
    tensor = value.const_value
    if tensor is None or tensor.dtype not in _FLOATS:
        return None
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    path, offset, length = value.meta.get(REGION, ("", 0, 0))
    if not length:
        return None
    data = np.memmap(path, np.uint8, "r", offset, (length,))
    return np.asarray(data).view(tensor.dtype.numpy()).reshape([int(d) for d in tensor.shape])


def where(node: ir.Node) -> str:
    """How a report names a node: by its name, or by its first output if it has none, with its operator."""
    name = node.name or next((v.name for v in node.outputs if v.name), "")
    return f"node {name!r} ({node.op_type})"


def is_standard(node: ir.Node) -> bool:
    """Whether a node is of the standard domain."""
    return node.domain in ("", "ai.onnx")


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs among a node's attributes: a branch, a body, or several in one attribute."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def with_inner(node: ir.Node) -> Iterator[ir.Node]:
    """A node and those of its subgraphs."""
    yield node
    for graph in subgraphs(node):
        yield from ir.traversal.RecursiveGraphIterator(graph)


def is_sorted(graph: ir.Graph) -> bool:
    """Whether every node of a graph stands behind those whose results it, or a subgraph of it, reads."""
    seen: set[ir.Node] = set()
    for node in graph:
        for value in itertools.chain.from_iterable(n.inputs for n in with_inner(node)):
            producer = None if value is None else value.producer()
            if producer is not None and producer.graph is graph and producer not in seen:
                return False
        seen.add(node)
    return True


def opset(imports: Mapping[str, int]) -> int:
    """The version of the standard operators; 0 if they are not imported."""
    return imports.get("", imports.get("ai.onnx", 0))


def free_names(model: ir.Model, stem: str) -> Iterator[str]:
    """``stem_0``, ``stem_1``, ...: those that no value of the model has."""
    taken = {v.name for v in (*model.graph.inputs, *model.graph.initializers.values())}
    taken |= {v.name for f in model.functions.values() for v in f.inputs}
    for graph in (model.graph, *model.functions.values()):
        taken |= {v.name for node in graph.all_nodes() for v in (*node.inputs, *node.outputs) if v is not None}
    return (name for k in itertools.count() if (name := f"{stem}_{k}") not in taken)


def replace(node: ir.Node, nodes: Sequence[ir.Node], name: str, old_name: str) -> None:
    """Put nodes before one, those that are not there yet; the last one's result takes the place of its first result.

    Args:
        name: the name of the new result. Type, shape, doc string and metadata come from the old one, too.
        old_name: the name that the old result has from now on.
    """
    assert node.graph is not None
    old, new = node.outputs[0], nodes[-1].outputs[0]
    old.name = old_name
    new.name, new.type, new.shape, new.doc_string = name, old.type, old.shape, old.doc_string
    new.metadata_props.update(old.metadata_props)
    node.graph.insert_before(node, [n for n in nodes if n.graph is None])
    old.replace_all_uses_with(new, replace_graph_outputs=True)
