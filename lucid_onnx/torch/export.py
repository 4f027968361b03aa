"""The way in from PyTorch: bags of a torch.nn.Module as ``ai.lucid`` nodes of an ONNX file, and `embedding_bag`.

torch.onnx.export does the work, with our translations of the operators that a bag comes down to (see
`translation_table`). What a translation cannot decide, because it sees one operator at a time, it leaves as a
stand-in node, and `export` settles those in the finished graph:

* ``EmbeddingRenorm``: torch clips the rows of a table *in the table*, then looks them up. The lookup takes the norm
  over from this node, which nothing reads any more.
* ``Embedding``: a lookup that is pooled is a bag, another one is a Gather.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass
from onnxscript.values import Op, Opset
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lucid_onnx.builder import FORMS, TABLE_TYPES, Form, fill_tables, save, to_form
from lucid_onnx.ops.embedding_bag import spec

#: The oldest opset that torch's exporter writes.
MIN_OPSET = 18
#: Initializers from this size on are written from the module's own memory.
_LARGE = 4096

_ATEN = torch.ops.aten
_SUM, _MEAN, _MAX = range(3)
#: Reductions that pool, by ONNX operator: the mode.
_POOLINGS = {"ReduceSum": _SUM, "ReduceMean": _MEAN, "ReduceMax": _MAX}
_OUTPUTS = ("output", "offset2bag", "bag_size", "max_indices")
_RENORM, _LOOKUP = "EmbeddingRenorm", "Embedding"


class _RefusedError(ValueError):
    """What cannot be exported; told apart from torch's own errors, which come wrapped around it."""


@overload
def export(
    module: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = ...,
    path: None = ...,
    *,
    kwargs: dict[str, Any] | None = ...,
    dynamic_shapes: Any = ...,
    input_names: Sequence[str] | None = ...,
    output_names: Sequence[str] | None = ...,
    form: Form = ...,
    opset: int = ...,
    embedding_as_bag: bool = ...,
    external_data: bool | None = ...,
) -> onnx.ModelProto: ...
@overload
def export(
    module: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: dict[str, Any] | None = ...,
    dynamic_shapes: Any = ...,
    input_names: Sequence[str] | None = ...,
    output_names: Sequence[str] | None = ...,
    form: Form = ...,
    opset: int = ...,
    embedding_as_bag: bool = ...,
    external_data: bool | None = ...,
) -> None: ...
def export(
    module: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    form: Form = "portable",
    opset: int = spec.DEFAULT_OPSET,
    embedding_as_bag: bool = True,
    external_data: bool | None = None,
) -> onnx.ModelProto | None:
    """Export a module, with every bag in it as one ``ai.lucid`` node.

    Bags are torch.nn.EmbeddingBag, torch.nn.functional.embedding_bag and what they come down to. ``max_norm`` clips
    the rows as they are read: the table in the file is the module's, and no run changes it. ``sparse`` and
    ``scale_grad_by_freq`` concern the gradient alone and are dropped.

    Args:
        module: the module, in ``eval()`` mode, or a torch.export.ExportedProgram of it.
        args, kwargs, dynamic_shapes, input_names, output_names: as in torch.onnx.export. Sizes are fixed to those of
            the example ``args`` but for what ``dynamic_shapes`` names; what it names may be 0 at run time.
        path: the .onnx file to write, whole or not at all.
        form: "portable", "standard" or "native", as in `lucid_onnx.to_form`.
        opset: version of the standard operators, 18 to 26.
        embedding_as_bag: make a torch.nn.Embedding of [B, L] indices that is only summed, averaged or maximised over L
            a bag too. The result is the same to rounding, and [B, L, D] is never in memory. (A 16-bit one that is
            itself an output of the module stays as torch exports it, in float32.)
        external_data: as in `lucid_onnx.save`; None puts the tables outside only where one file cannot hold them.

    Returns:
        The model if ``path`` is None, else nothing.

    Raises:
        ValueError: a bad argument; a bag whose offset2bag, bag_size or max_indices is used; a table that is used
            otherwise after max_norm changed it; parameters without data.
        torch.onnx.OnnxExporterError: what torch.onnx.export cannot export.
    """
    if form not in FORMS:
        raise ValueError(f"form = {form!r} is not one of 'portable', 'standard', 'native'")
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise TypeError(f"opset = {opset!r} must be an integer")
    if not MIN_OPSET <= opset <= spec.MAX_OPSET:
        raise ValueError(f"opset = {opset} is outside [{MIN_OPSET}, {spec.MAX_OPSET}], what torch's exporter can write")
    table = translation_table()
    if embedding_as_bag:
        table[_ATEN.embedding.default] = _guarded(_lookup)
    if _clips_a_shared_table(module):
        if isinstance(module, torch.export.ExportedProgram):
            raise ValueError(
                "the exported program clips a table by max_norm that several of its parameters share, which torch "
                "fails to decompose: give the module itself"
            )
        module, args, kwargs = _captured(module, args, kwargs, dynamic_shapes), (), None
    try:
        program = torch.onnx.export(
            module,
            args,
            kwargs=kwargs,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
            opset_version=opset,
            dynamo=True,
            custom_translation_table=table,
            optimize=False,
            verbose=False,
        )
    except Exception as error:
        refused = _refusal_in(error)
        if refused is None:
            raise
        raise ValueError(str(refused)) from error
    if program is None:  # dynamo=False alone returns nothing
        raise AssertionError("torch.onnx.export returned no program")
    written = program.model.opset_imports[""]
    if written != opset:
        raise ValueError(f"opset = {opset}, but torch {torch.__version__} could write this module as {written} only")
    _check_data(program.model)
    _settle(program.model)
    program.optimize()
    _share_tables(program.model)
    proto, tables = _to_proto(program.model)
    proto = to_form(proto, form)
    # torch asks for IR version 10 whatever the opset; ONNX Runtime 1.17 reads 9, and opset 18 needs 8.
    standard = onnx.helper.make_opsetid("", opset)
    proto.ir_version = min(proto.ir_version, onnx.helper.find_min_ir_version_for([standard]))
    if path is not None:
        save(proto, path, external_data=external_data, tables=tables)
        return None
    fill_tables(proto, tables)
    return proto


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of ATen's bags into ``ai.lucid`` nodes, for torch.onnx.export's ``custom_translation_table``.

    The exported model then wants `lucid_onnx.to_form`, which gives the nodes their functions::

        program = torch.onnx.export(module, args, dynamo=True, custom_translation_table=translation_table())
        model = lucid_onnx.to_form(program.model_proto, "portable")

    `export` is this and more: it makes bags of pooled torch.nn.Embedding too, names what it refuses, and writes
    tables of any size.
    """
    return {
        _ATEN.embedding_bag.default: _guarded(_bag),
        _ATEN.embedding_bag.padding_idx: _guarded(_bag),
        _ATEN._embedding_bag.default: _guarded(_decomposed_bag),
        _ATEN._embedding_bag_forward_only.default: _guarded(_decomposed_bag),
        _ATEN.embedding_renorm.default: _guarded(_renorm),
    }


# ---- Translations: called by torch's exporter with onnx_ir values in the place of tensors.


def _guarded(translate: Callable[..., Any]) -> Callable[..., Any]:
    """``translate``, whose ValueError and TypeError are refusals. Unannotated: torch would read the annotations."""

    def call(*args, **kwargs):  # type: ignore[no-untyped-def]
        try:
            return translate(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise _RefusedError(str(error)) from error

    call.__name__ = translate.__name__
    return call


def _bag(
    weight: ir.Value,
    indices: ir.Value,
    offsets: ir.Value,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: ir.Value | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Sequence[ir.Value]:
    """aten.embedding_bag; of its four outputs only the first exists."""
    del scale_grad_by_freq, sparse
    table, norm = _unclipped(weight, indices)
    # F.embedding_bag flattens [B, L] and counts out offsets. The operator for [B, L] needs neither.
    rows = None if include_last_offset else _rows(indices, offsets)
    weights = per_sample_weights
    if rows is not None and weights is not None:
        weights = _flattened(weights, like=rows)
        if weights is None:
            rows, weights = None, per_sample_weights
    return _Outputs(
        (
            _node(
                table,
                indices if rows is None else rows,
                offsets if rows is None else None,
                weights,
                mode=mode,
                padding_idx=padding_idx,
                norm=norm,
                include_last_offset=include_last_offset,
            ),
        )
    )


def _decomposed_bag(
    weight: ir.Value,
    indices: ir.Value,
    offsets: ir.Value,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: ir.Value | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Sequence[ir.Value]:
    """aten._embedding_bag, whose padding_idx is not negative, or -1 for none."""
    padding = None if padding_idx < 0 else padding_idx
    return _bag(
        weight, indices, offsets, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset, padding
    )


def _renorm(weight: ir.Value, indices: ir.Value, max_norm: float, norm_type: float) -> ir.Value:
    """aten.embedding_renorm, as a node that must not stay in the graph."""
    value = _OPERATORS[_RENORM](weight, indices, max_norm=float(max_norm), norm_type=float(norm_type))
    return _value(value)


def _lookup(
    weight: ir.Value,
    indices: ir.Value,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> ir.Value:
    """aten.embedding, as a node that `_settle` replaces. Its padding_idx is a matter of the gradient."""
    del padding_idx, scale_grad_by_freq, sparse
    return _value(_OPERATORS[_LOOKUP](weight, indices))


class _Outputs(tuple[ir.Value, ...]):
    """The outputs of aten.embedding_bag: one, and a refusal where another is asked for."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and index >= len(self):
            raise _RefusedError(
                f"the module uses {_OUTPUTS[index]}, output {index} of torch.embedding_bag; only output 0, "
                "the pooled rows, can be exported"
            )
        return super().__getitem__(index)


def _operator(name: str, inputs: Sequence[str], attributes: Mapping[str, Any]) -> Op:
    """An operator of our domain that torch's exporter can record."""
    schema = onnx.defs.OpSchema
    types = {
        "T": [f"tensor({t})" for t in ("float", "float16", "bfloat16", "double")],
        "I": ["tensor(int32)", "tensor(int64)"],
        "O": ["tensor(int32)", "tensor(int64)"],
    }
    letters = {"weight": "T", "indices": "I", "offsets": "O", "per_sample_weights": "T"}
    kinds = {int: schema.AttrType.INT, float: schema.AttrType.FLOAT}
    return Op(
        Opset(spec.DOMAIN, spec.VERSION),
        name,
        schema(
            name,
            spec.DOMAIN,
            spec.VERSION,
            inputs=[schema.FormalParameter(i, letters[i]) for i in inputs],
            outputs=[schema.FormalParameter("output", "T")],
            type_constraints=[(letter, types[letter], "") for letter in sorted({"T", *(letters[i] for i in inputs)})],
            attributes=[schema.Attribute(n, kinds[type(value)], required=True) for n, value in attributes.items()],
        ),
    )


_OPERATORS: dict[str, Op] = {
    _RENORM: _operator(_RENORM, ("weight", "indices"), {"max_norm": 1.0, "norm_type": 2.0}),
    _LOOKUP: _operator(_LOOKUP, ("weight", "indices"), {}),
    **{
        op.name: _operator(op.name, op.inputs, spec.Attributes().to_onnx(op, double=False))
        for op in spec.VARIANTS.values()
    },
}


class _Norm(NamedTuple):
    """What a table's rows were clipped to."""

    max_norm: float | None = None
    norm_type: float = 2.0


def _node(
    weight: ir.Value,
    indices: ir.Value,
    offsets: ir.Value | None,
    weights: ir.Value | None,
    *,
    mode: int,
    padding_idx: int | None,
    norm: _Norm,
    include_last_offset: bool,
) -> ir.Value:
    """Record one bag; without ``offsets`` the indices are [B, L]."""
    op = spec.variant(two_d=offsets is None, weighted=weights is not None)
    attributes = _attributes(weight, indices, mode, padding_idx, norm, include_last_offset, weighted=op.weighted)
    given = {"weight": weight, "indices": indices, "offsets": offsets, "per_sample_weights": weights}
    double = weight.dtype == ir.DataType.DOUBLE
    return _value(_OPERATORS[op.name](*(given[i] for i in op.inputs), **attributes.to_onnx(op, double=double)))


def _attributes(
    weight: ir.Value,
    indices: ir.Value,
    mode: int,
    padding_idx: int | None,
    norm: _Norm,
    include_last_offset: bool,
    *,
    weighted: bool,
) -> spec.Attributes:
    """The parameters of a bag, checked together with its inputs' types."""
    if not _is_table(weight):
        raise TypeError(
            f"a bag's weight is {weight.dtype} {weight.shape}; expected [V, D] of float32, float16, bfloat16 or float64"
        )
    if indices.dtype not in (ir.DataType.INT32, ir.DataType.INT64):
        raise TypeError(f"a bag's indices are {indices.dtype}; expected int32 or int64")
    if mode not in range(len(spec.MODES)):
        raise ValueError(f"mode = {mode} of torch.embedding_bag is not 0 (sum), 1 (mean) or 2 (max)")
    attributes = spec.Attributes(
        spec.MODES[mode], padding_idx, norm.max_norm, norm.norm_type, include_last_offset=include_last_offset
    )
    num_rows = _dims(weight)[0]
    attributes.check(weighted=weighted, num_rows=num_rows if isinstance(num_rows, int) else None)
    return attributes


def _is_table(value: ir.Value) -> bool:
    return value.dtype in [ir.DataType(t) for t in TABLE_TYPES.values()] and len(_dims(value)) == 2


def _dims(value: ir.Value) -> tuple[Any, ...]:
    """Its sizes: ints, or what has a name only; () where nothing is known."""
    return () if value.shape is None else tuple(value.shape)


def _value(output: Any) -> ir.Value:
    if not isinstance(output, ir.Value):
        raise AssertionError(f"torch {torch.__version__} recorded {output!r} in the place of one value")
    return output


def _unclipped(weight: ir.Value, indices: ir.Value) -> tuple[ir.Value, _Norm]:
    """The table behind a weight, and what max_norm clipped the rows of ``indices`` in it to.

    Where several bags share a table, torch clips it for one after another. Clipping rows twice to one norm is
    clipping them once, so such a chain leads back to the table itself.
    """
    weight = _source(weight)
    node = weight.producer()
    if node is None or not _is_ours(node, _RENORM):
        return weight, _Norm()
    norm = _norm_of(node)
    if _source(node.inputs[1]) is not _source(indices):
        raise ValueError(
            f"{_name_of(weight)} is read by a bag without a max_norm of its own after another lookup changed it in "
            f"place (max_norm = {norm.max_norm}): the model would have to change its table as it runs"
        )
    while node is not None and _is_ours(node, _RENORM):
        if _norm_of(node) != norm:
            raise ValueError(
                f"{_name_of(weight)} is shared by lookups of max_norm = {_norm_of(node).max_norm} (norm_type = "
                f"{_norm_of(node).norm_type}) and {norm.max_norm} (norm_type = {norm.norm_type}), each of which "
                "changes it in place for the next: the model would have to change its table as it runs"
            )
        weight = _source(node.inputs[0])
        node = weight.producer()
    return weight, norm


def _norm_of(node: ir.Node) -> _Norm:
    return _Norm(node.attributes["max_norm"].as_float(), node.attributes["norm_type"].as_float())


def _is_ours(node: ir.Node, *op_types: str) -> bool:
    return node.domain == spec.DOMAIN and node.op_type in op_types


def _source(value: ir.Value | None) -> ir.Value:
    """The value behind Identity nodes, which is what detach and alias become."""
    if value is None:
        raise AssertionError("an operator of ours lacks an input")
    node = value.producer()
    while node is not None and node.domain == "" and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _name_of(value: ir.Value) -> str:
    """The table behind clippings, for a message."""
    value = _source(value)
    node = value.producer()
    while node is not None and _is_ours(node, _RENORM):
        value = _source(node.inputs[0])
        node = value.producer()
    return f"the table {value.name!r}"


def _rows(indices: ir.Value, offsets: ir.Value) -> ir.Value | None:
    """The [B, L] value of which these are the flattened indices and the offsets of its rows, or None.

    ATen has no [B, L] bag: F.embedding_bag passes ``x.reshape(-1)`` and ``arange(0, x.numel(), x.size(1))``. That is
    seen in torch's own graph, where sizes can be compared as expressions.
    """
    rows, made = _flattened(indices), _fx_node(offsets)
    if rows is None or made is None or made.target is not _ATEN.arange.start_step:
        return None
    num_bags, length = _meta(_fx_inputs(indices)[0]).shape
    start, end, step = (*(_meta(a) for a in made.args), 1)[:3]  # a step of 1 is left out
    return rows if _equal(start, 0) and _equal(end, num_bags * length) and _equal(step, length) else None


def _flattened(value: ir.Value, like: ir.Value | None = None) -> ir.Value | None:
    """The 2-D value (of the shape of ``like``) that ``value`` is flattened from, or None."""
    node = _fx_node(value)
    if node is None or node.target not in (_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default):
        return None
    reshape = value.producer()
    if reshape is None or reshape.op_type != "Reshape" or reshape.inputs[0] is None:
        return None
    rows = reshape.inputs[0]
    if len(_meta(node).shape) != 1 or len(_dims(rows)) != 2:
        return None
    if like is not None and _dims(rows) != _dims(like):
        return None
    return rows


def _fx_node(value: ir.Value) -> torch.fx.Node | None:
    """The node of torch's graph that made a value. Without it a bag of [B, L] is one of [B * L] with offsets."""
    node = value.producer()
    found = None if node is None else node.meta.get("node")
    return found if isinstance(found, torch.fx.Node) else None


def _fx_inputs(value: ir.Value) -> list[torch.fx.Node]:
    node = _fx_node(value)
    return [] if node is None else node.all_input_nodes


def _meta(argument: Any) -> Any:
    """A number, symbolic or not, or a fake tensor."""
    return argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument


def _equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal whatever their symbols stand for."""
    return bool(statically_known_true(a == b))


# ---- Tables that modules share and max_norm changes: torch fails to decompose those.


def _clips_a_shared_table(module: torch.nn.Module | torch.export.ExportedProgram) -> bool:
    if isinstance(module, torch.export.ExportedProgram):
        tables = list(module.state_dict.values())
        clips = any(node.target is _ATEN.embedding_renorm_.default for node in module.graph.nodes)
    else:
        tables = [p for _, p in module.named_parameters(remove_duplicate=False)]
        clips = any(getattr(m, "max_norm", None) is not None for m in module.modules())
    memories = [_memory(p) for p in tables if not _has_no_data(p) and p.numel()]
    return clips and len(set(memories)) < len(memories)


def _captured(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None, dynamic_shapes: Any
) -> torch.export.ExportedProgram:
    """torch.export of the module, in which aten.embedding_renorm gives a new table in the place of changing one."""
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # as torch.onnx: sizes of 0 and 1 stay open
        program = torch.export.export(
            module,
            (args,) if isinstance(args, torch.Tensor) else args,
            kwargs,
            dynamic_shapes=_without_names(dynamic_shapes),
            strict=False,
        )
    graph = program.graph_module.graph
    first: dict[Any, torch.fx.Node] = {}
    for node in graph.find_nodes(op="placeholder"):  # two Parameters over one memory are one table
        name = program.graph_signature.inputs_to_parameters.get(node.name)
        if name is not None:
            memory = _memory(program.state_dict[name])
            if memory in first:
                node.replace_all_uses_with(first[memory])
            first.setdefault(memory, node)
    latest: dict[torch.fx.Node, torch.fx.Node] = {}
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
    graph.lint()
    program.graph_module.recompile()
    return program


def _without_names(dynamic_shapes: Any) -> Any:
    """``dynamic_shapes`` for torch.export, which has no names of sizes; torch.onnx.export sets them."""
    if isinstance(dynamic_shapes, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(dynamic_shapes, dict):
        return {key: _without_names(value) for key, value in dynamic_shapes.items()}
    if isinstance(dynamic_shapes, (list, tuple)):
        return type(dynamic_shapes)(_without_names(value) for value in dynamic_shapes)
    return dynamic_shapes


def _only_looked_up(table: torch.fx.Node) -> torch.fx.Node:
    """The placeholder of a clipped table, which nothing but lookups may read: they see the change, a view would not."""
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
                f"{reader.name!r} ({reader.target}), which is no lookup"
            )
    return table


def _memory(tensor: torch.Tensor) -> Any:
    """A key that tensors over the same elements share."""
    return tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()


def _refusal_in(error: BaseException | None) -> _RefusedError | None:
    while error is not None:
        if isinstance(error, _RefusedError):
            return error
        error = error.__cause__
    return None


# ---- The finished graph.


def _settle(model: ir.Model) -> None:
    """Replace the stand-ins, in place; the model then has ``ai.lucid`` nodes that the contract knows, and no other."""
    IdentityEliminationPass()(model)  # constant folding would copy a small table behind one
    RemoveUnusedNodesPass()(model)  # the clippings whose norm a bag took over, and the half of a max that nobody reads
    onnxscript.optimizer.fold_constants(model)  # axes that are computed
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in list(ir.traversal.RecursiveGraphIterator(graph)):
            if _is_ours(node, _LOOKUP):
                _replace_lookup(node)
            elif _is_ours(node, *(op.name for op in spec.VARIANTS.values() if op.two_d)):
                node.outputs[0].shape = ir.Shape([_dims(_source(node.inputs[1]))[0], _dims(_source(node.inputs[0]))[1]])
    RemoveUnusedNodesPass()(model)
    for node in itertools.chain.from_iterable(ir.traversal.RecursiveGraphIterator(g) for g in graphs):
        if _is_ours(node, _RENORM):
            readers = ", ".join(repr(n.name) for n in node.outputs[0].consumers()) or "the model's output"
            raise ValueError(
                f"{_name_of(node.outputs[0])} is read by {readers} after max_norm = {_norm_of(node).max_norm} changed "
                "it in place; only bags, and a torch.nn.Embedding that is pooled over its sequence, can be exported "
                "with max_norm"
            )


def _replace_lookup(lookup: ir.Node) -> None:
    """Make a lookup of rows a bag together with the reduction behind it, or a Gather."""
    weight, indices = _source(lookup.inputs[0]), _source(lookup.inputs[1])
    pooling = _pooling(lookup, weight, indices)
    if pooling is None:
        gather = ir.node("Gather", [weight, indices], {"axis": 0}, name=lookup.name)
        _replace(lookup, [lookup], [gather])
        return
    last, mode = pooling.nodes[0], pooling.mode
    try:
        table, norm = _unclipped(weight, indices)
        attributes = _attributes(table, indices, mode, None, norm, include_last_offset=False, weighted=False)
    except TypeError as error:
        raise ValueError(str(error)) from error
    op = spec.variant(two_d=True, weighted=False)
    new: list[ir.Node] = []

    def add(
        op_type: str, inputs: Sequence[ir.Value], attributes: dict[str, Any] | None = None, **where: Any
    ) -> ir.Value:
        new.append(ir.node(op_type, inputs, attributes, **where))
        return new[-1].outputs[0]

    def constant(array: np.ndarray) -> ir.Value:
        return add("Constant", [], {"value": ir.tensor(array)})

    dtype = table.dtype
    length = _dims(indices)[1]
    if mode == _MAX and not isinstance(length, int):
        # A maximum over nothing is an error in torch, where a bag has a row of zeros. [B, 0] has no reshape to [B, 1].
        shape = add("Max", [add("Shape", [indices]), constant(np.array([0, 1]))])
        indices = add("Reshape", [indices, shape], {"allowzero": 1})
    pooled = add(
        op.name,
        [table, indices],
        attributes.to_onnx(op, double=dtype == ir.DataType.DOUBLE),
        domain=spec.DOMAIN,
        name=last.name,
    )
    if mode == _MEAN and not isinstance(length, int):
        # A mean over nothing is NaN in torch, where a bag has a row of zeros. Plus 0 / L, which is 0 for all other L.
        wide = ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
        size = add("Cast", [add("Shape", [indices], {"start": 1, "end": 2})], {"to": wide})
        nothing = add("Div", [constant(np.zeros(1, wide.numpy())), size])
        if dtype != wide:  # there and back is exact, and not every runtime adds in 16 bits
            pooled = add("Cast", [pooled], {"to": wide})
        pooled = add("Add", [pooled, nothing])
        if dtype != wide:
            pooled = add("Cast", [pooled], {"to": dtype})
    if pooling.keepdims:
        add("Unsqueeze", [pooled, constant(np.array([1]))])
    _replace(last, pooling.nodes, new)


class _Pooling(NamedTuple):
    """A lookup [B, L, D] and the reduction over L that alone reads it."""

    nodes: tuple[ir.Node, ...]  #: from the last to the lookup
    mode: int
    keepdims: bool  #: whether L stays as 1


def _pooling(lookup: ir.Node, weight: ir.Value, indices: ir.Value) -> _Pooling | None:
    """What pools a lookup, or None."""
    if len(_dims(indices)) != 2 or not _is_table(weight):
        return None
    nodes = [lookup]
    reduction = _only_reader(lookup)
    widened = reduction is not None and _casts(reduction, ir.DataType.FLOAT) and weight.dtype.itemsize == 2
    if widened and reduction is not None:  # 16-bit reductions are written in float32, as a bag sums them
        nodes.insert(0, reduction)
        reduction = _only_reader(reduction)
    if reduction is None or reduction.domain != "" or reduction.op_type not in _POOLINGS:
        return None
    nodes.insert(0, reduction)
    if widened:
        narrow = _only_reader(reduction)
        if narrow is None or not _casts(narrow, weight.dtype):
            return None
        nodes.insert(0, narrow)
    axes = None
    if len(reduction.inputs) > 1 and reduction.inputs[1] is not None:
        axes = ir.convenience.get_const_tensor(reduction.inputs[1])
    if axes is None or [axis % 3 for axis in axes.numpy().reshape(-1).tolist()] != [1]:
        return None
    mode = _POOLINGS[reduction.op_type]
    if mode != _SUM and _dims(indices)[1] == 0:  # a mean of nothing is NaN, a maximum an error; a bag has zeros
        return None
    keepdims = reduction.attributes.get("keepdims")
    return _Pooling(tuple(nodes), mode, keepdims is None or keepdims.as_int() != 0)


def _only_reader(node: ir.Node) -> ir.Node | None:
    """The one node that reads a node's one output, as its first input and in the same graph; or None."""
    (output,) = node.outputs
    readers = tuple(output.uses())
    if output.is_graph_output() or len(readers) != 1 or readers[0].idx != 0:
        return None
    return readers[0].node if readers[0].node.graph is node.graph else None


def _casts(node: ir.Node, dtype: ir.DataType) -> bool:
    return node.domain == "" and node.op_type == "Cast" and node.attributes["to"].as_int() == dtype


def _replace(last: ir.Node, old: Sequence[ir.Node], new: Sequence[ir.Node]) -> None:
    """Put ``new`` in the place of ``old``, whose output is that of ``last``."""
    graph = last.graph
    if graph is None:
        raise AssertionError(f"node {last.name!r} is in no graph")
    ir.convenience.replace_nodes_and_values(graph, last, old, new, last.outputs, new[-1].outputs)


def _share_tables(model: ir.Model) -> None:
    """Make initializers over the same memory one. torch does that for one Parameter, not for views of its data."""
    seen: dict[Any, ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        if not isinstance(raw, torch.Tensor) or raw.numel() == 0:
            continue
        first = seen.setdefault(_memory(raw), value)
        if first is not value and not value.is_graph_output():
            value.replace_all_uses_with(first)
            del model.graph.initializers[name]


def _check_data(model: ir.Model) -> None:
    for name, value in model.graph.initializers.items():
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, torch.Tensor) and _has_no_data(raw):
            raise ValueError(f"parameter {name!r} has no data: it is a fake tensor, or one on the meta device")


def _has_no_data(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)


def _to_proto(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, memoryview]]:
    """The model without the data of its large initializers, and that data where it is now."""
    tables: dict[str, memoryview] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise ValueError(f"initializer {name!r} has no data")
        if tensor.nbytes < _LARGE:
            continue
        raw = getattr(tensor, "raw", None)
        if isinstance(raw, torch.Tensor):
            flat = raw.detach().cpu().contiguous().reshape(-1)
            tables[name] = flat.view(torch.uint8).numpy().data
        else:
            tables[name] = memoryview(tensor.tobytes())
        value.const_value = ir.ExternalTensor("", 0, tensor.nbytes, tensor.dtype, shape=value.shape, name=name)  # type: ignore[arg-type]
    return ir.to_proto(model), tables
