"""The tutorial U-Net: same keys, same start, same numbers as the tutorial's own class; bad sizes are named."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpm_fast
from ddpm_fast.nn import TimeEmbedding


class TutorialBlock(nn.Module):
    """The tutorial's block in plain torch: the time is added between the two convolutions."""

    def __init__(self, cin, cout, time_dim):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout)
        self.conv2, self.norm2 = nn.Conv2d(cout, cout, 3, padding=1), nn.BatchNorm2d(cout)
        self.time_mlp = nn.Linear(time_dim, cout)

    def forward(self, x, emb):
        h = F.silu(self.norm1(self.conv1(x))) + self.time_mlp(emb)[:, :, None, None]
        return F.silu(self.norm2(self.conv2(h)))


class TutorialUNet(nn.Module):
    """The tutorial's four levels, spelled out, as the independent answer."""

    def __init__(self, in_channels=3, time_dim=256, w=64):
        super().__init__()
        self.half = time_dim // 2
        self.down1 = TutorialBlock(in_channels, w, time_dim)
        self.down2 = TutorialBlock(w, 2 * w, time_dim)
        self.down3 = TutorialBlock(2 * w, 4 * w, time_dim)
        self.down4 = TutorialBlock(4 * w, 8 * w, time_dim)
        self.pool = nn.MaxPool2d(2)
        self.bottleneck = TutorialBlock(8 * w, 16 * w, time_dim)
        self.up4 = nn.ConvTranspose2d(16 * w, 8 * w, 2, stride=2)
        self.conv_up4 = TutorialBlock(16 * w, 8 * w, time_dim)
        self.up3 = nn.ConvTranspose2d(8 * w, 4 * w, 2, stride=2)
        self.conv_up3 = TutorialBlock(8 * w, 4 * w, time_dim)
        self.up2 = nn.ConvTranspose2d(4 * w, 2 * w, 2, stride=2)
        self.conv_up2 = TutorialBlock(4 * w, 2 * w, time_dim)
        self.up1 = nn.ConvTranspose2d(2 * w, w, 2, stride=2)
        self.conv_up1 = TutorialBlock(2 * w, w, time_dim)
        self.output = nn.Conv2d(w, in_channels, 1)

    def forward(self, x, t):
        freq = torch.exp(torch.arange(self.half) * -(math.log(10000) / (self.half - 1)))
        angle = t.unsqueeze(-1).float() * freq
        emb = torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)
        d1 = self.down1(x, emb)
        d2 = self.down2(self.pool(d1), emb)
        d3 = self.down3(self.pool(d2), emb)
        d4 = self.down4(self.pool(d3), emb)
        h = self.bottleneck(self.pool(d4), emb)
        h = self.conv_up4(torch.cat([self.up4(h), d4], 1), emb)
        h = self.conv_up3(torch.cat([self.up3(h), d3], 1), emb)
        h = self.conv_up2(torch.cat([self.up2(h), d2], 1), emb)
        h = self.conv_up1(torch.cat([self.up1(h), d1], 1), emb)
        return self.output(h)


def make(seed=0, **options):
    torch.manual_seed(seed)
    return ddpm_fast.UNet(**{"in_channels": 1, "time_dim": 16, "width": 4, "depth": 2, **options})


def inputs(n=3, c=1, size=(8, 12), seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, *size, generator=g), torch.randint(0, 1000, (n,), generator=g)


def relative(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def test_defaults_are_the_tutorials():
    torch.manual_seed(3)
    theirs = TutorialUNet()
    torch.manual_seed(3)
    ours = ddpm_fast.UNet()
    expected, got = theirs.state_dict(), ours.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    x, t = inputs(2, 3, (32, 32))
    with torch.no_grad():
        assert relative(ours.eval()(x, t), theirs.eval()(x, t)) < 1e-6


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_matches_the_tutorial_with_gradients(training):
    theirs = TutorialUNet(3, 32, 8).train(training)
    ours = ddpm_fast.UNet(3, 32, width=8).train(training)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that are not those of a new module
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    x, t = inputs(4, 3, (32, 16))
    results = []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = model(leaf, t)
        y.square().sum().backward()
        results.append((y, leaf.grad, {k: p.grad for k, p in model.named_parameters()}))
    assert relative(results[0][0], results[1][0]) < 1e-6
    assert relative(results[0][1], results[1][1]) < 1e-5
    expected = results[1][2]
    assert results[0][2].keys() == expected.keys()
    largest = max(float(g.norm()) for g in expected.values())
    for key, gradient in results[0][2].items():
        # A bias in front of a batch norm has gradient zero but for rounding: scale by the largest.
        assert float((gradient - expected[key]).norm()) < 1e-5 * max(float(expected[key].norm()), 1e-2 * largest), key
    statistics = theirs.state_dict()
    for key, value in ours.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(value, statistics[key], rtol=1e-5, atol=1e-6)


def test_blocks_go_through_the_fused_ops(monkeypatch):
    """With the statistics of the batch, norm, SiLU and time embedding are one op; with given ones, the last two are."""
    seen = []

    def spy(name):
        op = getattr(ddpm_fast.ops, name)

        def call(h, *arguments, temb=None, **named):
            temb = arguments[1] if name == "add_bias_temb" else temb
            seen.append((name, None if temb is None else tuple(temb.shape)))
            return op(h, *arguments, **named) if name == "add_bias_temb" else op(h, *arguments, temb=temb, **named)

        return call

    for name in ("add_bias_temb", "batch_norm_silu"):
        monkeypatch.setattr(ddpm_fast.ops, name, spy(name))
    unet = make().train()
    unet(*inputs())
    widths = (4, 8, 16, 8, 4)
    assert seen == [("batch_norm_silu", temb) for c in widths for temb in ((3, c), None)]
    seen.clear()
    unet.eval()(*inputs())
    assert seen == [("add_bias_temb", (3, c)) for c in widths]


def test_time_embedding_is_the_sinusoids_in_fp32():
    t = torch.tensor([0, 1, 999])
    emb = TimeEmbedding(8)(t)
    freq = torch.tensor([10000 ** (-i / 3) for i in range(4)], dtype=torch.float64)
    angle = t[:, None].double() * freq
    expected = torch.cat([angle.sin(), angle.cos()], 1)
    assert emb.dtype == torch.float32
    assert float((emb - expected).abs().max()) < 1e-4  # an ulp of an angle near 999
    assert torch.equal(TimeEmbedding(8).bfloat16()(t), emb)
    assert torch.equal(TimeEmbedding(8)(t.double()), emb)
    assert not list(TimeEmbedding(8).state_dict())


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_any_depth(depth):
    model = make(depth=depth, width=2).eval()
    size = 2**depth
    with torch.no_grad():
        assert model(*inputs(2, 1, (size, 2 * size))).shape == (2, 1, size, 2 * size)
    assert f"conv_up{depth}.conv1.weight" in model.state_dict()
    assert f"down{depth + 1}.conv1.weight" not in model.state_dict()
    again = ddpm_fast.UNet(**model.config)
    again.load_state_dict(model.state_dict())


def test_labels():
    model = make(num_classes=5).eval()
    assert model.null_label == 5
    assert model.label_embedding.weight.shape == (6, 16)
    x, t = inputs()
    with torch.no_grad():
        none = model(x, t)
        assert torch.equal(none, model(x, t, torch.tensor([5, 5, 5])))
        one = model(x, t, torch.tensor([0, 5, 4], dtype=torch.int32))
        assert torch.equal(one[1], none[1])
        assert not torch.equal(one[0], none[0])
        assert not torch.equal(one[2], none[2])
        # A label is an offset of the time embedding: no offset, no effect.
        model.label_embedding.weight.zero_()
        plain = make().eval()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "label" not in k})
        assert torch.equal(model(x, t, torch.tensor([0, 1, 2])), plain(x, t))
    assert make().null_label is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype):
    model = make(num_classes=3, width=8).eval()
    x, t = inputs()
    labels = torch.tensor([0, 1, 3])
    with torch.no_grad():
        expected = model(x, t, labels)
        got = model.to(dtype)(x.to(dtype), t, labels)
    assert got.dtype == dtype
    assert relative(got, expected) < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_memory_format_and_empty_batch():
    model = make(width=8).eval()
    x, t = inputs()
    with torch.no_grad():
        expected = model(x, t)
        fast = model.to(memory_format=torch.channels_last)
        got = fast(x.contiguous(memory_format=torch.channels_last), t)
        assert relative(got, expected) < 1e-5
        assert model(x[:0], t[:0]).shape == (0, 1, 8, 12)


def test_compiles_whole_and_once_over_t():
    graphs = []

    def count(module, _):
        graphs.append(module)
        return module.forward

    model = make(num_classes=3).eval()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    x, _ = inputs()
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        for step in (999, 500, 1, 0):
            t = torch.full((3,), step)
            assert torch.equal(compiled(x, t, labels), model(x, t, labels))
    assert len(graphs) == 1


def test_device_argument():
    meta = ddpm_fast.UNet(3, 256, "meta")
    assert meta.device == torch.device("meta")
    assert {p.device.type for p in meta.parameters()} | {b.device.type for b in meta.buffers()} == {"meta"}
    assert make().device == torch.get_default_device()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"time_dim": 15}, "time_dim must be an even number of at least 4, got 15"),
        ({"time_dim": 2}, "time_dim must be an even number of at least 4, got 2"),
    ],
)
def test_bad_architecture(options, message):
    with pytest.raises(ValueError) as error:
        make(**options)
    assert message in str(error.value)


X, T = inputs()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (X[:, :, :6, :9], T),
            "multiples of 4 (depth 2: 2 halvings), got (6, 9); pad or resize to the next valid size (8, 12)",
        ),
        ((X[:, :, :0], T), "got (0, 12); pad or resize to the next valid size (4, 12)"),
        ((X.expand(3, 2, 8, 12), T), "x must have shape (N, 1, H, W), got (3, 2, 8, 12)"),
        ((X[0], T), "x must have shape (N, 1, H, W), got (1, 8, 12)"),
        ((X, T[:2]), "t must have shape (3,), one per image, got (2,)"),
        ((X, T[0]), "t must have shape (3,), one per image, got ()"),
        ((X, T > 500), "t must be an integer or floating tensor, got torch.bool"),
        ((X, T, torch.zeros(2, dtype=torch.int64)), "labels must have shape (3,), got (2,)"),
        ((X, T, torch.zeros(3)), "labels must be int64 or int32, got torch.float32"),
        ((X, T, torch.tensor([0, 1, 6])), "labels must be in 0..5 (5 = no label), got 0..6"),
        ((X, T, torch.tensor([-1, 1, 2])), "labels must be in 0..5 (5 = no label), got -1..2"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError) as error:
        make(num_classes=5)(*arguments)
    assert message in str(error.value)


def test_labels_for_an_unconditional_net():
    with pytest.raises(ValueError, match="unconditional UNet; build it with num_classes=K"):
        make()(X, T, torch.zeros(3, dtype=torch.int64))
