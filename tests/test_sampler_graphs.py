"""The control of CUDA graphs, with a stand-in that records a step and replays it; and, with a GPU, the real thing."""

import warnings

import pytest
import torch
from sampler_models import SHAPE, Net, threads

from ddpm_fast.sampler import Sampler
from ddpm_fast.sampling import graphs
from ddpm_fast.schedule import Schedule

LINEAR = Schedule.linear(40)


class Captures:
    """Stands in for `graphs.capture`: runs the step as a warm-up does, then hands out what replays it."""

    def __init__(self):
        self.loops, self.replays = [], 0

    def __call__(self, loop):
        self.loops.append(loop)
        for _ in range(graphs.WARMUP_STEPS):
            loop.rows.zero_()
            loop.step()
        loop.rows.zero_()
        model, step = loop.plan.model, loop.step
        addresses = {name: value.data_ptr() for name, value in vars(loop).items() if torch.is_tensor(value)}

        def replay():
            now = {name: value.data_ptr() for name, value in vars(loop).items() if torch.is_tensor(value)}
            assert now == addresses  # a graph would go on using the old ones
            assert loop.plan.model is model
            self.replays += 1
            step()

        return replay


@pytest.fixture
def captures(monkeypatch):
    stand_in = Captures()
    monkeypatch.setattr(graphs, "supported", lambda device: True)
    monkeypatch.setattr(graphs, "capture", stand_in)
    return stand_in


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture
def net():
    return Net(num_classes=4)


def both(net, **choices):
    return Sampler(net, LINEAR, steps=6, **choices), Sampler(net, LINEAR, steps=6, cuda_graph=False, **choices)


class TestControl:
    def test_one_capture_serves_new_seeds_labels_guidance_states_and_starts(self, captures, net):
        graphed, eager = both(net)
        x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
        for call in (
            {"seed": 1, "labels": 2, "guidance": 2.0},
            {"seed": 2, "labels": [0, 1, 2], "guidance": 3.5, "first_sample": 9},
            {"seed": 3, "labels": 1, "guidance": 0.0, "x": x},
            {"seed": 4, "labels": 1, "guidance": -1.0, "x": x, "start": 4},
        ):
            assert torch.equal(graphed.sample(3, SHAPE, **call), eager.sample(3, SHAPE, **call))
        assert len(captures.loops) == 1
        assert captures.replays == 3 * 6 + 2

    def test_given_noise_is_written_before_each_replay(self, captures, net):
        graphed, eager = both(net)
        noise = torch.randn(6, 2, *SHAPE, generator=torch.Generator().manual_seed(0))
        assert torch.equal(graphed.sample(2, SHAPE, seed=0, noise=noise), eager.sample(2, SHAPE, seed=0, noise=noise))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_layout_gives_what_eager_gives(self, captures, dtype):
        net = Net(num_classes=4).to(dtype)
        solver = {"method": "dpmsolver++", "thresholding": (0.9, 2.0)}
        for choices in (
            {},
            {"deterministic": True, "chunk": 2},
            {"thresholding": (0.9, 2.0)},
            {"method": "ddim"},
            solver,
        ):
            graphed, eager = both(net, **choices)
            for call in ({}, {"labels": 1}, {"labels": 1, "guidance": 2.0}):
                first = graphed.sample(3, SHAPE, seed=0, **call)
                assert torch.equal(first, eager.sample(3, SHAPE, seed=0, **call))
                assert torch.equal(first, graphed.sample(3, SHAPE, seed=0, **call))
                steps = zip(
                    graphed.stream(3, SHAPE, seed=0, **call), eager.stream(3, SHAPE, seed=0, **call), strict=True
                )
                assert all(torch.equal(a.x, b.x) and torch.equal(a.x0, b.x0) for a, b in steps)

    def test_what_a_caller_got_is_not_overwritten_by_the_next_call(self, captures, net):
        sampler, _ = both(net)
        first = sampler.sample(2, SHAPE, seed=1)
        copy = first.clone()
        sampler.sample(2, SHAPE, seed=2)
        assert torch.equal(first, copy)
        assert len(captures.loops) == 1

    def test_another_layout_is_another_capture_and_only_a_few_are_kept(self, captures, net):
        sampler, _ = both(net)
        for n in range(1, 7):
            sampler.sample(n, SHAPE, seed=0)
        assert len(captures.loops) == 6
        assert len(sampler._loops) == graphs.KEPT == 4
        sampler.sample(6, SHAPE, seed=0)
        sampler.sample(3, SHAPE, seed=0)  # the oldest that is kept, and now the newest
        sampler.sample(7, SHAPE, seed=0)  # so this drops 4
        sampler.sample(3, SHAPE, seed=0)
        assert len(captures.loops) == 7
        sampler.sample(4, SHAPE, seed=0)
        assert len(captures.loops) == 8
        for call in ({"labels": 1}, {"labels": 1, "guidance": 2.0}, {"noise": torch.zeros(6, 3, *SHAPE)}):
            before = len(captures.loops)
            sampler.sample(3, SHAPE, seed=0, **call)
            assert len(captures.loops) == before + 1
        assert len(sampler._loops) == graphs.KEPT
        sampler.clear_graphs()
        assert len(sampler._loops) == 0

    def test_weights_that_moved_are_noticed_and_new_values_are_not_a_reason(self, captures, net):
        sampler, eager = both(net)
        sampler.sample(2, SHAPE, seed=0)
        with torch.no_grad():
            net.last.bias.add_(1.0)
        assert torch.equal(sampler.sample(2, SHAPE, seed=0), eager.sample(2, SHAPE, seed=0))
        assert len(captures.loops) == 1
        net.last.bias = torch.nn.Parameter(net.last.bias.detach() + 1.0)
        assert torch.equal(sampler.sample(2, SHAPE, seed=0), eager.sample(2, SHAPE, seed=0))
        assert len(captures.loops) == 2

    def test_streams_in_turn_do_not_share_buffers(self, captures, net):
        sampler, eager = both(net)
        pairs = list(zip(sampler.stream(2, SHAPE, seed=1), sampler.stream(2, SHAPE, seed=2), strict=True))
        assert len(captures.loops) == 2
        assert torch.equal(pairs[-1][0].x, eager.sample(2, SHAPE, seed=1))
        assert torch.equal(pairs[-1][1].x, eager.sample(2, SHAPE, seed=2))

    def test_a_loop_comes_back_after_an_error_and_an_abandoned_stream(self, captures, net):
        sampler, eager = both(net)
        stream = sampler.stream(2, SHAPE, seed=1)
        next(stream)
        stream.close()
        with pytest.raises(TypeError, match="must return a tensor"):
            sampler.stream(2, SHAPE, seed=1, noise=lambda row, t: None).__next__()
        for step in sampler.stream(2, SHAPE, seed=3):
            last = step.x
        assert torch.equal(last, eager.sample(2, SHAPE, seed=3))
        assert len(captures.loops) == 2  # with and without given noise

    def test_a_run_that_broke_leaves_no_mark_on_the_next(self, captures):
        sampler = Sampler(lambda x, t, labels: x * 0.1 / labels[:, None], LINEAR, steps=4)
        with pytest.raises(RuntimeError, match="in row 0"):
            sampler.sample(2, (3,), seed=0, labels=torch.tensor([0, 1]))
        assert torch.isfinite(sampler.sample(2, (3,), seed=0, labels=torch.tensor([1, 1]))).all()
        assert len(captures.loops) == 1

    def test_modes_of_the_model_are_given_back(self, captures, net):
        sampler, _ = both(net)
        sampler.sample(2, SHAPE, seed=0)
        assert all(part.training for part in net.modules())


class TestWithoutAGraph:
    def test_failure_falls_back_once_with_a_warning(self, captures, net, monkeypatch):
        attempts = []

        def fails(loop):
            attempts.append(loop)
            loop.step()  # what a warm-up leaves behind must not show in the result
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(graphs, "capture", fails)
        sampler, eager = both(net)
        with pytest.warns(RuntimeWarning, match="could not be captured .* operation not permitted"):
            result = sampler.sample(2, SHAPE, seed=0)
        assert torch.equal(result, eager.sample(2, SHAPE, seed=0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(sampler.sample(2, SHAPE, seed=0), result)
        assert len(attempts) == 1

    def test_failure_raises_when_a_graph_was_demanded(self, captures, net, monkeypatch):
        def fails(loop):
            raise RuntimeError("not permitted")

        monkeypatch.setattr(graphs, "capture", fails)
        with pytest.raises(RuntimeError, match=r"cuda_graph=True, but .* not permitted"):
            Sampler(net, LINEAR, cuda_graph=True).sample(2, SHAPE, seed=0)

    def test_a_model_that_returns_the_wrong_thing_is_not_blamed_on_the_graph(self, captures):
        with pytest.raises(ValueError, match="the model must return shape"):
            Sampler(lambda x, t: x[:1], LINEAR).sample(2, SHAPE, seed=0)

    def test_demanded_of_a_cpu(self, net):
        with pytest.raises(ValueError, match="cuda_graph=True needs a CUDA device, and the sampler runs on cpu"):
            Sampler(net, LINEAR, cuda_graph=True).sample(2, SHAPE, seed=0)

    def test_never(self, captures, net):
        Sampler(net, LINEAR, cuda_graph=False).sample(1, SHAPE, seed=0)
        assert captures.loops == []


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("guidance", [1.0, 2.0])
    def test_replayed_equals_eager(self, dtype, guidance):
        net = Net(num_classes=4).to("cuda", dtype)
        graphed = Sampler(net, LINEAR, cuda_graph=True, deterministic=True, chunk=4)
        eager = Sampler(net, LINEAR, cuda_graph=False, deterministic=True, chunk=4)
        for seed in (1, 2):
            call = {"seed": seed, "labels": [0, 1, 2], "guidance": guidance}
            assert torch.equal(graphed.sample(3, SHAPE, **call), eager.sample(3, SHAPE, **call))
        assert len(graphed._loops) == 1

    def test_noise_is_that_of_the_cpu(self):
        on_gpu = Sampler(lambda x, t: x * 0.0, LINEAR, device="cuda").sample(3, SHAPE, seed=5)
        on_cpu = Sampler(lambda x, t: x * 0.0, LINEAR, device="cpu").sample(3, SHAPE, seed=5)
        assert torch.equal(on_gpu.cpu(), on_cpu)

    def test_no_wait_for_the_device_between_rows(self):
        sampler = Sampler(Net().cuda(), LINEAR)
        sampler.sample(2, SHAPE, seed=0)
        run = sampler._prepare(2, SHAPE, 1, 0, None, 1.0, None, 0, None)
        with run.open(), run.running():
            torch.cuda.set_sync_debug_mode("error")
            try:
                for row in range(len(sampler)):
                    run.advance(row)
            finally:
                torch.cuda.set_sync_debug_mode("default")
