"""The graph of a static text model: ids to rows, rows to a mean, and the mean to length 1 where the model has that."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lucid_onnx.builder import convert, new_node
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.quantized_embedding_bag import spec as quantized

from . import arrays
from .imported import Imported, Options, add_metadata, add_table
from .text import Text

#: The output of all models of texts.
OUTPUT = "embeddings"
#: A token's row is this if the token is skipped.
_NOTHING = -1


@dataclasses.dataclass(frozen=True)
class Static:
    """A static text model: a row per token, and the mean of the rows of a text.

    Attributes:
        table: [V, D] of floats; or int8, whose values are the numbers themselves.
        output: the dtype of the vectors. The table is written as that, if nobody asks for another; of 16 bits with
            weights as float32, which the products are.
        mapping: the row of each token, [num_tokens]; None if the row is the token's id.
        weights: what each token's row is multiplied by, float32 [num_tokens], before the mean, which divides by the
            number of tokens; None for 1.
        skipped: the id of a token that is left out of texts.
        smallest_norm: vectors are divided by their Euclidean length, which is taken for this where it is less; None
            leaves them as they are.
    """

    table: np.ndarray
    output: np.dtype
    mapping: np.ndarray | None = None
    weights: np.ndarray | None = None
    skipped: int | None = None
    smallest_norm: float | None = None

    def __post_init__(self) -> None:
        if self.table.dtype != np.int8:
            arrays.checked(self.table, "the table")
        elif self.table.ndim != 2:
            raise ValueError(f"the table has shape {list(self.table.shape)}, expected [V, D]")
        if self.mapping is not None:
            bad = (self.mapping < 0) | (self.mapping >= len(self.table))
            if bad.any():
                token = int(bad.argmax())
                raise ValueError(
                    f"the mapping of token {token} is {self.mapping[token]}, outside [0, {len(self.table)})"
                )
        if self.weights is not None and self.weights.shape != (self.num_tokens,):
            raise ValueError(f"there are weights {list(self.weights.shape)} for {self.num_tokens} tokens")
        if self.skipped is not None and not 0 <= self.skipped < self.num_tokens:
            raise ValueError(f"token {self.skipped}, which texts are without, is outside [0, {self.num_tokens})")

    @property
    def written(self) -> np.dtype:
        """The dtype that the table is written as if nobody asks for another."""
        return np.dtype(np.float32) if self.weights is not None and self.output.itemsize == 2 else self.output

    @property
    def num_tokens(self) -> int:
        return len(self.table if self.mapping is None else self.mapping)


def imported(static: Static, text: Text | None, found: Mapping[str, str], options: Options) -> Imported:
    """A static text model as an import; ``found`` is what is said of it before its table and pooling.

    Raises:
        TypeError, ValueError: the table cannot be written as ``options.dtype``.
    """
    tables = _tables(static, options)
    rows = static.table
    shown = {
        **found,
        "rows": f"{len(rows):,}" + (f", for {static.num_tokens:,} tokens" if static.mapping is not None else ""),
        "embedding_dim": str(rows.shape[1]),
        "dtype": _dtypes(static, tables, options),
        "pooling": "mean" + ("" if static.weights is None else ", each token's row times its weight"),
        "normalisation": "none" if static.smallest_norm is None else "to length 1",
        "texts": "ids only" if text is None else text.describe(),
    }
    if static.skipped is not None:
        shown["left out"] = f"token {static.skipped}, for what is not in the vocabulary"
    if text is not None and (lost := loss(static, text, options)):
        shown["loss"] = lost
    model = _model(static, tables, options)
    add_metadata(model, shown)
    for name, table in tables.items():
        add_table(model, name, table)
    convert(model, options.form)
    return Imported(model, tables, shown, text)


def _tables(static: Static, options: Options) -> dict[str, np.ndarray]:
    """The table's initializers, by the names of the operator's inputs."""
    table = static.table
    if table.dtype == np.int8 and options.dtype in (None, "int8"):
        return {"codes": arrays.converted(table, np.dtype(np.int8)), "scale": np.ones(len(table), np.float32)}
    kind = quantized.CODES_TYPES.get(options.dtype or "")
    if kind is not None:
        return arrays.quantize(table, kind)
    dtype = static.written if options.dtype is None else arrays.float_dtype(options.dtype)
    return {"weight": arrays.converted(table, dtype)}


def _dtypes(static: Static, tables: Mapping[str, np.ndarray], options: Options) -> str:
    """The dtype of the table as it was found and as it is written."""
    before = str(static.table.dtype.newbyteorder("="))
    after = str(tables["weight"].dtype) if "weight" in tables else options.dtype or before
    return before if before == after else f"{before}, written as {after}"


def loss(static: Static, text: Text, options: Options) -> str | None:
    """What a smaller table costs on ``options.sample``; None if it costs nothing, or nothing is to be measured."""
    kind = quantized.CODES_TYPES.get(options.dtype or "")
    smaller = kind is not None or (options.dtype is not None and arrays.float_dtype(options.dtype).itemsize < 4)
    if not (smaller and options.sample) or (static.table.dtype == np.int8 and options.dtype == "int8"):
        return None
    try:
        bags = text.bags(options.sample)
    except ImportError as error:
        return f"not measured: {error}"
    kept = bags.ids != (_NOTHING if static.skipped is None else static.skipped)
    owner = np.repeat(np.arange(len(options.sample)), np.diff(bags.offsets))[kept]
    ids = bags.ids[kept]
    rows, at = np.unique(ids if static.mapping is None else static.mapping[ids], return_inverse=True)
    before = static.table[rows].astype(np.float64)
    after = (
        before.astype(arrays.float_dtype(options.dtype or "")).astype(np.float64)
        if kind is None
        else arrays.meant(before, kind)
    )
    weights = np.ones(len(ids)) if static.weights is None else static.weights[ids]
    sums = np.zeros((2, len(options.sample), before.shape[1]))
    for table, total in zip((before, after), sums, strict=True):
        np.add.at(total, owner, table[at] * weights[:, None])
    lengths = np.linalg.norm(sums, axis=2)
    measured = lengths.min(axis=0) > 0
    if not measured.any():
        return "not measured: no text of the sample has a token"
    cosines = (sums[0] * sums[1]).sum(axis=1)[measured] / lengths.prod(axis=0)[measured]
    worst = cosines.min()
    return f"cosine to the table as it was over {len(cosines):,} texts: mean {cosines.mean():.6f}, worst {worst:.6f}"


def _model(static: Static, tables: Mapping[str, np.ndarray], options: Options) -> onnx.ModelProto:
    """The model, with all initializers but the table's."""
    index = np.dtype(options.index_dtype)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {}

    def add(op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op_type, inputs, [output], name=f"{output}/{op_type}", **attributes))
        return output

    def constant(name: str, value: Any) -> str:
        constants[name] = np.asarray(value)
        return name

    padded = options.layout != "ragged"
    tokens = "input_ids" if padded else "ids"
    if padded:
        present = add("Cast", ["attention_mask"], "is_token", to=TensorProto.BOOL)
        tokens = add("Where", [present, tokens, constant("no_token", np.array(_NOTHING, index))], "tokens")
    rows, padding = tokens, static.skipped
    if static.mapping is not None or static.weights is not None:
        # All that is negative becomes -1, with which Gather finds the last entry: no row, and no weight.
        tokens = add("Max", [tokens, constant("no_token", np.array(_NOTHING, index))], "tokens_or_none")
    if static.mapping is not None:
        mapping = np.append(static.mapping, _NOTHING).astype(index)
        if static.skipped is not None:
            mapping[static.skipped] = _NOTHING
        rows, padding = add("Gather", [constant("row_of_token", mapping), tokens], "rows"), None
    weights, output_type = None, helper.np_dtype_to_tensor_dtype(static.output)
    typed_by = tables["scale" if "scale" in tables else "weight"].dtype
    if static.weights is not None:
        of_token = np.append(static.weights, np.float32(0)).astype(typed_by)
        weights = add("Gather", [constant("weight_of_token", of_token), tokens], "weights")
    pooled = _bag(static, tables, options, rows, weights, padding, nodes)
    if static.smallest_norm is not None:
        wide = np.dtype(np.float64 if typed_by == np.float64 else np.float32)
        if typed_by != wide:
            pooled = add("Cast", [pooled], "pooled_wide", to=helper.np_dtype_to_tensor_dtype(wide))
        typed_by = wide
        squares = add("Mul", [pooled, pooled], "squares")
        total = add("ReduceSum", [squares, constant("columns", np.array([1], np.int64))], "sum_of_squares", keepdims=1)
        norm = add("Sqrt", [total], "norm")
        least = constant("smallest_norm", np.array(static.smallest_norm, wide))
        pooled = add("Div", [pooled, add("Max", [norm, least], "norm_not_0")], "unit")
    if typed_by != static.output:
        pooled = add("Cast", [pooled], OUTPUT, to=output_type)
    nodes[-1].output[0] = OUTPUT
    return _around(nodes, constants, static, output_type, options)


def _bag(
    static: Static,
    tables: Mapping[str, np.ndarray],
    options: Options,
    rows: str,
    weights: str | None,
    padding: int | None,
    nodes: list[onnx.NodeProto],
) -> str:
    """The node of the bags; returns its output."""
    padded = options.layout != "ragged"
    means: dict[str, Any] = {"mode": "mean", "padding_idx": padding, "negative": "skip"}
    means["divisor"] = None if weights is None else "count"
    inputs = [*tables, rows, *([] if padded else ["offsets"]), *([] if weights is None else [weights])]
    if "codes" in tables:
        dim = static.table.shape[1]
        meaning: Any = quantized.Attributes(**means, codes_type=options.dtype or "int8", embedding_dim=dim)
        second = "bias" if "bias" in tables else None
        op: Any = quantized.variant(second=second, two_d=padded, weighted=weights is not None)
        double = False
    else:
        meaning = spec.Attributes(**means)
        op = spec.variant(two_d=padded, weighted=weights is not None)
        double = tables["weight"].dtype == np.float64
    nodes.append(new_node(op, inputs, ["pooled"], meaning, double=double, name="bag"))
    return "pooled"


def _around(
    nodes: list[onnx.NodeProto],
    constants: Mapping[str, np.ndarray],
    static: Static,
    output_type: int,
    options: Options,
) -> onnx.ModelProto:
    """The model of these nodes."""
    index_type = helper.np_dtype_to_tensor_dtype(np.dtype(options.index_dtype))
    if options.layout != "ragged":
        names = {"input_ids": ["num_texts", "length"], "attention_mask": ["num_texts", "length"]}
    else:
        names = {"ids": ["num_ids"], "offsets": ["num_texts"]}
    inputs = [helper.make_tensor_value_info(name, index_type, dims) for name, dims in names.items()]
    output = helper.make_tensor_value_info(OUTPUT, output_type, ["num_texts", static.table.shape[1]])
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "text", inputs, [output], held)
    imports = [helper.make_opsetid("", options.opset)]
    return helper.make_model(
        graph,
        opset_imports=imports,
        ir_version=helper.find_min_ir_version_for(imports),
        producer_name="lucid-onnx",
    )
