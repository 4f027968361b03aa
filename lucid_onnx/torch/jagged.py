"""TorchRec's keyed tensors as tensors of a model: KeyedJaggedTensors that go in, KeyedTensors that come out."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import onnx
import torch
from torch.utils import _pytree as pytree

from .batched import is_keyed_jagged

#: The parts of a KeyedJaggedTensor that are inputs of a model, in their order. One of lengths and offsets is.
PARTS = ("values", "lengths", "offsets", "weights")
#: What the output is called if it is one KeyedTensor.
OUTPUT = "output"


class Flat(NamedTuple):
    """What torch's exporter is given in the place of a module and a call of it."""

    module: Any  #: a torch.nn.Module with ``module``, the caller's, ``output_names`` and ``describe``
    args: tuple[torch.Tensor, ...]
    sizes: tuple[Any, ...]  #: which sizes of each of ``args`` vary, as torch.export has them
    input_names: list[str]

    @property
    def dynamic_shapes(self) -> Any:
        """The sizes by the parameters of the module, one of which may take all ``args``."""
        takes_any = next(iter(inspect.signature(self.module.forward).parameters.values())).kind
        return (self.sizes,) if takes_any is inspect.Parameter.VAR_POSITIONAL else self.sizes


def flatten(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> Flat | None:
    """A call whose arguments are tensors alone; None where there is no KeyedJaggedTensor among them.

    Without ``dynamic_shapes`` the number of values and of bags vary, and with them the first size of every other tensor
    that is the number of bags in the example.

    Raises:
        ValueError: a KeyedJaggedTensor with a batch size for each key or with inverse_indices; ``dynamic_shapes`` that
            do not fit.
    """
    leaves, tree = pytree.tree_flatten((args, dict(kwargs or {})), is_leaf=is_keyed_jagged)
    keyed = [leaf for leaf in leaves if is_keyed_jagged(leaf)]
    if not keyed:
        return None
    for value in keyed:
        _check(value)
    names = _names(module, args, dict(kwargs or {}))
    if len(names) != len(leaves):
        raise AssertionError(f"{len(leaves)} arguments have {len(names)} names")
    plain = {name for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, torch.Tensor)}
    short = len(keyed) == 1 and not plain & set(PARTS)
    slots: list[_Slot] = []
    tensors: list[torch.Tensor] = []
    input_names: list[str] = []
    for name, leaf in zip(names, leaves, strict=True):
        found: dict[str, torch.Tensor] = {"": leaf} if isinstance(leaf, torch.Tensor) else {}
        if is_keyed_jagged(leaf):
            found = parts(leaf)
        slots.append(_Slot(name, leaf, tuple(found)))
        tensors += found.values()
        input_names += [(part if short else f"{name}_{part}") if part else name for part in found]
    shapes = _automatic(slots) if dynamic_shapes is None else list(_given(slots, names, dynamic_shapes))
    flat = Flattened(module, slots, tree, tensors)
    return Flat(flat, tuple(tensors), tuple(shapes), input_names)


class _Slot(NamedTuple):
    """An argument of the module's call, nested ones too."""

    name: str
    example: Any
    parts: tuple[str, ...]  #: of a KeyedJaggedTensor, or "" of a tensor; () of what is the same in every call


class _Seen:
    """What a call saw; torch.export undoes what a call sets in a module.

    Attributes:
        example: the tensors of the call.
        outputs: the keys and columns of each output that is a KeyedTensor.
    """

    def __init__(self, example: Sequence[torch.Tensor]) -> None:
        self.example = tuple(example)
        self.outputs: list[tuple[list[str], list[int]] | None] = []


class Flattened(torch.nn.Module):
    """A module that is called with tensors, and returns tensors.

    It remembers which outputs of the latest call were KeyedTensors.
    """

    def __init__(
        self, module: torch.nn.Module, slots: Sequence[_Slot], tree: Any, example: Sequence[torch.Tensor]
    ) -> None:
        super().__init__()
        self.module = module
        self._slots, self._tree = list(slots), tree
        self._seen = _Seen(example)
        self.train(module.training)

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        leaves = [_filled(slot, [next(given) for _ in slot.parts]) for slot in self._slots]
        args, kwargs = pytree.tree_unflatten(leaves, self._tree)
        outputs = pytree.tree_leaves(self.module(*args, **kwargs), is_leaf=_is_keyed)
        outputs = [output for output in outputs if _is_keyed(output) or isinstance(output, torch.Tensor)]
        self._seen.outputs = [(list(o.keys()), list(o.length_per_key())) if _is_keyed(o) else None for o in outputs]
        found = tuple(o.values() if _is_keyed(o) else o for o in outputs)
        return found[0] if len(found) == 1 else found

    @property
    def output_names(self) -> list[str] | None:
        """Names of the outputs, where torch's own would tell nothing."""
        if not self._seen.outputs:  # torch.export read the code and did not call it
            with torch.no_grad():
                self(*self._seen.example)
        return [OUTPUT] if len(self._seen.outputs) == 1 and self._seen.outputs[0] is not None else None

    def describe(self, model: onnx.ModelProto) -> None:
        """Write the keys of a model's inputs and outputs into its metadata."""
        names = iter([i.name for i in model.graph.input])
        inputs: dict[str, list[str]] = {}
        for slot in self._slots:
            called = dict(zip(slot.parts, names, strict=False))
            if is_keyed_jagged(slot.example):
                inputs[called["values"]] = list(slot.example.keys())
        keyed = zip(model.graph.output, self._seen.outputs, strict=True)
        describe(model, inputs, {output.name: found for output, found in keyed if found is not None})


def describe(
    model: onnx.ModelProto, inputs: Mapping[str, Sequence[Any]], outputs: Mapping[str, tuple[Sequence[str], list[int]]]
) -> None:
    """Write keys into a model's metadata.

    Args:
        inputs: the keys of each input of values.
        outputs: the keys of each output, and how many columns each has.
    """
    found: dict[str, Any] = {f"torchrec.{name}.keys": list(keys) for name, keys in inputs.items()}
    for name, (keys, dims) in outputs.items():
        found |= {f"torchrec.{name}.keys": list(keys), f"torchrec.{name}.length_per_key": dims}
    version = getattr(sys.modules.get("torchrec"), "__version__", None)
    for key, value in found.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    if version is not None:
        model.metadata_props.add(key="torchrec.version", value=str(version))


def size_names(program: torch.export.ExportedProgram, sizes: Sequence[Any]) -> dict[str, str]:
    """The names of sizes that torch leaves without one, by its symbols: no input has the batch of lengths [T * batch].

    Args:
        sizes: those of each tensor of the call, as `Flat` has them.
    """
    examples = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    found = {}
    for name, of_tensor in zip(program.graph_signature.user_inputs, sizes, strict=True):
        for axis, size in (of_tensor or {}).items():
            expression = getattr(getattr(examples[name].shape[axis], "node", None), "expr", None)
            symbols = getattr(expression, "free_symbols", ())
            if hasattr(size, "root") and len(symbols) == 1:
                found[str(*symbols)] = str(size.root.__name__)
    return found


def parts(value: Any) -> dict[str, torch.Tensor]:
    """The tensors of a KeyedJaggedTensor that are inputs of a model: lengths if it has them, else offsets."""
    found = {"values": value.values()}
    lengths, weights = value.lengths_or_none(), value.weights_or_none()
    found.update({"offsets": value.offsets()} if lengths is None else {"lengths": lengths})
    return found if weights is None else {**found, "weights": weights}


def _filled(slot: _Slot, tensors: Sequence[torch.Tensor]) -> Any:
    """An argument made of the tensors that were given for it."""
    if is_keyed_jagged(slot.example):
        return type(slot.example)(keys=slot.example.keys(), **dict(zip(slot.parts, tensors, strict=True)))
    return tensors[0] if slot.parts else slot.example


def _is_keyed(value: Any) -> bool:
    """Whether this is a KeyedTensor of TorchRec's."""
    return type(value).__name__ == "KeyedTensor"


def _check(value: Any) -> None:
    if value.variable_stride_per_key():
        raise ValueError("a KeyedJaggedTensor with a batch size for each key cannot be exported: expected one for all")
    if value.inverse_indices_or_none() is not None:
        raise ValueError("a KeyedJaggedTensor with inverse_indices cannot be exported")
    if not value.keys():
        raise ValueError("a KeyedJaggedTensor without keys cannot be exported")


def _names(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """A name for each argument, in the order of the call: its parameter's, with its place in it if it is nested."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    parameters = inspect.signature(module.forward).parameters
    positions: list[str] = []
    for name, value in given.items():
        if parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            positions += [f"{name}_{k}" for k in range(len(value))]
        elif parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
            positions.append(name)
    names = [*positions[: len(args)], *kwargs]
    found: list[str] = []
    for name, value in zip(names, (*args, *kwargs.values()), strict=True):
        count = len(pytree.tree_leaves(value, is_leaf=is_keyed_jagged))
        is_leaf = is_keyed_jagged(value) or not isinstance(value, list | tuple | dict)
        found += [name] if is_leaf and count == 1 else [f"{name}_{k}" for k in range(count)]
    return found


# ---- Sizes.


def _automatic(slots: Sequence[_Slot]) -> list[dict[int, Any] | None]:
    """The sizes that vary: values, bags, and what is as many as the bags."""
    keyed = [slot.example for slot in slots if is_keyed_jagged(slot.example)]
    sizes = list(dict.fromkeys(value.stride() for value in keyed))
    batch = {size: torch.export.Dim("batch" if k == 0 else f"batch_{k}") for k, size in enumerate(sizes)}
    numbers = iter(range(len(keyed)))
    found: list[dict[int, Any] | None] = []
    for slot in slots:
        if not is_keyed_jagged(slot.example):
            for _ in slot.parts:
                first = slot.example.shape[0] if slot.example.dim() else None
                found.append({0: batch[first]} if first in batch else None)
            continue
        number = next(numbers)
        count = torch.export.Dim("num_values" if number == 0 else f"num_values_{number}")
        bags = batch[slot.example.stride()]
        num_keys = len(slot.example.keys())
        lengths = bags if num_keys == 1 else num_keys * bags
        dims = {"values": count, "weights": count, "lengths": lengths, "offsets": lengths + 1}
        found += [{0: dims[part]} for part in slot.parts]
    return found


def _given(slots: Sequence[_Slot], names: Sequence[str], dynamic_shapes: Any) -> Iterator[Any]:
    """What the caller says of the sizes, for each tensor."""
    if not isinstance(dynamic_shapes, Mapping):
        if len(dynamic_shapes) != len(slots):
            raise ValueError(f"dynamic_shapes has {len(dynamic_shapes)} entries for {len(slots)} arguments")
        dynamic_shapes = dict(zip(names, dynamic_shapes, strict=True))
    unknown = sorted(set(dynamic_shapes) - set(names))
    if unknown:
        raise ValueError(f"dynamic_shapes has {unknown[0]!r}, which is not one of {', '.join(names)}")
    for slot in slots:
        entry = dynamic_shapes.get(slot.name)
        if not is_keyed_jagged(slot.example):
            yield from [entry] * len(slot.parts)
            continue
        entry = entry or {}
        wrong = sorted(set(entry) - set(slot.parts)) if isinstance(entry, Mapping) else [entry]
        if wrong:
            raise ValueError(
                f"dynamic_shapes of {slot.name!r} has {wrong[0]!r}; a KeyedJaggedTensor takes sizes by the names of "
                f"its parts, {', '.join(slot.parts)}"
            )
        yield from (entry.get(part) for part in slot.parts)
