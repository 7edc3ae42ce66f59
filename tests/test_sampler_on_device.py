"""A sampling step asks the host for nothing and touches nothing there: run on tensors without values or addresses,
where reading a number raises, with an eye on the device of everything that it makes. What a CUDA graph needs.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ddpm_fast
from ddpm_fast import nn
from ddpm_fast.sampler import Sampler
from ddpm_fast.sampling.loop import Layout, Loop
from ddpm_fast.schedule import Schedule

META = torch.device("meta")
SHAPE = (3, 8, 8)
BLOCKS = {
    "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1,
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
}  # fmt: skip


class Devices(TorchDispatchMode):
    """Notes operations with a tensor of the host's in or out."""

    def __init__(self):
        super().__init__()
        self.operations, self.on_host = 0, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs or {}, result)) if isinstance(value, torch.Tensor)]
        self.operations += 1
        if any(tensor.device != META for tensor in tensors):
            self.on_host.append(str(operation))
        return result


NETS = {
    "unet": (lambda: ddpm_fast.UNet(width=16, depth=2, time_dim=16, num_classes=3), {}),
    "paper": (lambda: nn.DDPMUNet(**BLOCKS), {}),
    "paper with a variance": (lambda: nn.DDPMUNet(out_channels=6, **BLOCKS), {"variance": "learned_range"}),
    "rms": (lambda: nn.RMSNormUNet(16, dim_mults=(1, 2), self_condition=True), {}),
}
CHOICES = [{}, {"thresholding": True}, {"method": "ddim"}, {"method": "dpmsolver++"}, {"time_scale": "rescaled"}]
LAYOUTS = [
    {"chunk": 2},
    {"chunk": 2, "noise": True, "x0": True},
    {"chunk": 1},
    {"chunk": 2, "label": ((), torch.int64)},
    {"chunk": 2, "label": ((), torch.int64), "guided": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_a_step_needs_nothing_of_the_host(monkeypatch, name, dtype):
    make, options = NETS[name]
    # Addresses, which these tensors do not have, are not looked at while a compiler traces.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    net = make().eval().to(META, dtype)
    for choices in CHOICES if dtype == torch.float32 else CHOICES[:1]:
        if options and choices.get("method") == "dpmsolver++":
            continue
        plan = Sampler(net, Schedule.linear(10), **options, **choices)._plan(META)
        for layout in LAYOUTS:
            if "label" in layout and name != "unet":
                continue
            loop = Loop(plan, Layout(n=2, shape=SHAPE, **layout))
            with torch.inference_mode(), Devices() as seen:
                loop.step()
            assert seen.operations > 20
            assert seen.on_host == [], (choices, layout)


def test_a_step_that_asks_the_host_is_found(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for model, error in (
        (lambda x, t: x * float(t[0]), RuntimeError),
        (lambda x, t: x * torch.ones(1).to(x), None),
    ):
        plan = Sampler(model, Schedule.linear(10), device="meta")._plan(META)
        loop = Loop(plan, Layout(n=2, shape=SHAPE, chunk=2))
        with torch.inference_mode(), Devices() as seen:
            if error is None:
                loop.step()
                assert seen.on_host
            else:
                with pytest.raises(error):
                    loop.step()
