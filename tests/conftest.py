"""What the tests share: skips with a reason, and hypothesis under one profile."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Generated examples build sessions, which takes milliseconds to tens of them: no deadline. The examples are the
# same in every run, so that a red test is red again; LUCID_HYPOTHESIS_EXAMPLES asks for more of them.
settings.register_profile(
    "lucid",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("LUCID_HYPOTHESIS_EXAMPLES", "40")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("lucid")


@pytest.fixture(scope="session")
def native() -> None:
    """Skip where this installation has no native library."""
    import lucid_onnx

    try:
        lucid_onnx.get_library_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
