"""Which tests run under which of compute-sanitizer's tools, what matters most first."""

from __future__ import annotations

import dataclasses

OPS = (
    "normal",
    "q_sample",
    "ddpm_step",
    "add_bias_temb",
    "group_norm_silu",
    "batch_norm_silu",
    "rms_norm_silu",
    "noise_mse",
)
"""Test files of ops; the first three have neither sums nor memory that threads share."""

LAYERS = ("triton_conv", "triton_conv_output", "triton_norm", "triton_rms_norm")
"""Test files of the fused plan's kernels, whose tests all run compiled where there is a GPU."""

CORE = ("matches", "gradients_match", "parts", "writes_nothing")
"""What is enough where a tool is slow: every kernel, in every dtype and memory format."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Some tests under one tool. A test is chosen if its name has `all_of`, one of `any_of` and none of `none_of`."""

    tool: str
    file: str
    all_of: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    none_of: tuple[str, ...] = ()
    seconds: float = 240.0

    @property
    def name(self) -> str:
        """For logs and tables."""
        what = self.file.removeprefix("tests/test_").removesuffix(".py").replace("_", "-")
        return "-".join([self.tool, what, *(part.removesuffix("-gpu") for part in self.all_of)])

    @property
    def expression(self) -> str:
        """As pytest's -k takes it."""
        one = [" or ".join(self.any_of)] if self.any_of else []
        parts = [*self.all_of, *(f"({part})" for part in one), *(f"not {part}" for part in self.none_of)]
        return " and ".join(parts)

    def arguments(self) -> list[str]:
        """For pytest."""
        return [self.file, *(["-k", self.expression] if self.expression else [])]


def matching(job: Job, test: str) -> bool:
    """Whether pytest would run the test, by its name, in this job."""
    file, _, rest = test.partition("::")
    return (
        file == job.file
        and all(part in rest for part in job.all_of)
        and (not job.any_of or any(part in rest for part in job.any_of))
        and not any(part in rest for part in job.none_of)
    )


def of_op(tool: str, op: str, backend: str, any_of: tuple[str, ...] = ()) -> Job:
    """The tests of an op on one backend."""
    # opcheck runs through autograd and tracing, minutes of host time under the tool and no other launch.
    return Job(tool, f"tests/test_{op}.py", (f"{backend}-gpu",), any_of, ("opcheck",))


def of_layer(tool: str, layer: str, none_of: tuple[str, ...] = ()) -> Job:
    """The tests of a kernel of fused plans."""
    return Job(tool, f"tests/test_{layer}.py", none_of=("bad_input", "every_tile", *none_of))


SUMS = OPS[3:]
BACKENDS = ("native", "triton")
JOBS: tuple[Job, ...] = (
    *(of_op("memcheck", op, backend) for backend in BACKENDS for op in OPS),
    *(of_layer("memcheck", layer) for layer in LAYERS),
    *(of_op("racecheck", op, backend, CORE) for backend in BACKENDS for op in SUMS),
    *(of_layer("racecheck", layer) for layer in LAYERS),
    Job("memcheck", "tests/test_triton_conv_plan.py", any_of=("network_of_these_layers",)),
    *(of_op("synccheck", op, backend, CORE) for backend in BACKENDS for op in SUMS),
    *(of_layer("synccheck", layer) for layer in LAYERS[:1]),
)
