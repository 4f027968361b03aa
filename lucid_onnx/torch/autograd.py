"""`embedding_bag` for tensors of PyTorch, forward and backward on our kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lucid_onnx.ops.attributes import Choice, Flag, Kind, OptionalIndex, Real, takes
from lucid_onnx.ops.embedding_bag.spec import BFLOAT16, Mode
from lucid_onnx.ops.embedding_bag_grad.spec import Attributes

#: The parameters of both directions after their tensors, in order, with their defaults.
_SETTINGS = {**{a.name: a.default for a in Attributes.keyword_table()}, "native": True}
_Settings = tuple[Any, ...]


@takes(Attributes)
def embedding_bag(
    input: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: Mode = "mean",
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    native: bool = True,
    **further: Any,
) -> torch.Tensor:
    """torch.nn.functional.embedding_bag on ONNX Runtime and our kernels, differentiable once.

    The gradients are those of ``weight`` and ``per_sample_weights``. Unlike torch's function this one

    - does not change the table: ``max_norm`` clips rows as they are read, where torch writes them back into ``weight``.
      The output and the gradients of a call are the same;
    - has ``scale_grad_by_freq`` and ``sparse`` in every mode, and divides by the row's own count;
    - accumulates gradients of 16 bits in float32, and rounds once (``lucid_onnx.ops.embedding_bag_grad.spec``);
    - puts positions after the last offset of ``include_last_offset`` in no bag;
    - raises the specification's errors: an index outside the table is an IndexError.

    Args:
        input: int32 or int64, [N] with ``offsets`` or [B, L].
        weight: [V, D] of float32, float16, bfloat16 or float64, on the CPU.
        sparse: the gradient of ``weight`` is a sparse COO tensor, not coalesced, with an entry for each position that
            is in a bag and not padded.
        offsets, per_sample_weights: as in `lucid_onnx.embedding_bag`.
        **attributes: those of `lucid_onnx.embedding_bag_grad`.
        native: use the native kernels; False runs standard operators.

    Returns:
        [B, D], of the dtype of ``weight``.

    Raises:
        IndexError, TypeError, ValueError: as `lucid_onnx.embedding_bag`; ValueError for a tensor that is not a
            dense one on the CPU.
    """
    given = {"input": input, "weight": weight, "offsets": offsets, "per_sample_weights": per_sample_weights}
    for name, tensor in given.items():
        if tensor is None and name not in ("input", "weight"):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise ValueError(f"{name} is a {tensor.layout} tensor on {tensor.device}, expected a dense one on the CPU")
    named = {
        **_SETTINGS,
        "max_norm": max_norm,
        "norm_type": norm_type,
        "scale_grad_by_freq": scale_grad_by_freq,
        "mode": mode,
        "include_last_offset": include_last_offset,
        "padding_idx": padding_idx,
        "native": native,
        **further,
    }
    settings = tuple(named.values())
    output = _EmbeddingBag.apply(input, weight, offsets, per_sample_weights, sparse, settings)
    assert isinstance(output, torch.Tensor)
    return output


class _EmbeddingBag(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        indices: torch.Tensor,
        weight: torch.Tensor,
        offsets: torch.Tensor | None,
        per_sample_weights: torch.Tensor | None,
        sparse: bool,
        settings: _Settings,
    ) -> torch.Tensor:
        from lucid_onnx.runtime.functional import embedding_bag as run

        output = run(
            _array(indices),
            _array(weight),
            None if offsets is None else _array(offsets),
            per_sample_weights=None if per_sample_weights is None else _array(per_sample_weights),
            **_keywords(settings),
        )
        # A gradient that does not look at the table's numbers need not mind if they change before it is taken.
        reads = per_sample_weights is not None or _keywords(settings)["mode"] == "max"
        ctx.save_for_backward(indices, offsets, per_sample_weights, weight if reads else None)
        ctx.weight = None if reads else weight.detach()
        ctx.sparse, ctx.settings = sparse, settings
        return _tensor(output)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        indices, offsets, per_sample_weights, weight = ctx.saved_tensors
        weight = ctx.weight if weight is None else weight
        arguments = (grad_output, indices, weight, offsets, per_sample_weights, *ctx.settings)
        if ctx.sparse:
            rows, values, by_sample = torch.ops.lucid_onnx.embedding_bag_sparse_grad(*arguments)
            by_weight = torch.sparse_coo_tensor(rows[None], values, weight.shape, check_invariants=False)
        else:
            by_weight, by_sample = torch.ops.lucid_onnx.embedding_bag_grad(*arguments)
        return None, by_weight, None, None if per_sample_weights is None else by_sample, None, None


# The gradient is an operator of torch's dispatcher, so that torch knows what to do with it where a tensor stands for
# many, as in the batched gradients of torch.autograd.gradcheck: it calls it for each.
_TYPES: dict[type[Kind], str] = {Choice: "str", Flag: "bool", OptionalIndex: "int", Real: "float"}
_SIGNATURE = (
    "(Tensor grad_output, Tensor indices, Tensor weight, Tensor? offsets, Tensor? per_sample_weights, "
    + "".join(
        f"{_TYPES[type(a.kind)]}{'?' if a.default is None else ''} {a.name}, " for a in Attributes.keyword_table()
    )
    + "bool native)"
)
_LIBRARY = torch.library.Library("lucid_onnx", "DEF")
_LIBRARY.define(f"embedding_bag_grad{_SIGNATURE} -> (Tensor, Tensor)")
_LIBRARY.define(f"embedding_bag_sparse_grad{_SIGNATURE} -> (Tensor, Tensor, Tensor)")


def _grad(sparse: bool, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """The gradient's outputs, and that of per_sample_weights always last: empty where there are none."""
    from lucid_onnx.runtime.functional import embedding_bag_grad as run

    grad_output, indices, weight, offsets, per_sample_weights, *settings = arguments
    got = run(
        _array(grad_output),
        _array(indices),
        _array(weight),
        None if offsets is None else _array(offsets),
        per_sample_weights=None if per_sample_weights is None else _array(per_sample_weights),
        with_per_sample_weights=per_sample_weights is not None,
        sparse=sparse,
        **_keywords(tuple(settings)),
    )
    outputs = [_tensor(array) for array in (got if isinstance(got, tuple) else (got,))]
    return (*outputs, *(() if per_sample_weights is not None else (weight.new_empty(0),)))


_LIBRARY.impl("embedding_bag_grad", lambda *arguments: _grad(False, *arguments), "CPU")
_LIBRARY.impl("embedding_bag_sparse_grad", lambda *arguments: _grad(True, *arguments), "CPU")


def _keywords(settings: Any) -> dict[str, Any]:
    keywords = dict(zip(_SETTINGS, settings, strict=True))
    # Of the forms, the one that a session starts with soonest.
    return {**keywords, "form": "native" if keywords["native"] else "standard"}


def _array(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor; a copy only of one that is not contiguous."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # which NumPy has from ml_dtypes
        return np.asarray(tensor.view(torch.int16).numpy().view(BFLOAT16))
    return np.asarray(tensor.numpy())


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
