"""A pytest plugin with the conformance suite, for the author of a runtime::

    def test_my_runtime(parity):
        outputs = my_runtime.run(parity.model_bytes, parity.inputs)
        parity.check(outputs)

is one test per case of the suite, or, with ``--lucid-parity MODEL.onnx``, per set of inputs to that model. ``parity``
is a `lucid_onnx.parity.suite.SuiteCase`. Nothing is imported before a test asks for the fixture.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .parity.suite import SuiteCase

_FORMS = ("standard", "portable", "native")
#: The fixture's parameter has another name, so that a project can have its own fixture ``parity``.
_PARAMETER = "lucid_parity_case"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lucid-onnx", "the ai.lucid conformance suite (fixture: parity)")
    group.addoption(
        "--lucid-parity",
        action="append",
        default=[],
        metavar="MODEL.onnx",
        help="run tests of the fixture `parity` over this model and random inputs, not over the suite; repeatable",
    )
    group.addoption(
        "--lucid-parity-cases",
        default="*",
        metavar="PATTERN",
        help="the suite's cases whose names match, such as 'max_*'",
    )
    group.addoption(
        "--lucid-parity-form",
        action="append",
        choices=_FORMS,
        help="form of the models, by default standard: no custom domain; repeatable",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if _PARAMETER not in metafunc.fixturenames:
        return
    from .parity import suite

    forms = metafunc.config.getoption("--lucid-parity-form") or ["standard"]
    models = metafunc.config.getoption("--lucid-parity")
    pattern = metafunc.config.getoption("--lucid-parity-cases")
    parameters = []
    if models:
        for path in models:
            if not os.path.isfile(path):
                raise pytest.UsageError(f"--lucid-parity {path}: no such file")
            stem = os.path.splitext(os.path.basename(path))[0]
            for form in forms:
                parameters += [pytest.param((path, k, form), id=f"{stem}-inputs{k}-{form}") for k in range(suite.SETS)]
    else:
        names = suite.names(pattern)
        if not names:
            raise pytest.UsageError(f"--lucid-parity-cases {pattern}: no case matches")
        parameters = [pytest.param((name, None, form), id=f"{name}-{form}") for form in forms for name in names]
    metafunc.parametrize(_PARAMETER, parameters, indirect=True)


@pytest.fixture(name=_PARAMETER)
def _case(request: pytest.FixtureRequest) -> SuiteCase:
    from .parity import suite, work

    name, number, form = request.param
    if number is None:
        return suite.case(name, form)
    try:
        return suite.model_case(name, number, form)
    except work.CannotRunError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture
def parity(lucid_parity_case: SuiteCase) -> SuiteCase:
    """A case of the ai.lucid conformance suite: model, model_bytes, inputs, check(outputs)."""
    return lucid_parity_case
