"""embedding_bag as an ATen node, which torch once exported."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.rewrite.expressions import Expression, number

from .bag import Bag

_INPUTS = (
    *("weight", "indices", "offsets", "scale_grad_by_freq", "mode", "sparse"),
    *("per_sample_weights", "include_last_offset", "padding_idx"),
)


def aten(node: ir.Node, inputs: Sequence[Expression | None]) -> Bag | str:
    """The bag of an ATen node whose ``operator`` is embedding_bag, or why it is not one.

    1. torch wrote mode, include_last_offset and padding_idx as attributes.
    2. ONNX Runtime's training takes the whole list of ATen's arguments as inputs.

    A padding_idx of -1 means none, as in ATen.
    """
    given = dict(zip(_INPUTS, inputs, strict=False))
    if len(inputs) > len(_INPUTS):
        return f"it has {len(inputs)} inputs, expected at most {len(_INPUTS)}"
    weight, indices, offsets = (given.get(name) for name in ("weight", "indices", "offsets"))
    if weight is None or indices is None or offsets is None:
        return "it lacks one of weight, indices and offsets"
    settings: dict[str, int] = {}
    for name, default in (("mode", 0), ("include_last_offset", 0), ("padding_idx", -1)):
        written, attribute = given.get(name), node.attributes.get(name)
        if written is None:  # 1
            value = default if attribute is None else attribute.value
        else:  # 2
            value = number(written)
            if value is None:
                return f"its {name} is not constant"
        if not isinstance(value, int):
            return f"its {name} is {value!r}, expected an integer"
        settings[name] = int(value)
    if settings["mode"] not in range(len(spec.ATEN_MODES)):
        return f"its mode is {settings['mode']}, expected 0 (sum), 1 (mean) or 2 (max)"
    if settings["padding_idx"] < -1:
        return f"its padding_idx is {settings['padding_idx']}"
    attributes = spec.Attributes(
        spec.ATEN_MODES[settings["mode"]],
        padding_idx=None if settings["padding_idx"] == -1 else settings["padding_idx"],
        include_last_offset=bool(settings["include_last_offset"]),
    )
    return Bag(weight, indices, offsets, given.get("per_sample_weights"), attributes)
