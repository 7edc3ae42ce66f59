"""The Triton kernels as a plan uses them: whole networks layer by layer, in the interpreter or on the GPU where there
is one, and the choice of tiles."""

from __future__ import annotations

import functools

import pytest
import torch
from inference_models import products_of
from plan_networks import ddpm_unet, rms_unet, unet

pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")

from ddpm_fast.backends.triton import launch
from ddpm_fast.backends.triton.conv_call import Tile
from ddpm_fast.inference import gpu, gpu_layers, library
from ddpm_fast.inference.candidate import Packs
from ddpm_fast.inference.check import BOUNDS, error, exact
from ddpm_fast.inference.gpu_tiles import tiles, with_joined
from ddpm_fast.inference.known import read
from ddpm_fast.inference.network import (
    Attention,
    Conv,
    Down,
    Layer,
    Linear,
    LinearAttention,
    Norm,
    Output,
    RMSNorm,
    Up,
)
from ddpm_fast.inference.plan import frame_for, places
from ddpm_fast.nn import DDPMUNet, UNet

H100, A100 = (132, 90), (108, 80)
CPU = torch.device("cpu")
DEVICE = CPU if launch.INTERPRETED else torch.device("cuda", torch.cuda.current_device())
# With few processors programs are large, which suits the interpreter.
HERE = (4, 90) if launch.INTERPRETED else gpu.processors(DEVICE)


@pytest.mark.parametrize(
    ("size", "sizes", "n", "dtype"),
    [
        pytest.param(8, {}, 2, torch.float32, id="float32"),
        pytest.param(8, {"num_classes": 3, "in_channels": 1}, 3, torch.bfloat16, id="labels_bfloat16"),
        pytest.param(4, {}, 17, torch.float16, id="float16_down_to_single_pixels"),
    ],
)
@torch.no_grad()
def test_a_network_of_these_layers_computes_the_model(size, sizes, n, dtype):
    """Every layer alone against float32, then all of them in a row against the model in float64."""
    model = unet(**sizes).to(DEVICE)
    network = read(model)
    spots = places(network, n, size, size, dtype, DEVICE, Packs())
    frame = frame_for(network, n, size, size, DEVICE)
    if network.time.null_label is not None:
        frame.label_rows = torch.arange(n, device=DEVICE) % (network.time.null_label + 1)
    images = torch.arange(n, device=DEVICE)
    kinds = set()
    for layer, place in zip(network.layers, spots, strict=True):
        listed = gpu_layers.listed(layer, n, place.h, place.w, dtype, *HERE)
        kinds |= {getattr(candidate, "kind", "output") for candidate in listed}
        assert len({candidate.name for candidate in listed}) == len(listed)
        bound = listed[0].prepare(layer, place)
        expected = exact(layer, place, frame, images)
        assert error(layer, place, frame, bound, expected, images) < BOUNDS[dtype], (layer.name, listed[0].name)
    assert kinds >= {"first", "conv", "up", "output"} | ({"window", "point"} if size == 4 else set())
    t = torch.linspace(0, 999, n, device=DEVICE).round()
    labels = () if frame.label_rows is None else (frame.label_rows,)
    m = model.double()(frame.x.double(), t, *labels)
    assert (frame.out.double() - m).norm() / m.norm() < 3 * BOUNDS[dtype]


def left_to_the_library(layer: Layer) -> bool:
    if isinstance(layer, Conv):
        return layer.resample == "down" or layer.weight.shape[-1] == 7
    return isinstance(layer, (Attention, LinearAttention, Down))


def run_by_layers(model, network, size, n, dtype) -> tuple[set, set]:
    """Every layer alone against float32, then all of them in a row against the model in float64: the library's where
    there is no kernel. The kinds of implementations, and of layers with a residual."""
    spots = places(network, n, size, size, dtype, DEVICE, Packs())
    frame = frame_for(network, n, size, size, DEVICE)
    labels = () if frame.label_rows is None else (frame.label_rows,)
    images = torch.arange(n, device=DEVICE)
    kinds, residuals = set(), set()
    for layer, place in zip(network.layers, spots, strict=True):
        listed = gpu_layers.listed(layer, n, place.h, place.w, dtype, *HERE)
        assert bool(listed) != left_to_the_library(layer), layer.name
        assert len({candidate.name for candidate in listed}) == len(listed)
        candidate = (listed or library.candidates(layer, n, place.h, place.w, dtype, DEVICE))[0]
        kinds.add(getattr(candidate, "kind", "library" if not listed else type(layer)))
        if place.residual is not None:
            residuals.add(type(layer))
        bound = candidate.prepare(layer, place)
        expected = exact(layer, place, frame, images)
        assert error(layer, place, frame, bound, expected, images) < BOUNDS[dtype], (layer.name, candidate.name)
    t = torch.linspace(0, 999, n, device=DEVICE).round()
    m = model.double()(frame.x.double(), t, *labels)
    assert (frame.out.double() - m).norm() / m.norm() < 3 * BOUNDS[dtype]
    return kinds, residuals


@pytest.mark.parametrize(
    ("size", "options", "n", "dtype"),
    [
        pytest.param(8, {}, 2, torch.float32, id="float32"),
        pytest.param(8, {"resnet_time_scale_shift": "scale_shift"}, 3, torch.bfloat16, id="scale_shift_bfloat16"),
        pytest.param(2, {"num_class_embeds": 3}, 17, torch.float16, id="labels_float16_down_to_single_pixels"),
    ],
)
@torch.no_grad()
def test_the_paper_s_network_of_these_layers_and_the_library_s_computes_the_model(size, options, n, dtype):
    """As above, with the library's attentions and convolutions of stride 2 in between."""
    model = ddpm_unet(**options).to(DEVICE)
    kinds, residuals = run_by_layers(model, read(model), size, n, dtype)
    assert kinds >= {"first", "linear", "doubled", Norm, Output, "library"}
    assert kinds >= ({"window", "point"} if size == 2 else {"conv"})
    assert residuals == {Conv, Linear}


@pytest.mark.parametrize(
    ("size", "options", "n", "dtype"),
    [
        pytest.param(4, {}, 1, torch.float32, id="float32"),
        pytest.param(4, {"dim_mults": (3,), "full_attn": False}, 2, torch.bfloat16, id="bfloat16"),
    ],
)
@torch.no_grad()
def test_lucidrains_network_of_these_layers_and_the_library_s_computes_the_model(size, options, n, dtype):
    """The library's are the stem, the attentions and the convolutions of stride 2."""
    model = rms_unet(**options).to(DEVICE)
    kinds, residuals = run_by_layers(model, read(model), size, n, dtype)
    assert kinds >= {"conv", "linear", RMSNorm, Output, "library"}
    assert residuals >= {Linear, RMSNorm}


@torch.no_grad()
def test_new_weights_are_seen_by_what_is_bound_already():
    network = read(unet().to(DEVICE))
    packs = Packs()
    layer, place = network.layers[1], places(network, 1, 8, 8, torch.float32, DEVICE, packs)[1]
    frame = frame_for(network, 1, 8, 8, DEVICE)
    bound = gpu_layers.listed(layer, 1, 8, 8, torch.float32, *HERE)[0].prepare(layer, place)
    place.source.copy_(torch.randn(place.source.shape, generator=torch.Generator().manual_seed(0)))
    layer.weight.mul_(-2.0)
    layer.bias.add_(1.0)
    packs.refresh()
    images = torch.arange(1, device=DEVICE)
    assert error(layer, place, frame, bound, exact(layer, place, frame, images), images) < BOUNDS[torch.float32]


def test_no_candidates_without_a_gpu_or_for_layers_that_do_not_fit():
    network = read(unet())
    assert gpu.candidates(network.layers[1], 1, 8, 8, torch.float32, CPU) == []
    assert gpu.output_step(network.layers[-1], places(network, 1, 8, 8, torch.float32, CPU, Packs())[-1]) is None
    for layer in read(ddpm_unet(block_out_channels=(24, 40), norm_num_groups=4)).layers:
        sizes = (
            (layer.source.channels,) if isinstance(layer, Norm) else getattr(layer, "weight", torch.ones(9)).shape[:2]
        )
        fits = not left_to_the_library(layer) and all(size % 16 == 0 or size == 3 for size in sizes)
        assert bool(gpu_layers.listed(layer, 1, 8, 8, torch.bfloat16, *H100)) == fits, layer.name
    for layer in read(unet(width=24)).layers:
        sizes = layer.weight.shape[:2]
        fits = all(size % 16 == 0 or size == 3 for size in sizes)
        assert bool(gpu_layers.listed(layer, 1, 8, 8, torch.bfloat16, *H100)) == fits, layer.name
    for dtype, numbers in ((torch.float64, H100), (torch.bfloat16, (40, 75))):
        assert gpu_layers.listed(network.layers[1], 1, 8, 8, dtype, *numbers) == []
    assert gpu_layers.listed(network.layers[1], 2**25, 8, 8, torch.bfloat16, *H100) == []


@functools.cache
def products() -> list[tuple[Conv | Up | Linear, int, int, int]]:
    return products_of(UNet().eval(), 32) + products_of(DDPMUNet().eval(), 32)


@pytest.mark.parametrize("numbers", [H100, A100], ids=["H100", "A100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_suit_the_layer(dtype, numbers):
    for layer, side, channels, _ in products():
        for n in (1, 16, 64, 512):
            rows = n * side * side
            listed = gpu_layers.listed(layer, n, side, side, dtype, *numbers)
            found = [c for c in listed if c.kind in ("conv", "linear", "up", "doubled")]
            assert len(found) <= gpu_layers.TILES + 1
            joined = [c.tile for c in found if c.tile.joined]
            assert len(joined) <= 1
            assert all(tile.m * tile.n <= 4096 and tile.splits > 1 for tile in joined)
            for tile in (candidate.tile for candidate in found):
                assert channels % tile.k == 0
                assert tile.m < 2 * max(rows, 16)
                # What was seen not to spill: test_triton_aot_conv.py.
                assert tile.m * tile.n <= (16384 if dtype == torch.bfloat16 else 4096)
                assert tile.k <= (64 if dtype == torch.bfloat16 else 32)
                assert not (numbers == A100 and tile.m * tile.n >= 8192 and tile.k > 32)
                operands = (tile.m + tile.n) * tile.k * dtype.itemsize * tile.stages
                assert operands <= 163 * 1024


def test_few_rows_split_the_sum_and_many_do_not():
    def best(rows: int) -> Tile:
        return tiles(rows, 512, 1, 512, 9, torch.bfloat16, *H100, 4)[0]

    assert best(16).splits > 1
    assert best(16).m == 16
    assert best(16 * 512) == Tile(128, 128, 64)


def test_the_first_split_tile_stands_twice_joined_first():
    whole, small, large = Tile(16, 32, 64), Tile(16, 64, 64, splits=8), Tile(128, 128, 64, splits=4)
    joined = Tile(16, 64, 64, splits=8, joined=True)
    assert with_joined([whole, large, small, small]) == [whole, large, joined, small, small]
    assert with_joined([whole, large]) == [whole, large]
    assert str(joined) == "16x64x64 split 8 joined"


def test_tiles_are_of_different_shapes_where_there_are_enough():
    found = tiles(4096, 128, 1, 128, 9, torch.bfloat16, *H100, 4)
    assert len({(tile.m, tile.n) for tile in found}) == len(found) == 4
    few = tiles(16, 512, 1, 512, 9, torch.bfloat16, *H100, 6)  # of one row block there are three shapes
    assert len(set(few)) == len(few) == 6
    assert tiles(4, 16, 1, 16, 1, torch.bfloat16, *H100, 8) == [Tile(16, 32, 16, stages=4)]
