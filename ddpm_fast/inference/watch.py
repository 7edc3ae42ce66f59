"""Noticing that a module's weights are no longer those that a plan was made of."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

SAMPLED = 4  # places per tensor where a quick look reads eight bytes
TOGETHER, ROW = 1 << 24, 1 << 10  # words of 4 bytes: of tensors that a GPU adds up at once, and of which each sum is


class Watch:
    """Remembers a module's tensors: which they are, where they lie, their version counters, and what is in them.

    `moved` sees everything that PyTorch counts: optimiser steps, load_state_dict, in-place writes, a parameter or a
    submodule replaced, `.data =`, `.to()`. Writes through `.data` are counted nowhere, so `sampled_changed` (on a CPU)
    compares some values of every tensor, and `contents_changed` sums over all of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.note()

    def note(self) -> None:
        """What is there now is what is expected from now on."""
        self._parts = list(self._model.modules())
        self._slots: list[tuple[dict[str, Any], str, object]] = []
        for part in self._parts:
            self._slots += [(part._modules, name, child) for name, child in part._modules.items()]
            self._slots += [(part._parameters, name, tensor) for name, tensor in part._parameters.items()]
            self._slots += [(part._buffers, name, tensor) for name, tensor in part._buffers.items()]
        self._norms = [(part, part.eps) for part in self._parts if isinstance(part, (nn.BatchNorm2d, nn.GroupNorm))]
        every = list({id(value): value for _, _, value in self._slots if isinstance(value, Tensor)}.values())
        self._tensors = [tensor for tensor in every if tensor.is_floating_point()]
        # BatchNorm's batch counters among them: in training mode its statistics change uncounted, but they do not.
        self._counted = [tensor for tensor in every if not tensor.is_inference()]
        self._places, self._versions = self._marks()
        self._on_host = _on_host(self._tensors)
        self._cells = [cell for tensor in self._tensors for cell in _cells(tensor)] if self._on_host else []
        self._groups, self._others = ([], self._tensors) if self._on_host else _grouped(self._tensors)
        self._sample = [cell.value for cell in self._cells]
        self._sums = self._contents()

    def training(self) -> bool:
        """Whether any part is in training mode."""
        return any(part.training for part in self._parts)

    def moved(self) -> bool:
        """Whether a tensor or a submodule is another one, lies elsewhere, or was written to by counted means.

        Also whether a module got hooks or another forward, or a norm another eps: to be read again, or refused.
        """
        if any(owner.get(name) is not value for owner, name, value in self._slots):
            return True
        if any(part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ for part in self._parts):
            return True
        if any(norm.eps != eps for norm, eps in self._norms):
            return True
        return self._marks() != (self._places, self._versions)

    def sampled_changed(self) -> bool:
        """Whether some values of any tensor differ. On a GPU False: looking would wait for the device.

        To be asked after `moved`, which says whether the tensors are still where they were.
        """
        return [cell.value for cell in self._cells] != self._sample

    def contents_changed(self) -> bool:
        """Whether anything at all differs. Reads every weight once, and on a GPU waits for it."""
        return self.moved() or self.sampled_changed() or not torch.equal(self._contents(), self._sums)

    def _marks(self) -> tuple[list[int], list[int]]:
        return [tensor.data_ptr() for tensor in self._tensors], [tensor._version for tensor in self._counted]

    def _contents(self) -> Tensor:
        with torch.no_grad():
            sums = [_sums_of_rows(torch.cat(group)) for group in self._groups]
            return torch.cat([*sums, *(_sums(tensor) for tensor in self._others)])


def _on_host(tensors: list[Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


def _grouped(tensors: list[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The memory of tensors as int32 words [words], in groups of about TOGETHER; and those that cannot be seen so.

    Added up one by one, a hundred tensors would be several hundred launches, milliseconds in which a GPU idles.
    """
    groups: list[list[Tensor]] = []
    others, space = [], 0
    for tensor in tensors:
        memory = _bytes(tensor)
        if memory.data_ptr() != tensor.data_ptr() or memory.data_ptr() % 4 or memory.numel() % 4:
            others.append(tensor)
            continue
        for words in memory.view(torch.int32).split(TOGETHER):
            if len(words) > space:
                groups.append([])
                space = TOGETHER
            groups[-1].append(words)
            space -= len(words)
    return groups, others


def _sums_of_rows(words: Tensor) -> Tensor:
    """int64: of every ROW words, and of what is left over."""
    whole = len(words) // ROW * ROW
    return torch.cat([words[:whole].view(-1, ROW).sum(1), words[whole:].sum()[None]])


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory, uint8 [bytes], without a copy, whatever the order of its dimensions."""
    values = tensor.detach()
    if not values.is_contiguous():
        strides = values.stride()
        values = values.permute(sorted(range(values.dim()), key=lambda d: -strides[d]))
    return values.contiguous().view(-1).view(torch.uint8)


def _cells(tensor: Tensor) -> list[ctypes.c_uint64]:
    """Eight bytes at some places of the tensor's memory, to be read without asking PyTorch, which takes longer."""
    memory = _bytes(tensor)
    if memory.data_ptr() != tensor.data_ptr():  # not dense: what was looked at would be a copy
        return []
    words = memory.numel() // 8
    places = sorted({words * i // SAMPLED for i in range(SAMPLED)}) if words else []
    return [ctypes.c_uint64.from_address(memory.data_ptr() + 8 * place) for place in places]


def _sums(tensor: Tensor) -> Tensor:
    """The bits of the tensor added up as integers, exact in any order: of every row where rows are whole words."""
    memory = _bytes(tensor)
    rows = tensor.shape[0] if tensor.dim() and tensor.numel() else 1
    if memory.numel() % (8 * rows) == 0 and memory.data_ptr() % 8 == 0:
        return memory.view(torch.int64).view(rows, -1).sum(1)
    return memory.view(1, -1).sum(1, dtype=torch.int64)
