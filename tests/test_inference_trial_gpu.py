"""How a trial times candidates on a GPU, with a stand-in for its events that has a clock of its own."""

import pytest
import torch

from ddpm_fast.inference import trial
from ddpm_fast.inference.module import Module


class Device:
    """A host that takes `launch` microseconds a call and a GPU that takes what a call asks for, in order."""

    def __init__(self, launch):
        self.launch, self.host, self.done, self.sleeps = launch, 0.0, 0.0, []
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.done = max(device.done, device.host)

            def query(self):
                return device.host >= self.at

            def synchronize(self):
                device.host = max(device.host, self.at)

            def elapsed_time(self, after):
                return (after.at - self.at) / 1e3

        self.Event = Event

    def sleep(self, cycles):
        self.sleeps.append(cycles)
        self.run(cycles / 2000)  # at 2 GHz

    def run(self, microseconds):
        self.host += self.launch
        self.done = max(self.done, self.host) + microseconds

    def call(self, microseconds):
        return lambda: self.run(microseconds)


@pytest.fixture
def gpu(monkeypatch):
    def make(launch):
        device = Device(launch)
        monkeypatch.setattr(torch.cuda, "Event", device.Event)
        monkeypatch.setattr(torch.cuda, "_sleep", device.sleep)
        return device

    return make


@pytest.mark.parametrize(("launch", "attempts"), [(5.0, 1), (600.0, 2), (4000.0, 3)])
def test_times_are_those_of_the_device_however_slow_the_host(gpu, launch, attempts):
    device = gpu(launch)
    seconds = trial.busy_seconds([device.call(40.0), device.call(7.0), device.call(90.0)])
    assert seconds == pytest.approx([40e-6, 7e-6, 90e-6])
    assert len(device.sleeps) == attempts


def test_a_call_that_waits_for_the_device_is_timed_all_the_same(gpu):
    device = gpu(5.0)

    def waits():
        device.run(40.0)
        device.host = max(device.host, device.done)

    (seconds,) = trial.busy_seconds([waits])
    assert 40e-6 <= seconds < 60e-6
    assert len(device.sleeps) == trial.ATTEMPTS


def test_a_clock_that_has_to_speed_up_first_throws_nobody_out(gpu):
    """The first five calls take four times as long."""
    device = gpu(1.0)
    calls = []

    def bound(microseconds):
        def run(frame):
            calls.append(microseconds)
            device.run(microseconds * (4 if len(calls) <= 5 else 1))

        return run

    class Candidate:
        def __init__(self, name):
            self.name = name

    alike = trial.Alike()
    served = [(Candidate(str(i)), bound(10.0 + i)) for i in range(4)]
    alike.enter(served, trial.timed_on_gpu, None)
    assert [contender.candidate.name for contender in alike.contenders] == ["0", "1", "2", "3"]
    assert alike.ranking == pytest.approx({str(i): (10.0 + i) * 1e-6 for i in range(4)})


def test_the_model_beats_a_plan_by_the_time_of_the_device(gpu):
    """The plan's launches take ten times as long on the host as the model's, and half as long on the device."""

    class Image:
        """What `beats` asks of its images."""

        shape = (1,)
        device = torch.device("cuda", 0)

    def beats(plan, model):
        device = gpu(1.0)

        class Timed(Module):
            def __call__(self, *arguments):
                device.host += model[0]
                device.run(model[1])

        def run():
            device.host += plan[0]
            device.run(plan[1])

        return Timed(torch.nn.Identity(), torch.float32).beats(run, Image())

    with pytest.MonkeyPatch.context() as patch:
        zeros = torch.zeros
        patch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
        assert beats(plan=(1000.0, 100.0), model=(100.0, 200.0)) is None
        assert beats(plan=(100.0, 200.0), model=(1000.0, 100.0)) == pytest.approx(100e-6)
