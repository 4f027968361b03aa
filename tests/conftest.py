"""The fixtures that tests share, skips with a reason, and hypothesis under one profile."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]


def _is_installed() -> bool:
    """Whether the lucid_onnx that would be imported is an installed one, which has lucid_onnx.ops."""
    try:
        return importlib.util.find_spec("lucid_onnx.ops") is not None
    except ModuleNotFoundError:
        return False


if not _is_installed():
    # `python -m pytest` looks in the current folder first, where lucid_onnx is the folder of the sources. pytest has
    # even imported its plugin from there, which imports the rest of the package by name, and only when a test asks.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    for module in [name for name in sys.modules if name.split(".")[0] == "lucid_onnx"]:
        del sys.modules[module]
    if not _is_installed():
        raise pytest.UsageError("lucid_onnx is not installed, which these sources need: pip install '.[cpu,test]'")

pytest.register_assert_rewrite("lucid_testing")

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

if TYPE_CHECKING:
    from lucid_testing.cuda import Emulated, Gpu
    from lucid_testing.torch_exports import Export


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of a ``device`` runs emulated, and on a GPU where there is one, which only such a test looks for."""
    if "device" in metafunc.fixturenames:
        from lucid_testing.cuda import devices

        metafunc.parametrize("device", devices(), indirect=True, scope="module")


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
    """Cache the sources and signatures of torch's own 500 translations, which it reads for every export.

    That takes half of an export's time. The patched names are private: if they move, the tests are slower, not wrong.
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


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> Emulated | Gpu:
    """Where the CUDA kernels run."""
    from lucid_testing import cuda

    return cuda.emulated() if request.param == "emulated" else cuda.Gpu(str(cuda.gpu_library()))


@pytest.fixture(scope="module")
def emulated() -> Emulated:
    """The CUDA kernels on the CPU."""
    from lucid_testing import cuda

    return cuda.emulated()


@pytest.fixture(scope="session")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Export]:
    """An export by torch.onnx.export(dynamo=False), made when first asked for."""
    from lucid_testing.torch_exports import export_legacy

    folder = tmp_path_factory.mktemp("legacy")
    return functools.cache(lambda name: export_legacy(name, folder))


@pytest.fixture(scope="session")
def dynamo(tmp_path_factory: pytest.TempPathFactory, translations: None) -> Callable[[str], Export]:
    """An export by torch.onnx.export(dynamo=True), made when first asked for."""
    from lucid_testing.torch_exports import export_dynamo

    folder = tmp_path_factory.mktemp("dynamo")
    return functools.cache(lambda name: export_dynamo(name, folder))


@pytest.fixture
def lowered(tmp_path: Path) -> Path:
    """A model in standard form whose table of 80,000 bytes is external."""
    import numpy as np

    import lucid_onnx

    table = np.random.default_rng(0).standard_normal((1000, 20)).astype(np.float32)
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    lucid_onnx.save(lucid_onnx.build_model(table, mode="sum", form="standard"), path, external_data=True)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    return path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: the exit code, and what it and native code wrote to stdout and stderr."""
    from lucid_onnx import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in arguments])
        return (code, *capfd.readouterr())

    return call
