"""What is asked of torch.cuda when steps are recorded, with a stand-in for it; and, with GPUs, the real thing."""

import pytest
import torch
from sampler_models import SHAPE, Net, threads

import ddpm_fast
from ddpm_fast.sampler import Sampler
from ddpm_fast.sampling import graphs
from ddpm_fast.sampling.loop import Layout
from ddpm_fast.schedule import Schedule

LINEAR = Schedule.linear(6)


class Stream:
    def __init__(self, device):
        self.device, self.waited = device, []

    def wait_stream(self, other):
        self.waited.append(other)


class FakeCuda:
    """The part of torch.cuda that `graphs` talks to. As torch's own, `graph` leaves its stream current where it cannot
    end a capture, and a capture in which something raised cannot be ended.
    """

    def __init__(self):
        self.usual = Stream("usual")
        self.current = self.usual
        self.fails_to_end = 0  # so many times
        self.captures = []
        fake = self

        class Context:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                self.before, fake.current = fake.current, self.stream

            def __exit__(self, *error):
                fake.current = self.before

        class Graph(Context):
            def __init__(self, graph, stream, capture_error_mode="global"):
                super().__init__(stream)
                fake.captures.append((stream, capture_error_mode))

            def __exit__(self, *error):
                if fake.fails_to_end:
                    fake.fails_to_end -= 1
                    raise RuntimeError("operation failed due to a previous error during capture")
                super().__exit__(*error)

        class CUDAGraph:
            def replay(self):
                pass

        self.parts = {
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "graph": Graph,
            "stream": Context,
            "device": lambda device: torch.autograd.profiler.record_function("device"),
            "current_stream": lambda device: fake.current,
            "set_stream": lambda stream: setattr(fake, "current", stream),
        }


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name, part in fake.parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    graphs._stream.cache_clear()
    yield fake
    graphs._stream.cache_clear()


class StepLoop:
    """A loop whose step does what the test says."""

    def __init__(self, step):
        self.plan = Sampler(lambda x, t: x, LINEAR, shape=(3,))._plan(torch.device("cpu"))
        self.rows = torch.zeros(1, dtype=torch.int64)
        self.step = step


def test_steps_are_recorded_on_a_stream_of_the_device(cuda):
    seen = []
    graphs.record(StepLoop(lambda: seen.append(cuda.current.device)), 2)
    device = torch.device("cpu")
    assert seen == [device, device]
    assert [(stream.device, mode) for stream, mode in cuda.captures] == [(device, "thread_local")]
    graphs.record(StepLoop(lambda: None), 1)
    assert cuda.captures[0][0] is cuda.captures[1][0]  # cuBLAS keeps a workspace for every stream
    assert cuda.current is cuda.usual


@pytest.mark.parametrize("cannot_end", [False, True])
def test_a_failed_capture_says_why_and_leaves_the_stream(cuda, cannot_end):
    def step():
        raise ValueError("the model must return shape (3,)")

    cuda.fails_to_end = int(cannot_end)
    with pytest.raises(ValueError, match="must return shape"):
        graphs.record(StepLoop(step), 1)
    assert cuda.current is cuda.usual
    assert len(cuda.captures) == 1 + cannot_end  # another one, which ends well


@pytest.mark.parametrize("times", [1, 2])
def test_a_capture_that_cannot_be_ended(cuda, times):
    cuda.fails_to_end = times
    with pytest.raises(RuntimeError, match="previous error during capture"):
        graphs.record(StepLoop(lambda: None), 1)
    assert cuda.current is cuda.usual


def test_the_stream_of_a_warm_up_is_waited_for_even_if_it_fails(cuda):
    def step():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        graphs.capture(StepLoop(step))
    with pytest.raises(RuntimeError, match="broken"):
        graphs.capture(StepLoop(step))
    first, second = cuda.usual.waited
    assert first is second  # of all warm-ups the same, for cuBLAS keeps memory for each
    assert not cuda.captures


def test_weights_are_cast_in_every_recorded_step(cuda):
    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        graphs.capture(StepLoop(lambda: seen.append(torch.is_autocast_cache_enabled())))
        assert torch.is_autocast_cache_enabled()
    assert seen == [False] * (graphs.WARMUP_STEPS + 1)


def test_autocast_and_a_requested_backend_are_other_captures(monkeypatch):
    loops = []
    monkeypatch.setattr(graphs, "supported", lambda device: True)
    monkeypatch.setattr(graphs, "capture", lambda loop: loops.append(loop) or loop.step)
    sampler = Sampler(Net(), LINEAR)
    with threads(1):
        for _ in range(2):
            sampler.sample(2, SHAPE, seed=0)
            with torch.autocast("cpu", torch.bfloat16):
                sampler.sample(2, SHAPE, seed=0)
            with ddpm_fast.use_backend("reference"):
                sampler.sample(2, SHAPE, seed=0)
    assert len(loops) == 3


@pytest.mark.gpu
class TestOnAGpu:
    def test_after_a_failed_capture_everything_works(self):
        def model(x, t):
            return x * float(t[0] >= 0)  # waits for the device, which a capture cannot

        usual = torch.cuda.current_stream()
        with pytest.warns(RuntimeWarning, match="could not be captured"):
            images = Sampler(model, LINEAR, device="cuda").sample(2, SHAPE, seed=1)
        assert torch.cuda.current_stream() == usual
        assert torch.isfinite(torch.randn(4, device="cuda")).all()
        expected = Sampler(lambda x, t: x, LINEAR, device="cuda", cuda_graph=True).sample(2, SHAPE, seed=1)
        assert torch.equal(images, expected)

    def test_under_autocast_and_after_it(self):
        net = Net().cuda().eval()
        sampler = Sampler(net, LINEAR, cuda_graph=True, deterministic=True)
        with torch.autocast("cuda", torch.bfloat16):
            net(torch.zeros(2, *SHAPE, device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda"))
            first = sampler.sample(2, SHAPE, seed=1)
        torch.empty(1 << 24, device="cuda").fill_(float("nan"))  # where autocast kept its weights
        plain = sampler.sample(2, SHAPE, seed=1)
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.equal(sampler.sample(2, SHAPE, seed=1), first)
        eager = Sampler(net, LINEAR, cuda_graph=False, deterministic=True)
        assert torch.equal(eager.sample(2, SHAPE, seed=1), plain)

    def test_runs_on_several_streams_in_turn(self):
        sampler = Sampler(Net().cuda().eval(), LINEAR, cuda_graph=True, deterministic=True)
        expected = [sampler.sample(2, SHAPE, seed=seed) for seed in range(4)]
        streams = [torch.cuda.Stream() for _ in range(2)]
        results = []
        for seed in range(4):
            with torch.cuda.stream(streams[seed % 2]):
                results.append(sampler.sample(2, SHAPE, seed=seed))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_on_the_second_gpu(self):
        first, second = (Sampler(Net().to(f"cuda:{i}").eval(), LINEAR, cuda_graph=True) for i in range(2))
        first.sample(2, SHAPE, seed=1)
        expected = Sampler(second.model, LINEAR, cuda_graph=False).sample(2, SHAPE, seed=1)
        torch.testing.assert_close(second.sample(2, SHAPE, seed=1), expected)


def test_layouts_are_hashable_as_keys():
    plan = Sampler(lambda x, t: x, LINEAR, shape=(3,))._plan(torch.device("cpu"))
    assert len({graphs.Loops._key(plan, Layout(n=n, shape=(3,), chunk=n)) for n in (1, 2, 1)}) == 2
