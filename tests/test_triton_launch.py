"""Launching Triton kernels: what a kernel that cannot run raises, and what Triton is asked for."""

import subprocess

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources, PTXASError

from ddpm_fast.backends.triton import launch
from ddpm_fast.inference import check
from ddpm_fast.inference.candidate import Frame, Packs, Place
from ddpm_fast.inference.library import candidates
from ddpm_fast.inference.network import Linear, whole

CPU = torch.device("cpu")
FAILURES = [
    OutOfResources(300_000, 232_448, "shared memory"),
    PTXASError("too many registers"),
    subprocess.CalledProcessError(1, ["gcc"]),
    FileNotFoundError("ptxas"),
    AssertionError("libcuda.so cannot found!"),
]


class Kernel:
    """What a kernel of Triton's is to `launch`, which fails when it is launched."""

    __name__ = "_some_kernel"

    def __init__(self, failure):
        self.failure = failure

    def __getitem__(self, grid):
        def run(*args, **options):
            raise self.failure

        return run


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_kernel_that_cannot_run_is_a_runtime_error(failure):
    with pytest.raises(RuntimeError, match="Triton cannot run _some_kernel: ") as caught:
        launch.launch(Kernel(failure), (1,), torch.zeros(1))
    assert caught.value.__cause__ is failure


def test_other_errors_stay_what_they_are():
    with pytest.raises(KeyError):
        launch.launch(Kernel(KeyError("no such option")), (1,), torch.zeros(1))


def test_a_plan_leaves_out_a_kernel_that_cannot_run():
    source, target = torch.randn(1, 4, 4, 16), torch.zeros(1, 4, 4, 16)
    layer = Linear("linear", torch.randn(16, 16), torch.randn(16), whole("a", 16, 0), whole("b", 16, 0))
    place = Place(1, 4, 4, torch.float32, CPU, source, target, None, 0, Packs())
    frame = Frame(
        torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
    )

    class TooLarge:
        name = "triton 128x128x64"

        def prepare(self, layer, place):
            return lambda frame: launch.launch(Kernel(FAILURES[0]), (1,), place.target)

    library = candidates(layer, 1, 4, 4, torch.float32, CPU)
    served = check.serving(layer, place, frame, [TooLarge(), *library])
    assert [candidate.name for candidate, _ in served] == [candidate.name for candidate in library]
