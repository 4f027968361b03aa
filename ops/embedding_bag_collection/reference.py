"""The NumPy reference: `..embedding_bag.reference`, one table after another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..embedding_bag import reference as pooling
from ..embedding_bag.spec import Attributes
from . import spec


def embedding_bag_collection(
    x: Sequence[npt.ArrayLike] | npt.ArrayLike,
    weights: Sequence[npt.ArrayLike],
    offsets: Sequence[npt.ArrayLike] | npt.ArrayLike | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    mode: str = "mean",
    per_sample_weights: Sequence[npt.ArrayLike] | npt.ArrayLike | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    packed: bool = False,
) -> np.ndarray:
    """Pool rows of several tables, bag by bag, in NumPy.

    Args:
        x: the indices [N_t] or [B, L_t] of each table; with ``packed`` those of all, [N].
        weights: the tables [V_t, D_t], of one dtype.
        offsets: those of each table; with ``packed`` those of all, [T * B + 1].
        per_sample_weights: those of each table, or of all; mode "sum" only.
        packed: one array has the indices of all tables. It needs include_last_offset.
        max_norm, norm_type, mode, include_last_offset, padding_idx: as in `..embedding_bag.reference`.

    Returns:
        [B, sum of D_t], of the tables' dtype.

    Raises:
        TypeError, IndexError, ValueError: see `..embedding_bag.spec.check_inputs`. What concerns one table says which;
            positions in packed indices are those in all.
    """
    tables = [np.asarray(weight) for weight in weights]
    spec.check_tables(tables)
    attributes = Attributes(mode, padding_idx, max_norm, norm_type, include_last_offset)
    parts = split(x, len(tables), offsets, per_sample_weights, packed, attributes, tables[0].dtype)
    outputs: list[np.ndarray] = []
    before = 0
    for t, (table, (indices, starts, row_weights)) in enumerate(zip(tables, parts, strict=True)):
        with spec.in_table(t):
            if packed:
                attributes.check(weighted=row_weights is not None, num_rows=table.shape[0])
                check_packed_indices(indices, table.shape[0], before, attributes.padding_idx)
                before += len(indices)
            outputs.append(
                pooling.embedding_bag(
                    indices,
                    table,
                    starts,
                    max_norm,
                    norm_type,
                    mode=mode,
                    per_sample_weights=row_weights,
                    include_last_offset=include_last_offset,
                    padding_idx=padding_idx,
                )
            )
        if len(outputs[t]) != len(outputs[0]):
            raise ValueError(f"table {t} has {len(outputs[t])} bags, table 0 has {len(outputs[0])}: they must be equal")
    return np.concatenate(outputs, axis=1)


def split(
    x: Sequence[npt.ArrayLike] | npt.ArrayLike,
    num_tables: int,
    offsets: Sequence[npt.ArrayLike] | npt.ArrayLike | None,
    per_sample_weights: Sequence[npt.ArrayLike] | npt.ArrayLike | None,
    packed: bool,
    attributes: Attributes,
    table_dtype: np.dtype,
) -> list[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]:
    """The indices, offsets and weights of each table, whichever way they are given.

    Raises:
        TypeError, ValueError: packed ones that are none, or a number of them that is not that of the tables.
    """
    if packed:
        if offsets is None:
            raise ValueError("offsets missing: packed indices need them")
        spec.Attributes(include_last_offset=attributes.include_last_offset).check_layout(
            spec.variant(num_tables=num_tables, layout="packed", weighted=False)
        )
        weights = None if per_sample_weights is None else np.asarray(per_sample_weights)
        indices, starts = np.asarray(x), np.asarray(offsets)
        spec.check_packed(num_tables, table_dtype, indices, starts, weights, attributes)
        return list(spec.unpack(num_tables, indices, starts, weights))
    columns: list[list[np.ndarray | None]] = []
    for name, given in (("x", x), ("offsets", offsets), ("per_sample_weights", per_sample_weights)):
        if given is None:
            columns.append([None] * num_tables)
            continue
        columns.append([np.asarray(g) for g in given])  # type: ignore[union-attr]
        if len(columns[-1]) != num_tables:
            raise ValueError(f"{name} has {len(columns[-1])} entries for {num_tables} tables")
    return list(zip(*columns, strict=True))  # type: ignore[arg-type]


def check_packed_indices(indices: np.ndarray, num_rows: int, before: int, padding_idx: int | None) -> None:
    """Refuse an index outside a table, with its position among those of all tables."""
    bad = (indices < 0) | (indices >= num_rows)
    if padding_idx is not None:
        bad &= indices != padding_idx % max(num_rows, 1)
    if bad.any():
        k = int(bad.argmax())
        raise IndexError(f"indices[{before + k}] = {int(indices[k])} is outside [0, {num_rows})")
