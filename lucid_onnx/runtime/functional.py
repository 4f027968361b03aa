"""The calls: `embedding_bag`, with the signature of Lucid's and PyTorch's functional form, and its relatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lucid_onnx.builder import FORMS, Form, bag_model, collection_model, quantized_bag_model
from lucid_onnx.ops import OPERATOR_OF
from lucid_onnx.ops import embedding_bag_grad as gradient_op
from lucid_onnx.ops import quantized_embedding_bag as quantized
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag_collection import spec as collection
from lucid_onnx.ops.quantized_embedding_bag.table import QuantizedTable

from .installation import install_gpu
from .library import why_no_cuda
from .session import InferenceSession

_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}


def embedding_bag(
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    offsets: npt.ArrayLike | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: npt.ArrayLike | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    form: Form = "portable",
    native: bool = True,
    provider: str = "cpu",
) -> np.ndarray:
    """Pool rows of ``weight``, bag by bag, on ONNX Runtime.

    Args:
        x: indices, int32 or int64: [N] with ``offsets``, or [B, L] with a bag per row.
        weight: the table [V, D]: float32, float16, bfloat16 (ml_dtypes) or float64. It is handed to the session as
            it is, without a copy, and never changed.
        offsets: [B], int32 or int64: where each bag begins in ``x``. Needed for [N], an error with [B, L].
        max_norm: rows with a larger norm are scaled down to it, for this call.
        norm_type: the p of that norm, > 0 or infinity.
        scale_grad_by_freq, sparse: concern the gradient alone; no effect here.
        mode: "sum", "mean" or "max".
        per_sample_weights: shaped like ``x``, of the table's dtype; mode "sum" only.
        include_last_offset: ``offsets`` is [B + 1] and its last entry ends the last bag.
        padding_idx: a row in [-V, V) whose positions are skipped.
        form: which expression of the operator runs: "portable", "standard" or "native".
        native: whether the native library is registered; the form "native" needs it.
        provider: "cpu" or "cuda".

    Returns:
        [B, D], of the table's dtype.

    Raises:
        IndexError: an index outside the table, with its value and position.
        TypeError: a dtype that the operator does not have.
        ValueError: any other bad argument, with its name and value.
    """
    del scale_grad_by_freq, sparse
    indices, table = _index_array(x), np.asarray(weight)
    starts = None if offsets is None else _index_array(offsets)
    weights = None if per_sample_weights is None else np.asarray(per_sample_weights)
    attributes = spec.Attributes(mode, padding_idx, max_norm, norm_type, include_last_offset)
    spec.check_table(table)
    spec.check_layout(indices, starts, weights, table.dtype, attributes)
    attributes.check(weighted=weights is not None, num_rows=table.shape[0])
    _check_choices(form, native, provider)
    op = spec.variant(two_d=indices.ndim == 2, weighted=weights is not None)
    given = {"weight": table, "indices": indices, "offsets": starts, "per_sample_weights": weights}

    def check() -> None:
        spec.check_inputs(table, indices, starts, weights, attributes)

    return _run(op, op.outputs, attributes, table.dtype, given, check, form, native, provider)[0]


def embedding_bag_grad(
    grad_output: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    offsets: npt.ArrayLike | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: npt.ArrayLike | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    with_per_sample_weights: bool = False,
    form: Form = "portable",
    native: bool = True,
    provider: str = "cpu",
) -> np.ndarray | tuple[np.ndarray, ...]:
    """The gradient of a bag, on ONNX Runtime: what `embedding_bag` of the same arguments hands back to its table.

    Args:
        grad_output: the gradient of the bag's output, [B, D] of the table's dtype.
        scale_grad_by_freq: divide the gradient of a row by how often its index occurs in the bags.
        sparse: give an entry for every position that counts, in the place of a gradient of the whole table.
        with_per_sample_weights: give the gradient of ``per_sample_weights`` too, shaped like them.
        x, weight, offsets, max_norm, norm_type, mode, per_sample_weights, include_last_offset, padding_idx, form,
            native, provider: as in `embedding_bag`. Where a row is clipped, the clip is not differentiated, as in
            PyTorch.

    Returns:
        ``grad_weight`` [V, D], of the table's dtype; with ``sparse`` a tuple of ``rows`` (int64 [M]: the index of each
        position that is in a bag and not padded, in order) and ``values`` [M, D], which may repeat a row; with
        ``with_per_sample_weights`` a tuple that ends in that gradient.

    Raises:
        IndexError, TypeError, ValueError: as `embedding_bag`; ``grad_output`` of another shape or dtype; or
            with_per_sample_weights where there are none.
    """
    gradient, indices, table = np.asarray(grad_output), _index_array(x), np.asarray(weight)
    starts = None if offsets is None else _index_array(offsets)
    weights = None if per_sample_weights is None else np.asarray(per_sample_weights)
    attributes = gradient_op.spec.Attributes(
        mode, padding_idx, max_norm, norm_type, include_last_offset, scale_grad_by_freq
    )
    gradient_op.spec.check_shapes(gradient, table, indices, starts, weights, attributes)
    attributes.check(weighted=weights is not None, num_rows=table.shape[0])
    _check_choices(form, native, provider)
    if with_per_sample_weights and weights is None:
        raise ValueError("with_per_sample_weights = True, but per_sample_weights is None")
    op = gradient_op.spec.variant(sparse=sparse, two_d=indices.ndim == 2, weighted=weights is not None)
    given = {
        "grad_output": gradient,
        "weight": table,
        "indices": indices,
        "offsets": starts,
        "per_sample_weights": weights,
    }

    def check() -> None:
        gradient_op.spec.check_inputs(gradient, table, indices, starts, weights, attributes)

    wanted = [name for name in op.outputs if with_per_sample_weights or name != "grad_per_sample_weights"]
    outputs = _run(op, wanted, attributes, table.dtype, given, check, form, native, provider)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def quantized_embedding_bag(
    x: npt.ArrayLike,
    table: QuantizedTable,
    offsets: npt.ArrayLike | None = None,
    *,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    mode: str = "mean",
    per_sample_weights: npt.ArrayLike | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    form: Form = "portable",
    native: bool = True,
    provider: str = "cpu",
) -> np.ndarray:
    """Pool rows of a table of codes, bag by bag, on ONNX Runtime: `embedding_bag` of what the codes stand for.

    Args:
        table: codes and scales; see `QuantizedTable.quantize` and `QuantizedTable.of`.
        per_sample_weights: shaped like ``x``, of the dtype of ``table.scale``; mode "sum" only.
        x, offsets, max_norm, norm_type, mode, include_last_offset, padding_idx, form, native, provider: as in
            `embedding_bag`. Norms are those of the decoded rows.

    Returns:
        [B, D], of the dtype of ``table.scale``.

    Raises:
        IndexError, TypeError, ValueError: as `embedding_bag`.
    """
    if not isinstance(table, QuantizedTable):
        raise TypeError(f"table is a {type(table).__name__}, expected a QuantizedTable")
    indices = _index_array(x)
    starts = None if offsets is None else _index_array(offsets)
    weights = None if per_sample_weights is None else np.asarray(per_sample_weights)
    attributes = quantized.spec.Attributes(
        mode, padding_idx, max_norm, norm_type, include_last_offset, table.codes_type, table.embedding_dim
    )
    dtype = table.scale.dtype
    # What the checks look at of a table is its shape and the dtype of its rows, so no row is decoded for them.
    rows = np.broadcast_to(np.zeros((), dtype), table.shape)
    if weights is not None and weights.dtype != dtype:
        raise TypeError(f"per_sample_weights has dtype {weights.dtype}, scale has {dtype}: they must be equal")
    spec.check_layout(indices, starts, weights, dtype, attributes)
    attributes.check(weighted=weights is not None, num_rows=table.shape[0])
    _check_choices(form, native, provider)
    op = quantized.spec.variant(second=table.second, two_d=indices.ndim == 2, weighted=weights is not None)
    given = {**table.inputs, "indices": indices, "offsets": starts, "per_sample_weights": weights}

    def check() -> None:
        spec.check_inputs(rows, indices, starts, weights, attributes)

    return _run(op, op.outputs, attributes, dtype, given, check, form, native, provider)[0]


def embedding_bag_collection(
    x: Sequence[npt.ArrayLike] | npt.ArrayLike,
    weights: Sequence[npt.ArrayLike],
    offsets: Sequence[npt.ArrayLike] | npt.ArrayLike | None = None,
    *,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    mode: str = "mean",
    per_sample_weights: Sequence[npt.ArrayLike] | npt.ArrayLike | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    packed: bool = False,
    form: Form = "portable",
    native: bool = True,
) -> np.ndarray:
    """Pool rows of several tables, bag by bag, on ONNX Runtime's CPU: the `embedding_bag` of each, side by side.

    Args:
        x: the indices of each table, [N_t] with ``offsets`` or [B, L_t]; with ``packed`` those of all, [N].
        weights: the tables [V_t, D_t], of one dtype.
        offsets: those of each table; with ``packed`` those of all, [len(weights) * B + 1], first all bags of the first.
        per_sample_weights: those of each table, or of all; mode "sum" only.
        packed: one array has the indices of all tables. It needs include_last_offset.
        max_norm, norm_type, mode, include_last_offset, padding_idx, form, native: as in `embedding_bag`.

    Returns:
        [B, sum of D_t], of the tables' dtype.

    Raises:
        IndexError, TypeError, ValueError: as `embedding_bag`; what concerns one table says which.
    """
    attributes = collection.Attributes(mode, padding_idx, max_norm, norm_type, include_last_offset)
    op, given = collection.arrange(x, weights, offsets, per_sample_weights, packed=packed)
    collection.check_layout(op, given, attributes)
    _check_choices(form, native, "cpu")
    dtypes = tuple((name, given[name].dtype.name) for name in op.inputs)
    kernel = native and form != "standard"
    return _answer(
        lambda: _collection_session(op, attributes, dtypes, form, kernel),
        op.outputs,
        given,
        lambda: collection.check_inputs(op, given, attributes),
        kernel,
    )[0]


@functools.lru_cache(maxsize=32)
def _collection_session(
    op: collection.Variant,
    attributes: collection.Attributes,
    dtypes: tuple[tuple[str, str], ...],
    form: str,
    native: bool,
) -> InferenceSession:
    found = {name: spec.BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype) for name, dtype in dtypes}
    model = collection_model(
        op,
        attributes,
        tables=[],
        table_dtype=found["weight_0"],
        index_dtypes=found,
        form=form,
        opset=spec.DEFAULT_OPSET,
    )
    return InferenceSession(model, native=native)


def _run(
    op: spec.Variant | gradient_op.spec.Variant | quantized.spec.Variant,
    outputs: Sequence[str],
    attributes: spec.Attributes,
    dtype: np.dtype,
    given: Mapping[str, np.ndarray | None],
    check: Callable[[], None],
    form: str,
    native: bool,
    provider: str,
) -> list[np.ndarray]:
    """The call, where all but the values in it is checked.

    Args:
        dtype: of the table's rows.
        check: looks at the values too.
    """
    indices, starts = given["indices"], given["offsets"]
    assert indices is not None
    kernel = native and form != "standard"
    index_dtypes = indices.dtype.name, indices.dtype.name if starts is None else starts.dtype.name
    return _answer(
        lambda: _session(op.name, attributes, dtype.name, *index_dtypes, form, kernel, provider),
        outputs,
        {name: given[name] for name in op.inputs},
        check,
        kernel,
    )


def _answer(
    session: Callable[[], InferenceSession],
    outputs: Sequence[str],
    feeds: Mapping[str, np.ndarray | None],
    check: Callable[[], None],
    kernel: bool,
) -> list[np.ndarray]:
    """The outputs of a session, or the contract's own error."""
    if not kernel:  # standard operators cannot refuse all that the contract refuses
        check()
    try:
        return [np.asarray(output) for output in session().run(list(outputs), feeds)]
    except Exception:
        # The kernel says what is wrong in onnxruntime's exceptions; the contract has its own.
        check()
        raise


def _check_choices(form: str, native: bool, provider: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form = {form!r} is not one of 'portable', 'standard', 'native'")
    if form == "native" and not native:
        raise ValueError("native = False, but form 'native' is the kernel alone")
    if provider not in _PROVIDERS:
        raise ValueError(f"provider = {provider!r} is not one of 'cpu', 'cuda'")


def _index_array(values: npt.ArrayLike) -> np.ndarray:
    """An array; an empty list, which NumPy would make float64, is a list of no indices."""
    array = np.asarray(values)
    return array.astype(np.int64) if array.size == 0 and not isinstance(values, np.ndarray) else array


@functools.lru_cache(maxsize=128)
def _session(
    op: str,
    attributes: spec.Attributes,
    table_dtype: str,
    index_dtype: str,
    offsets_dtype: str,
    form: str,
    native: bool,
    provider: str,
) -> Any:
    """A session for everything that shapes the graph; the table is an input."""
    if provider == "cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise RuntimeError(f"provider = 'cuda', but this onnxruntime has no CUDAExecutionProvider: {install_gpu()}")
        why = why_no_cuda() if native else None
        if why is not None:
            raise RuntimeError(f"provider = 'cuda', but {why}")
    dtype = spec.BFLOAT16 if table_dtype == "bfloat16" else np.dtype(table_dtype)
    common: dict[str, Any] = {
        "index_dtype": np.dtype(index_dtype),
        "offsets_dtype": np.dtype(offsets_dtype),
        "form": form,
        "opset": spec.DEFAULT_OPSET,
    }
    variant = OPERATOR_OF[op].spec.VARIANTS[op]
    if isinstance(attributes, quantized.spec.Attributes):
        model = quantized_bag_model(variant, attributes, table={}, scale_dtype=dtype, **common)
    else:
        model = bag_model(variant, attributes, table=None, table_dtype=dtype, **common)
    session = InferenceSession(model, native=native, providers=_PROVIDERS[provider])
    if _PROVIDERS[provider][0] not in session.get_providers():
        raise RuntimeError(f"provider = {provider!r}, but {_PROVIDERS[provider][0]} did not start here")
    return session
