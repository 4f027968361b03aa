"""torch.export of modules that share a table and clip it by max_norm, which torch alone fails to decompose."""

from __future__ import annotations

from typing import Any

import torch

from .translations import translation_table

_ATEN = torch.ops.aten


def clips_a_shared_table(module: torch.nn.Module | torch.export.ExportedProgram) -> bool:
    """Whether a module has a max_norm, and tables that are the same memory."""
    if isinstance(module, torch.export.ExportedProgram):
        tables = list(module.state_dict.values())
        clips = any(node.target is _ATEN.embedding_renorm_.default for node in module.graph.nodes)
    else:
        tables = [p for _, p in module.named_parameters(remove_duplicate=False)]
        clips = any(getattr(m, "max_norm", None) is not None for m in module.modules())
    memories = [memory_key(p) for p in tables if not has_no_data(p) and p.numel()]
    return clips and len(set(memories)) < len(memories)


def capture(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None, dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    """torch.export of the module, with an aten.embedding_renorm that returns a new table and changes none."""
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # as torch.onnx: sizes of 0 and 1 stay open
        program = torch.export.export(
            module,
            (args,) if isinstance(args, torch.Tensor) else args,
            kwargs,
            dynamic_shapes=_without_names(dynamic_shapes),
            strict=False,
        )
    _join_parameters(program)
    _clip_copies(program.graph_module.graph)
    program.graph_module.graph.lint()
    program.graph_module.recompile()
    return program


def _join_parameters(program: torch.export.ExportedProgram) -> None:
    """Make Parameters over the same memory one input of the graph."""
    first: dict[Any, torch.fx.Node] = {}
    for node in program.graph_module.graph.find_nodes(op="placeholder"):
        name = program.graph_signature.inputs_to_parameters.get(node.name)
        if name is not None:
            memory = memory_key(program.state_dict[name])
            if memory in first:
                node.replace_all_uses_with(first[memory])
            first.setdefault(memory, node)


def _clip_copies(graph: torch.fx.Graph) -> None:
    """Make every clipping in place one that returns a new table, which all later lookups read."""
    latest: dict[torch.fx.Node, torch.fx.Node] = {}  # by the table as it was first
    for node in list(graph.nodes):
        if node.target is not _ATEN.embedding_renorm_.default:
            for table in set(node.all_input_nodes) & set(latest):
                node.replace_input_with(table, latest[table])
            continue
        table = _only_looked_up(node.args[0])
        with graph.inserting_before(node):
            clipped = graph.call_function(_ATEN.embedding_renorm.default, (latest.get(table, table), *node.args[1:]))
        clipped.meta = dict(node.meta)
        node.replace_all_uses_with(clipped)
        graph.erase_node(node)
        latest[table] = clipped


def _without_names(dynamic_shapes: Any) -> Any:
    """``dynamic_shapes`` for torch.export, which takes no names of sizes; torch.onnx.export sets them."""
    if isinstance(dynamic_shapes, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(dynamic_shapes, dict):
        return {key: _without_names(value) for key, value in dynamic_shapes.items()}
    if isinstance(dynamic_shapes, (list, tuple)):
        return type(dynamic_shapes)(_without_names(value) for value in dynamic_shapes)
    return dynamic_shapes


def _only_looked_up(table: torch.fx.Node) -> torch.fx.Node:
    """The graph's input behind a clipped table, which only lookups may read.

    A lookup sees the clipped rows, a view of the table would not.

    Raises:
        ValueError: something else reads the table.
    """
    aliases = (_ATEN.detach.default, _ATEN.alias.default)
    lookups = (
        _ATEN.embedding.default,
        _ATEN.embedding_renorm.default,
        _ATEN.embedding_renorm_.default,
        *(overload for overload in translation_table()),
    )
    while table.target in aliases:
        table = table.args[0]  # type: ignore[assignment]
    if table.target is _ATEN.embedding_renorm.default:  # replaced before
        return _only_looked_up(table.args[0])  # type: ignore[arg-type]
    readers = list(table.users)
    for reader in readers:
        if reader.target in aliases:
            readers += reader.users
        elif reader.target not in lookups:
            raise ValueError(
                f"the table {str(table.target)!r} is shared by modules, clipped by max_norm and read by "
                f"{reader.name!r} ({reader.target}), which is not a lookup"
            )
    return table


def memory_key(tensor: torch.Tensor) -> Any:
    """A key that tensors over the same elements share."""
    return tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()


def has_no_data(tensor: torch.Tensor) -> bool:
    """Whether a tensor is fake, or on the meta device."""
    return tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)
