"""The main job with tiny settings: its files open, its report and its lines say what was done; its parts alone."""

import json
import math
import re

import pytest

pytest.importorskip("sklearn", reason="pip install 'ddpm_fast[demo]'")
pytest.importorskip("safetensors", reason="pip install safetensors")
pytest.importorskip("PIL", reason="pip install 'ddpm_fast[images]'")

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

import ddpm_fast
from ddpm_fast import noise
from ddpm_fast.demo import DemoError, Recipe, Settings, measure, report, run, textbook
from ddpm_fast.demo import digits as digits_module
from ddpm_fast.demo import train as train_module


class Bar:
    """What a tqdm bar is to the training loop."""

    total, n = 1.0, 0.0

    def update(self, by):
        self.n += by

    def set_postfix_str(self, text, refresh=True):
        self.text = text


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small are slower on two threads, and on a busy machine slower without bounds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return digits_module.load()


@pytest.fixture(scope="module")
def done(tmp_path_factory, one_thread):
    """One tiny run: its settings, report and printed lines."""
    settings = Settings(
        out=tmp_path_factory.mktemp("demo") / "new" / "folder",
        seed=7,
        device="cpu",
        recipe=Recipe(steps=12, batch=16),
        timesteps=20,
        steps=5,
        rows=2,
        guided=30,
        unguided=15,
        width=4,
        time_dim=16,
        compare_seconds=0.01,
        progress=False,
    )
    lines = []
    return settings, run(settings, lines.append), "\n".join(lines)


def test_the_files_open_again(done):
    settings, _, _ = done
    assert {p.name for p in settings.out.iterdir()} == {
        "samples.png",
        "reverse.gif",
        "model.safetensors",
        "report.json",
    }
    with Image.open(settings.out / "samples.png") as picture:
        width, height = picture.size
        assert width == 10 * 19 * 4 + 12  # ten columns of 16 pixels and a gap of 3, enlarged four times
        assert height > 2 * 19 * 4 + 12  # two rows, and the labels above
    with Image.open(settings.out / "reverse.gif") as gif:
        assert gif.n_frames == 5  # a frame a step, the last one held
        assert gif.size[0] == 10 * 19 * 2 + 6
        gif.seek(4)
        assert gif.info["duration"] >= 2000
    with safe_open(settings.out / "model.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        assert file.metadata()["prediction"] == "eps"
        assert json.loads(file.metadata()["schedule"]) == {"name": "linear", "T": 20}
        ddpm_fast.UNet(**config).load_state_dict({key: file.get_tensor(key) for key in list(file.keys())})
    assert config == {"in_channels": 1, "time_dim": 16, "width": 4, "depth": 3, "num_classes": 10}


def test_the_picture_is_what_the_model_file_samples(done):
    settings, _, _ = done
    with safe_open(settings.out / "model.safetensors", framework="pt") as file:
        net = ddpm_fast.UNet(**json.loads(file.metadata()["config"])).to(memory_format=torch.channels_last)
        net.load_state_dict({key: file.get_tensor(key) for key in list(file.keys())})
    sampler = ddpm_fast.Sampler(net, ddpm_fast.Schedule.linear(20), steps=5, variance="fixed_small", clip=1.0)
    images = sampler.sample(20, (1, 16, 16), seed=7, labels=torch.arange(20) % 10, guidance=2.0, progress=False)
    plain = ddpm_fast.viz.grid(-images, 10, scale=4, padding=12)
    shown = np.asarray(Image.open(settings.out / "samples.png"))[-plain.shape[0] :]
    assert np.abs(shown.astype(int) - plain).max() <= 1


def test_the_report(done):
    settings, said, _ = done
    written = json.loads((settings.out / "report.json").read_text())
    assert written == json.loads(json.dumps(said))
    assert written["seed"] == 7
    assert written["ddpm_fast"] == ddpm_fast.__version__
    assert written["machine"]["torch"] == torch.__version__
    assert written["training"]["steps"] == 12
    assert written["training"]["images_drawn"] == 192
    assert len(written["training"]["losses"]) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in written["training"]["losses"])
    assert written["data"]["images"] == 1797
    assert written["data"]["reader_accuracy_on_held_out"] > 0.97
    assert 0 <= written["quality"]["recognised"] <= 1
    assert written["quality"]["guided_samples"] == 30
    assert written["quality"]["unguided_samples"] == 15
    assert len(written["missed"]) == 2  # twelve steps train nothing: both bars must notice
    assert written["speed"]["steps"] == 20
    eager, ours, fused, half = written["speed"]["rows"]
    assert [row["name"] for row in (eager, ours, fused, half)] == ["eager textbook loop", *measure.OURS]
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in (eager, ours, fused, half))
    assert eager["max_abs_difference"] == 0
    assert 0 < max(ours["max_abs_difference"], fused["max_abs_difference"]) < 1e-3
    assert 0 < half["max_abs_difference"] < 0.5
    assert written["total_seconds"] > 0


def test_the_lines(done):
    _, said, lines = done
    share = 100 * said["quality"]["recognised"]
    assert re.search(rf"^recognised: {share:.1f} %", lines, re.M)
    assert re.search(r"^energy distance: 15 unguided samples .* at most 1.5 wanted", lines, re.M)
    assert re.search(r"^eager textbook loop +\d+\.\d\d +\d\.\d{3} +1\.00x +-$", lines, re.M)
    for name in measure.OURS:
        row = rf"^{re.escape(name)} +\d+\.\d\d +\d\.\d{{3}} +\d+\.\d\dx +\d\.\de-\d\d$"
        assert re.search(row, lines, re.M)
    assert "samples.png, reverse.gif, model.safetensors, report.json" in lines


def test_digits(digits):
    assert digits.images.shape == (1797, 1, 16, 16)
    assert digits.images.dtype == torch.float32
    assert float(digits.images.min()) == -1
    assert float(digits.images.max()) == 1
    assert torch.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    reader = digits_module.Reader(digits)
    assert reader.fitted + reader.held_out == 1797
    assert 0.97 < reader.accuracy <= 1
    assert reader.share_right(digits.images, (digits.labels + 1) % 10) < 0.02


def test_batches_are_epochs_of_keyed_order():
    device = torch.device("cpu")

    def drawn(batch, count, seed=1):
        stream = train_module.batches(10, batch, seed, device)
        return torch.cat([next(stream) for _ in range(count)])

    order = drawn(4, 10)
    assert torch.equal(order, drawn(8, 5))  # a function of the seed and the image's number alone
    for epoch in order.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(order[:10], order[10:20])
    assert not torch.equal(order, drawn(4, 10, seed=2))


def test_draws_do_not_depend_on_the_batch():
    whole = noise.make_rng(3, 0)
    half = noise.make_rng(3, 50)
    t = train_module.draw_t(whole, 100, 1000)
    assert torch.equal(t[50:], train_module.draw_t(half, 50, 1000))
    many = train_module.draw_t(whole, 20000, 7)
    assert torch.bincount(many).min() > 2600
    assert torch.bincount(many).numel() == 7
    labels = torch.arange(20000) % 10
    dropped = train_module.drop_labels(whole, labels, 0.1, 10)
    assert torch.equal(dropped[dropped != 10], labels[dropped != 10])
    assert float((dropped == 10).double().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(train_module.drop_labels(half, labels[50:], 0.1, 10), dropped[50:])
    assert torch.equal(train_module.drop_labels(whole, labels, 0.0, 10), labels)


def test_average_of_weights():
    net, average = (ddpm_fast.UNet(1, 16, width=2, depth=1, num_classes=2) for _ in range(2))
    before = [p.detach().clone() for p in average.parameters()]
    net.down1.norm1.running_mean.fill_(3.0)
    train_module.update_average(average, net, 0.75)
    for ours, old, new in zip(average.parameters(), before, net.parameters(), strict=True):
        torch.testing.assert_close(ours, 0.75 * old + 0.25 * new)
    assert torch.equal(average.down1.norm1.running_mean, net.down1.norm1.running_mean)


def test_training_learns_and_keeps_its_budget(digits):
    torch.manual_seed(0)
    net = ddpm_fast.UNet(1, 16, width=4, depth=2, num_classes=10)
    schedule = ddpm_fast.Schedule.linear(1000)
    bar = Bar()
    average, log = train_module.train(net, digits, schedule, Recipe(steps=60, batch=32), seed=0, bar=bar)
    assert (log.steps, log.images) == (60, 1920)
    assert bar.n == pytest.approx(100)
    assert log.losses[-1] < 0.8 * log.losses[0]
    assert "loss" in bar.text
    assert not average.training
    bar = Bar()
    recipe = Recipe(seconds=0.2, max_seconds=0.2, batch=8)
    _, log = train_module.train(net, digits, schedule, recipe, seed=0, bar=bar)
    assert 0.2 <= log.seconds < 2
    assert bar.n == pytest.approx(100)
    _, log = train_module.train(net, digits, schedule, Recipe(seconds=60, max_steps=3, batch=8), seed=0, bar=Bar())
    assert log.steps == 3
    assert len(log.losses) == 1


def test_a_slow_machine_gets_more_time_and_a_fast_one_stops():
    recipe = Recipe(seconds=100, min_steps=500, max_seconds=140, max_steps=2000)
    assert recipe.progress(0, 0.0) == 0
    assert recipe.progress(600, 100.0) == 1  # on time
    assert recipe.progress(450, 100.0) == pytest.approx(0.9)  # 500 steps will be there after 111 s
    assert recipe.progress(500, 111.2) >= 1
    assert recipe.progress(100, 70.0) == pytest.approx(0.5)  # 350 s would be needed: not given
    assert recipe.progress(100, 140.0) == 1
    assert recipe.progress(2000, 20.0) == 1  # enough
    assert Recipe(steps=50).progress(25, 1e9) == 0.5


def test_training_wants_a_conditional_net(digits):
    net = ddpm_fast.UNet(1, 16, width=2, depth=1)
    with pytest.raises(ValueError, match="net must be class-conditional"):
        train_module.train(net, digits, ddpm_fast.Schedule.linear(10), Recipe(), seed=0, bar=Bar())


def test_plain_unet_is_the_unet():
    torch.manual_seed(0)
    net = ddpm_fast.UNet(1, 16, width=4, depth=3, num_classes=10).eval()
    x, t, labels = torch.randn(4, 1, 16, 16), torch.tensor([0, 5, 500, 999]), torch.tensor([0, 3, 9, 10])
    with torch.no_grad():
        torch.testing.assert_close(textbook.plain_unet(net, x, t, labels), net(x, t, labels), rtol=1e-5, atol=1e-6)
        net = ddpm_fast.UNet(1, 16, width=4, depth=3).eval()
        torch.testing.assert_close(textbook.plain_unet(net, x, t), net(x, t), rtol=1e-5, atol=1e-6)


def test_comparison_of_nothing():
    with pytest.raises(ValueError, match="n must be at least 1 image to compare, got 0"):
        measure.compare_speed(
            ddpm_fast.UNet(1, 16, width=4, depth=1), ddpm_fast.Schedule.linear(10), (1, 4, 4), n=0, seed=0
        )


def test_textbook_loop_is_the_formula():
    betas = np.array([0.1, 0.2, 0.3])
    x_t, z = torch.tensor([[1.5], [-0.5]]), torch.tensor([[[0.3], [0.7]], [[-1.0], [2.0]]])

    def model(x, t):
        return 0.1 * x + t[:, None]

    x = x_t.double().numpy()
    bars = np.cumprod(1 - betas)
    for k, i in enumerate((2, 1, 0)):
        x = (x - betas[i] / np.sqrt(1 - bars[i]) * (0.1 * x + i)) / np.sqrt(1 - betas[i])
        if i:
            x = x + np.sqrt(betas[i]) * z[k].double().numpy()
    got = textbook.textbook_loop(model, betas, x_t, z)
    torch.testing.assert_close(got.double(), torch.from_numpy(x), rtol=1e-6, atol=1e-6)


def test_verdicts():
    good = {
        "recognised": 0.95,
        "energy_ratio": 1.5,
        "guided_samples": 100,
        "guidance": 2.0,
        "method": "ddpm",
        "unguided_samples": 50,
        "nearest_real_distance": 4.0,
        "nearest_real_distance_of_real": 3.5,
    }
    assert measure.verdicts(good, lambda line: None) == []
    assert measure.verdicts({**good, "recognised": 0.949}, lambda line: None) == ["recognised 94.9 %"]
    assert measure.verdicts({**good, "energy_ratio": 1.51}, lambda line: None) == ["energy distance 1.51 times"]
    assert len(measure.verdicts({**good, "energy_ratio": math.nan}, lambda line: None)) == 1


def test_speed_table_of_given_seconds():
    rows = [
        {"name": "eager textbook loop", "seconds": [5.0, 4.0, 9.0], "speed_up": 1.0, "max_abs_difference": 0.0},
        {"name": "Sampler, fused=True", "seconds": [2.5, 2.0, 4.0], "speed_up": 2.0, "max_abs_difference": 1.24e-5},
    ]
    text = report.speed_table({"images": 10, "steps": 1000, "rows": rows})
    assert "eager textbook loop     5.00      0.500     1.00x                 -" in text
    assert "Sampler, fused=True     2.50      0.250     2.00x           1.2e-05" in text
    assert "median of 3 runs" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "--seed must be in 0..2^63-1, got -1"),
        ({"recipe": Recipe(seconds=-3.0)}, "--seconds must be a positive number of seconds, got -3.0"),
        ({"recipe": Recipe(seconds=math.nan)}, "--seconds must be a positive number of seconds, got nan"),
        ({"recipe": Recipe(steps=0)}, "--train-steps must be at least 1, got 0"),
        ({"device": "warp"}, "--device must be auto, cpu, cuda or cuda:N, got 'warp'"),
        ({"device": "meta"}, "--device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        ({"device": "cuda:99"}, "CUDA devices; use --device cpu"),
    ],
)
def test_bad_settings(tmp_path, options, message):
    with pytest.raises(DemoError) as error:
        run(Settings(**{"out": tmp_path / "out", **options}))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DemoError, match="cannot be written to"):
            run(Settings(out=out))


def test_missing_extras_are_named_together(tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("sklearn", "tqdm") else real(name))
    with pytest.raises(DemoError, match=r"needs scikit-learn, tqdm; .*pip install ddpm_fast\[demo\]"):
        run(Settings(out=tmp_path))


class TestThreads:
    """Which number of threads the training uses, with made-up times."""

    @staticmethod
    def choices(monkeypatch, seconds, steps, threads=4):
        from ddpm_fast.demo.threads import Threads

        used = []
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: used.append(n))
        chooser = Threads(torch.device("cpu"))
        taken = []
        for step in range(steps):
            chooser.before(step)
            taken.append(chooser.chosen)
            chooser.after(seconds(step, chooser.chosen))
        return taken

    @pytest.mark.parametrize(("slow", "best"), [(1, 4), (4, 1)])
    def test_the_faster_is_kept_after_the_trial(self, monkeypatch, slow, best):
        taken = self.choices(monkeypatch, lambda step, n: 2.0 if n == slow else 1.0, 60)
        assert taken[:8] == [4] * 4 + [1] * 4
        assert set(taken[8:]) == {best}

    def test_a_first_step_that_warms_up_does_not_decide(self, monkeypatch):
        taken = self.choices(monkeypatch, lambda step, n: 50.0 if step == 0 else 1.0 if n == 4 else 2.0, 20)
        assert taken[-1] == 4

    def test_it_changes_its_mind_when_the_machine_changes(self, monkeypatch):
        taken = self.choices(monkeypatch, lambda step, n: (3.0 if n == 4 else 2.0) if step >= 60 else 1.0 / n, 120)
        assert taken[59] == 4
        assert taken[119] == 1

    def test_one_thread_is_left_alone(self, monkeypatch):
        from ddpm_fast.demo.threads import Threads

        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: pytest.fail("nothing to choose"))
        chooser = Threads(torch.device("cpu"))
        chooser.before(0)
        chooser.after(1.0)
        assert chooser.chosen == 1
