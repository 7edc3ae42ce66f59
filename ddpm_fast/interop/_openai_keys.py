"""The state dict of OpenAI's `UNetModel` and of `DDPMUNet`, each as the other's: the same numbers under other names.

Only attention is laid out differently: q, k and v are one 1x1 convolution there, [3 c, c, 1], and three linear layers
here, [c, c]. Its rows are [head][q, k, v][channel of the head], with use_new_attention_order [q, k, v][head][channel].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._weights import State

KINDS = ("weight", "bias")
RES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
QKV = ("to_q", "to_k", "to_v")


class Place(NamedTuple):
    """A part of the network: our name, theirs; heads is -1 for a residual block, 0 for a layer, else attention's."""

    ours: str
    theirs: str
    heads: int = 0


def resamples(config: Mapping[str, Any], way: str, level: int) -> bool:
    """Whether the level hands over by a residual block; way "down" or "up", level 0 the finest."""
    blocks = config[f"{way}_block_types"]
    block = blocks[level if way == "down" else len(blocks) - 1 - level]
    return bool(block.startswith("Resnet") or (block.startswith("Attn") and config[f"{way}sample_type"] == "resnet"))


def head_count(config: Mapping[str, Any], way: str, level: int) -> int:
    """Heads of the attention of a level; of the middle's with way "down" and the last level."""
    pair = config.get("num_attention_heads")
    if pair is not None:
        return int(pair[way == "up"])
    width = config["block_out_channels"][level]
    return int(width // (config["attention_head_dim"] or width))


def places(config: Mapping[str, Any]) -> Iterator[Place]:
    """Every part that has weights, in the order of their state dict. config: of a `DDPMUNet`."""
    layers, last = config["layers_per_block"], len(config["block_out_channels"]) - 1
    yield from (Place(f"time_embedding.linear_{i + 1}", f"time_embed.{2 * i}") for i in range(2))
    if config["num_class_embeds"] is not None:
        yield Place("class_embedding", "label_emb")
    yield Place("conv_in", "input_blocks.0.0")
    k = 1
    for level, block in enumerate(config["down_block_types"]):
        ours = f"down_blocks.{level}"
        for j in range(layers):
            yield Place(f"{ours}.resnets.{j}", f"input_blocks.{k}.0", -1)
            if block.startswith("Attn"):
                yield Place(f"{ours}.attentions.{j}", f"input_blocks.{k}.1", head_count(config, "down", level))
            k += 1
        if level < last:
            yield _change(f"{ours}.downsamplers.0", f"input_blocks.{k}.0", "op", resamples(config, "down", level))
            k += 1
    yield Place("mid_block.resnets.0", "middle_block.0", -1)
    yield Place("mid_block.attentions.0", "middle_block.1", head_count(config, "down", last))
    yield Place("mid_block.resnets.1", "middle_block.2", -1)
    k = 0
    for i, block in enumerate(config["up_block_types"]):
        ours, level, attends = f"up_blocks.{i}", last - i, block.startswith("Attn")
        for j in range(layers + 1):
            yield Place(f"{ours}.resnets.{j}", f"output_blocks.{k}.0", -1)
            if attends:
                yield Place(f"{ours}.attentions.{j}", f"output_blocks.{k}.1", head_count(config, "up", level))
            if level and j == layers:
                theirs = f"output_blocks.{k}.{1 + attends}"
                yield _change(f"{ours}.upsamplers.0", theirs, "conv", resamples(config, "up", level))
            k += 1
    yield Place("conv_norm_out", "out.0")
    yield Place("conv_out", "out.2")


def _change(ours: str, theirs: str, conv: str, resnet: bool) -> Place:
    return Place(ours, theirs, -1) if resnet else Place(f"{ours}.conv", f"{theirs}.{conv}")


def _plain(place: Place) -> Iterator[tuple[str, str]]:
    """(our key, their key) of what has the same shape on both sides."""
    if place.heads < 0:
        pairs = [(f"{place.ours}.{ours}", f"{place.theirs}.{theirs}") for ours, theirs in RES.items()]
    elif place.heads:
        pairs = [(f"{place.ours}.group_norm", f"{place.theirs}.norm")]
    else:
        pairs = [(place.ours, place.theirs)]
    yield from ((f"{ours}.{kind}", f"{theirs}.{kind}") for ours, theirs in pairs for kind in KINDS)


def to_theirs(state: Mapping[str, Tensor], config: Mapping[str, Any], new_order: bool) -> State:
    """Our state dict under their names. What is not joined shares memory with what was given."""
    result: State = {}
    for place in places(config):
        result |= {theirs: state[ours] for ours, theirs in _plain(place) if ours in state}
        if place.heads > 0:
            for kind in KINDS:
                parts = [state[f"{place.ours}.{name}.{kind}"] for name in QKV]
                joined = _join(parts, place.heads, new_order)
                result[f"{place.theirs}.qkv.{kind}"] = joined[..., None] if kind == "weight" else joined
            for kind in KINDS:
                out = state[f"{place.ours}.to_out.0.{kind}"]
                result[f"{place.theirs}.proj_out.{kind}"] = out[..., None] if kind == "weight" else out
    return result


def to_ours(state: Mapping[str, Tensor], config: Mapping[str, Any], new_order: bool) -> State:
    """Their state dict under our names, as far as it is theirs; what is left over keeps its name."""
    result: State = dict(state)
    for place in places(config):
        for ours, theirs in _plain(place):
            if theirs in state:
                result[ours] = result.pop(theirs)
        if place.heads <= 0:
            continue
        for kind in KINDS:
            qkv, out = f"{place.theirs}.qkv.{kind}", f"{place.theirs}.proj_out.{kind}"
            if qkv in state and state[qkv].shape[0] % (3 * place.heads) == 0:
                parts = _split(_flat(result.pop(qkv)), place.heads, new_order)
                result |= {f"{place.ours}.{name}.{kind}": part for name, part in zip(QKV, parts, strict=True)}
            if out in state:
                result[f"{place.ours}.to_out.0.{kind}"] = _flat(result.pop(out))
    return result


def _flat(weight: Tensor) -> Tensor:
    """A 1x1 convolution's weight as a linear layer's; a bias as it is."""
    return weight[..., 0] if weight.dim() == 3 else weight


def _join(parts: list[Tensor], heads: int, new_order: bool) -> Tensor:
    if new_order:
        return torch.cat(parts)
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)


def _split(qkv: Tensor, heads: int, new_order: bool) -> tuple[Tensor, ...]:
    if new_order:
        return qkv.chunk(3)
    return tuple(part.flatten(0, 1) for part in qkv.unflatten(0, (heads, 3, -1)).unbind(1))
