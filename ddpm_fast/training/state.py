"""What networks and optimisers know, as named tensors and JSON, and back."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "optimizer."


def network_state(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    """{prefix + key: tensor}: its weights and buffers themselves, not copies. TypeError for extra state of modules that
    is no tensor.
    """
    state = network.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"a checkpoint holds a model's tensors; {key} is a {type(value).__name__}")
    return {prefix + key: value.detach() for key, value in state.items()}


def load_network_state(prefix: str, network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies the tensors of that prefix into the network."""
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    network.load_state_dict(own)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({"optimizer.<i>.<name>": tensor}, {"groups", "numbers", "class"}), i counting the optimiser's parameters.

    The tensors are its own, not copies. TypeError for an optimiser that keeps something else than tensors and numbers.
    """
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for i, entry in whole["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{PREFIX}{i}.{name}"] = value.detach()
            else:
                numbers.setdefault(str(i), {})[name] = _plain(value, f"state {name}")
    groups = []
    for index, group in enumerate(whole["param_groups"]):
        kept = {}
        for name, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"{PREFIX}group{index}.{name}"] = value.detach()
            else:
                kept[name] = _plain(value, f"option {name}")
        groups.append(kept)
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "numbers": numbers}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:  # fmt: skip
    """Gives the optimiser what `optimizer_state` had of another; in the same dtypes, and copied.

    Raises ValueError where it is of another class or of other parameters, before it is changed.
    """
    if state["class"] != type(optimizer).__name__:
        raise ValueError(f"the optimizer is {type(optimizer).__name__}, the state is {state['class']}'s")
    entries: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in state["numbers"].items()}
    groups = [dict(group) for group in state["groups"]]
    for key, value in tensors.items():
        if key.startswith(PREFIX):
            where, name = key.removeprefix(PREFIX).split(".", 1)
            owner = groups[int(where[5:])] if where.startswith("group") else entries.setdefault(int(where), {})
            owner[name] = value
    for group, ours in zip(groups, optimizer.param_groups, strict=False):
        for name, value in group.items():  # JSON knows no tuples
            group[name] = tuple(value) if isinstance(ours.get(name), tuple) else value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(i >= len(parameters) for i in entries):
        raise ValueError(f"the state is of {max(entries) + 1} parameters or more, the optimizer has {len(parameters)}")
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
    for i, entry in entries.items():
        for name, saved in entry.items():
            if isinstance(saved, Tensor):
                _restore(optimizer.state[parameters[i]], name, saved, parameters[i])


def _restore(entry: dict[str, Any], name: str, saved: Tensor, parameter: Tensor) -> None:
    """torch's loading casts to the dtype of the parameter, takes over the strides of the file and may share memory.

    Fused kernels walk through parameter and state alike, so both have to lie in the same order.
    """
    device = entry[name].device
    like = parameter if saved.shape == parameter.shape else saved
    entry[name] = torch.empty_like(like, dtype=saved.dtype, device=device, requires_grad=False).copy_(saved)


def _plain(value: Any, what: str) -> Any:
    """TypeError unless JSON gives the value back."""
    try:
        again = json.loads(json.dumps(value))
    except (TypeError, ValueError):
        again = None
    if again != (list(value) if isinstance(value, tuple) else value):
        raise TypeError(
            f"a checkpoint holds an optimizer of tensors, numbers and names; its {what} is a {type(value).__name__}"
        )
    return value
