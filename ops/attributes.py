"""Attributes of operators: each is declared once, in its operator's spec, and everything else is read from there.

A spec's ``Attributes`` is a frozen dataclass whose fields are made by `attribute`; what an operator's name or a dtype
decides, and no caller, is made by `decided`. From these declarations come the checks of values, the attributes of a
node and back, the keyword arguments of calls and builders (`takes`), the options of the command line and their help,
and the tables in the documentation (`rst_table`). So a new attribute is one field more.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
from onnx import AttributeProto, helper

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Cls = TypeVar("_Cls", bound="BaseAttributes")

INT, FLOAT, STRING = AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.STRING
_TYPE_WORDS: dict[int, str] = {INT: "an INT", FLOAT: "a FLOAT", STRING: "a STRING"}


def either(words: Iterable[Any]) -> str:
    """``a, b or c``."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ValueError if ``value`` is not one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} = {value!r} is not one of {', '.join(map(repr, choices))}")


def split_double(value: float) -> tuple[float, float]:
    """``value`` as two float32 numbers whose sum is it to 48 bits: FLOAT is all that ONNX attributes have."""
    with np.errstate(over="ignore"):
        high = float(np.float32(value))
    if math.isinf(value):
        return value, 0.0
    if math.isinf(high):  # above float32's range: keep the sum finite
        high = math.copysign(float(np.finfo(np.float32).max), value)
    with np.errstate(over="ignore", under="ignore"):
        return high, float(np.float32(value - high))


class Kind:
    """The values that an attribute may have, as a caller gives them and as ONNX attributes."""

    type: int = INT  #: of the ONNX attributes that it is written as
    accepted: tuple[int, ...] = (INT,)  #: the types that a node's attribute may have
    words = ""  #: the range, for a caller; None is not mentioned
    onnx_words = ""  #: the range of the ONNX attribute

    def check(self, name: str, value: Any) -> Any:
        """A caller's value in its one form.

        Raises:
            TypeError: a value of a type that cannot be meant.
            ValueError: a value outside the range.
        """
        raise NotImplementedError

    def names(self, name: str) -> tuple[str, ...]:
        """The ONNX attributes that it is written as."""
        return (name,)

    def encode(self, name: str, value: Any) -> dict[str, int | float]:
        """The ONNX attributes of a checked value."""
        return {name: int(value)}

    def decode(self, name: str, given: Mapping[str, Any], default: Any) -> Any:
        """The value of ONNX attributes, of which some may be missing; not checked yet.

        Raises:
            ValueError: a value that means nothing.
        """
        return given.get(name, default)


@dataclasses.dataclass(frozen=True)
class Choice(Kind):
    """One of a few texts, each with its number in ONNX; with ``or_text`` a node may have the text itself.

    With ``none`` None is a value too, and that is its number.
    """

    numbers: Mapping[str, int]
    or_text: bool = False
    none: int | None = None

    @property
    def accepted(self) -> tuple[int, ...]:  # type: ignore[override]
        return (INT, STRING) if self.or_text else (INT,)

    @property
    def words(self) -> str:  # type: ignore[override]
        return either(f'"{text}"' for text in self.numbers)

    @property
    def onnx_words(self) -> str:  # type: ignore[override]
        return ", ".join(f"{number} {text}" for number, text in self._texts)

    @property
    def _texts(self) -> list[tuple[int, str]]:
        none = [] if self.none is None else [(self.none, "none")]
        return [*none, *((number, text) for text, number in self.numbers.items())]

    def check(self, name: str, value: Any) -> str | None:
        if value is None and self.none is not None:
            return None
        check_choice(name, value, self.numbers)
        return str(value)

    def encode(self, name: str, value: Any) -> dict[str, int | float]:
        return {name: self.none if value is None and self.none is not None else self.numbers[value]}

    def decode(self, name: str, given: Mapping[str, Any], default: Any) -> Any:
        if name not in given:
            return default
        value = given[name]
        if isinstance(value, (bytes, str)) and self.or_text:
            text = value.decode(errors="replace") if isinstance(value, bytes) else value
            return self.check(name, text)
        for text, number in self.numbers.items():
            if number == value:
                return text
        if self.none is not None and value == self.none:
            return None
        raise ValueError(f"{name} = {value} is not {self.known}")

    @property
    def known(self) -> str:
        """The numbers with their texts, as a message has them."""
        return either(f"{number} ({text})" for number, text in self._texts)


@dataclasses.dataclass(frozen=True)
class Flag(Kind):
    """A bool; 0 or 1 in ONNX."""

    onnx_words = "0 or 1"

    def check(self, name: str, value: Any) -> bool:
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name} = {value!r} must be a bool")
        return bool(value)

    def decode(self, name: str, given: Mapping[str, Any], default: Any) -> bool:
        value = given.get(name, int(default))
        if value not in (0, 1):
            raise ValueError(f"{name} = {value} is not 0 or 1")
        return bool(value)


@dataclasses.dataclass(frozen=True)
class OptionalIndex(Kind):
    """The number of a row, negative from the end, or None, for which ONNX has the number ``none``."""

    none: int
    words = "an integer in [-V, V), negative from the end"

    @property
    def onnx_words(self) -> str:  # type: ignore[override]
        return f"in [-V, V), or -2**{(-self.none).bit_length() - 1} for none"

    def check(self, name: str, value: Any) -> int | None:
        if value is None:
            return None
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Integral, np.integer)):
            raise TypeError(f"{name} = {value!r} must be an integer or None")
        return int(value)

    def encode(self, name: str, value: Any) -> dict[str, int | float]:
        return {name: self.none if value is None else value}

    def decode(self, name: str, given: Mapping[str, Any], default: Any) -> int | None:
        value = int(given.get(name, self.encode(name, default)[name]))
        return None if value == self.none else value


@dataclasses.dataclass(frozen=True)
class Real(Kind):
    """A real number, written in two parts, as ONNX has no double: ``<name>`` and ``<name>_lo``, what rounding lost.

    ``at_least`` and ``above`` bound it. With ``none_is_infinity`` None is the same as infinity.
    """

    at_least: float | None = None
    above: float | None = None
    none_is_infinity: bool = False

    type = FLOAT
    accepted = (FLOAT, INT)

    @property
    def _bound(self) -> str:
        if self.above is not None:
            return f"> {self.above:g}"
        return "" if self.at_least is None else f">= {self.at_least:g}"

    @property
    def words(self) -> str:  # type: ignore[override]
        return f"a number {self._bound}".rstrip()

    @property
    def onnx_words(self) -> str:  # type: ignore[override]
        return f"{self._bound}{', or +inf for none' if self.none_is_infinity else ''}"

    def check(self, name: str, value: Any) -> float | None:
        if value is None and self.none_is_infinity:
            return None
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.floating)):
            raise TypeError(f"{name} = {value!r} must be a real number")
        try:
            found = float(value)
        except OverflowError as error:
            raise ValueError(f"{name} = {value!r} is more than a double holds") from error
        if self.above is not None and not found > self.above:
            raise ValueError(f"{name} = {found!r} must be > {self.above:g}")
        if self.at_least is not None and not found >= self.at_least:
            raise ValueError(f"{name} = {found!r} must be >= {self.at_least:g}")
        return None if self.none_is_infinity and math.isinf(found) else found

    def names(self, name: str) -> tuple[str, ...]:
        return name, f"{name}_lo"

    def encode(self, name: str, value: Any) -> dict[str, int | float]:
        return dict(zip(self.names(name), split_double(math.inf if value is None else value), strict=True))

    def decode(self, name: str, given: Mapping[str, Any], default: Any) -> float | None:
        high, low = self.names(name)
        if high not in given and low not in given:
            return default  # type: ignore[no-any-return]
        return float(given.get(high, self.encode(name, default)[high]) + given.get(low, 0.0))


@dataclasses.dataclass(frozen=True)
class Integer(Kind):
    """An integer, ``at_least`` so large."""

    at_least: int = 0

    @property
    def words(self) -> str:  # type: ignore[override]
        return f"an integer >= {self.at_least}"

    @property
    def onnx_words(self) -> str:  # type: ignore[override]
        return f">= {self.at_least}"

    def check(self, name: str, value: Any) -> int:
        if value < self.at_least:
            raise ValueError(f"{name} = {value} must be >= {self.at_least}")
        return int(value)

    def decode(self, name: str, given: Mapping[str, Any], default: Any) -> int:
        return int(given.get(name, default))


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A declared attribute: a row of `BaseAttributes.table`."""

    kind: Kind
    meaning: str  #: in words, without a full stop
    default: Any = None  #: the caller's, and what a node without the attribute means
    by_caller: bool = True  #: whether calls and builders take it as a keyword argument
    required: bool = False  #: on a node
    decide: Callable[[Any, bool], Any] | None = None  #: of the operator name and whether the table is float64
    where: str = ""  #: which operator names have it, in words; "" for all
    applies: Callable[[Any], bool] = lambda op: True  #: whether an operator name has it
    name: str = ""

    @property
    def onnx_names(self) -> tuple[str, ...]:
        return self.kind.names(self.name)

    @property
    def sentence(self) -> str:
        """Meaning and range for a caller, as a docstring has them."""
        words = self.kind.words
        if words and self.default is None:
            words += ", or None"
        return f"{self.meaning}: {words}." if words else f"{self.meaning}."


def attribute(
    kind: Kind,
    default: Any,
    meaning: str,
    *,
    by_caller: bool = True,
    required: bool = False,
    keyword_only: bool = False,
    where: str = "",
    applies: Callable[[Any], bool] = lambda op: True,
) -> Any:
    """A field of an operator's Attributes. ``by_caller=False`` is for what a table tells, and no keyword argument.

    ``keyword_only``: for every attribute that comes later, so that what gives the others by position stays right.
    """
    declared = Attribute(kind, meaning, default, by_caller, required, None, where, applies)
    return dataclasses.field(default=default, kw_only=keyword_only, metadata={"attribute": declared})


def decided(kind: Kind, decide: Callable[[Any, bool], Any], meaning: str) -> Any:
    """An attribute that no caller sets: ``decide(op, double)`` gives its value; ``double``: the table is float64."""
    return Attribute(kind, meaning, by_caller=False, decide=decide)


class BaseAttributes:
    """The base of every operator's Attributes: frozen dataclasses whose fields are made by `attribute`.

    Raises:
        ValueError: naming the attribute and its value, if one is outside its range.
        TypeError: if one is of a type that cannot be meant.
    """

    def __post_init__(self) -> None:
        for a in self.table():
            if a.decide is None:
                object.__setattr__(self, a.name, a.kind.check(a.name, getattr(self, a.name)))

    @classmethod
    @functools.cache
    def table(cls) -> tuple[Attribute, ...]:
        """Every attribute, in the order in which nodes have them."""
        found = []
        for owner in reversed(cls.__mro__):
            for name in inspect.get_annotations(owner):
                field = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]  # also of a ClassVar
                declared = field.metadata.get("attribute") or getattr(cls, name)
                found.append(dataclasses.replace(declared, name=name))
        return tuple(found)

    @classmethod
    def keyword_table(cls) -> tuple[Attribute, ...]:
        """The attributes that callers give, by keyword."""
        return tuple(a for a in cls.table() if a.by_caller)

    @classmethod
    def keyword_types(cls) -> dict[str, Any]:
        """The types of the attributes that callers give; of a choice its texts."""
        hints = typing.get_type_hints(cls)
        found: dict[str, Any] = {}
        for a in cls.keyword_table():
            found[a.name] = hints[a.name]
            if isinstance(a.kind, Choice):
                texts: Any = typing.Literal[tuple(a.kind.numbers)]  # type: ignore[misc]
                found[a.name] = texts if a.kind.none is None else texts | None
        return found

    @property
    def keywords(self) -> dict[str, Any]:
        """The values that callers give, as keyword arguments of the operator's call."""
        return {a.name: getattr(self, a.name) for a in self.keyword_table()}

    @property
    def changed(self) -> str:
        """In words, the attributes that differ from a caller's defaults: ``padding_idx 0, negative skip``.

        The mode is not among them, and a flag that is set is its name alone.
        """
        found = []
        for a in self.keyword_table():
            value = getattr(self, a.name)
            if a.name == "mode" or value == a.default:
                continue
            text = "" if value is True else f" {value:.9g}" if isinstance(value, float) else f" {value}"
            found.append(f"{a.name}{text}")
        return ", ".join(found)

    @classmethod
    def onnx_names(cls, op: Any) -> tuple[str, ...]:
        """The ONNX attributes of an operator name, in order."""
        return tuple(name for a in cls.table() if a.applies(op) for name in a.onnx_names)

    def to_onnx(self, op: Any, *, double: bool = False) -> dict[str, int | float]:
        """The node's attributes, all of them, as neither a kernel nor onnx's inliner knows a default.

        Args:
            op: the operator name, a Variant.
            double: the table is float64.
        """
        given: dict[str, int | float] = {}
        for a in self.table():
            if a.applies(op):
                value = getattr(self, a.name) if a.decide is None else a.decide(op, double)
                given |= a.kind.encode(a.name, value)
        return given

    @classmethod
    def from_onnx(cls: type[_Cls], attributes: Mapping[str, Any]) -> _Cls:
        """The inverse of `to_onnx`; what a node leaves out has its default, and what the operator has not is ignored.

        Raises:
            ValueError: a value outside its range, or a required attribute is missing.
        """
        values = {}
        for a in cls.table():
            if a.decide is None:
                if a.required and a.name not in attributes:
                    raise ValueError(f"the attribute {a.name} is missing")
                values[a.name] = a.kind.decode(a.name, attributes, a.default)
        return cls(**values)

    @classmethod
    def read(cls, attribute: AttributeProto) -> Any:
        """The value of a node's attribute, for `from_onnx`.

        Raises:
            ValueError: the operator gives it another type.
        """
        kind = next(a.kind for a in cls.table() if attribute.name in a.onnx_names)
        value = helper.get_attribute_value(attribute)
        if attribute.type not in kind.accepted:
            if isinstance(kind, Choice) and kind.or_text:
                raise ValueError(f"{attribute.name} = {value} is not {kind.known}")
            words = " or ".join(_TYPE_WORDS[t] for t in kind.accepted)
            raise ValueError(f"{attribute.name} = {value!r} must be {words} attribute")
        return value


def takes(attributes: type[BaseAttributes]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """For a function that takes the attributes of an operator as ``**attributes``: its signature with them written out.

    The keyword arguments come before the function's own; those among its parameters already stay where they are. An
    unknown one is a TypeError, as Python has it. In the docstring, the entry ``**attributes:`` becomes an entry for
    each.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        written = inspect.signature(function)
        types = attributes.keyword_types()
        *plain, rest = (p.replace(annotation=types.get(p.name, p.annotation)) for p in written.parameters.values())
        assert rest.kind is inspect.Parameter.VAR_KEYWORD, function
        added = [
            inspect.Parameter(a.name, inspect.Parameter.KEYWORD_ONLY, default=a.default, annotation=types[a.name])
            for a in attributes.keyword_table()
            if a.name not in written.parameters
        ]
        at = sum(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in plain)
        signature = written.replace(parameters=[*plain[:at], *added, *plain[at:]])
        known = frozenset(signature.parameters)

        @functools.wraps(function)
        def call(*args: _P.args, **keywords: _P.kwargs) -> _R:
            for name in keywords:
                if name not in known:
                    raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
            return function(*args, **keywords)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
        call.__annotations__["return"] = written.return_annotation
        call.__doc__ = _with_entries(function.__doc__, attributes)
        return call

    return decorate


def _with_entries(doc: str | None, attributes: type[BaseAttributes]) -> str | None:
    """A docstring with an entry for each attribute in place of ``**attributes:``."""
    if doc is None:  # python -OO
        return None

    def entries(found: re.Match[str]) -> str:
        indent = found[1]
        wrap = functools.partial(textwrap.wrap, width=118, initial_indent=indent, subsequent_indent=f"{indent}    ")
        return "".join(f"{line}\n" for a in attributes.keyword_table() for line in wrap(f"{a.name}: {a.sentence}"))

    return re.sub(r"^( *)\*\*attributes: .*\n(?:\1 +\S.*\n)*", entries, doc, flags=re.MULTILINE)


class Row(NamedTuple):
    """A row of an operator's table of ONNX attributes, for documentation."""

    name: str
    type: str  #: INT or FLOAT
    values: str
    meaning: str


def rows(attributes: type[BaseAttributes]) -> list[Row]:
    """The ONNX attributes of an operator that its base does not have, each with its type, range and meaning."""
    inherited = {
        a.name
        for base in attributes.__mro__[1:]
        if issubclass(base, BaseAttributes) and base is not BaseAttributes
        for a in base.table()
    }
    found = []
    for a in attributes.table():
        if a.name in inherited:
            continue
        kind = AttributeProto.AttributeType.Name(a.kind.type)
        meaning = f"{a.meaning}{f'; {a.where}' if a.where else ''}"
        found.append(Row(a.name, kind, a.kind.onnx_words, meaning))
        found += [Row(low, kind, "", f"what rounding {a.name} to FLOAT lost") for low in a.onnx_names[1:]]
    return found


def rst_table(attributes: type[BaseAttributes]) -> str:
    """`rows` as the table in a spec's docstring."""
    cells = [Row("attribute", "type", "values", "meaning"), *rows(attributes)]
    widths = [max(len(row[k]) for row in cells) for k in range(4)]
    rule = " ".join("=" * width for width in widths)
    lines = [" ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])
