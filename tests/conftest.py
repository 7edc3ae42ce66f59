"""Fixtures of the suite: which backend serves a test, poisoned allocations, and what a missing GPU means.

Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before triton is imported. With
DDPM_FAST_REQUIRE_GPU=1 a test that would be skipped for lack of a GPU fails instead.

The marker ``gpu`` says which tests need one. The others find none even where there is one, neither they nor the
processes that they start: what picks a device by itself picks the CPU in them, on every machine.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
REQUIRE_GPU = os.environ.get("DDPM_FAST_REQUIRE_GPU") == "1"
# The Triton kernels compiled for a GPU of this capability (80, 90) and executed on the CPU (benchmarks/gpu_check/ptx).
PTX = int(os.environ.get("DDPM_FAST_TEST_PTX", "0"))
if not HAS_GPU and not PTX:
    os.environ["TRITON_INTERPRET"] = "1"

# The CUDA kernels compiled for the CPU (tests/cuda_on_cpu): then they alone serve the op tests.
SHIM = os.environ.get("DDPM_FAST_SHIM_MODULE")
ONLY_SHIM = os.environ.get("DDPM_FAST_TEST_BACKEND") == "cuda_on_cpu"

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(Path(__file__).parent))

import interpreter  # noqa: E402

import ddpm_fast  # noqa: E402
from ddpm_fast import backends  # noqa: E402
from ddpm_fast.backends import native  # noqa: E402

if not HAS_GPU and not PTX and importlib.util.find_spec("triton") is not None:
    interpreter.make_faster()

# What `with torch.device(...)` redirects is looked up once: here, before a test replaces torch.empty.
with torch.device("meta"):
    torch.empty(0)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "no_poison: allocations are left alone (torch.compile traces them)")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")
    if threading.current_thread() is threading.main_thread():
        # A script's job in the background ignores Ctrl-C, and one under nohup that its terminal has gone.
        for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, usual)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of a module whose DEVICE is the GPU, where there is one, need it."""
    for item in items:
        device = getattr(getattr(item, "module", None), "DEVICE", None)
        if isinstance(device, torch.device) and device.type == "cuda":
            item.add_marker("gpu")


_REAL = {"is_available": torch.cuda.is_available, "device_count": torch.cuda.device_count}
_NONE = {"is_available": lambda: False, "device_count": lambda: 0}
_VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")


def show_gpu(shown: bool) -> None:
    """Let PyTorch, and children to come, find the GPU or not. Here, not in a fixture: those of a module come first."""
    for name, function in (_REAL if shown else _NONE).items():
        setattr(torch.cuda, name, function)
    if not shown:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif _VISIBLE is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = _VISIBLE


def pytest_runtest_setup(item: pytest.Item) -> None:
    if HAS_GPU:
        show_gpu(item.get_closest_marker("gpu") is not None)
    if item.get_closest_marker("gpu") and not HAS_GPU:
        message = "no NVIDIA GPU here; run on a machine with one: DDPM_FAST_REQUIRE_GPU=1 make test"
        if REQUIRE_GPU:
            pytest.fail(message)
        pytest.skip(message)


def _use_shim(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SHIM is not None, (
        "DDPM_FAST_TEST_BACKEND=cuda_on_cpu needs DDPM_FAST_SHIM_MODULE, the path of the built module"
    )
    if "_C_shim" not in sys.modules:
        spec = importlib.util.spec_from_file_location("_C_shim", SHIM)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["_C_shim"] = module
    monkeypatch.setattr(native, "_C", sys.modules["_C_shim"])
    monkeypatch.setattr(native, "_target", lambda x: (0, 0))


if ONLY_SHIM:
    SERVED = [pytest.param(("native", "cpu"), id="cuda_on_cpu")]
elif PTX:
    SERVED = [pytest.param(("triton", "cpu"), id="triton-ptx")]
else:
    SERVED = [
        pytest.param(("native", "cpu"), id="native"),
        pytest.param(
            ("triton", "cpu"),
            id="triton-interpreter",
            marks=pytest.mark.skipif(HAS_GPU, reason="there is a GPU: compiled kernels are tested"),
        ),
        pytest.param(("reference", "cuda"), id="reference-gpu", marks=pytest.mark.gpu),
        pytest.param(("native", "cuda"), id="native-gpu", marks=pytest.mark.gpu),
        pytest.param(("triton", "cuda"), id="triton-gpu", marks=pytest.mark.gpu),
    ]


@pytest.fixture(params=SERVED)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device of a test over all backends; while it runs, the backend of the parameter serves every op."""
    name, where = request.param
    if ONLY_SHIM:
        _use_shim(monkeypatch)
    with ddpm_fast.use_backend(name):
        yield torch.device(where)


@pytest.fixture(autouse=bool(PTX))
def compiled_kernels(monkeypatch: pytest.MonkeyPatch, module: Callable[[str], Any]) -> Iterator[None]:
    """With DDPM_FAST_TEST_PTX, what the kernels are compiled to serves CPU tensors: those of Triton, or those of the
    module that gpu_check.ptx.cuda has built, where DDPM_FAST_SHIM_MODULE names it."""
    if ONLY_SHIM:
        cuda = module("gpu_check.ptx.cuda")
        cuda.load_ptx(Path(str(SHIM)))
        with cuda.watch():
            yield
        return
    monkeypatch.setattr("ddpm_fast.backends.triton.unavailable_reason", lambda device: None)
    with module("gpu_check.ptx").launches(PTX):
        yield


@pytest.fixture(autouse=True)
def poisoned_allocations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty* returns NaN (integers: 99) inside the package, so that an element never written shows itself."""
    if request.node.get_closest_marker("no_poison"):
        return

    def poison(original):
        def allocate(*args, **kwargs):
            x = original(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("ddpm_fast") and isinstance(x, torch.Tensor) and x.device.type != "meta":
                x.fill_(float("nan") if x.is_floating_point() else 99)
            return x

        return allocate

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(autouse=True)
def automatic_backend() -> Iterator[None]:
    """No test leaves a backend choice behind."""
    yield
    backends._requested = None
    backends._chosen.clear()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks so small that handing out work costs more than the work, above all beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def lucidrains() -> Any:
    """The package denoising_diffusion_pytorch. It asks for torchvision, which has no build for this CPU-only torch: a
    stand-in is there while it is imported, which only its Trainer's images go through.
    """
    sys.path.insert(0, str(BENCHMARKS))
    try:
        packages = importlib.import_module("packages")
        return packages.lucidrains()
    except packages.Missing as missing:
        pytest.skip(f"denoising_diffusion_pytorch is {missing}")
    finally:
        sys.path.remove(str(BENCHMARKS))


# -- the benchmark ---------------------------------------------------------------------------------------------------


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a file of benchmarks/ as its neighbours do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def tiny(module: Any) -> Any:
    """(num_classes) -> a problem of two 8x8 images."""
    candidate = module("candidate")

    def make(num_classes: int | None = None) -> Any:
        options = {"width": 16, "depth": 2, "num_classes": num_classes}
        return candidate.Problem(candidate.Case("tiny", 2, (3, 8, 8), options=options), torch.device("cpu"))

    return make


@pytest.fixture
def tiny_paper(module: Any) -> Any:
    """(num_classes) -> the same of the paper's network, with attention, and with labels where asked."""
    candidate = module("candidate")

    def make(num_classes: int | None = None) -> Any:
        options = {
            "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1,
            "num_class_embeds": num_classes,
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        }  # fmt: skip
        return candidate.Problem(candidate.Case("tiny", 2, (3, 8, 8), "ddpm-cifar10-32", options), torch.device("cpu"))

    return make
