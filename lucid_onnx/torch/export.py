"""`export`: torch.onnx.export with our translations, then the placeholders resolved and the model written."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, overload

import onnx
import onnx_ir as ir
import torch

from lucid_onnx.builder import Form, check_form, fill_tables, save, to_form
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.rewrite import Unfused

from .batched import batched_tables, is_keyed_jagged
from .capture import capture, clips_a_shared_table, has_no_data, memory_key
from .jagged import Flat, flatten, size_names
from .packed import packed_tables
from .placeholders import RejectedError
from .resolve import pool_lookups, resolve_placeholders, take_over_norms
from .simplify import restore_doubles, simplify, tidy
from .translations import rejecting, translate_batched, translate_lookup, translate_packed, translation_table

#: The oldest opset that torch's exporter writes.
MIN_OPSET = 18
#: Initializers of at least so many bytes are written from the module's own memory.
_LARGE = 4096
_ATEN = torch.ops.aten
_SHORT = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}


class UnfusedWarning(UserWarning):
    """A module looks up rows of a table and pools them, and `export` made no bag of it."""


@overload
def export(
    module: torch.nn.Module | torch.export.ExportedProgram,
    args: Any = ...,
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
    args: Any,
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
    args: Any = (),
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

    Bags are torch.nn.EmbeddingBag, torch.nn.functional.embedding_bag and what they come down to, torch's quantized bags
    (torch.ao.nn.quantized, torch.ops.quantized.embedding_bag_byte and _4bit), and pooled embeddings. TorchRec's
    collections and FBGEMM's batched tables become a collection, or a bag for each feature where they are quantized.
    ``max_norm`` clips the rows as they are read: the table in the file is the module's, and no run changes it.
    ``sparse`` and ``scale_grad_by_freq`` concern the gradient alone and are dropped.

    Args:
        module: the module, in ``eval()`` mode, or a torch.export.ExportedProgram of it.
        args, kwargs, dynamic_shapes, input_names, output_names: as in torch.onnx.export. Sizes are fixed to those of
            the example ``args``, except those that ``dynamic_shapes`` names, which may be 0 at run time. A
            KeyedJaggedTensor of TorchRec's is inputs ``values``, ``lengths`` [T * B] (or ``offsets`` [T * B + 1] if it
            has no lengths) and ``weights``; with one among them and no ``dynamic_shapes``, the number of values and of
            bags vary. A lone one may be given for ``args``.
        path: the .onnx file to write, whole or not at all.
        form: "portable", "standard" or "native", as in `lucid_onnx.to_form`.
        opset: version of the standard operators, 18 to 26.
        embedding_as_bag: make a torch.nn.Embedding that is pooled over a sequence a bag too, with a mask or weights or
            without: what `lucid_onnx.fuse` finds. The result is the same to rounding, and [B, L, D] is never in memory.
            What looks like one and is none raises an `UnfusedWarning` with the reason. (A 16-bit sum that is itself an
            output of the module stays as torch exports it, in float32.)
        external_data: as in `lucid_onnx.save`; None puts the tables outside only if one file cannot hold them.

    Returns:
        The model if ``path`` is None, else nothing.

    Raises:
        ValueError: a bad argument; a bag whose offset2bag, bag_size or max_indices is used; a table that is used
            otherwise after max_norm changed it; parameters without data.
        torch.onnx.OnnxExporterError: what torch.onnx.export cannot export.
    """
    check_arguments(form, opset)
    args = (args,) if is_keyed_jagged(args) else args
    flat = None if isinstance(module, torch.export.ExportedProgram) else flatten(module, args, kwargs, dynamic_shapes)
    if flat is not None:
        module, args, kwargs, dynamic_shapes = flat.module, flat.args, None, flat.dynamic_shapes
        input_names = flat.input_names if input_names is None else input_names
    return write(
        module,
        args,
        path,
        flat=flat,
        form=form,
        opset=opset,
        embedding_as_bag=embedding_as_bag,
        external_data=external_data,
        kwargs=kwargs,
        dynamic_shapes=dynamic_shapes,
        input_names=input_names,
        output_names=output_names,
    )


def write(
    module: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    path: str | os.PathLike[str] | None,
    *,
    flat: Flat | None,
    form: Form,
    opset: int,
    embedding_as_bag: bool,
    external_data: bool | None,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **names: Sequence[str] | None,
) -> onnx.ModelProto | None:
    """`export` of a call whose arguments are tensors; ``flat`` tells of the keyed tensors that were made tensors."""
    translations = translation_table()
    translations[torch.ops.lucid_onnx.packed_embedding_bag.default] = rejecting(translate_packed)
    translations[torch.ops.lucid_onnx.batched_bags.default] = rejecting(translate_batched)
    if embedding_as_bag:
        translations[_ATEN.embedding.default] = rejecting(translate_lookup)
    if clips_a_shared_table(module):
        if isinstance(module, torch.export.ExportedProgram):
            raise ValueError(
                "the exported program clips a table by max_norm that several of its parameters share, which torch "
                "fails to decompose: give the module itself"
            )
        module, args, kwargs = capture(module, args, kwargs, dynamic_shapes), (), None
    model, unfused = _translated(
        module, args, translations, opset, flat=flat, kwargs=kwargs, dynamic_shapes=dynamic_shapes, **names
    )
    _warn(unfused)
    if flat is not None:
        own = flat.module.output_names
        _unwrap(model, own if names.get("output_names") is None else None)
    proto, tables = _to_proto(model)
    if flat is not None:
        flat.module.describe(proto)
    proto = to_form(proto, form)
    # torch asks for IR version 10 whatever the opset; ONNX Runtime 1.17 reads 9, and opset 18 needs 8.
    standard = onnx.helper.make_opsetid("", opset)
    proto.ir_version = min(proto.ir_version, onnx.helper.find_min_ir_version_for([standard]))
    if path is not None:
        save(proto, path, external_data=external_data, tables=tables)
        return None
    fill_tables(proto, tables)
    return proto


def _unwrap(model: ir.Model, output_names: Sequence[str] | None) -> None:
    """Give initializers and outputs the names that they have without the module around the caller's, in place."""
    for name, value in list(model.graph.initializers.items()):
        bare = name.removeprefix("module.")
        if bare != name and bare not in model.graph.initializers:
            value.name = bare
    for k, name in enumerate(output_names or ()):
        model.graph.outputs[k].name = name


def _warn(unfused: Sequence[Unfused]) -> None:
    """Say what was exported without a bag, and why."""
    if unfused:
        reasons = "".join(f"\n  {u.where}: {u.reason}" for u in unfused)
        warnings.warn(
            f"{len(unfused)} poolings of an embedding are exported as torch writes them, not as a bag:{reasons}",
            UnfusedWarning,
            stacklevel=4,
        )


def check_arguments(form: str, opset: int) -> None:
    """Raise the errors of a form or opset that is not one."""
    check_form(form)
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise TypeError(f"opset = {opset!r} must be an integer")
    if not MIN_OPSET <= opset <= spec.MAX_OPSET:
        raise ValueError(f"opset = {opset} is outside [{MIN_OPSET}, {spec.MAX_OPSET}], what torch's exporter can write")


def _translated(
    module: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    translations: dict[Callable[..., Any], Callable[..., Any]],
    opset: int,
    *,
    flat: Flat | None,
    **options: Any,
) -> tuple[ir.Model, list[Unfused]]:
    """The module as torch.onnx.export writes it, with every bag as one ``ai.lucid`` node; and what is not one."""
    with packed_tables(module) as operators, batched_tables(module):
        try:
            program = torch.onnx.export(
                module,
                args,
                **options,
                opset_version=opset,
                dynamo=True,
                custom_translation_table=translations,
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            rejected = operators.rejected or _rejection_in(error)
            if rejected is None:
                raise
            raise ValueError(str(rejected)) from error
    if program is None:  # dynamo=False alone returns nothing
        raise AssertionError("torch.onnx.export returned no program")
    written = program.model.opset_imports[""]
    if written != opset:
        raise ValueError(f"opset = {opset}, but torch {torch.__version__} could write this module as {written} only")
    _check_data(program.model)
    _narrow_outputs(program)
    restore_doubles(program.model)
    resolve_placeholders(program.model)
    simplify(program.model)
    unfused = pool_lookups(program.model) if _ATEN.embedding.default in translations else []
    take_over_norms(program.model)
    tidy(program.model)
    _share_tables(program.model)
    if flat is not None:
        _name_sizes(program.model, size_names(program.exported_program, flat.sizes))
    return program.model, unfused


def _name_sizes(model: ir.Model, names: dict[str, str]) -> None:
    """Give sizes names in the place of torch's symbols, in place."""
    for value in [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_named(size, names) for size in value.shape])


def _named(size: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    """A size with names in the place of torch's symbols."""
    if isinstance(size, int):
        return size
    return None if size.value is None else re.sub(r"\bs\d+\b", lambda m: names.get(m[0], m[0]), size.value)


def _narrow_outputs(program: torch.onnx.ONNXProgram) -> None:
    """Cast outputs to the module's type of 16 bits; torch gives the float32 in which it adds up."""
    outputs = program.model.graph.outputs
    exported = program.exported_program
    specs = zip(exported.graph_signature.output_specs, exported.graph.output_node().args[0], strict=True)
    results = [result for output, result in specs if output.kind is torch.export.graph_signature.OutputKind.USER_OUTPUT]
    if len(results) != len(outputs):  # some are not tensors
        return
    for k, (wide, result) in enumerate(zip(list(outputs), results, strict=True)):
        value = result.meta.get("val") if isinstance(result, torch.fx.Node) else None
        to = _SHORT.get(value.dtype) if isinstance(value, torch.Tensor) else None
        if to is None or wide.dtype != ir.DataType.FLOAT:
            continue
        node = ir.node("Cast", [wide], {"to": int(to)})
        outputs[k] = node.outputs[0]
        outputs[k].type, outputs[k].shape = ir.TensorType(to), wide.shape
        outputs[k].name, wide.name = wide.name, f"{wide.name}__float32"
        program.model.graph.append(node)


def _share_tables(model: ir.Model) -> None:
    """Make initializers over the same memory one. torch does that for one Parameter, not for views of its data."""
    seen: dict[Any, ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        if not isinstance(raw, torch.Tensor) or raw.numel() == 0:
            continue
        first = seen.setdefault(memory_key(raw), value)
        if first is not value and not value.is_graph_output():
            value.replace_all_uses_with(first)
            del model.graph.initializers[name]


def _check_data(model: ir.Model) -> None:
    for name, value in model.graph.initializers.items():
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, torch.Tensor) and has_no_data(raw):
            raise ValueError(f"parameter {name!r} has no data: it is a fake tensor, or one on the meta device")


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


def _rejection_in(error: BaseException | None) -> RejectedError | None:
    """Our own error among the causes of torch's."""
    while error is not None:
        if isinstance(error, RejectedError):
            return error
        error = error.__cause__
    return None
