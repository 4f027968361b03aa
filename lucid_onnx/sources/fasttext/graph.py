"""fastText's arithmetic as a graph: rows to means, and the means of texts to labels with their probabilities."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lucid_onnx.builder import make_node, new_node
from lucid_onnx.ops.emit import Emitter
from lucid_onnx.ops.quantized_embedding_bag import spec as quantized
from lucid_onnx.sources import arrays
from lucid_onnx.sources.imported import Options, add_table

from . import tree
from .reader import CENTROIDS, Model, Quantized

#: The outputs: vectors of texts; of word vectors, those of words; and what a classifier says, the best label first.
EMBEDDINGS, WORDS, LABELS, PROBABILITIES = "embeddings", "word_embeddings", "labels", "probabilities"
#: The input that says how many labels a text gets.
HOW_MANY = "k"
#: What fastText adds to a probability before it takes the logarithm.
_LEAST = 1e-5
#: Beyond it, fastText's logistic is 0 or 1; between, it has this many steps to a unit.
_LARGEST_LOGIT, _STEPS = 8, 32


class Graph(NamedTuple):
    """A model, and the tables that it has no data of."""

    model: onnx.ModelProto
    tables: dict[str, np.ndarray]


def build(model: Model, options: Options) -> Graph:
    """The graph of a model, in which bags are nodes of the domain, without their functions.

    Raises:
        ValueError: the tree of the labels cannot be built, or the table not be written as ``options.dtype``.
    """
    return _Writer(model, options).graph()


def decoded(table: Quantized) -> np.ndarray:
    """A quantized table as float32, in a file where it is large."""
    rows = arrays.new_array(table.shape, np.dtype(np.float32))
    begin = 0
    for block in table.blocks():
        rows[begin : begin + len(block)] = block
        begin += len(block)
    return rows


class _Writer:
    def __init__(self, model: Model, options: Options) -> None:
        self._model, self._head, self._options = model, model.head, options
        self._index = helper.np_dtype_to_tensor_dtype(np.dtype(options.index_dtype))
        self._e = Emitter(options.opset)
        self._constants: list[onnx.TensorProto] = []
        self._tables: dict[str, np.ndarray] = {}

    def graph(self) -> Graph:
        head, dim = self._head, self._head.arguments.dim
        index = {"ids": ["num_ids"], "word_offsets": ["num_words"], "offsets": ["num_texts"]}
        outputs: list[tuple[str, int, list[Any]]] = [(EMBEDDINGS, TensorProto.FLOAT, ["num_texts", dim])]
        if head.kind == "supervised":
            del index["word_offsets"]
            shape = ["num_texts", "num_labels"]
            outputs += [(LABELS, TensorProto.STRING, shape), (PROBABILITIES, TensorProto.FLOAT, shape)]
            self._labels(self._mean("offsets", EMBEDDINGS))
        else:
            outputs.append((WORDS, TensorProto.FLOAT, ["num_words", dim]))
            self._sentences(self._mean("word_offsets", WORDS))
        inputs = [helper.make_tensor_value_info(name, self._index, dims) for name, dims in index.items()]
        if head.kind == "supervised":
            inputs.append(helper.make_tensor_value_info(HOW_MANY, TensorProto.INT64, [1]))
        graph = helper.make_graph(
            self._e.nodes,
            "fasttext",
            inputs,
            [helper.make_tensor_value_info(name, kind, dims) for name, kind, dims in outputs],
            self._constants,
        )
        imports = [helper.make_opsetid("", self._e.opset)]
        made = helper.make_model(
            graph,
            opset_imports=imports,
            ir_version=helper.find_min_ir_version_for(imports),
            producer_name="lucid-onnx",
        )
        for name, table in self._tables.items():
            add_table(made, name, table)
        return Graph(made, self._tables)

    def _constant(self, name: str, value: np.ndarray) -> str:
        self._constants.append(numpy_helper.from_array(value, name))
        return name

    def _table(self, name: str, value: np.ndarray) -> str:
        self._tables[name] = value
        return name

    # ---- Rows to means.

    def _mean(self, offsets: str, output: str) -> str:
        """The mean of the rows of each bag, float32 [num_bags, dim]."""
        table, dtype = self._model.input, self._options.dtype
        if isinstance(table, Quantized):
            if dtype is None:
                rows = self._centroids(table)
                self._e.nodes.append(make_node(rows, self._range("ids"), offsets, output, mode="mean", name="bag"))
                return output
            table = decoded(table)
        kind = quantized.CODES_TYPES.get(dtype or "")
        if kind is not None:
            tables = arrays.quantize(table, kind)
            meaning = quantized.Attributes(mode="mean", codes_type=kind.name, embedding_dim=table.shape[1])
            second = "bias" if "bias" in tables else None
            op = quantized.variant(second=second, two_d=False, weighted=False)
            inputs = [self._table(name, array) for name, array in tables.items()]
            self._e.nodes.append(new_node(op, [*inputs, "ids", offsets], [output], meaning, double=False, name="bag"))
            return output
        weight = arrays.converted(table, np.dtype(np.float32) if dtype is None else arrays.float_dtype(dtype))
        pooled = output if weight.dtype == np.float32 else "pooled"
        self._e.nodes.append(
            make_node(
                self._table("weight", weight),
                "ids",
                offsets,
                pooled,
                mode="mean",
                weight_dtype=weight.dtype,
                name="bag",
            )
        )
        if pooled != output:
            self._e.node("Cast", (pooled,), {"to": TensorProto.FLOAT}, output)
        return output

    def _centroids(self, table: Quantized) -> str:
        """The rows of ``ids`` from a quantized table, [num_ids, dim]."""
        e = self._e
        e.part("centroids")
        pieces, _, dsub = table.centroids.shape
        first = self._constant("first_centroids", np.arange(pieces, dtype=np.int32) * CENTROIDS)
        centroids = self._table("centroids", table.centroids.reshape(-1, dsub))
        codes = e.Cast(e.Gather(self._table("codes", table.codes), "ids"), to=TensorProto.INT32)
        rows = e.Reshape(e.Gather(centroids, e.Add(codes, first)), [0, pieces * dsub])
        if pieces * dsub != table.dim:
            rows = e.Slice(rows, [0], [table.dim], [1])
        if table.norms is not None:
            rows = e.Mul(rows, e.Gather(self._table("norms", table.norms[:, None]), "ids"))
        e.rename(rows, "rows")
        return "rows"

    def _range(self, of: str) -> str:
        """0, 1 and so on, as many as a value has entries."""
        e = self._e
        count = e.Squeeze(e.Shape(of))
        numbers = e.Range(e.int64(0), count, e.int64(1))
        return str(numbers if self._index == TensorProto.INT64 else e.Cast(numbers, to=self._index))

    # ---- Word vectors.

    def _sentences(self, words: str) -> None:
        """The mean of the words of a text, each of length 1; words of length 0 do not count."""
        e = self._e
        e.part("sentence")
        norm = e.Sqrt(e.ReduceSum(e.Mul(words, words), [1], keepdims=1))
        zero, one = e.constant(np.float32(0)), e.constant(np.float32(1))
        counts = e.Greater(norm, zero)
        unit = e.Where(counts, e.Div(words, e.Where(counts, norm, one)), zero)
        both = e.Concat(unit, e.Cast(counts, to=TensorProto.FLOAT), axis=1)
        e.nodes.append(make_node(both, self._range("word_offsets"), "offsets", "sums", mode="sum", name="sentences"))
        dim = self._head.arguments.dim
        total, count = e.Slice("sums", [0], [dim], [1]), e.Slice("sums", [dim], [dim + 1], [1])
        e.node("Div", (total, e.Max(count, one)), {}, EMBEDDINGS)

    # ---- Labels.

    def _labels(self, hidden: str) -> None:
        """The k best labels of each text. Of equal ones fastText's best is the last it sees, so labels go backwards."""
        e, head = self._e, self._head
        num_labels = len(head.labels)
        if head.loss == "hs":
            scores, order = self._tree(hidden)
        else:
            order = np.arange(num_labels)[::-1]
            scores = self._softmax(hidden, order) if head.loss == "softmax" else self._logistic(hidden, order)
        e.part("best")
        k = e.Min(HOW_MANY, [num_labels])
        best, place = e.multi_output("TopK", (scores, k), {"axis": 1}, 2)
        nothing = e.Unsqueeze(self._are_empty(), [1])
        if head.loss == "hs":
            # fastText turns back where a probability falls below the least there is.
            nothing = e.Or(nothing, e.Less(best, e.constant(np.float32(math.log(_LEAST)))))
            probability = e.Exp(best)
        else:
            probability = e.Add(best, e.constant(np.float32(_LEAST)))
        e.node("Where", (nothing, e.constant(np.float32(0)), probability), {}, PROBABILITIES)
        names = [head.labels[label].decode("utf-8", "replace") for label in order]
        known = self._constant("label_names", np.array([*names, ""], object))
        e.node("Gather", (known, e.Where(nothing, num_labels, place)), {}, LABELS)

    def _are_empty(self) -> str:
        """Whether each text has no ids, bool [num_texts]."""
        e = self._e
        e.part("empty")
        end = e.Cast(e.Shape("ids"), to=self._index)
        ends = e.Concat(e.Slice("offsets", [1], [2**31 - 1]), end, axis=0)
        return str(e.Equal(ends, "offsets"))

    def _output(self, rows: np.ndarray) -> str:
        """Rows of the output table, as an initializer."""
        table = self._model.output
        return self._table("output_weight", (decoded(table) if isinstance(table, Quantized) else table)[rows])

    def _softmax(self, hidden: str, order: np.ndarray) -> str:
        """The probabilities of labels in this order, [num_texts, num_labels].

        fastText adds up the exponentials one label after another, and so does CumSum: of thousands of labels that are
        next to nothing, float32 loses more than the sixth digit. So the labels are the first axis until then.
        """
        e = self._e
        e.part("softmax")
        logits = e.Gemm(self._output(np.arange(len(order))), hidden, transB=1)
        exponentials = e.Exp(e.Sub(logits, e.reduce("ReduceMax", logits, 0, keepdims=1)))
        total = e.Gather(e.CumSum(exponentials, 0), len(order) - 1)
        backwards = e.Gather(e.Div(exponentials, total), self._constant("label_order", order))
        return str(e.Transpose(backwards, perm=[1, 0]))

    def _logistic(self, hidden: str, order: np.ndarray) -> str:
        """The probabilities of labels in this order, each by itself, [num_texts, num_labels].

        fastText's logistic function is that of the next lower step, and 0 or 1 at the far ends.
        """
        e = self._e
        e.part("logistic")
        logits = e.Gemm(hidden, self._output(order), transB=1)
        low, high, steps = (e.constant(np.float32(c)) for c in (-_LARGEST_LOGIT, _LARGEST_LOGIT, _STEPS))
        lower = e.Sub(e.Div(e.Floor(e.Mul(e.Add(logits, high), steps)), steps), high)
        zero, one = e.constant(np.float32(0)), e.constant(np.float32(1))
        inside = e.Div(one, e.Add(one, e.Exp(e.Neg(lower))))
        return str(e.Where(e.Less(logits, low), zero, e.Where(e.Greater(logits, high), one, inside)))

    def _tree(self, hidden: str) -> tuple[str, np.ndarray]:
        """The logarithm of each label's probability, [num_texts, num_labels], and the order of the labels."""
        e = self._e
        e.part("tree")
        found = tree.build(self._head.label_counts)
        order = found.order[::-1]
        inner = len(order) - 1
        no_step = e.ConstantOfShape(e.Concat([1], e.Shape(hidden, end=1), axis=0))
        if inner == 0:
            return str(e.Transpose(no_step, perm=[1, 0])), order
        logits = e.Gemm(self._output(np.arange(inner)), hidden, transB=1)
        one, least = e.constant(np.float32(1)), e.constant(np.float32(_LEAST))
        right = e.Div(one, e.Add(one, e.Exp(e.Neg(logits))))
        left = e.Sub(one, right)
        # One step after another would be as many nodes as the tree is deep. So every step is first added to the one
        # before it, then those two to the two before, and so on: [steps, num_texts] each time.
        sums = e.Concat(e.Log(e.Add(left, least)), e.Log(e.Add(right, least)), no_step, axis=0)
        before, length = found.before, 1
        while 2 * length < found.depth:
            sums = e.Add(sums, e.Gather(sums, self._constant(f"steps_{length}_before", before)))
            before, length = before[before], 2 * length
        last = found.last[order]
        scores = e.Gather(sums, self._constant("last_steps", last))
        if length < found.depth:
            scores = e.Add(scores, e.Gather(sums, self._constant("steps_before_last", before[last])))
        return str(e.Transpose(scores, perm=[1, 0])), order
