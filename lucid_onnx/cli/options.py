"""The commands' options: parsers, and the attributes of an operator as options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any, cast, get_type_hints

import typer

from lucid_onnx.builder import FORMS
from lucid_onnx.ops.attributes import Attribute, BaseAttributes, Choice, Flag, Real, takes
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.quantized_embedding_bag.spec import CODES_TYPES

#: What `quantize` and `build` make of tables.
SMALLER_DTYPES = (*CODES_TYPES, "float16", "bfloat16")


def choice(names: Iterable[str], text: str) -> Any:
    """An option that takes one of these names, which shells complete. The command checks it, in its own words."""
    known = list(names)
    return typer.Option(metavar="NAME", autocompletion=lambda: known, help=text)


#: The option of every command that writes a model from another.
SingleFile = Annotated[
    bool, typer.Option("--single-file", help="Put all tables into OUTPUT itself, which must stay below 2 GiB.")
]


def real(text: str) -> float:
    """A parser of floats with a plain message."""
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a number") from error


def integer(text: str) -> int:
    """A parser of integers with a plain message."""
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not an integer") from error


#: The options of the commands that make a model.
AnyForm = Annotated[
    str, choice(FORMS, "portable (runs everywhere), standard (no custom domain) or native (needs the library).")
]
Opset = Annotated[
    int,
    typer.Option(
        parser=integer, metavar="INTEGER", help=f"Of the standard operators, {spec.MIN_OPSET} to {spec.MAX_OPSET}."
    ),
]
TableBeside = Annotated[
    bool | None,
    typer.Option(
        "--external-data/--single-file",
        help="Put the table beside the model, in OUTPUT.data, or into OUTPUT itself. By default it is beside the "
        "model only if it exceeds 2 GiB.",
    ),
]


def with_options(function: Callable[..., int | None], attributes: type[BaseAttributes]) -> Callable[..., int | None]:
    """A command that takes the attributes of an operator as ``**attributes``, with an option for each of them."""
    command: Any = takes(attributes)(function)
    types = get_type_hints(function, include_extras=True) | {a.name: _option(a) for a in attributes.keyword_table()}
    signature = inspect.signature(command)
    parameters = [p.replace(annotation=types[p.name]) for p in signature.parameters.values()]
    command.__signature__ = signature.replace(parameters=parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return cast("Callable[..., int | None]", command)


def _option(attribute: Attribute) -> Any:
    """An attribute of an operator as an option, in Typer's form."""
    text = attribute.meaning + (f": {attribute.kind.words}." if attribute.kind.words else ".")
    text = text[0].upper() + text[1:].replace('"', "")
    if isinstance(attribute.kind, Flag):
        return Annotated[bool, typer.Option(f"--{attribute.name.replace('_', '-')}", help=text)]
    if isinstance(attribute.kind, Choice):
        texts = str if attribute.default is not None else str | None
        return Annotated[texts, choice(attribute.kind.numbers, text)]
    if isinstance(attribute.kind, Real):
        return Annotated[float | None, typer.Option(parser=real, metavar="NUMBER", help=text)]
    return Annotated[int | None, typer.Option(parser=integer, metavar="INTEGER", help=text)]
