"""Translations of ATen's bags into ``ai.lucid`` nodes and placeholders.

torch's exporter calls a translation with onnx_ir values in the place of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.values import Op, Opset
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lucid_onnx.ops.embedding_bag import spec

from .placeholders import BATCHED, LOOKUP, PACKED, RENORM, SUM, Norm, RejectedError, bag_attributes, dims, unclipped

_ATEN = torch.ops.aten
#: The outputs of torch.embedding_bag.
_OUTPUTS = ("output", "offset2bag", "bag_size", "max_indices")


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of ATen's bags into ``ai.lucid`` nodes, for torch.onnx.export's ``custom_translation_table``.

    The exported model then wants `lucid_onnx.to_form`, which gives the nodes their functions::

        program = torch.onnx.export(
            module, args, dynamo=True, optimize=False, custom_translation_table=translation_table()
        )
        model = lucid_onnx.to_form(program.model_proto, "portable")

    ``optimize=False`` matters: by default torch runs onnxscript's optimizer, which takes a constant within 1e-8 of 0
    for 0 and one within 1e-5 of 1 for 1, so that ``x + 1e-8`` is lost. Nothing here can undo that. torch also rounds
    the constants of a float64 module to float32.

    `export` is this and more: it keeps all constants, makes bags of pooled torch.nn.Embedding too, says what it cannot
    export and why, simplifies the graph, and writes tables of any size.
    """
    return {
        _ATEN.embedding_bag.default: rejecting(translate_bag),
        _ATEN.embedding_bag.padding_idx: rejecting(translate_bag),
        _ATEN._embedding_bag.default: rejecting(translate_decomposed_bag),
        _ATEN._embedding_bag_forward_only.default: rejecting(translate_decomposed_bag),
        _ATEN.embedding_renorm.default: rejecting(translate_renorm),
    }


def rejecting(translate: Callable[..., Any]) -> Callable[..., Any]:
    """``translate``, whose ValueError and TypeError become `RejectedError`.

    Not annotated, as torch would read the annotations.
    """

    def call(*args, **kwargs):  # type: ignore[no-untyped-def]
        try:
            return translate(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise RejectedError(str(error)) from error

    call.__name__ = translate.__name__
    return call


def translate_bag(
    weight: ir.Value,
    indices: ir.Value,
    offsets: ir.Value,
    scale_grad_by_freq: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    per_sample_weights: ir.Value | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Sequence[ir.Value]:
    """aten.embedding_bag; of its four outputs only the first exists."""
    del scale_grad_by_freq, sparse
    if len(dims(indices)) == 2:
        raise ValueError(
            f"torch.embedding_bag is called with offsets and indices of shape {list(dims(indices))}: flatten these, or "
            "call torch.nn.functional.embedding_bag without offsets, where each row of indices is a bag"
        )
    table, norm = unclipped(weight, indices)
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


def translate_decomposed_bag(
    weight: ir.Value,
    indices: ir.Value,
    offsets: ir.Value,
    scale_grad_by_freq: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    per_sample_weights: ir.Value | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Sequence[ir.Value]:
    """aten._embedding_bag, whose padding_idx is not negative, or -1 for none."""
    padding = None if padding_idx < 0 else padding_idx
    return translate_bag(
        weight, indices, offsets, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset, padding
    )


def translate_renorm(weight: ir.Value, indices: ir.Value, max_norm: float, norm_type: float) -> ir.Value:
    """aten.embedding_renorm, as a placeholder."""
    value = _OPERATORS[RENORM](weight, indices, max_norm=float(max_norm), norm_type=float(norm_type))
    return _one_value(value)


def translate_lookup(
    weight: ir.Value,
    indices: ir.Value,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> ir.Value:
    """aten.embedding, as a placeholder. Its padding_idx concerns the gradient alone."""
    del padding_idx, scale_grad_by_freq, sparse
    return _one_value(_OPERATORS[LOOKUP](weight, indices))


def translate_packed(
    rows: ir.Value,
    indices: ir.Value,
    offsets: ir.Value | None = None,
    per_sample_weights: ir.Value | None = None,
    bits: int = 8,
    include_last_offset: bool = False,
) -> ir.Value:
    """lucid_onnx.packed_embedding_bag, as a placeholder."""
    call = _OPERATORS[PACKED]
    return _one_value(
        call(rows, indices, offsets, per_sample_weights, bits=bits, include_last_offset=int(include_last_offset))
    )


def translate_batched(
    tables: Sequence[ir.Value],
    indices: ir.Value,
    offsets: ir.Value,
    per_sample_weights: ir.Value | None,
    num_keys: int,
    keys: Sequence[int],
    table_of: Sequence[int],
    bits: Sequence[int],
    names: Sequence[str],
    mode: int,
) -> ir.Value:
    """lucid_onnx.batched_bags, as a placeholder."""
    weights = [] if per_sample_weights is None else [per_sample_weights]
    attributes = {
        "num_tables": len(tables),
        "num_keys": num_keys,
        "keys": list(keys),
        "table_of": list(table_of),
        "bits": list(bits),
        "names": list(names),
        "mode": mode,
    }
    inputs = [f"{'rows' if any(bits) else 'weight'}_{t}" for t in range(len(tables))]
    inputs += ["indices", "offsets", *(["per_sample_weights"] if weights else [])]
    call = _operator(BATCHED, inputs, attributes)
    return _one_value(call(*tables, indices, offsets, *weights, **attributes))


class _Outputs(tuple[ir.Value, ...]):
    """The outputs of aten.embedding_bag: one, and an error where another is asked for."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and index >= len(self):
            raise RejectedError(
                f"the module uses {_OUTPUTS[index]}, output {index} of torch.embedding_bag; only output 0, "
                "the pooled rows, can be exported"
            )
        return super().__getitem__(index)


def _operator(name: str, inputs: Sequence[str], attributes: Mapping[str, Any], optional: Sequence[str] = ()) -> Op:
    """An operator of our domain that torch's exporter can record. The last inputs may be ``optional``."""
    schema = onnx.defs.OpSchema
    types = {
        "T": [f"tensor({t})" for t in ("float", "float16", "bfloat16", "double")],
        "I": ["tensor(int32)", "tensor(int64)"],
        "O": ["tensor(int32)", "tensor(int64)"],
        "R": ["tensor(uint8)"],
    }
    letters = {"weight": "T", "indices": "I", "offsets": "O", "per_sample_weights": "T", "rows": "R"}
    option = schema.FormalParameterOption
    kinds = {int: schema.AttrType.INT, float: schema.AttrType.FLOAT}
    lists = {int: schema.AttrType.INTS, str: schema.AttrType.STRINGS}

    def letter(name: str) -> str:
        return letters[name.rstrip("0123456789").removesuffix("_")]

    def kind(value: Any) -> Any:
        return lists[type(value[0])] if isinstance(value, list) else kinds[type(value)]

    return Op(
        Opset(spec.DOMAIN, spec.VERSION),
        name,
        schema(
            name,
            spec.DOMAIN,
            spec.VERSION,
            inputs=[
                *(schema.FormalParameter(i, letter(i)) for i in inputs),
                *(schema.FormalParameter(i, letter(i), param_option=option.Optional) for i in optional),
            ],
            outputs=[schema.FormalParameter("output", "T")],
            type_constraints=[
                (each, types[each], "") for each in sorted({"T", *(letter(i) for i in (*inputs, *optional))})
            ],
            attributes=[schema.Attribute(n, kind(value), required=True) for n, value in attributes.items()],
        ),
    )


#: Every operator of our domain that a translation writes, the placeholders included.
_OPERATORS: dict[str, Op] = {
    RENORM: _operator(RENORM, ("weight", "indices"), {"max_norm": 1.0, "norm_type": 2.0}),
    LOOKUP: _operator(LOOKUP, ("weight", "indices"), {}),
    PACKED: _operator(
        PACKED, ("rows", "indices"), {"bits": 8, "include_last_offset": 0}, ("offsets", "per_sample_weights")
    ),
    **{
        op.name: _operator(op.name, op.inputs, spec.Attributes().to_onnx(op, double=False))
        for op in spec.VARIANTS.values()
    },
}


def _node(
    weight: ir.Value,
    indices: ir.Value,
    offsets: ir.Value | None,
    weights: ir.Value | None,
    *,
    mode: int,
    padding_idx: int | None,
    norm: Norm,
    include_last_offset: bool,
) -> ir.Value:
    """Record one bag. Without ``offsets`` the indices are [B, L]."""
    op = spec.variant(two_d=offsets is None, weighted=weights is not None)
    attributes = bag_attributes(weight, indices, mode, padding_idx, norm, include_last_offset, weighted=op.weighted)
    given = {"weight": weight, "indices": indices, "offsets": offsets, "per_sample_weights": weights}
    double = weight.dtype == ir.DataType.DOUBLE
    return _one_value(_OPERATORS[op.name](*(given[i] for i in op.inputs), **attributes.to_onnx(op, double=double)))


def _one_value(output: Any) -> ir.Value:
    """What torch's exporter recorded for an operator of one output."""
    if not isinstance(output, ir.Value):
        raise AssertionError(f"torch {torch.__version__} recorded {output!r} in the place of one value")
    return output


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
    if len(_meta(node).shape) != 1 or len(dims(rows)) != 2:
        return None
    if like is not None and dims(rows) != dims(like):
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
