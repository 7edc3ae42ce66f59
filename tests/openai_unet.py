"""The U-Net of improved- and guided-diffusion in plain PyTorch, written from the published architecture.

Its keys, layouts and formulas are the authority that `ddpm_fast.interop.openai` is held to; nothing is imported from
the package. Weights are random everywhere, where OpenAI's start at zero, so that every layer shows in the output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = 32


def sinusoids(t, dim):
    """[cos, sin] of t / 10000^(i / (dim / 2))."""
    rates = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = t.double()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1).float()


class Residual(nn.Module):
    def __init__(self, before, after, time_dim, dropout, modulated, change=None):
        super().__init__()
        self.modulated, self.change = modulated, change
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, before), nn.SiLU(), nn.Conv2d(before, after, 3, 1, 1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, after * (2 if modulated else 1)))
        end = nn.Conv2d(after, after, 3, 1, 1)
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, after), nn.SiLU(), nn.Dropout(dropout), end)
        self.skip_connection = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def resized(self, x):
        if self.change == "up":
            return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return F.avg_pool2d(x, 2) if self.change == "down" else x

    def forward(self, x, emb):
        norm, act, conv = self.in_layers
        h = conv(self.resized(act(norm(x))))
        told = self.emb_layers(emb)[..., None, None]
        norm, act, dropout, conv = self.out_layers
        if self.modulated:
            scale, shift = told.tensor_split(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + told)
        return self.skip_connection(self.resized(x)) + conv(dropout(act(h)))


class SelfAttention(nn.Module):
    def __init__(self, channels, heads, new_order):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, emb):
        n, c = x.shape[:2]
        tokens = x.flatten(2)
        qkv = self.qkv(self.norm(tokens))
        size = c // self.heads
        if self.new_order:
            q, k, v = qkv.view(n, 3, self.heads, size, -1).unbind(1)
        else:
            q, k, v = qkv.view(n, self.heads, 3, size, -1).unbind(2)
        weights = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(size), dim=-1)
        attended = (v @ weights.transpose(2, 3)).reshape(n, c, -1)
        return x + self.proj_out(attended).view_as(x)


class Resampling(nn.Module):
    """A convolution by its name: "op" with stride 2, "conv" after doubling."""

    def __init__(self, channels, name):
        super().__init__()
        self.add_module(name, nn.Conv2d(channels, channels, 3, 2 if name == "op" else 1, 1))

    def forward(self, x, emb):
        if hasattr(self, "op"):
            return self.op(x)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class OpenAIUNet(nn.Module):
    def __init__(
        self,
        in_channels=3,
        num_channels=32,
        out_channels=3,
        num_res_blocks=1,
        factors=(2,),
        multipliers=(1, 2),
        dropout=0.0,
        num_classes=None,
        num_heads=1,
        num_head_channels=-1,
        num_heads_upsample=-1,
        scale_shift=False,
        updown=False,
        new_order=False,
    ):
        super().__init__()
        width = lambda m: int(m * num_channels)  # noqa: E731
        time_dim, levels = 4 * num_channels, len(multipliers)
        self.num_channels = num_channels
        self.time_embed = nn.Sequential(nn.Linear(num_channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, time_dim)

        def residual(before, after, change=None):
            return Residual(before, after, time_dim, dropout, scale_shift, change)

        def attention(channels, heads):
            return SelfAttention(
                channels, heads if num_head_channels == -1 else channels // num_head_channels, new_order
            )

        c = width(multipliers[0])
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, c, 3, padding=1)])])
        kept = [c]
        for level, m in enumerate(multipliers):
            for _ in range(num_res_blocks):
                block = nn.ModuleList([residual(c, width(m))])
                c = width(m)
                if 2**level in factors:
                    block.append(attention(c, num_heads))
                self.input_blocks.append(block)
                kept.append(c)
            if level + 1 < levels:
                self.input_blocks.append(nn.ModuleList([residual(c, c, "down") if updown else Resampling(c, "op")]))
                kept.append(c)
        self.middle_block = nn.ModuleList([residual(c, c), attention(c, num_heads), residual(c, c)])
        self.output_blocks = nn.ModuleList()
        for level in range(levels - 1, -1, -1):
            for i in range(num_res_blocks + 1):
                block = nn.ModuleList([residual(c + kept.pop(), width(multipliers[level]))])
                c = width(multipliers[level])
                if 2**level in factors:
                    block.append(attention(c, num_heads if num_heads_upsample == -1 else num_heads_upsample))
                if level and i == num_res_blocks:
                    block.append(residual(c, c, "up") if updown else Resampling(c, "conv"))
                self.output_blocks.append(block)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, c), nn.SiLU(), nn.Conv2d(c, out_channels, 3, padding=1))

    def forward(self, x, timesteps, y=None):
        emb = self.time_embed(sinusoids(timesteps, self.num_channels).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        kept = [self.input_blocks[0][0](x)]
        for block in self.input_blocks[1:]:
            h = kept[-1]
            for part in block:
                h = part(h, emb)
            kept.append(h)
        for part in self.middle_block:
            h = part(h, emb)
        for block in self.output_blocks:
            h = torch.cat([h, kept.pop()], dim=1)
            for part in block:
                h = part(h, emb)
        return self.out(h)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale_shift": {"scale_shift": True},
    "updown": {"updown": True},
    "updown_scale_shift": {"updown": True, "scale_shift": True, "num_heads": 2},
    "updown_without_attention": {"updown": True, "factors": ()},
    "updown_three_levels": {"updown": True, "multipliers": (1, 1, 2), "factors": (2,), "num_res_blocks": 2},
    "heads": {"num_heads": 4},
    "heads_new_order": {"num_heads": 4, "new_order": True},
    "heads_on_all_levels": {"num_heads": 4, "factors": (1, 2)},
    "heads_on_all_levels_new_order": {"num_heads": 2, "factors": (1, 2), "new_order": True},
    "heads_upsample": {"num_heads": 2, "num_heads_upsample": 4, "factors": (1, 2)},
    "heads_upsample_new_order": {"num_heads": 4, "num_heads_upsample": 1, "new_order": True},
    "head_channels": {"num_head_channels": 16, "factors": (1, 2)},
    "head_channels_new_order": {"num_head_channels": 16, "factors": (1, 2), "new_order": True, "updown": True},
    "one_head_everywhere": {"factors": (1, 2)},
    "classes": {"num_classes": 7},
    "classes_scale_shift": {"num_classes": 7, "scale_shift": True, "num_heads": 4},
    "learn_sigma": {"out_channels": 6, "scale_shift": True},
    "three_blocks": {"num_res_blocks": 3, "num_heads": 2},
    "narrow_first": {"num_channels": 64, "multipliers": (0.5, 1, 1), "factors": (4,), "num_heads": 4},
    "narrow_first_updown": {"num_channels": 64, "multipliers": (0.5, 1), "updown": True, "scale_shift": True},
    "one_level": {"multipliers": (1,), "factors": (1,)},
    "dropout": {"dropout": 0.3},
    "guided": {
        "multipliers": (1, 2, 2),
        "factors": (2, 4),
        "num_head_channels": 32,
        "new_order": True,
        "scale_shift": True,
        "updown": True,
        "num_classes": 7,
        "out_channels": 6,
    },
}


def authority(name="plain", seed=0, **change):
    """The network of that config with weights that leave no layer out, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = OpenAIUNet(**{**CONFIGS[name], **change}).eval()
        for parameter in net.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, std=0.2)
        for part in net.modules():
            if isinstance(part, nn.GroupNorm):
                with torch.no_grad():
                    part.weight += 1
    return net


def flags_of(name):
    """What weights do not say of that config."""
    config = CONFIGS[name]
    flags = {"num_heads": config.get("num_heads", 1), "num_head_channels": config.get("num_head_channels", -1)}
    flags["num_heads_upsample"] = config.get("num_heads_upsample", -1)
    return {**flags, "use_new_attention_order": config.get("new_order", False)}


def inputs_of(name, n=2, side=8, seed=1):
    """(x, timesteps, y or None)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, side, side, generator=g)
    t = torch.randint(0, 1000, (n,), generator=g)
    classes = CONFIGS[name].get("num_classes")
    return x, t, None if classes is None else torch.randint(0, classes, (n,), generator=g)
