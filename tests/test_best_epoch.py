"""`BestEpoch`: the mean loss of each epoch, and the weights of the best one, against a loop over the steps."""

from __future__ import annotations

import pytest
import torch

import ddpm_fast
from ddpm_fast.training import BestEpoch, StepReport


class FakeTrainer:
    """As much of a Trainer as a callback looks at; its weight counts the steps."""

    def __init__(self, images: int, seen: int = 0) -> None:
        self.data, self.images_seen, self.steps = torch.zeros(images, 2), seen, 0
        self.model = torch.nn.Linear(1, 1, bias=False)

    def run(self, callback: BestEpoch, losses: list[float], batch: int) -> None:
        callback.on_start(self)
        for loss in losses:
            self.images_seen, self.steps = self.images_seen + batch, self.steps + 1
            torch.nn.init.constant_(self.model.weight, self.steps)
            callback.on_step(self, StepReport(self.images_seen, self.steps, loss, 1e-3, 1.0, 0.1))


def kept(path) -> float:
    return float(torch.load(path, weights_only=True)["weight"])


def test_the_lowest_mean_is_kept(tmp_path):
    said: list[str] = []
    best = BestEpoch(tmp_path / "best.pt", say=said.append)
    # 10 images in batches of 4: epochs end in the steps in which the 10th, 20th, 30th image is seen.
    FakeTrainer(10).run(best, [3.0, 2.0, 1.0, 0.5, 0.7, 0.6, 0.6, 0.9, 0.1], 4)
    assert best.losses == pytest.approx([2.0, 0.6, 0.7])
    assert best.best == 1
    assert kept(tmp_path / "best.pt") == 5
    assert said == ["epoch 1: mean loss 2.0000, kept", "epoch 2: mean loss 0.6000, kept", "epoch 3: mean loss 0.7000"]
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_an_unfinished_epoch_does_not_count(tmp_path):
    best = BestEpoch(tmp_path / "best.pt")
    FakeTrainer(10).run(best, [1.0, 1.0], 4)
    assert (best.losses, best.best) == ([], None)
    assert not (tmp_path / "best.pt").exists()


def test_a_run_that_goes_on_and_a_batch_of_several_epochs(tmp_path):
    best = BestEpoch(tmp_path / "best.pt")
    trainer = FakeTrainer(10, seen=16)
    trainer.run(best, [1.0], 4)  # the second epoch ends here: 20 images
    assert best.losses == [1.0]
    trainer.run(best, [0.5], 25)  # and here the third and fourth, in one step
    assert best.losses == [1.0, 0.5]
    assert kept(tmp_path / "best.pt") == 2


def test_in_a_trainer_the_weights_are_those_after_the_epoch(tmp_path):
    torch.manual_seed(0)
    net = ddpm_fast.UNet(1, 8, width=2, depth=1)
    images = torch.randint(0, 256, (12, 1, 4, 4), dtype=torch.uint8)
    schedule = ddpm_fast.Schedule.linear(10)
    trainer = ddpm_fast.Trainer(net, schedule, images, images=36, batch_size=4, lr=1e-2)
    best = BestEpoch(tmp_path / "best.pt")
    losses, states = [], []

    class Watch:
        def on_step(self, trainer, report):
            losses.append(report.loss)
            if report.step % 3 == 0:
                states.append({key: value.clone() for key, value in trainer.model.state_dict().items()})

    trainer.callbacks += [best, Watch()]
    trainer.train()
    means = [sum(losses[i : i + 3]) / 3 for i in (0, 3, 6)]
    assert best.losses == pytest.approx(means)
    assert best.best == means.index(min(means))
    found = torch.load(best.path, weights_only=True)
    assert list(found) == list(net.state_dict())
    assert all(torch.equal(found[key], states[best.best][key]) for key in found)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FakeTrainer(4).run(BestEpoch(tmp_path / "nowhere" / "best.pt"), [1.0], 4)
