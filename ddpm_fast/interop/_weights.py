"""A folder's weights, as diffusers names and writes them. Needs no diffusers; safetensors for `.safetensors` files.

Everything that is wrong with a file is one ValueError (FileNotFoundError where it is missing) that names it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..training.files import reason

STEM = "diffusion_pytorch_model"
KINDS = ("safetensors", "bin")
SHOWN = 3  # keys named in a message before "and 17 more"

State = dict[str, Tensor]


def read_weights(folder: Path, variant: str | None = None) -> tuple[State, Path]:
    """The state dict in `folder` and the file that it was read from, an index where it is in shards.

    Looked for in this order: safetensors, its index of shards, bin, its index. variant: part of the name, as in "fp16".
    """
    names = _names(variant)
    for name in names:
        path = folder / name
        if path.is_file():
            return (_read_shards(path) if name.endswith("json") else read_file(path)), path
    others = sorted(path.name for path in folder.glob(f"{STEM}*"))
    there = f"there are {', '.join(others)}: pass variant=" if others else "it has no weights"
    raise FileNotFoundError(f"no {' or '.join(names)} in {folder}; {there}")


def _names(variant: str | None) -> list[str]:
    """What weights may be called: whole and index, of either kind."""
    between = "" if variant is None else f"{variant}."
    return [name for kind in KINDS for name in (f"{STEM}.{between}{kind}", f"{STEM}.{kind}.index.{between}json")]


def write_weights(state: Mapping[str, Tensor], folder: Path, *, variant: str | None, safe: bool) -> None:
    """One file, safetensors or (safe=False) what torch.save writes, replaced in one step; then it is the only one that
    `read_weights` finds: another kind of file of the same variant, which holds older weights, goes.
    """
    names = _names(variant)
    path = folder / (names[0] if safe else names[2])
    beside = path.with_name(path.name + ".part")
    plain = {key: value.detach().contiguous() for key, value in state.items()}
    try:
        if safe:
            _safetensors(path).torch.save_file(plain, beside, metadata={"format": "pt"})
        else:
            torch.save(plain, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    for name in names:
        if name != path.name:
            (folder / name).unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def check_state(state: object, expected: Mapping[str, Tensor], source: object) -> State:
    """`state` if it has exactly the keys and shapes of `expected`; else a ValueError naming `source` and the keys."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} must hold a state dict, tensors by name, got {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{source} must hold tensors by name, got {type(value).__name__} under {key!r}")
    wrong = []
    for words, keys in (
        ("missing", [key for key in expected if key not in state]),
        ("unexpected", [key for key in state if key not in expected]),
    ):
        if keys:
            wrong.append(f"{words}: {_some(keys)}")
    shapes = [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if shapes:
        wrong.append(_some(shapes))
    kinds = [f"{key} is {value.dtype}" for key, value in state.items() if not value.is_floating_point()]
    if kinds:
        wrong.append(f"not floating: {_some(kinds)}")
    if wrong:
        raise ValueError(f"{source} does not fit the network; {'; '.join(wrong)}")
    return dict(state)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _safetensors(path: Path) -> Any:
    """The package, with its part for torch."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError(
            f"{path.name} needs the safetensors package: pip install safetensors, or ddpm_fast[interop]"
        ) from None
    return safetensors


def read_file(path: Path) -> State:
    """The state dict in one file: .safetensors, or what torch.save wrote, read as weights only."""
    if path.suffix == ".safetensors":
        library = _safetensors(path)
        try:
            state = library.torch.load_file(path, device="cpu")
        except (library.SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is cut off or no safetensors file: {reason(error)}") from None
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # rubbish makes the restricted unpickler raise almost anything
            raise ValueError(f"{path} is cut off or holds something other than weights: {reason(error)}") from None
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} must hold a state dict, tensors by name, got {type(state).__name__}")
    return dict(state)


def _read_shards(index: Path) -> State:
    """The files that an index names, together. Each must hold the keys that the index expects of it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f'{index} must hold "weight_map", file names by key')
    state: State = {}
    for name in sorted({str(name) for name in places.values()}):
        path = index.parent / name
        if Path(name).name != name:
            raise ValueError(f"{index} must name files beside it, got {name!r}")
        if not path.is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not beside it")
        shard = read_file(path)
        for key in shard:
            if places.get(key) != name:
                raise ValueError(f"{path} holds {key}, which {index.name} does not expect there")
        state |= shard
    absent = [key for key in places if key not in state]
    if absent:
        raise ValueError(f"{index} names keys that its files do not hold: {_some(absent)}")
    return state
