"""Put ``ai.lucid`` nodes where a model has bags that somebody wrote out.

A model is read into onnx_ir once, searched and merged there, and written once. (One whose opset has to be raised is
read again before tables are merged.) Protobuf is the language at the door: onnx.checker, onnx.version_converter, shape
inference and `convert` take nothing else. External tables are only referred to, and neither loaded nor copied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from typing import Any

import onnx
import onnx_ir as ir
from onnx import helper, version_converter
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lucid_onnx.builder import ExternalData, Form, check_form, convert, is_external, tensors
from lucid_onnx.ops.embedding_bag import spec

from . import files, nodes
from .merging import Merged, Unmerged, merge
from .search import Fused, Search, Unfused

__all__ = ["FuseReport", "Fused", "Unfused", "fuse"]

#: What an opset before `spec.MIN_OPSET` is raised to.
_RAISED_OPSET = spec.DEFAULT_OPSET
#: The first IR version with model-local functions, with defaults of their attributes, with overloads, and with devices.
_FUNCTIONS_IR, _DEFAULTS_IR, _OVERLOADS_IR, _DEVICES_IR = 8, 9, 10, 11
#: The first IR versions of types: those of 8 bits, of 4 bits, and so on, by the first type of each.
_TYPES_IR = {"FLOAT8E4M3FN": 9, "UINT4": 10, "FLOAT4E2M1": 11, "FLOAT8E8M0": 12, "UINT2": 13, "FLOAT6E2M3": 14}


@dataclasses.dataclass(frozen=True)
class FuseReport:
    """The model, the bags that were put into it, and what looked like one.

    External data is not loaded; `InferenceSession` and this package's other functions find it where it was. ``files``
    are all that the result needs, the model first if it was written; copy or remove them together.

    ``merged`` and ``unmerged`` are the bags that were to be merged; both are empty if nobody asked.
    """

    model: onnx.ModelProto = dataclasses.field(repr=False)
    fused: tuple[Fused, ...]
    unfused: tuple[Unfused, ...]
    merged: tuple[Merged, ...] = ()
    unmerged: tuple[Unmerged, ...] = ()
    files: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All but the model, for JSON."""
        return {
            "fused": [dataclasses.asdict(f) for f in self.fused],
            "unfused": [dataclasses.asdict(u) for u in self.unfused],
            "merged": [dataclasses.asdict(m) for m in self.merged],
            "unmerged": [dataclasses.asdict(u) for u in self.unmerged],
            "files": list(self.files),
        }


def fuse(
    model: onnx.ModelProto | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    form: Form = "portable",
    assume_nonempty: bool = False,
    merge_tables: bool = False,
    single_file: bool = False,
) -> FuseReport:
    """Find the bags that a model has written out, and put one node in the place of each.

    Found are nn.EmbeddingBag as torch exports it (dynamo or not, optimized or not, and as an ATen node), embeddings
    that are pooled by hand, with masks, weights and divisors (see `docs/fuse.md`), a fixed number of bags written
    out one after another, lookups that TensorFlow's segment operators pool, as tf2onnx writes them, and what
    `lower` writes, of quantized tables too. A lowered file is recognised by the release that wrote it, and by any
    later release whose lowering did not change.

    A graph is fused only if it is, node for node and up to what changes no value, what such a bag is written as; of
    what is pooled by hand, only what provably has the same meaning. The docstrings of the patterns in
    `lucid_onnx.rewrite.patterns` say where the two differ all the same. Above all, a bag rejects a negative index,
    where ONNX's Gather counts from the end.

    What torch.onnx.export's own optimizer lost before stays lost: by default it drops ``x + 1e-8`` and
    ``x * 1.000009``. `lucid_onnx.torch.export`, and torch with ``optimize=False``, keep them.

    Inputs, outputs and metadata keep their names and order (the axis of a ragged bag's indices may get another name, as
    in `lucid_onnx.to_form`), and tables stay where they are: external data is neither
    loaded nor changed, and is copied only if ``output`` is in another folder. A model whose opset is below 16 is
    raised to 18 where it has a bag. In the body of a model-local function that imports the model's opset a bag is
    found if all calls of it agree in the types that the bag needs to know.

    Args:
        model: a path, or a model; it is not changed.
        output: where to write the result; it appears whole or not at all, and may be the input's path.
        form: the form of all ``ai.lucid`` nodes in the result, as in `lucid_onnx.to_form`. Strict shape inference fails
            where a function of the model has a node in the "native" form, whose type it cannot know.
        assume_nonempty: indices [B, L] under a mean or a maximum have L > 0, though the model does not say so. Without
            it, nodes beside the bag keep a mean over nothing NaN and a maximum an error, from opset 15 on.
        merge_tables: bags of equal attributes whose results are concatenated by a Concat, those that the model had
            before among them, become one ``ai.lucid::EmbeddingBagCollection``; see `lucid_onnx.rewrite.merging`.
        single_file: put all external data into ``output``, and into the report's model.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: an unknown form, not an ONNX model, one that onnx.checker rejects, or a single file over 2 GiB.
    """
    check_form(form)
    proto, data = files.read(model)
    report = _fuse(proto, data, form, assume_nonempty, merge_tables)
    result, needed = files.finish(report.model, data, output, single_file=single_file)
    return dataclasses.replace(report, model=result, files=needed)


def _fuse(
    proto: onnx.ModelProto, data: ExternalData | None, form: Form, assume_nonempty: bool, merge_tables: bool
) -> FuseReport:
    unknown = files.unknown_name(proto)
    if unknown is not None:
        raise ValueError(f"the model, before any change, does not pass onnx.checker: {files.check(proto) or unknown}")
    model = _from_proto(proto, data)
    if not nodes.is_sorted(model.graph):  # onnxruntime.quantization does not see what a subgraph reads
        with contextlib.suppress(ValueError):  # a circle, which onnx.checker reports
            model.graph.sort()
    RemoveUnusedNodesPass()(model)  # exporters leave nodes that nothing uses, and that would keep a Loop alive
    search = Search(model, _inferred(proto), assume_nonempty=assume_nonempty)
    search.run()
    raised = _raised(model) if search.fused else None
    merged: tuple[Merged, ...] = ()
    unmerged: tuple[Unmerged, ...] = ()
    if merge_tables:
        model = model if raised is None else _from_proto(raised, data)
        merged, unmerged = merge(model)
    if raised is not None and not merged:
        result = raised
    elif search.fused or merged:
        result = ir.to_proto(model)
    elif data is not None:
        result = proto  # read for this call
    else:
        result = onnx.ModelProto()
        result.CopyFrom(proto)
    if search.fused or any(i.domain == spec.DOMAIN for i in proto.opset_import):
        convert(result, form)
        # torch's dynamo exporter asks for IR version 10 whatever the model has; ONNX Runtime 1.17 does not read it.
        if search.fused:
            result.ir_version = min(result.ir_version, _needed_ir(result))
        if form == "portable":
            result.ir_version = max(result.ir_version, _FUNCTIONS_IR)
        complaint = files.check(result)
        if complaint is not None:
            before = files.check(proto)
            whose = "the model, before any change" if before is not None else "the model with its bags fused"
            raise ValueError(f"{whose}, does not pass onnx.checker: {before or complaint}")
    return FuseReport(result, tuple(reversed(search.fused)), tuple(reversed(search.unfused)), merged, unmerged)


def _from_proto(proto: onnx.ModelProto, data: ExternalData | None) -> ir.Model:
    """The model in onnx_ir. Its initializers are told where their external data is, if that is there."""
    try:
        model = ir.from_proto(proto)
    except ir.serde.SerdeError as error:
        raise ValueError(f"the model is not one that onnx_ir can hold: {_causes(error)}") from error
    for tensor in proto.graph.initializer:
        if data is not None and is_external(tensor) and tensor.name in model.graph.initializers:
            with contextlib.suppress(FileNotFoundError):  # a model can be looked at without its tables
                model.graph.initializers[tensor.name].meta[nodes.REGION] = data.region(tensor)
    return model


def _needed_ir(model: onnx.ModelProto) -> int:
    """The lowest IR version that has everything that a model has."""
    imports = [i for held in (model, *model.functions) for i in held.opset_import]
    versions = [helper.find_min_ir_version_for(imports, True)]
    for held, version in (
        (model.functions, _FUNCTIONS_IR),
        ([f for f in model.functions if f.attribute_proto], _DEFAULTS_IR),
        ([f for f in model.functions if f.overload], _OVERLOADS_IR),
        (model.configuration, _DEVICES_IR),
    ):
        if len(held):
            versions.append(version)
    values = itertools.chain(model.graph.input, model.graph.output, model.graph.value_info)
    types = {t.data_type for t in tensors(model)} | {v.type.tensor_type.elem_type for v in values}
    known = {name: number for name, number in onnx.TensorProto.DataType.items() if name in _TYPES_IR}
    versions += [_TYPES_IR[name] for name, number in known.items() if max(types, default=0) >= number]
    return max(versions)


def _causes(error: BaseException | None) -> str:
    """What an error of onnx_ir says, without the messages of what it was found in."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def _inferred(proto: onnx.ModelProto) -> dict[str, ir.Value]:
    """What shape inference finds for the values of the graph, by name."""
    light = files.without_tables(proto)
    try:
        inferred = onnx.shape_inference.infer_shapes(light)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError):
        inferred = light  # the checker will say what is wrong, if there is something to fuse
    values = (*inferred.graph.value_info, *inferred.graph.output)
    return {v.name: ir.serde.deserialize_value_info_proto(v, None) for v in values if v.name}


def _raised(model: ir.Model) -> onnx.ModelProto | None:
    """The model with an opset that bags have; None if it has one."""
    opset = nodes.opset(model.graph.opset_imports)
    if opset >= spec.MIN_OPSET:
        return None
    proto = ir.to_proto(model)
    if proto.functions:
        raise ValueError(
            f"the model imports opset {opset} and has functions, which onnx.version_converter drops: a bag needs "
            f"opset {spec.MIN_OPSET}"
        )
    light = files.without_tables(proto)
    try:
        converted = version_converter.convert_version(light, _RAISED_OPSET)
    except (version_converter.ConvertError, onnx.shape_inference.InferenceError, RuntimeError) as error:
        raise ValueError(
            f"the model imports opset {opset}, and onnx.version_converter cannot raise it to {_RAISED_OPSET}: "
            f"{' '.join(str(error).split())}"
        ) from error
    del converted.graph.input[:]
    converted.graph.input.extend(proto.graph.input)
    converted.graph.initializer.extend(t for t in proto.graph.initializer if files.is_table(t))
    converted.ir_version = max(proto.ir_version, helper.find_min_ir_version_for(list(converted.opset_import), True))
    return converted
