"""The calls: `embedding_bag`, with the signature of Lucid's and PyTorch's functional form, and its relatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from lucid_onnx.builder import Form, check_form, op_model
from lucid_onnx.ops.attributes import BaseAttributes, takes
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag_collection import spec as collection
from lucid_onnx.ops.embedding_bag_grad import spec as gradient
from lucid_onnx.ops.quantized_embedding_bag import spec as quantized
from lucid_onnx.ops.quantized_embedding_bag.table import QuantizedTable
from lucid_onnx.ops.variants import BaseVariant

from .installation import install_gpu
from .library import CUDA, PROVIDERS, Provider, check_provider, why_no_cuda
from .session import InferenceSession

if TYPE_CHECKING:
    from typing import Unpack


@takes(spec.Attributes)
def embedding_bag(
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    offsets: npt.ArrayLike | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: spec.Mode = "mean",
    sparse: bool = False,
    per_sample_weights: npt.ArrayLike | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    form: Form = "portable",
    native: bool = True,
    provider: Provider = "cpu",
    **further: Any,
) -> np.ndarray:
    """Pool rows of ``weight``, bag by bag, on ONNX Runtime.

    Args:
        x: indices, int32 or int64: [N] with ``offsets``, or [B, L] with a bag per row.
        weight: the table [V, D]: float32, float16, bfloat16 (ml_dtypes) or float64. It is handed to the session as
            it is, without a copy, and never changed.
        offsets: [B], int32 or int64: where each bag begins in ``x``. Needed for [N], an error with [B, L].
        per_sample_weights: shaped like ``x``, of the table's dtype, or lists of numbers; mode "sum", or mean and sqrtn
            with a divisor.
        **attributes: those of `lucid_onnx.ops.embedding_bag.spec`.
        scale_grad_by_freq, sparse: concern the gradient alone; no effect here.
        form: which expression of the operator runs: "portable", "standard" or "native".
        native: whether the native library is registered; the form "native" needs it.
        provider: "cpu" or "cuda".

    Returns:
        [B, D], of the table's dtype.

    Raises:
        IndexError: an index outside the table, with its value and position.
        TypeError: a dtype that the operator does not have, or a torch tensor that requires a gradient.
        ValueError: any other invalid argument, with its name and value.
    """
    del scale_grad_by_freq, sparse
    indices, table = _index_array(x), _array("weight", weight)
    starts = None if offsets is None else _index_array(offsets)
    weights = None if per_sample_weights is None else _weight_array(per_sample_weights, table.dtype)
    attributes = spec.Attributes(mode, padding_idx, max_norm, norm_type, include_last_offset, **further)
    spec.check_table(table)
    spec.check_layout(indices, starts, weights, table.dtype, attributes)
    attributes.check(weighted=weights is not None, num_rows=table.shape[0])
    _check_choices(form, native, provider)
    op = spec.variant(two_d=indices.ndim == 2, weighted=weights is not None)
    given = {"weight": table, "indices": indices, "offsets": starts, "per_sample_weights": weights}

    def check() -> None:
        spec.check_inputs(table, indices, starts, weights, attributes)

    return _run(op, op.outputs, attributes, given, check, form, native, provider)[0]


@overload
def embedding_bag_grad(
    grad_output: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    offsets: npt.ArrayLike | None = ...,
    max_norm: float | None = ...,
    norm_type: float = ...,
    scale_grad_by_freq: bool = ...,
    mode: spec.Mode = ...,
    sparse: Literal[False] = ...,
    per_sample_weights: npt.ArrayLike | None = ...,
    include_last_offset: bool = ...,
    padding_idx: int | None = ...,
    *,
    with_per_sample_weights: Literal[False] = ...,
    **further: Any,
) -> np.ndarray: ...


@overload
def embedding_bag_grad(
    grad_output: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    offsets: npt.ArrayLike | None = ...,
    max_norm: float | None = ...,
    norm_type: float = ...,
    scale_grad_by_freq: bool = ...,
    mode: spec.Mode = ...,
    *,
    sparse: Literal[True],
    with_per_sample_weights: bool = ...,
    **further: Any,
) -> tuple[np.ndarray, ...]: ...


@overload
def embedding_bag_grad(
    grad_output: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    offsets: npt.ArrayLike | None = ...,
    max_norm: float | None = ...,
    norm_type: float = ...,
    scale_grad_by_freq: bool = ...,
    mode: spec.Mode = ...,
    sparse: bool = ...,
    *,
    with_per_sample_weights: Literal[True],
    **further: Any,
) -> tuple[np.ndarray, ...]: ...


@overload
def embedding_bag_grad(
    grad_output: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    offsets: npt.ArrayLike | None = ...,
    max_norm: float | None = ...,
    norm_type: float = ...,
    scale_grad_by_freq: bool = ...,
    mode: spec.Mode = ...,
    sparse: bool = ...,
    per_sample_weights: npt.ArrayLike | None = ...,
    include_last_offset: bool = ...,
    padding_idx: int | None = ...,
    *,
    with_per_sample_weights: bool = ...,
    **further: Any,
) -> np.ndarray | tuple[np.ndarray, ...]: ...


@takes(gradient.Attributes)
def embedding_bag_grad(
    grad_output: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    offsets: npt.ArrayLike | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: spec.Mode = "mean",
    sparse: bool = False,
    per_sample_weights: npt.ArrayLike | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    with_per_sample_weights: bool = False,
    form: Form = "portable",
    native: bool = True,
    provider: Provider = "cpu",
    **further: Any,
) -> np.ndarray | tuple[np.ndarray, ...]:
    """The gradient of a bag, on ONNX Runtime: what `embedding_bag` of the same arguments hands back to its table.

    Where a row is clipped to max_norm, the clip is not differentiated, as in PyTorch.

    Args:
        grad_output: the gradient of the bag's output, [B, D] of the table's dtype.
        **attributes: those of `lucid_onnx.ops.embedding_bag_grad.spec`.
        sparse: give an entry for every position that counts, instead of a gradient of the whole table.
        with_per_sample_weights: give the gradient of ``per_sample_weights`` too, shaped like them.
        x, weight, offsets, per_sample_weights, form, native, provider: as in `embedding_bag`.

    Returns:
        ``grad_weight`` [V, D], of the table's dtype; with ``sparse`` a tuple of ``rows`` (int64 [M]: the index of each
        position that is in a bag and not padded, in order) and ``values`` [M, D], which may repeat a row; with
        ``with_per_sample_weights`` a tuple that ends in that gradient.

    Raises:
        IndexError, TypeError, ValueError: as `embedding_bag`; ``grad_output`` of another shape or dtype; or
            with_per_sample_weights where there are none.
    """
    given_gradient, indices, table = _array("grad_output", grad_output), _index_array(x), _array("weight", weight)
    starts = None if offsets is None else _index_array(offsets)
    weights = None if per_sample_weights is None else _weight_array(per_sample_weights, table.dtype)
    attributes = gradient.Attributes(
        mode, padding_idx, max_norm, norm_type, include_last_offset, scale_grad_by_freq=scale_grad_by_freq, **further
    )
    gradient.check_shapes(given_gradient, table, indices, starts, weights, attributes)
    attributes.check(weighted=weights is not None, num_rows=table.shape[0])
    _check_choices(form, native, provider)
    if with_per_sample_weights and weights is None:
        raise ValueError("with_per_sample_weights = True, but per_sample_weights is None")
    op = gradient.variant(sparse=sparse, two_d=indices.ndim == 2, weighted=weights is not None)
    given = {
        "grad_output": given_gradient,
        "weight": table,
        "indices": indices,
        "offsets": starts,
        "per_sample_weights": weights,
    }

    def check() -> None:
        gradient.check_inputs(given_gradient, table, indices, starts, weights, attributes)

    wanted = [name for name in op.outputs if with_per_sample_weights or name != "grad_per_sample_weights"]
    outputs = _run(op, wanted, attributes, given, check, form, native, provider)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


@takes(quantized.Attributes)
def quantized_embedding_bag(
    x: npt.ArrayLike,
    table: QuantizedTable,
    offsets: npt.ArrayLike | None = None,
    *,
    per_sample_weights: npt.ArrayLike | None = None,
    form: Form = "portable",
    native: bool = True,
    provider: Provider = "cpu",
    **attributes: Unpack[spec.Keywords],
) -> np.ndarray:
    """Pool rows of a quantized table, bag by bag, on ONNX Runtime: `embedding_bag` of the rows that it stands for.

    Args:
        table: quantized values and scales; see `QuantizedTable.quantize` and `QuantizedTable.of`.
        per_sample_weights: shaped like ``x``, of the dtype of ``table.scale``; mode "sum", or mean and sqrtn with a
            divisor.
        **attributes: those of `embedding_bag`.
        x, offsets, form, native, provider: as in `embedding_bag`. Norms are those of the decoded rows.

    Returns:
        [B, D], of the dtype of ``table.scale``.

    Raises:
        IndexError, TypeError, ValueError: as `embedding_bag`.
    """
    if not isinstance(table, QuantizedTable):
        raise TypeError(f"table is a {type(table).__name__}, expected a QuantizedTable")
    indices = _index_array(x)
    starts = None if offsets is None else _index_array(offsets)
    weights = None if per_sample_weights is None else _weight_array(per_sample_weights, table.scale.dtype)
    meaning = quantized.Attributes(**attributes, codes_type=table.codes_type, embedding_dim=table.embedding_dim)
    dtype = table.scale.dtype
    # What the checks look at of a table is its shape and the dtype of its rows, so no row is decoded for them.
    rows = np.broadcast_to(np.zeros((), dtype), table.shape)
    if weights is not None and weights.dtype != dtype:
        raise TypeError(f"per_sample_weights has dtype {weights.dtype}, scale has {dtype}: they must be equal")
    spec.check_layout(indices, starts, weights, dtype, meaning)
    meaning.check(weighted=weights is not None, num_rows=table.shape[0])
    _check_choices(form, native, provider)
    op = quantized.variant(second=table.second, two_d=indices.ndim == 2, weighted=weights is not None)
    given = {**table.inputs, "indices": indices, "offsets": starts, "per_sample_weights": weights}

    def check() -> None:
        spec.check_inputs(rows, indices, starts, weights, meaning)

    return _run(op, op.outputs, meaning, given, check, form, native, provider)[0]


@takes(collection.Attributes)
def embedding_bag_collection(
    x: Sequence[npt.ArrayLike] | npt.ArrayLike,
    weights: Sequence[npt.ArrayLike],
    offsets: Sequence[npt.ArrayLike] | npt.ArrayLike | None = None,
    *,
    per_sample_weights: Sequence[npt.ArrayLike] | npt.ArrayLike | None = None,
    packed: bool = False,
    form: Form = "portable",
    native: bool = True,
    **attributes: Unpack[spec.Keywords],
) -> np.ndarray:
    """Pool rows of several tables, bag by bag, on ONNX Runtime's CPU: the `embedding_bag` of each, side by side.

    Args:
        x: the indices of each table, [N_t] with ``offsets`` or [B, L_t]; with ``packed`` those of all, [N].
        weights: the tables [V_t, D_t], of one dtype.
        offsets: those of each table; with ``packed`` those of all, [len(weights) * B + 1], first all bags of the first.
        per_sample_weights: those of each table, or of all; mode "sum", or mean and sqrtn with a divisor.
        packed: one array has the indices of all tables. It needs include_last_offset.
        **attributes: those of `embedding_bag`, for all tables.
        form, native: as in `embedding_bag`.

    Returns:
        [B, sum of D_t], of the tables' dtype.

    Raises:
        IndexError, TypeError, ValueError: as `embedding_bag`; what concerns one table says which.
    """
    meaning = collection.Attributes(**attributes)
    tables = [_array(f"weight of table {t}", weight) for t, weight in enumerate(weights)]
    if per_sample_weights is not None and tables:
        given_weights: Any = per_sample_weights
        dtype = tables[0].dtype
        per_sample_weights = (
            _weight_array(given_weights, dtype) if packed else [_weight_array(w, dtype) for w in given_weights]
        )
    op, given = collection.arrange(x, tables, offsets, per_sample_weights, packed=packed)
    collection.check_layout(op, given, meaning)
    _check_choices(form, native, "cpu")

    def check() -> None:
        collection.check_inputs(op, given, meaning)

    return _run(op, op.outputs, meaning, given, check, form, native, "cpu")[0]


def _run(
    op: BaseVariant,
    outputs: Sequence[str],
    attributes: BaseAttributes,
    given: Mapping[str, np.ndarray | None],
    check: Callable[[], None],
    form: str,
    native: bool,
    provider: str,
) -> list[np.ndarray]:
    """The outputs of a session, or the operator's own error.

    Args:
        given: the operator's inputs, and perhaps None for what is none of them.
        check: raises that error. All but the values in ``given`` is checked before this call.
    """
    kernel = native and form != "standard"
    if not kernel:  # standard operators cannot reject all that the operator rejects
        check()
    feeds = {name: np.asarray(given[name]) for name in op.inputs}
    dtypes = tuple((name, array.dtype) for name, array in feeds.items())
    try:
        session = _session(op, attributes, dtypes, form, kernel, provider)
        return [np.asarray(output) for output in session.run(list(outputs), feeds, _quiet())]
    except Exception:
        # The kernel says what is wrong in onnxruntime's exceptions; the operator has its own.
        check()
        raise


@functools.cache
def _quiet() -> Any:
    """Options of a run that logs no error: what is wrong is an exception here, in the operator's own words."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return options


def _check_choices(form: str, native: bool, provider: str) -> None:
    check_form(form)
    if form == "native" and not native:
        raise ValueError("native = False, but form 'native' is the kernel alone")
    check_provider(provider)


def _array(name: str, values: npt.ArrayLike) -> np.ndarray:
    """An array. A tensor that a gradient flows through would end that here, and torch does not let it."""
    try:
        return np.asarray(values)
    except RuntimeError as error:
        if not getattr(values, "requires_grad", False):
            raise
        raise TypeError(
            f"{name} requires a gradient, and this call gives NumPy arrays: give {name}.detach(), or call "
            "lucid_onnx.torch.embedding_bag, which torch differentiates"
        ) from error


def _weight_array(values: npt.ArrayLike, dtype: np.dtype) -> np.ndarray:
    """An array; numbers in lists, which have no dtype of their own, take the table's."""
    array = _array("per_sample_weights", values)
    return array.astype(dtype) if array.dtype.kind in "iuf" and not hasattr(values, "dtype") else array


def _index_array(values: npt.ArrayLike) -> np.ndarray:
    """An array; an empty list, which NumPy would make float64, is a list of no indices."""
    array = np.asarray(values)
    return array.astype(np.int64) if array.size == 0 and not isinstance(values, np.ndarray) else array


@functools.lru_cache(maxsize=128)
def _session(
    op: BaseVariant,
    attributes: BaseAttributes,
    dtypes: tuple[tuple[str, np.dtype], ...],
    form: str,
    native: bool,
    provider: str,
) -> InferenceSession:
    """A session for everything that shapes the graph; the tables are inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # onnxruntime warns of what it cannot simplify in functions, which is no news here
    if provider == "cuda":
        if CUDA not in onnxruntime.get_available_providers():
            raise RuntimeError(f"provider = 'cuda', but this onnxruntime has no {CUDA}: {install_gpu()}")
        why = why_no_cuda() if native else None
        if why is not None:
            raise RuntimeError(f"provider = 'cuda', but {why}")
    model = op_model(op, attributes, dict(dtypes), form=form, opset=spec.DEFAULT_OPSET)
    session = InferenceSession(model, options, PROVIDERS[provider], native=native)
    if PROVIDERS[provider][0] not in session.get_providers():
        raise RuntimeError(f"provider = {provider!r}, but {PROVIDERS[provider][0]} did not start here")
    return session
