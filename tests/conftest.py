"""What the tests share: skips with a reason, and hypothesis under one profile."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

if importlib.util.find_spec("lucid_onnx.ops") is None:
    raise pytest.UsageError(
        "lucid_onnx is the folder of the sources here, not the installed package, which has lucid_onnx.ops too: "
        "install it (pip install '.[cpu,test]') and run `pytest`; `python -m pytest` would look in this folder first"
    )

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


@pytest.fixture(scope="session")
def infers_shapes() -> None:
    """Skip where the kernels are not asked for shapes: before 1.24 that crashes on an absent middle input."""
    ort = pytest.importorskip("onnxruntime")
    if tuple(int(x) for x in ort.__version__.split(".")[:2]) < (1, 24):
        pytest.skip("shape inference of custom ops is not safe before onnxruntime 1.24")


@pytest.fixture(scope="session")
def newest_opset() -> int:
    """The newest opset that we write and both packages here know: onnx to check a model, onnxruntime to run it."""
    import onnx
    from onnx import TensorProto, helper

    from lucid_onnx.ops.embedding_bag import spec

    ort = pytest.importorskip("onnxruntime")
    for opset in range(min(spec.MAX_OPSET, onnx.defs.onnx_opset_version()), spec.DEFAULT_OPSET, -1):
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", [x], [y])
        imports = [helper.make_opsetid("", opset)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=helper.find_min_ir_version_for(imports))
        try:
            ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        except Exception as error:
            if re.search(r"[Oo]pset \d+ is under development|Unsupported model IR version: \d+", str(error)):
                continue
            raise
        return opset
    return spec.DEFAULT_OPSET


@pytest.fixture(scope="session")
def translations() -> Iterator[None]:
    """torch reads the sources and signatures of its own 500 translations for every export, half of its time.

    Where it does so is its own affair: if that place moves, the tests are slower and no less true.
    """
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    with pytest.MonkeyPatch.context() as patch:
        one = torch.ones(1, 1)
        torch.onnx.export(
            torch.nn.Linear(1, 1).eval(), (one,), dynamo=True, verbose=False
        )  # so that the place is there
        for name, apis in list(sys.modules.items()):
            if name.startswith("onnxscript._framework_apis.") and hasattr(apis, "get_torchlib_ops"):
                patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        schemas = sys.modules.get("torch.onnx._internal.exporter._schemas")
        if hasattr(schemas, "op_signature_from_function"):
            patch.setattr(schemas, "op_signature_from_function", functools.cache(schemas.op_signature_from_function))
        yield
