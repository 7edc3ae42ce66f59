"""Strides of CUDA graphs: several steps in one replay, with a stand-in that notes steps and replays them."""

import pytest
import torch
from sampler_models import SHAPE, Net, threads

from ddpm_fast.sampler import Sampler
from ddpm_fast.sampling import graphs
from ddpm_fast.sampling.loop import Layout, Start
from ddpm_fast.schedule import Schedule


class Recorder:
    """Stands in for `graphs.record` and, as one step after a warm-up, for `graphs.capture`."""

    def __init__(self):
        self.recorded, self.replayed, self.fails = [], [], False

    def record(self, loop, steps):
        if self.fails:
            raise RuntimeError("CUDA out of memory")
        self.recorded.append(steps)

        def replay():
            self.replayed.append(steps)
            for _ in range(steps):
                loop.step()

        return replay

    def capture(self, loop):
        loop.step()
        return self.record(loop, 1)


@pytest.fixture
def recorder(monkeypatch):
    stand_in = Recorder()
    monkeypatch.setattr(graphs, "supported", lambda device: True)
    monkeypatch.setattr(graphs, "record", stand_in.record)
    monkeypatch.setattr(graphs, "capture", stand_in.capture)
    with threads(1):
        yield stand_in


def run(loops, plan, layout, rows, seed=0):
    """A run of `rows` rows as a sampler makes it; the last state."""
    with torch.inference_mode():
        loop, advance = loops.take(plan, layout)
        try:
            loop.load(Start(seed))
            for _, count in graphs.portions(0, rows, graphs.stride_of(advance)):
                if count > 1:
                    advance(count)
                else:
                    advance()
            assert int(loop.row) == rows
            return loop.x.clone()
        finally:
            loops.give(loop, advance)


def plan_of(steps):
    sampler = Sampler(Net().eval(), Schedule.linear(steps))
    return sampler._plan(torch.device("cpu"))


LAYOUT = Layout(n=2, shape=SHAPE, chunk=2)


@pytest.mark.parametrize(
    ("first", "last", "stride", "expected"),
    [
        (0, 23, 10, [(0, 10), (10, 10), (20, 1), (21, 1), (22, 1)]),
        (5, 15, 10, [(5, 10)]),
        (5, 14, 10, [(row, 1) for row in range(5, 14)]),
        (3, 3, 10, []),
        (0, 3, 1, [(0, 1), (1, 1), (2, 1)]),
    ],
)
def test_portions_cover_every_row_once(first, last, stride, expected):
    assert list(graphs.portions(first, last, stride)) == expected


def test_strides_start_with_the_second_run_and_change_nothing(recorder):
    plan, loops, eager = plan_of(23), graphs.Loops(None), graphs.Loops(False)
    expected = [run(eager, plan, LAYOUT, 23, seed) for seed in (1, 2, 3)]
    assert torch.equal(run(loops, plan, LAYOUT, 23, 1), expected[0])
    assert recorder.recorded == [1]
    assert recorder.replayed == [1] * 23
    for seed in (2, 3):
        recorder.replayed.clear()
        assert torch.equal(run(loops, plan, LAYOUT, 23, seed), expected[seed - 1])
        assert recorder.recorded == [1, graphs.STRIDE]
        assert recorder.replayed == [10, 10, 1, 1, 1]


def test_a_short_run_records_no_stride(recorder):
    plan, loops = plan_of(9), graphs.Loops(None)
    for _ in range(3):
        run(loops, plan, LAYOUT, 9)
    assert recorder.recorded == [1]


def test_without_memory_for_a_stride_every_row_is_a_replay_and_nobody_asks_again(recorder):
    plan, loops = plan_of(12), graphs.Loops(None)
    expected = run(loops, plan, LAYOUT, 12)
    recorder.fails = True
    recorder.replayed.clear()
    assert torch.equal(run(loops, plan, LAYOUT, 12), expected)
    assert recorder.replayed == [1] * 12
    recorder.fails = False
    assert torch.equal(run(loops, plan, LAYOUT, 12), expected)
    assert recorder.recorded == [1]


def test_more_rows_than_a_stride_at_once(recorder):
    plan, loops = plan_of(40), graphs.Loops(None)
    with torch.inference_mode():
        loop, advance = loops.take(plan, LAYOUT)
        advance.again()
        loop.load(Start(0))
        advance(25)
        assert int(loop.row) == 25
    assert recorder.replayed == [10, 10, 1, 1, 1, 1, 1]


def test_only_captured_loops_have_strides_and_are_kept(recorder):
    plan = plan_of(4)
    eager = graphs.Loops(False)
    loop, advance = eager.take(plan, LAYOUT)
    assert graphs.stride_of(advance) == 1
    eager.give(loop, advance)
    assert len(eager) == 0
    loops = graphs.Loops(None)
    for n in range(1, 7):
        run(loops, plan, Layout(n=n, shape=SHAPE, chunk=n), 4)
    assert len(loops) == graphs.KEPT


@pytest.mark.gpu
def test_strides_on_a_gpu_equal_single_replays():
    plan = Sampler(Net().cuda().eval(), Schedule.linear(23), deterministic=True)._plan(torch.device("cuda", 0))
    loops, singles = graphs.Loops(True), graphs.Loops(False)
    states = [run(loops, plan, LAYOUT, 23, 5) for _ in range(3)]
    assert all(torch.equal(state, states[0]) for state in states)
    torch.testing.assert_close(states[0], run(singles, plan, LAYOUT, 23, 5))
