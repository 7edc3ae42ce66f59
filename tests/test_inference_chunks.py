"""A program that runs its layers for a few images at a time gives the bits of one that runs each for all of them."""

from __future__ import annotations

import pytest
import torch
from inference_models import one_thread

import ddpm_fast
from ddpm_fast.inference import native
from ddpm_fast.inference.candidate import Packs, Place
from ddpm_fast.inference.network import Linear, whole

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the extension has no inference layers here"),
    pytest.mark.usefixtures(one_thread.__name__),
]


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "tutorial":
        return ddpm_fast.UNet(width=16, depth=2, num_classes=3).eval()
    return ddpm_fast.nn.RMSNormUNet(16, dim_mults=(1, 2), attn_dim_head=16).eval()


@pytest.mark.parametrize("name", ["tutorial", "lucidrains"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_those_of_all_images_at_once(name, dtype, monkeypatch) -> None:
    """Every image has its own timestep and label, so that a chunk that reads another's would be seen."""
    n, model = 5, network(name)
    x, t = torch.randn(n, 3, 8, 12), torch.tensor([999, 0, 3, 500, 77])
    labels = torch.tensor([0, 1, 2, 1, 0]) if name == "tutorial" else None
    results, pieces = [], []
    for budget in (1 << 40, 1, 8_000):
        monkeypatch.setattr(native, "CHUNK_BYTES", budget)
        compiled = ddpm_fast.inference.compile(model, dtype=dtype, deterministic=True)
        results.append(compiled(x, t, labels))
        program = compiled.plan(n, 8, 12).program
        assert program is not None
        pieces.append(len(list(native.chunked(program.layers, 1))))
    assert pieces[0] == len(program.layers)
    assert pieces[1] >= pieces[2] > pieces[0]
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


def layer(name: str, n: int, h: int) -> native.NativeLayer:
    """16 channels to 16: 1024 bytes a pixel row of 8 in float32."""
    part = whole(name, 16, 0)
    linear = Linear(name, torch.zeros(16, 16), torch.zeros(16), part, part)
    x, y = torch.zeros(n, h, 8, 16), torch.zeros(n, h, 8, 16)
    place = Place(n, h, 8, torch.float32, torch.device("cpu"), x, y, None, 0, Packs())
    return native.NativeLayer("linear", native.isas(torch.float32)[0], linear, place)


def order(layers: list[native.NativeLayer], threads: int) -> list[tuple[str, int | None, int | None]]:
    return [(one.layer.name, images.start, images.stop) for one, images in native.chunked(layers, threads)]


def test_neighbours_of_one_size_take_turns_on_even_parts(monkeypatch) -> None:
    monkeypatch.setattr(native, "CHUNK_BYTES", 4096)  # for two threads 8192, which are 2 images of 4x8
    layers = [layer("a", 5, 4), layer("b", 5, 4), layer("c", 5, 2), layer("d", 5, 4)]
    turns = [("a", 0, 1), ("b", 0, 1), ("a", 1, 3), ("b", 1, 3), ("a", 3, 5), ("b", 3, 5)]
    assert order(layers, 1) == [*turns, ("c", None, None), ("d", None, None)]


def test_each_thread_finds_an_image(monkeypatch) -> None:
    monkeypatch.setattr(native, "CHUNK_BYTES", 1)
    layers = [layer("a", 5, 4), layer("b", 5, 4)]
    assert order(layers, 2) == [("a", 0, 2), ("b", 0, 2), ("a", 2, 5), ("b", 2, 5)]
    assert order(layers, 3) == [("a", None, None), ("b", None, None)]
