"""generator=: the numbers of torch.randn, in the order in which diffusers' pipelines draw them."""

from __future__ import annotations

import pytest
import torch
from sampler_models import SHAPE, Net, threads

from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule

LINEAR = Schedule.linear(100)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_draws_x_t_and_then_each_row_but_the_last(dtype):
    net, generator, twin = Net().to(dtype), seeded(5), seeded(5)
    sampler = Sampler(net, LINEAR, steps=8, clip=1.0)
    got = sampler.sample(3, SHAPE, generator=generator)
    x, *noise = [torch.randn(3, *SHAPE, generator=twin, dtype=dtype) for _ in range(8)]
    assert torch.equal(generator.get_state(), twin.get_state())
    given = [*noise, torch.zeros_like(x)]
    assert torch.equal(got, sampler.sample(3, SHAPE, x=x, noise=lambda row, t: given[row]))
    assert sampler.sample(3, SHAPE, generator=generator).ne(got).any()


def test_is_what_diffusers_pipeline_draws():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()
    pipeline = diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(num_train_timesteps=100))
    pipeline.set_progress_bar_config(disable=True)
    sampler = Sampler(net, LINEAR, like="diffusers", steps=10)
    for draw in (lambda: torch.manual_seed(0), lambda: [seeded(i) for i in range(4)], lambda: [seeded(3)]):
        theirs = pipeline(batch_size=4, generator=draw(), num_inference_steps=10, output_type="np").images
        ours = sampler.sample(4, generator=draw())
        torch.testing.assert_close(ours.permute(0, 2, 3, 1), torch.from_numpy(theirs), rtol=0, atol=1e-4)


def test_a_list_makes_each_image_its_own():
    sampler = Sampler(lambda x, t: 0.1 * x, LINEAR, steps=6)
    three = sampler.sample(3, SHAPE, generator=[seeded(i) for i in range(3)])
    for i in range(3):
        assert torch.equal(three[i : i + 1], sampler.sample(1, SHAPE, generator=seeded(i)))


def test_methods_without_noise_draw_x_t_only():
    for options in ({"method": "ddim"}, {"method": "dpmsolver++"}):
        generator, twin = seeded(1), seeded(1)
        sampler = Sampler(Net(), LINEAR, steps=6, **options)
        got = sampler.sample(2, SHAPE, generator=generator)
        assert torch.equal(got, sampler.sample(2, SHAPE, x=torch.randn(2, *SHAPE, generator=twin)))
        assert torch.equal(generator.get_state(), twin.get_state())


def test_resumes_with_the_generator_as_it_is():
    sampler = Sampler(Net(), LINEAR, steps=6)
    whole = sampler.sample(2, SHAPE, generator=seeded(4))
    generator = seeded(4)
    for step in sampler.stream(2, SHAPE, generator=generator):
        if step.row == 2:
            break
    assert sorted(step.state()) == ["start", "x"]
    assert sampler.last_seed is None
    assert torch.equal(sampler.sample(2, **step.state(), generator=generator), whole)


def test_nothing_is_drawn_by_a_call_that_cannot_run():
    generator = seeded(0)
    before = generator.get_state()
    sampler = Sampler(Net(), LINEAR)
    with pytest.raises(ValueError, match="output must be one of"):
        sampler.sample(2, SHAPE, generator=generator, output="png")
    sampler.stream(2, SHAPE, generator=generator)
    assert sampler.sample(0, SHAPE, generator=generator).shape == (0, *SHAPE)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": 1}, ValueError, "generator draws all noise: it excludes seed, first_sample and noise"),
        ({"first_sample": 1}, ValueError, "generator draws all noise"),
        ({"noise": lambda row, t: None}, ValueError, "generator draws all noise"),
        ({"generator": 5}, TypeError, "generator must be a torch.Generator or a list of them, got int"),
        ({"generator": [5, 5]}, TypeError, "generator must be a torch.Generator or a list of them, got int in it"),
        ({"generator": []}, ValueError, "generator must be one torch.Generator or a list of 2, one per sample, got 0"),
        ({"generator": [seeded(0)] * 3}, ValueError, "a list of 2, one per sample, got 3"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        Sampler(Net(), LINEAR).sample(2, SHAPE, **{"generator": seeded(0), **arguments})


@pytest.mark.gpu
def test_on_a_gpu():
    sampler = Sampler(lambda x, t: 0.1 * x, LINEAR, steps=6, device="cuda")
    by_cpu = sampler.sample(2, SHAPE, generator=seeded(0)).cpu()
    on_cpu = Sampler(lambda x, t: 0.1 * x, LINEAR, steps=6).sample(2, SHAPE, generator=seeded(0))
    assert torch.equal(by_cpu, on_cpu)
    generator = torch.Generator("cuda").manual_seed(0)
    first = torch.randn(2, *SHAPE, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    start = Sampler(lambda x, t: 0.1 * x, LINEAR, steps=1, prediction="x0", device="cuda")
    torch.testing.assert_close(start.sample(2, SHAPE, generator=generator), 0.1 * first)
    with pytest.raises(ValueError, match="generator must live on cpu, where the sampler runs, got one on cuda"):
        Sampler(Net(), LINEAR).sample(2, SHAPE, generator=generator)
