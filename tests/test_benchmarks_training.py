"""The benchmark of training steps: candidates that do the same, checked, timed in turns, weighed; and its report."""

from __future__ import annotations

import torch

OPTIONS = {"width": 4, "depth": 1, "time_dim": 32}
CPU = torch.device("cpu")
EAGER = ("T16", "A16", "A16L")


def test_candidates_are_checked_timed_and_reported(module, monkeypatch):
    training, results = module("training"), module("results")
    monkeypatch.setattr(training, "SHAPE", (3, 8, 8))
    monkeypatch.setattr(training, "peak_of", lambda *arguments: 3 * 2**20)
    figures = training.run_training(4, CPU, names=EAGER, budget=0.02, turn=0.01, **OPTIONS)
    assert [record["id"] for record in figures["candidates"]] == list(EAGER)
    for record in figures["candidates"]:
        assert record["gradient_error"] < 0.05
        assert record["loss_error"] < 0.02
        assert len(record["rounds_s"]) >= 5
    assert "T16" in training.lines(figures)[1]
    assert "x ours" in training.lines(figures)[2]
    empty = {
        "schema": results.SCHEMA,
        "machine": {"device": "cpu"},
        "settings": {},
        "peaks": {},
        "ops": [],
        "cases": [],
    }
    result = results.validate({**empty, "training": [figures]})
    (target,) = module("targets").targets(result)
    assert (target.baseline, target.n, target.least) == (results.best_in_training(figures), 4, 1.0)
    table = module("report").training_table(figures)
    assert table.count("| 3 |") == 3
    assert "| 1 |" in table.splitlines()[2]


def test_a_wrong_gradient_gets_no_speed(module, monkeypatch):
    training = module("training")
    monkeypatch.setattr(training, "SHAPE", (3, 8, 8))
    right = training.Ours.gradients

    def wrong(self):
        loss, gradients = right(self)
        return loss, [-gradient for gradient in gradients]

    monkeypatch.setattr(training.Ours, "gradients", wrong)
    figures = training.run_training(4, CPU, names=("T16",), budget=0.02, turn=0.01, **OPTIONS)
    (record,) = figures["candidates"]
    assert (record["status"], record["rounds_s"], record["peak_bytes"]) == ("wrong", [], None)
    assert "relative error of the gradient 2" in training.lines(figures)[1]
    failed = module("run").failed({"ops": [], "cases": [], "host": [], "training": [figures]})
    assert failed == ["training with T16, n = 4: wrong"]


def test_all_train_on_the_same_draws(module, monkeypatch):
    """In float32 the plain network's gradient is the Trainer's, whose step 0 it is checked by."""
    training = module("training")
    monkeypatch.setattr(training, "SHAPE", (3, 8, 8))
    problem = training.Problem(4, CPU, **OPTIONS)
    ours = training.Ours(problem)
    ours.trainer._update._dtype = None
    loss, gradients = ours.gradients()
    exact_loss, exact = training.Eager(problem, torch.contiguous_format, False, half=False).gradients()
    assert abs(loss - exact_loss) < 1e-6
    assert training.relative(gradients, exact) < 1e-5


def test_memory_is_that_of_steps(module, monkeypatch):
    monkeypatch.setattr(module("training"), "SHAPE", (3, 8, 8))
    small = module("peak_memory").main("A16", 4, CPU, OPTIONS)
    assert 0 <= small < 2**30


def test_means_over_seeds(module):
    """Of the Fashion-MNIST run: every seed of a loop counts once, and real images not at all."""
    distances = {
        "ddpm-fast train": 2.0, "plain eager loop": 4.0, "real training images": 0.1,
        "ddpm-fast train, seed 1": 4.0, "plain eager loop, seed 1": 8.0,
    }  # fmt: skip
    found = module("fashion_mnist").means({name: {"frechet": value} for name, value in distances.items()})
    assert found["frechet by seed"] == {"ddpm-fast train": [2.0, 4.0], "plain eager loop": [4.0, 8.0]}
    assert found["ratio of the means"] == 0.5
