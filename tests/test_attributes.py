"""The declared attributes: calls, builders, nodes, options and documentation agree with them."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar, get_args, get_type_hints

import numpy as np
import pytest
from onnx import TensorProto, helper

import lucid_onnx
from lucid_onnx.ops import OPERATORS
from lucid_onnx.ops import attributes as declared
from lucid_onnx.ops.embedding_bag import spec
from lucid_onnx.ops.embedding_bag_grad import spec as gradient

#: Every function that takes attributes, with the operator that they are of.
TAKES: dict[str, str] = {
    "build_collection_model": "embedding_bag_collection",
    "build_grad_model": "embedding_bag_grad",
    "build_model": "embedding_bag",
    "build_quantized_model": "embedding_bag",
    "build_training_model": "embedding_bag_grad",
    "embedding_bag": "embedding_bag",
    "embedding_bag_collection": "embedding_bag_collection",
    "embedding_bag_grad": "embedding_bag_grad",
    "lucid.from_checkpoint": "embedding_bag",
    "make_collection_node": "embedding_bag_collection",
    "make_grad_node": "embedding_bag_grad",
    "make_node": "embedding_bag",
    "quantized_embedding_bag": "quantized_embedding_bag",
    "reference.embedding_bag": "embedding_bag",
    "reference.embedding_bag_grad": "embedding_bag_grad",
}


def function(name: str) -> Callable[..., Any]:
    import lucid_onnx.lucid

    found: Any = lucid_onnx
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", TAKES)
def test_a_function_takes_every_attribute(name: str) -> None:
    signature = inspect.signature(function(name))
    doc = function(name).__doc__ or ""
    table = OPERATORS[TAKES[name]].spec.Attributes.keyword_table()
    assert len(table) >= 5
    for attribute in table:
        assert signature.parameters[attribute.name].default == attribute.default, attribute.name
        # As a line of its own; the lines may be broken.
        assert f" {attribute.name}: {' '.join(attribute.sentence.split())}" in " ".join(doc.split()), attribute.name
    assert not [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]


@pytest.mark.parametrize("name", TAKES)
def test_an_unknown_keyword_is_pythons_error(name: str) -> None:
    stem = name.rpartition(".")[2]
    with pytest.raises(TypeError) as caught:
        function(name)(modus="sum")
    assert str(caught.value) == f"{stem}() got an unexpected keyword argument 'modus'"


def test_the_options_of_the_command_line() -> None:
    typer = pytest.importorskip("typer")
    from lucid_onnx.cli import app

    build = typer.main.get_command(app._app()).commands["build"]
    options = {parameter.name: parameter for parameter in build.params}
    for attribute in spec.Attributes.keyword_table():
        option = options[attribute.name]
        assert option.default == attribute.default
        assert option.help.lower().startswith(attribute.meaning.lower())


@pytest.mark.parametrize("keywords", [spec, gradient])
def test_the_keywords_for_type_checkers_are_the_declared_ones(keywords: Any) -> None:
    assert get_type_hints(keywords.Keywords) == keywords.Attributes.keyword_types()
    assert keywords.Attributes.keyword_types()["mode"] == spec.Mode
    assert get_args(spec.Mode) == spec.MODES


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))
def test_the_table_in_a_specs_docstring_is_the_declared_one(operator: Any) -> None:
    assert declared.rst_table(operator.spec.Attributes) in operator.spec.__doc__


def test_the_dtypes_and_opsets_in_docstrings_are_the_specs() -> None:
    names = [str(dtype) for dtype in spec.TABLE_DTYPES]
    first = ", ".join(names[:-1])
    assert f"{first} (ml_dtypes) or {names[-1]}" in str(lucid_onnx.embedding_bag.__doc__)
    assert f"{spec.MIN_OPSET} to {spec.MAX_OPSET}" in str(lucid_onnx.build_model.__doc__)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))
def test_every_name_writes_and_reads_its_attributes(operator: Any) -> None:
    for op in operator.spec.VARIANTS.values():
        plain = operator.spec.Attributes("sum", 3, 0.5, math.inf, not op.two_d)
        written = plain.to_onnx(op, double=True)
        assert tuple(written) == operator.spec.Attributes.onnx_names(op)
        assert operator.spec.Attributes.from_onnx(written) == plain
        node = helper.make_node("Any", [], [], **written)
        read = {a.name: operator.spec.Attributes.read(a) for a in node.attribute}
        assert operator.spec.Attributes.from_onnx(read) == plain
        assert ("include_last_offset" in written) is not op.two_d


@dataclasses.dataclass(frozen=True)
class Trial(declared.BaseAttributes):
    """Every kind of attribute."""

    way: str = declared.attribute(declared.Choice({"up": 4, "down": 7}), "up", "the way")
    row: int | None = declared.attribute(declared.OptionalIndex(-(2**63)), None, "a row")
    share: float = declared.attribute(declared.Real(), 0.1, "a share")
    limit: float | None = declared.attribute(declared.Real(above=1, none_is_infinity=True), None, "a limit")
    on: bool = declared.attribute(declared.Flag(), True, "whether it is on")
    size: int = declared.attribute(declared.Integer(2), 2, "a size", by_caller=False, required=True)
    double: ClassVar[declared.Attribute] = declared.decided(declared.Flag(), lambda op, double: double, "of the table")


def test_every_kind_is_written_and_read() -> None:
    for given in (Trial(share=0.5), Trial("down", -3, np.float32(0.3), 5, np.bool_(False), 9)):
        for double in (False, True):
            written = given.to_onnx(None, double=double)
            assert written["double"] == double
            assert Trial.from_onnx(written) == given
            assert {type(value) for value in written.values()} == {int, float}
    assert Trial.from_onnx({"size": 2}) == Trial()
    assert Trial().share == 0.1
    assert list(Trial().keywords) == ["way", "row", "share", "limit", "on"]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"way": "left"}, ValueError, "way = 'left' is not one of 'up', 'down'"),
        ({"row": 1.0}, TypeError, "row = 1.0 must be an integer or None"),
        ({"row": True}, TypeError, "row = True must be an integer or None"),
        ({"share": None}, TypeError, "share = None must be a real number"),
        ({"share": 10**400}, ValueError, f"share = {10**400} is more than a double holds"),
        ({"limit": 1}, ValueError, "limit = 1.0 must be > 1"),
        ({"limit": math.nan}, ValueError, "limit = nan must be > 1"),
        ({"on": 1}, TypeError, "on = 1 must be a bool"),
        ({"size": 1}, ValueError, "size = 1 must be >= 2"),
    ],
)
def test_a_value_outside_its_range(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        Trial(**given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "the attribute size is missing"),
        ({"size": 2, "way": 5}, "way = 5 is not 4 (up) or 7 (down)"),
        ({"size": 2, "on": 2}, "on = 2 is not 0 or 1"),
    ],
)
def test_a_node_outside_the_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Trial.from_onnx(given)
    assert str(caught.value) == message


def test_a_node_of_another_type() -> None:
    for value, message in (
        ("up", "way = b'up' must be an INT attribute"),
        (1.5, "way = 1.5 must be an INT attribute"),
    ):
        with pytest.raises(ValueError) as caught:
            Trial.read(helper.make_attribute("way", value))
        assert str(caught.value) == message
    assert Trial.read(helper.make_attribute("share", 1)) == 1
    with pytest.raises(ValueError, match="share = b'1' must be a FLOAT or an INT attribute"):
        Trial.read(helper.make_attribute("share", "1"))


def test_onnx_has_the_numbers_of_the_types() -> None:
    for operator in OPERATORS.values():
        for row in declared.rows(operator.spec.Attributes):
            if row.name == "stash_type":
                assert row.values == f"{TensorProto.FLOAT} FLOAT, {TensorProto.DOUBLE} DOUBLE"
            if row.name == "codes_type":
                assert row.values == ", ".join(
                    f"{getattr(TensorProto, name.upper())} {name}" for name in ("int8", "uint8", "int4", "uint4")
                )
