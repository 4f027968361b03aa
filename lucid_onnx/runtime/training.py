"""Train a table with ONNX Runtime alone: bags, a loss, its gradient and the update of the table in one graph.

A step reads the rows of the batch and writes them back. Only the ScatterND that writes the rows could take time or
memory in proportion to the table, and it copies nothing if its output is bound to the memory of its input, as
`Trainer` does. This is safe because every node that reads a table is an ancestor of the ScatterND that writes it, so
that no runtime may run them in another order. The nodes that reject a batch are ancestors of every ScatterND, so that
a rejected batch changes nothing.

The gradient of a row that a batch has several times is added up first, by the operator's own bags: the positions
sorted by row are indices, and where a row begins is an offset. So each row is a target of the ScatterND once, and
the additions have one order, at any thread count.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from lucid_onnx.builder import FORMS, INDEX_TYPES, TABLE_TYPES, Form, convert, make_grad_node, make_node
from lucid_onnx.ops.attributes import check_choice, takes
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag.lowering import refusal
from lucid_onnx.ops.embedding_bag_grad import spec as gradient_spec
from lucid_onnx.ops.emit import Emitter

if TYPE_CHECKING:
    from typing import Unpack

Loss = Literal["mse", "logistic"]
Optimizer = Literal["sgd", "rowwise_adagrad"]
Reduction = Literal["mean", "sum"]
_LOSSES: tuple[str, ...] = ("mse", "logistic")
_OPTIMIZERS: tuple[str, ...] = ("sgd", "rowwise_adagrad")
_REDUCTIONS: tuple[str, ...] = ("mean", "sum")
_DTYPES = ("float32", "float64")

#: The tables that a model may have, and the symbols of their numbers of rows.
_ROWS = {"weight": "num_rows", "target_weight": "num_target_rows"}


@takes(gradient_spec.Attributes)
def build_training_model(
    *,
    loss: Loss,
    optimizer: Optimizer = "sgd",
    reduction: Reduction = "mean",
    eps: float = 1e-8,
    two_d: bool = False,
    per_sample_weights: bool = False,
    index_dtype: npt.DTypeLike = "int64",
    weight_dtype: npt.DTypeLike = "float32",
    form: Form = "portable",
    opset: int = spec.DEFAULT_OPSET,
    **attributes: Unpack[gradient_spec.Keywords],
) -> onnx.ModelProto:
    """A model of one training step: tables and a batch in, the loss and the new tables out. `Trainer` runs it.

    =================== ============ ================================ ===========================================
    input               dtype        shape                            present
    =================== ============ ================================ ===========================================
    weight              weight_dtype [V, D]                           always
    target_weight       weight_dtype [W, D]                           for the loss "logistic"
    state, target_state weight_dtype [V], [W]                         for "rowwise_adagrad", one a table; begin at 0
    indices, offsets    index_dtype  as in `build_model`              as in `build_model`
    per_sample_weights  weight_dtype as ``indices``                   where asked for
    target              weight_dtype [B, D]                           for "mse"
    targets             index_dtype  [B, K], rows of target_weight    for "logistic"
    labels              weight_dtype [B, K], in [0, 1]                for "logistic"
    learning_rate       weight_dtype a scalar                         always
    =================== ============ ================================ ===========================================

    Outputs are ``loss``, a scalar, and for each table and state its new value: ``new_weight``, ``new_target_weight``,
    ``new_state``, ``new_target_state``.

    With ``pooled`` = the bags of ``weight``, [B, D], the loss is

    - "mse": ``torch.nn.functional.mse_loss(pooled, target)``;
    - "logistic": ``torch.nn.functional.binary_cross_entropy_with_logits(scores, labels)``, where ``scores[b, k]`` is
      the dot product of bag b and row ``targets[b, k]`` of ``target_weight``. With label 1 for what belongs to the bag
      and 0 for random rows, this is negative sampling.

    Args:
        optimizer: "sgd" is ``row -= learning_rate * g``, with g the gradient of the row, added up over the batch.
            "rowwise_adagrad" is that of FBGEMM (EXACT_ROWWISE_ADAGRAD), with one number of state for a row:
            ``state += mean(g * g)``, then ``row -= learning_rate / (sqrt(state) + eps) * g``. Rows that are not in a
            batch do not change.
        reduction: "mean" over the elements of ``target`` or ``labels``, or their "sum". The loss of no elements is 0.
        eps: of Adagrad, > 0.
        **attributes: those of `build_grad_model`.
        two_d, per_sample_weights, index_dtype, form, opset: as in `build_grad_model`. Rows are clipped as they are
            read, and the row that is updated is the one in the table. The padded row is never updated.
        weight_dtype: float32 or float64; sums of many small updates need more than 16 bits.

    Raises:
        TypeError: a dtype that the model cannot have.
        ValueError: any other invalid argument, named with its value.
    """
    _check_choices(loss=loss, optimizer=optimizer, reduction=reduction, form=form)
    dtype = _dtype("weight_dtype", weight_dtype, _DTYPES)
    index = _dtype("index_dtype", index_dtype, tuple(d.name for d in INDEX_TYPES))
    _check_eps(eps)
    spec.check_opset(opset)
    e = Emitter(opset, "step_", {})
    tables = _Tables(e, dtype, optimizer, float(eps))
    offsets = None if two_d else "offsets"
    given = gradient_spec.Attributes(**attributes).keywords
    bag: dict[str, Any] = {
        **{a.name: given.pop(a.name) for a in spec.Attributes.keyword_table()},
        "per_sample_weights": "per_sample_weights" if per_sample_weights else None,
        "weight_dtype": dtype,
    }
    pooled = e.name()
    e.nodes.append(make_node(tables.read("weight"), "indices", offsets, pooled, **bag))
    gradient = _mse(e, pooled, reduction, dtype) if loss == "mse" else _logistic(e, tables, pooled, reduction, dtype)
    _update_bags(e, tables, gradient, offsets, bag, given, dtype)
    batch = _batch(loss, bag, two_d, TABLE_TYPES[dtype], INDEX_TYPES[index])
    model = _model(e, tables, batch, TABLE_TYPES[dtype], opset)
    convert(model, form)
    return model


def _check_choices(**given: str) -> None:
    choices = {"loss": _LOSSES, "optimizer": _OPTIMIZERS, "reduction": _REDUCTIONS, "form": FORMS}
    for name, value in given.items():
        check_choice(name, value, choices[name])


def _check_eps(eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float, np.floating)):
        raise TypeError(f"eps = {eps!r} must be a number")
    if not 0 < eps < np.inf:
        raise ValueError(f"eps = {eps!r} must be > 0 and finite")


def _update_bags(
    e: Emitter,
    tables: _Tables,
    gradient: str,
    offsets: str | None,
    bag: dict[str, Any],
    of_gradient: dict[str, Any],
    dtype: np.dtype,
) -> None:
    """Write the update of ``weight`` from the gradient [B, D] of its bags, which has attributes of its own."""
    outputs = [e.name() for _ in range(2 if bag["per_sample_weights"] is None else 3)]
    e.nodes.append(
        make_grad_node(
            gradient,
            tables.read("weight"),
            "indices",
            offsets,
            outputs,
            **bag,
            sparse=True,
            **of_gradient,
        )
    )
    rows, values = outputs[:2]
    found = _by_row(e, rows, e.Shape("weight", start=0, end=1))
    tables.update("weight", found.rows, _sums(e, values, found.order, found.starts, None, dtype))


def _batch(loss: str, bag: dict[str, Any], two_d: bool, number: int, integer: int) -> dict[str, tuple[int, list[str]]]:
    """The element types and shapes of the inputs that each step gets anew, except the learning rate."""
    positions = ["num_bags", "bag_length"] if two_d else ["num_indices"]
    batch: dict[str, tuple[int, list[str]]] = {"indices": (integer, positions)}
    if not two_d:
        batch["offsets"] = (integer, ["num_offsets" if bag["include_last_offset"] else "num_bags"])
    if bag["per_sample_weights"] is not None:
        batch["per_sample_weights"] = (number, positions)
    if loss == "mse":
        batch["target"] = (number, ["num_bags", "embedding_dim"])
    else:
        batch["targets"] = (integer, ["num_bags", "num_targets"])
        batch["labels"] = (number, ["num_bags", "num_targets"])
    return batch


def _model(
    e: Emitter, tables: _Tables, batch: dict[str, tuple[int, list[str]]], number: int, opset: int
) -> onnx.ModelProto:
    """The model of the nodes that were emitted; its bags are native nodes."""
    graph = helper.make_graph(
        e.nodes,
        "training_step",
        [
            *(helper.make_tensor_value_info(n, number, shape) for n, shape in tables.shapes.items()),
            *(helper.make_tensor_value_info(n, *value) for n, value in batch.items()),
            helper.make_tensor_value_info("learning_rate", number, []),
        ],
        [
            helper.make_tensor_value_info("loss", number, []),
            *(helper.make_tensor_value_info(f"new_{n}", number, shape) for n, shape in tables.shapes.items()),
        ],
    )
    imports = [helper.make_opsetid("", opset)]
    version = helper.find_min_ir_version_for(imports)
    return helper.make_model(graph, opset_imports=imports, ir_version=version, producer_name="lucid-onnx")


def _dtype(name: str, dtype: npt.DTypeLike, choices: tuple[str, ...]) -> np.dtype:
    found = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if found not in choices:
        raise TypeError(f"{name} = {found} is not one of {', '.join(choices)}")
    return np.dtype(found)


class _Tables:
    """The tables of a step, and their updates, each of which comes after every read of its table."""

    def __init__(self, e: Emitter, dtype: np.dtype, optimizer: str, eps: float) -> None:
        self.shapes: dict[str, list[str]] = {}  #: of tables and states, in the order of the model's inputs
        self._e, self._dtype, self._optimizer, self._eps = e, dtype, optimizer, eps
        self._written: set[str] = set()

    def read(self, table: str) -> str:
        """The table's name, for a node that reads it before it is written."""
        assert table not in self._written
        self.shapes[table] = [_ROWS[table], "embedding_dim"]
        if self._optimizer == "rowwise_adagrad":
            self.shapes[_state(table)] = [_ROWS[table]]
        return table

    def update(self, table: str, rows: str, gradient: str) -> None:
        """Write ``new_<table>``, and its state, from the gradients [U, D] of distinct rows [U]."""
        e = self._e
        old = e.Gather(self.read(table), rows)
        where = e.Unsqueeze(rows, [1])
        rate = "learning_rate"
        if self._optimizer == "rowwise_adagrad":
            state = _state(table)
            dim = e.Cast(e.Max(e.Shape(table, start=1), 1), to=TABLE_TYPES[self._dtype])
            mean = e.Div(e.reduce("ReduceSum", e.Mul(gradient, gradient), 1), dim)
            new = e.Add(e.Gather(state, rows), mean)
            e.node("ScatterND", (state, where, new), {}, f"new_{state}")
            rate = e.Unsqueeze(e.Div(rate, e.Add(e.Sqrt(new), e.constant(self._dtype.type(self._eps)))), [1])
        e.node("ScatterND", (table, where, e.Sub(old, e.Mul(rate, gradient))), {}, f"new_{table}")
        self._written.add(table)


def _state(table: str) -> str:
    return table.replace("weight", "state")


def _mse(e: Emitter, pooled: str, reduction: str, dtype: np.dtype) -> str:
    """Write ``loss``; its gradient [B, D]."""
    target = _of_shape(e, "target", e.Shape(pooled))
    difference = e.Sub(pooled, target)
    total = _total(e, e.Mul(difference, difference))
    two = e.constant(dtype.type(2))
    return _reduced(e, total, e.Mul(two, difference), e.Size(target), reduction, dtype)


def _logistic(e: Emitter, tables: _Tables, pooled: str, reduction: str, dtype: np.dtype) -> str:
    """Write ``loss`` and the update of target_weight; the gradient [B, D] of the bags."""
    num_bags, dim = e.Shape(pooled, start=0, end=1), e.Shape(pooled, start=1)
    # An error unless there are as many bags as rows of targets.
    shape = e.Shape("targets")
    targets = _of_shape(e, "targets", e.Concat(num_bags, e.Shape("targets", start=1), axis=0))
    labels = _of_shape(e, "labels", shape)
    num_targets = e.Shape(targets, start=1)
    flat = e.Reshape(targets, [-1])
    # One row a bag: the operator's own lookup, which rejects an index outside the table.
    read = e.name()
    e.nodes.append(
        make_node(tables.read("target_weight"), e.Unsqueeze(flat, [1]), None, read, mode="sum", weight_dtype=dtype)
    )
    rows = e.Reshape(read, e.Concat(num_bags, num_targets, dim, axis=0), allowzero=1)  # [B, K, D]
    scores = e.reduce("ReduceSum", e.Mul(rows, e.Unsqueeze(pooled, [1])), 2)  # [B, K]
    zero, one = e.constant(dtype.type(0)), e.constant(dtype.type(1))
    # log(1 + exp(s)) - s * label, without an exp that overflows.
    softplus = e.Add(e.Max(scores, zero), e.Log(e.Add(one, e.Exp(e.Neg(e.Abs(scores))))))
    total = _total(e, e.Sub(softplus, e.Mul(scores, labels)))
    by_score = _reduced(e, total, e.Sub(e.Sigmoid(scores), labels), e.Size(labels), reduction, dtype)
    gradient = e.reduce("ReduceSum", e.Mul(rows, e.Unsqueeze(by_score, [2])), 1)
    # Position p is bag p / K's: the gradient of a row is a weighted sum of bags.
    found = _by_row(e, e.Cast(flat, to=TensorProto.INT64), e.Shape("target_weight", start=0, end=1))
    weights = e.Gather(e.Reshape(by_score, [-1]), found.order)
    bags = e.Div(found.order, e.Max(num_targets, 1))
    tables.update("target_weight", found.rows, _sums(e, pooled, bags, found.starts, weights, dtype))
    return str(gradient)


def _total(e: Emitter, terms: str) -> str:
    """The sum of [B, K]: row by row and then of rows, as ONNX Runtime adds one after another."""
    return str(e.ReduceSum(e.reduce("ReduceSum", terms, 1), keepdims=0))


def _reduced(e: Emitter, total: str, gradient: str, count: str, reduction: str, dtype: np.dtype) -> str:
    """Write ``loss``, the sum or mean of ``count`` terms; the gradient of it from that of the sum."""
    if reduction == "sum":
        e.node("Identity", (total,), {}, "loss")
        return gradient
    count = e.Cast(e.Max(count, 1), to=TABLE_TYPES[dtype])
    e.node("Div", (total, count), {}, "loss")
    return str(e.Div(gradient, count))


def _of_shape(e: Emitter, value: str, shape: str) -> str:
    """``value``, if it has this shape. Any other shape is an error, as it could be broadcast."""
    wrong = e.Not(e.Equal(e.Shape(value), shape))
    return str(e.Reshape(value, e.Add(e.Shape(value), refusal(e, wrong)), allowzero=1))


class _ByRow(NamedTuple):
    """M positions sorted by row, in their order within a row; U rows occur."""

    rows: str  #: [U]: the rows, ascending
    order: str  #: [M]: the positions, sorted
    starts: str  #: [U + 1]: where each row begins, and M


def _by_row(e: Emitter, row: str, num_rows: str) -> _ByRow:
    # A dummy of row V at the end keeps every tensor non-empty, and its place is the last row's end. The keys are
    # distinct, so that the sort need not be stable.
    count = e.Shape(row)
    total = e.Add(count, 1)
    keys = e.Add(e.Mul(e.Concat(row, num_rows, axis=0), total), e.Range(0, e.Squeeze(total), 1))
    keys, _ = e.multi_output("TopK", (keys, total), {"axis": 0, "largest": 0, "sorted": 1}, 2)
    sorted_row = e.Div(keys, total)
    order = e.Slice(e.Sub(keys, e.Mul(sorted_row, total)), [0], count)
    new = e.Greater(e.Sub(sorted_row, e.Concat([-1], e.Slice(sorted_row, [0], count), axis=0)), 0)
    starts = e.Squeeze(e.NonZero(new), [0])
    rows = e.Gather(sorted_row, e.Slice(starts, [0], e.Sub(e.Shape(starts), 1)))
    return _ByRow(rows, order, starts)


def _sums(e: Emitter, table: str, numbers: str, starts: str, weights: str | None, dtype: np.dtype) -> str:
    """[U, D]: rows ``numbers`` of a table, summed from each start to the next."""
    output = e.name()
    e.nodes.append(
        make_node(
            table,
            numbers,
            starts,
            output,
            mode="sum",
            include_last_offset=True,
            per_sample_weights=weights,
            weight_dtype=dtype,
        )
    )
    return output


class Trainer:
    """Runs a training step again and again, over tables that it changes in place.

    Args:
        model: of `build_training_model`, as `InferenceSession` takes it.
        tables: the arrays of its inputs that have an output ``new_<name>`` (``weight``, ``target_weight`` and their
            states), C-contiguous, writable and of the model's dtype. Each step changes them in place.
        **kwargs: passed to `InferenceSession`: ``native``, ``providers`` (CPUExecutionProvider only),
            ``session_options``.

    Attributes:
        tables: the arrays by name, as given.
        session: the `InferenceSession`.

    Example::

        table = np.random.rand(1000, 64).astype(np.float32)
        trainer = lucid_onnx.Trainer(lucid_onnx.build_training_model(loss="mse"), {"weight": table})
        loss = trainer.step(0.1, indices=words, offsets=starts, target=target)

    Raises:
        TypeError, ValueError: a table that is missing, or that a step cannot change in place.
    """

    def __init__(
        self, model: str | os.PathLike[str] | bytes | onnx.ModelProto, tables: Mapping[str, np.ndarray], **kwargs: Any
    ) -> None:
        from .session import InferenceSession

        providers = list(kwargs.get("providers") or ["CPUExecutionProvider"])
        if providers != ["CPUExecutionProvider"]:
            raise ValueError(f"providers = {providers}: only CPUExecutionProvider can train tables in place")
        self.session = InferenceSession(model, **kwargs)
        inputs = {i.name: i for i in self.session.get_inputs()}
        outputs = [o.name for o in self.session.get_outputs()]
        trained = [name for name in inputs if f"new_{name}" in outputs]
        if "loss" not in outputs or "learning_rate" not in inputs or not trained:
            raise ValueError(
                "the model was not made by build_training_model: it has no loss, learning_rate or new table"
            )
        if set(tables) != set(trained):
            raise ValueError(f"tables = {sorted(tables)}, but the model trains {sorted(trained)}")
        self._dtype = np.dtype({"tensor(float)": np.float32, "tensor(double)": np.float64}[inputs[trained[0]].type])
        self._batch = [name for name in inputs if name not in (*trained, "learning_rate")]
        self._floats = {name for name in self._batch if inputs[name].type in ("tensor(float)", "tensor(double)")}
        self.tables = {name: _table(name, tables[name], self._dtype, len(inputs[name].shape)) for name in trained}
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Check that tables have rows of one length, states a number for each row, and that none share memory."""
        dim = self.tables["weight"].shape[1]
        for name, table in self.tables.items():
            if table.ndim == 1:
                rows = len(self.tables[name.replace("state", "weight")])
                if len(table) != rows:
                    raise ValueError(f"{name} has shape {list(table.shape)}, expected [{rows}]")
            elif table.shape[1] != dim:
                raise ValueError(f"{name} has {table.shape[1]} columns, weight has {dim}: they must be equal")
            elif not len(table):
                raise ValueError(f"{name} has no rows to train")
        for (name, table), (other, second) in itertools.combinations(self.tables.items(), 2):
            if np.may_share_memory(table, second):
                raise ValueError(f"{name} and {other} share memory, and both are trained in place")

    def step(self, learning_rate: float, **batch: npt.ArrayLike) -> float:
        """Run a step over a batch, and update the tables.

        Args:
            learning_rate: a finite number.
            batch: the model's other inputs by name, of its dtypes, or lists of numbers.

        Returns:
            The loss, before the step.

        Raises:
            ValueError: an input is missing or unknown, or the learning rate is not finite.
            Exception: onnxruntime's own, for a batch that is rejected. The tables do not change then.
        """
        if set(batch) != set(self._batch):
            raise ValueError(f"batch = {sorted(batch)}, but the model takes {sorted(self._batch)}")
        rate = np.asarray(learning_rate, self._dtype)
        if rate.ndim or not np.isfinite(rate):
            raise ValueError(f"learning_rate = {learning_rate!r} is not a finite number")
        binding = self.session.io_binding()
        for name, value in batch.items():
            array = np.ascontiguousarray(value)
            if name in self._floats and not hasattr(value, "dtype"):  # a list of numbers has no dtype of its own
                array = array.astype(self._dtype)
            binding.bind_cpu_input(name, array)
        binding.bind_cpu_input("learning_rate", rate)
        for name, table in self.tables.items():
            where = ("cpu", 0, table.dtype.type, table.shape, table.ctypes.data)
            binding.bind_input(name, *where)
            binding.bind_output(f"new_{name}", *where)
        loss = np.empty((), self._dtype)
        binding.bind_output("loss", "cpu", 0, loss.dtype.type, loss.shape, loss.ctypes.data)
        self.session.run_with_iobinding(binding)
        return float(loss)


def _table(name: str, table: np.ndarray, dtype: np.dtype, rank: int) -> np.ndarray:
    if not isinstance(table, np.ndarray):
        raise TypeError(f"{name} is a {type(table).__name__}, expected a numpy.ndarray, which is trained in place")
    if table.dtype != dtype:
        raise TypeError(f"{name} has dtype {table.dtype}, the model has {dtype}")
    if table.ndim != rank:
        raise ValueError(f"{name} has shape {list(table.shape)}, expected {rank} dimensions")
    if not (table.flags.c_contiguous and table.flags.writeable):
        raise ValueError(f"{name} is not C-contiguous and writable, as an array that is trained in place must be")
    return table
