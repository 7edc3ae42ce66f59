"""Files of named tensors: the safetensors format, written whole or not at all, with a checksum over all of it.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of every tensor,
and `__metadata__`, strings by name) and the tensors' bytes, one after the other. The checksum is SHA-256 of the file
with zeros in the place of the checksum. One tensor at a time is copied, so no memory goes into a second set of them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TEMPORARY = ".part"  # the end of the name of a file that is being written
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NO_CHECKSUM = "0" * 64
_LONGEST_HEADER = 100_000_000  # the format's own limit
_CHUNK = 1 << 22


class BrokenFile(ValueError):
    """A file that is cut off, altered, or of another format."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor is in a file; first and last are bytes counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Header:
    """What a file says before its tensors. raw: its bytes, the length in front included."""

    raw: bytes
    metadata: dict[str, str]
    entries: dict[str, Entry]  # in the order of the file


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Replaces `path` in one step, after the new file has reached the disk; the checksum, 64 hexadecimal digits.

    Raises TypeError for what the format cannot hold, and OSError (disk full, not allowed, ...) naming the file; then
    nothing is changed and no temporary is left.
    """
    for name, tensor in tensors.items():
        check(name, tensor)
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # each at a multiple of its size
    raw = _header(order, tensors, metadata)
    beside = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(beside, "wb") as file:
            checksum = hashlib.sha256(raw)
            file.write(raw)
            for name in order:
                content = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                checksum.update(content)
                file.write(content)
            file.seek(raw.index(_NO_CHECKSUM.encode()))
            file.write(checksum.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        said = f"cannot write {path}: {error.strerror or error}; files written before are untouched"
        raise OSError(error.errno or errno.EIO, said) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    return checksum.hexdigest()


def read_tensors(
    path: Path, header: Header, file: BinaryIO, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """The tensors of an open file whose header has been read, on the CPU. BrokenFile where the checksum does not hold,
    which also covers the tensors that are not `wanted`.
    """
    said = header.metadata.get("checksum", "")
    checksum = hashlib.sha256(header.raw.replace(said.encode(), _NO_CHECKSUM.encode(), 1) if said else header.raw)
    spare = bytearray(_CHUNK)
    tensors = {}
    for name, entry in header.entries.items():
        size = entry.last - entry.first
        if wanted(name):
            content = torch.empty(size, dtype=torch.uint8)
            _fill(path, file, content.numpy().data, checksum)
            tensors[name] = content.view(entry.dtype).reshape(entry.shape)
        else:
            for start in range(0, size, _CHUNK):
                _fill(path, file, memoryview(spare)[: min(_CHUNK, size - start)], checksum)
    if checksum.hexdigest() != said:
        raise BrokenFile(f"{path} is damaged: its checksum does not hold")
    return tensors


def read_header(path: Path, file: BinaryIO) -> Header:
    """The header of an open file, checked against the file's size. Raises BrokenFile saying what is wrong."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if size < 8:
        raise BrokenFile(f"{path} is cut off: it has {size} bytes" if size else f"{path} is empty")
    if length > _LONGEST_HEADER:
        raise BrokenFile(f"{path} is no safetensors file")
    raw = file.read(length)
    if len(raw) < length:
        raise BrokenFile(f"{path} is cut off in its header, at {size} bytes, or no safetensors file")
    try:
        places = json.loads(raw)
        metadata = places.pop("__metadata__", {})
        entries = {name: _entry(place) for name, place in places.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BrokenFile(f"{path} is damaged, or no safetensors file: its header cannot be read") from None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BrokenFile(f"{path} is damaged: its metadata are no strings")
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].first, item[1].last)))
    end = 0
    for name, entry in entries.items():
        if entry.first != end or entry.last - entry.first != math.prod(entry.shape) * entry.dtype.itemsize:
            raise BrokenFile(f"{path} is damaged: {name} is not where its header says")
        end = entry.last
    if size != 8 + length + end:
        wrong = "cut off" if size < 8 + length + end else "damaged"
        raise BrokenFile(f"{path} is {wrong}: it has {size} bytes of {8 + length + end}")
    return Header(start + raw, metadata, entries)


def _entry(place: Any) -> Entry:
    shape, (first, last) = place["shape"], place["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError
    return Entry(DTYPES[place["dtype"]], tuple(shape), first, last)


def _header(order: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Its length, and the header with a checksum of zeros, which stand in front of all that could look like them."""
    places: dict[str, Any] = {"__metadata__": {"checksum": _NO_CHECKSUM, **metadata}}
    end = 0
    for name in order:
        tensor = tensors[name]
        first, end = end, end + tensor.numel() * tensor.dtype.itemsize
        places[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(places, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check(name: str, tensor: Tensor) -> None:
    """TypeError for what the format cannot hold."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in _NAMES:
        got = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a dense tensor of a dtype that safetensors files hold, got {got}")


def _fill(path: Path, file: BinaryIO, content: memoryview, checksum: Any) -> None:
    done = 0
    while done < len(content):
        count = file.readinto(content[done:])  # type: ignore[attr-defined]
        if not count:
            raise BrokenFile(f"{path} was cut off while it was read")
        done += count
    checksum.update(content)


def _sync_folder(folder: Path) -> None:
    """The new name reaches the disk, too."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
