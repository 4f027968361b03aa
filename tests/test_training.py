"""Training steps: torch's autograd and optimizers are the oracle, and a table is changed where it lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import lucid_onnx
from lucid_onnx.builder import FORMS
from lucid_onnx.graph import reads

onnxruntime = pytest.importorskip("onnxruntime")

#: Where a step runs: the model's form, and whether the library is registered.
PLACES = {"library": ("portable", True), "portable": ("portable", False), "standard": ("standard", False)}

#: Name -> arguments of the model. Rows repeat in all of them, and bags are empty.
STEPS: dict[str, dict[str, Any]] = {
    "mse": {"loss": "mse", "padding_idx": 2, "scale_grad_by_freq": True},
    "mse_weights_adagrad": {
        "loss": "mse",
        "mode": "sum",
        "reduction": "sum",
        "optimizer": "rowwise_adagrad",
        "per_sample_weights": True,
        "include_last_offset": True,
    },
    "logistic_max_rows": {"loss": "logistic", "mode": "max", "two_d": True, "padding_idx": -1, "index_dtype": "int32"},
    "logistic_clipped_adagrad": {
        "loss": "logistic",
        "optimizer": "rowwise_adagrad",
        "mode": "sum",
        "max_norm": 1.5,
        "norm_type": 1.0,
        "eps": 0.1,
    },
    "mse_weighted_mean_of_some": {
        "loss": "mse",
        "mode": "mean",
        "divisor": "weights",
        "negative": "skip",
        "per_sample_weights": True,
    },
    "logistic_sqrtn_of_some_adagrad": {
        "loss": "logistic",
        "optimizer": "rowwise_adagrad",
        "mode": "sqrtn",
        "negative": "skip",
        "padding_idx": 2,
        "two_d": True,
    },
}
ROWS, TARGETS, DIM, BAGS, PER_BAG = 12, 9, 5, 6, 4
LENGTHS = (5, 0, 3, 8, 0, 2)


def tables_of(model: onnx.ModelProto, dtype: str = "float64", dim: int = DIM) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    made = {"weight": random.standard_normal((ROWS, dim)), "target_weight": random.standard_normal((TARGETS, dim))}
    made |= {"state": np.full(ROWS, 0.25), "target_state": np.zeros(TARGETS)}
    names = {i.name for i in model.graph.input}
    return {name: array.astype(dtype) for name, array in made.items() if name in names}


def batch_of(model: onnx.ModelProto, seed: int, dtype: str = "float64", dim: int = DIM) -> dict[str, np.ndarray]:
    """A batch with the inputs that the model has."""
    random = np.random.default_rng(seed)
    inputs = {i.name: i.type.tensor_type for i in model.graph.input}
    index = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(inputs["indices"].elem_type))
    flat = len(inputs["indices"].shape.dim) == 1
    made: dict[str, np.ndarray] = {
        "indices": random.integers(0, ROWS, sum(LENGTHS) if flat else (BAGS, 3)).astype(index),
        "target": random.standard_normal((BAGS, dim)).astype(dtype),
        "targets": random.integers(0, TARGETS, (BAGS, PER_BAG)).astype(index),
        "labels": random.random((BAGS, PER_BAG)).astype(dtype),
    }
    if flat:
        ends = inputs["offsets"].shape.dim[0].dim_param == "num_offsets"
        made["offsets"] = np.cumsum([0, *LENGTHS])[: BAGS + ends].astype(index)
    made["per_sample_weights"] = random.standard_normal(made["indices"].shape).astype(dtype)
    numbers = {a.name: a.i for node in model.graph.node for a in node.attribute}
    if numbers.get("negative"):
        made["indices"][random.random(made["indices"].shape) < 0.3] = -1
    if numbers.get("divisor"):  # sums that are not near 0
        made["per_sample_weights"] = np.abs(made["per_sample_weights"]) + np.asarray(0.5, dtype)
    return {name: array for name, array in made.items() if name in inputs}


def build(arguments: dict[str, Any], form: str = "portable", dtype: str = "float64", **more: Any) -> onnx.ModelProto:
    return lucid_onnx.build_training_model(**arguments, form=form, weight_dtype=dtype, **more)


class Oracle:
    """The step in torch, in float64; rowwise Adagrad is written out, as torch has none."""

    def __init__(self, arguments: dict[str, Any], tables: dict[str, np.ndarray]) -> None:
        self.arguments = arguments
        self.tables = {name: array.copy() for name, array in tables.items()}

    def step(self, rate: float, batch: dict[str, np.ndarray]) -> float:
        import torch

        given = {name: torch.from_numpy(array) for name, array in batch.items()}
        tables = {n: torch.from_numpy(t.copy()).requires_grad_() for n, t in self.tables.items() if t.ndim == 2}
        a = self.arguments
        weight, mean = tables["weight"], a.get("mode", "mean")
        clipped = weight
        if a.get("max_norm") is not None:  # the clip is not differentiated
            with torch.no_grad():
                norms = torch.linalg.vector_norm(weight, a["norm_type"], dim=1, keepdim=True)
                factors = torch.where(norms > a["max_norm"], a["max_norm"] / (norms + 1e-7), 1.0)
            clipped = weight + (weight * factors - weight).detach()
        keywords = {k: a[k] for k in ("padding_idx", "include_last_offset") if k in a}
        if a.get("negative") == "skip":
            pooled = self.pooled(clipped, given, **keywords)
        else:
            pooled = torch.nn.functional.embedding_bag(
                given["indices"],
                clipped,
                given.get("offsets"),
                mode=mean,
                per_sample_weights=given.get("per_sample_weights"),
                **keywords,
            )
        reduction = a.get("reduction", "mean")
        if a["loss"] == "mse":
            loss = torch.nn.functional.mse_loss(pooled, given["target"], reduction=reduction)
        else:
            scores = (tables["target_weight"][given["targets"].long()] * pooled[:, None]).sum(2)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, given["labels"], reduction=reduction)
        loss.backward()
        for name, table in tables.items():
            assert table.grad is not None
            gradient = table.grad.numpy()
            if name == "weight" and a.get("scale_grad_by_freq"):
                # torch 2.13 divides by another row's count on the CPU
                counts = np.bincount(batch["indices"].reshape(-1), minlength=ROWS)
                gradient = gradient / np.maximum(counts, 1)[:, None]
            scale: Any = rate
            if a.get("optimizer") == "rowwise_adagrad":
                state = self.tables[name.replace("weight", "state")]
                state += (gradient * gradient).mean(1)
                scale = (rate / (np.sqrt(state) + a.get("eps", 1e-8)))[:, None]
            self.tables[name] -= scale * gradient
        return float(loss.detach())

    def pooled(self, weight: Any, given: dict[str, Any], **keywords: Any) -> Any:
        """Bags that torch has not, made of its sums: skipped positions have the weight 0, and n is a sum as well."""
        import torch

        ids, kept = given["indices"].clamp(min=0), (given["indices"] >= 0).double()
        weights = kept * given.get("per_sample_weights", torch.ones(ids.shape, dtype=torch.float64))

        def total(table: Any, by: Any) -> Any:
            given_by = {"mode": "sum", "per_sample_weights": by, **keywords}
            return torch.nn.functional.embedding_bag(ids, table, given.get("offsets"), **given_by)

        counted = weights if self.arguments.get("divisor") == "weights" else kept
        root = self.arguments["mode"] == "sqrtn"
        n = total(torch.ones((len(weight), 1), dtype=torch.float64), counted * counted if root else counted)
        return total(weight, weights) / torch.where(n == 0, 1, n.sqrt() if root else n)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("step", STEPS)
def test_steps_are_torchs(step: str, place: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    form, native = PLACES[place]
    if native:
        request.getfixturevalue("native")
    model = build(STEPS[step], form)
    tables = tables_of(model)
    oracle = Oracle(STEPS[step], tables)
    trainer = lucid_onnx.Trainer(model, tables, native=native)
    for seed in range(3):
        batch = batch_of(model, seed)
        # float64 sums of fewer than a hundred terms, in another order
        assert trainer.step(0.3, **batch) == pytest.approx(oracle.step(0.3, batch), rel=1e-12)
        for name, table in tables.items():
            np.testing.assert_allclose(table, oracle.tables[name], rtol=1e-12, atol=1e-13, err_msg=name)


def test_adagrad_of_one_column_is_torchs_own() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = build({"loss": "mse", "optimizer": "rowwise_adagrad", "mode": "sum"}, "standard")
    tables = tables_of(model, dim=1)
    tables["state"][:] = 0
    weight = torch.from_numpy(tables["weight"].copy()).requires_grad_()
    optimizer = torch.optim.Adagrad([weight], lr=0.2, eps=1e-8)
    trainer = lucid_onnx.Trainer(model, tables, native=False)
    for seed in range(4):
        batch = batch_of(model, seed, dim=1)
        trainer.step(0.2, **batch)
        given = {name: torch.from_numpy(array) for name, array in batch.items()}
        pooled = torch.nn.functional.embedding_bag(given["indices"], weight, given["offsets"], mode="sum")
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(pooled, given["target"]).backward()
        optimizer.step()
        np.testing.assert_allclose(tables["weight"], weight.detach().numpy(), rtol=1e-12)


def test_tables_are_changed_where_they_lie_and_nowhere_else() -> None:
    model = build(STEPS["mse"] | {"loss": "logistic", "optimizer": "rowwise_adagrad"}, dtype="float32")
    tables = tables_of(model, "float32")
    before = {name: table.copy() for name, table in tables.items()}
    trainer = lucid_onnx.Trainer(model, tables, native=False)
    batch = batch_of(model, 0, "float32")
    batch["indices"] %= 7
    batch["targets"] %= 4
    trainer.step(0.5, **batch)
    assert all(trainer.tables[name] is table for name, table in tables.items())
    touched = {"weight": set(batch["indices"]) - {2}, "target_weight": set(batch["targets"].flat)}  # 2 is padded
    for name, table in tables.items():
        changed = np.flatnonzero((table != before[name]).reshape(len(table), -1).any(1))
        assert set(changed) == touched[name.replace("state", "weight")], name
    # What session.run returns beside its inputs is what the step wrote over them.
    got = trainer.session.run(None, {**before, **batch, "learning_rate": np.array(0.5, np.float32)})
    for output, array in zip(trainer.session.get_outputs()[1:], got[1:], strict=True):
        np.testing.assert_array_equal(array, tables[output.name.removeprefix("new_")])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", STEPS)
def test_every_read_comes_before_the_write(step: str, form: str) -> None:
    """What makes it safe to bind an output to its input's memory: readers are ancestors of the writer.

    A node reads what its subgraphs read from outside, and is done when they are.
    """
    model = build(STEPS[step], form)
    producer = {output: node for node in model.graph.node for output in node.output}
    writers = [node for node in model.graph.node if node.op_type == "ScatterND" and node.output[0].startswith("new_")]
    assert {node.output[0].removeprefix("new_") for node in writers} == set(tables_of(model))
    for writer in writers:
        (table,) = (name for name in writer.input[:1])
        assert writer.output[0] == f"new_{table}"
        ancestors: set[str] = set()
        waiting = list(writer.input)
        while waiting:
            made_by = producer.get(waiting.pop())
            if made_by is not None and made_by.output[0] not in ancestors:
                ancestors.add(made_by.output[0])
                waiting.extend(reads(made_by))
        readers = [n for n in model.graph.node if table in reads(n) and n.op_type != "Shape" and n is not writer]
        assert readers
        assert {n.output[0] for n in readers} <= ancestors


@pytest.mark.parametrize("native_too", [True, False])
def test_the_bits_do_not_depend_on_threads(native_too: bool, request: pytest.FixtureRequest) -> None:
    if native_too:
        request.getfixturevalue("native")
    model = lucid_onnx.build_training_model(loss="logistic", mode="mean")
    random = np.random.default_rng(5)
    start = {
        n: random.standard_normal((n_rows, 32)).astype(np.float32)
        for n, n_rows in (("weight", 50), ("target_weight", 40))
    }
    lengths = random.integers(0, 60, 200)
    batch = {
        "indices": random.integers(0, 50, lengths.sum()) // random.integers(1, 50, lengths.sum()),  # few rows often
        "offsets": np.cumsum([0, *lengths[:-1]]),
        "targets": random.integers(0, 40, (200, 6)),
        "labels": random.integers(0, 2, (200, 6)).astype(np.float32),
    }
    results = []
    for threads in (1, 2):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        tables = {name: table.copy() for name, table in start.items()}
        trainer = lucid_onnx.Trainer(model, tables, native=native_too, session_options=options)
        for _ in range(3):
            trainer.step(0.1, **batch)
        results.append(tables)
    for name, table in results[0].items():
        np.testing.assert_array_equal(table, results[1][name])


@pytest.mark.parametrize("step", ["mse_weights_adagrad", "logistic_max_rows"])
def test_nothing_in_the_batch_changes_nothing(step: str) -> None:
    model = build(STEPS[step], "standard", opset=16)
    tables = tables_of(model)
    before = {name: table.copy() for name, table in tables.items()}
    trainer = lucid_onnx.Trainer(model, tables, native=False)
    full = batch_of(model, 0)
    empty = {name: array[:0] for name, array in full.items()}
    if "offsets" in full:
        empty["offsets"] = full["offsets"][:1]
    assert trainer.step(0.1, **empty) == 0.0
    for name, table in tables.items():
        np.testing.assert_array_equal(table, before[name])
    # Bags without a position have a loss, and no row to update.
    hollow = {name: array[:0] if name in ("indices", "per_sample_weights") else array for name, array in full.items()}
    if "offsets" in full:
        hollow["offsets"] = np.zeros_like(full["offsets"])
    else:
        hollow["indices"] = np.zeros((BAGS, 0), np.int32)
    loss = trainer.step(0.1, **hollow)
    expected = (full["target"] ** 2).sum() if "target" in full else np.log(2)
    assert loss == pytest.approx(expected, rel=1e-12)
    for name, table in tables.items():
        np.testing.assert_array_equal(table, before[name])


@pytest.mark.parametrize("place", PLACES)
def test_a_refused_batch_changes_nothing(place: str, request: pytest.FixtureRequest) -> None:
    form, native = PLACES[place]
    if native:
        request.getfixturevalue("native")
    model = build({"loss": "logistic", "optimizer": "rowwise_adagrad"}, form)
    tables = tables_of(model)
    before = {name: table.copy() for name, table in tables.items()}
    trainer = lucid_onnx.Trainer(model, tables, native=native)
    good = batch_of(model, 0)
    wrong = {
        "indices": np.where(np.arange(sum(LENGTHS)) == 4, ROWS, good["indices"]),
        "targets": np.where(good["targets"] == good["targets"].max(), TARGETS, good["targets"]),
        "labels": good["labels"][:1],  # which would be broadcast
        "offsets": good["offsets"][:-1],
    }
    for name, value in wrong.items():
        with pytest.raises(Exception, match=r"(?i)index|indices|shape|dimension|broadcast|out of"):
            trainer.step(0.1, **{**good, name: value})
        for table, array in tables.items():
            np.testing.assert_array_equal(array, before[table], err_msg=f"{table} after bad {name}")
    for name in ("indices", "targets"):  # -1 is no last row
        bad = good[name].copy()
        bad.flat[0] = -1
        with pytest.raises(Exception, match=r"(?i)index|indices|out of"):
            trainer.step(0.1, **{**good, name: bad})
    trainer.step(0.1, **good)
    assert all((array != before[name]).any() for name, array in tables.items())


def test_a_target_that_would_be_broadcast_is_refused() -> None:
    model = build({"loss": "mse"})
    trainer = lucid_onnx.Trainer(model, tables_of(model), native=False)
    good = batch_of(model, 0)
    for target in (good["target"][:1], good["target"][:, :1]):
        with pytest.raises(Exception, match=r"(?i)index|indices|out of"):
            trainer.step(0.1, **{**good, "target": target})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": "hinge"}, ValueError, "loss = 'hinge' is not one of 'mse', 'logistic'"),
        ({"optimizer": "adam"}, ValueError, "optimizer = 'adam' is not one of 'sgd', 'rowwise_adagrad'"),
        ({"reduction": "none"}, ValueError, "reduction = 'none' is not one of 'mean', 'sum'"),
        ({"form": "short"}, ValueError, "form = 'short' is not one of 'portable', 'standard', 'native'"),
        ({"weight_dtype": "float16"}, TypeError, "weight_dtype = float16 is not one of float32, float64"),
        ({"weight_dtype": "bfloat16"}, TypeError, "weight_dtype = bfloat16 is not one of float32, float64"),
        ({"index_dtype": np.int16}, TypeError, "index_dtype = int16 is not one of int32, int64"),
        ({"eps": 0.0}, ValueError, "eps = 0.0 must be > 0 and finite"),
        ({"eps": "small"}, TypeError, "eps = 'small' must be a number"),
        ({"opset": 15}, ValueError, "opset = 15 is outside [16, 26]"),
        ({"opset": 18.0}, TypeError, "opset = 18.0 must be an integer"),
        ({"mode": "product"}, ValueError, "mode = 'product'"),
        ({"mode": "max", "per_sample_weights": True}, ValueError, "per_sample_weights"),
    ],
)
def test_what_no_model_can_be(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        lucid_onnx.build_training_model(**{"loss": "mse", **arguments})
    assert message in str(caught.value)


def shell_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model with the inputs and outputs of a step that loads at once and trains nothing."""
    shell = onnx.ModelProto()
    shell.CopyFrom(model)
    del shell.graph.node[:], shell.functions[:]
    for output in shell.graph.output:
        source = "learning_rate" if output.name == "loss" else output.name.removeprefix("new_")
        shell.graph.node.append(onnx.helper.make_node("Identity", [source], [output.name]))
    return shell


def test_what_no_trainer_takes() -> None:
    model = shell_of(build({"loss": "logistic", "optimizer": "rowwise_adagrad"}))
    good = tables_of(model)
    read_only = good["weight"].copy()
    read_only.flags.writeable = False
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({k: v for k, v in good.items() if k != "state"}, ValueError, "but the model trains ['state', 'target_state',"),
        (good | {"weight": good["weight"].tolist()}, TypeError, "weight is a list, expected a numpy.ndarray"),
        (good | {"weight": good["weight"].astype(np.float32)}, TypeError, "weight has dtype float32, the model has fl"),
        (good | {"weight": good["weight"][0]}, ValueError, "weight has shape [5], expected 2 dimensions"),
        (good | {"weight": np.asfortranarray(good["weight"])}, ValueError, "weight is not C-contiguous and writable"),
        (good | {"weight": read_only}, ValueError, "weight is not C-contiguous and writable"),
        (good | {"state": good["state"][1:].copy()}, ValueError, "state has shape [11], expected [12]"),
        (good | {"target_weight": np.zeros((9, 4))}, ValueError, "target_weight has 4 columns, weight has 5"),
        (good | {"weight": np.zeros((0, 5)), "state": np.zeros(0)}, ValueError, "weight has no rows to train"),
        (good | {"target_weight": good["weight"][:9]}, ValueError, "weight and target_weight share memory"),
    ]
    for tables, error, message in cases:
        with pytest.raises(error) as caught:
            lucid_onnx.Trainer(model, tables, native=False)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="not made by build_training_model"):
        lucid_onnx.Trainer(lucid_onnx.build_model(None), good, native=False)
    with pytest.raises(ValueError, match="providers = "):
        lucid_onnx.Trainer(model, good, native=False, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    trainer = lucid_onnx.Trainer(model, good, native=False)
    batch = batch_of(model, 0)
    with pytest.raises(ValueError, match="batch = "):
        trainer.step(0.1, **{k: v for k, v in batch.items() if k != "labels"})
    for rate in (np.nan, np.inf, [0.1, 0.1]):
        with pytest.raises(ValueError, match="learning_rate = "):
            trainer.step(rate, **batch)  # type: ignore[arg-type]


def test_a_batch_takes_lists_of_numbers() -> None:
    model = lucid_onnx.build_training_model(loss="mse", mode="sum", per_sample_weights=True, form="standard")
    given = {"indices": [1, 2], "offsets": [0], "per_sample_weights": [3, 2], "target": [[1.0, 0.0]]}
    arrays = {name: np.array(value, np.float32 if name[0] in "pt" else np.int64) for name, value in given.items()}
    tables, losses = [np.eye(4, 2, dtype=np.float32) for _ in range(2)], []
    for table, batch in zip(tables, (given, arrays), strict=True):
        losses.append(lucid_onnx.Trainer(model, {"weight": table}, native=False).step(0.1, **batch))
    assert losses[0] == losses[1]
    np.testing.assert_array_equal(*tables)
