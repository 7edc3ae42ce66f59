"""PTX text -> a program for the machine: registers become places in a warp's file, constants registers with a value."""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import dataclass, field

import numpy as np

from .build import entries, library

LANES = 32
WIDTHS = {"pred": 0, "b8": 2, "b16": 2, "u16": 2, "s16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8,
          "u64": 8, "s64": 8}  # fmt: skip
LETTERS = {"h": 2, "w": 4, "x": 8, "p": 0, "v": 8}
SPECIALS = ("%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%ntid.x", "%ntid.y", "%ntid.z",
            "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid")  # fmt: skip
POISON = 0xBD
"""Every byte of a register that nothing was written to."""
NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})$|0[dD]([0-9a-fA-F]{16})$")
# Words of a name that change nothing here: hints for caches, and that all lanes branch alike.
IDLE = re.compile(r"\.(?:uni|volatile|relaxed|gpu|cta|L1::\w+|L2::\w+|nc|ca|cg|cs|wb)\b(?!::)")
SAME_WIDTH = re.compile(r"\.[usf](16|32|64)$")


class Unknown(ValueError):
    """PTX that the machine does not know."""


@dataclass
class Program:
    """A kernel ready to run. ``lines``: the PTX of each instruction, for messages; parameters: (byte, size) of each."""

    name: str
    handle: int
    lines: list[str]
    parameters: list[tuple[int, int]]
    approximate: list[str]
    threads: int
    shared: int = 0

    def __del__(self) -> None:
        library().ptx_free_program(self.handle)


@dataclass
class _Reader:
    """What has been read so far."""

    scopes: list[dict[str, int]] = field(default_factory=lambda: [{}])
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    constants: dict[tuple[int, int], int] = field(default_factory=dict)
    specials: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    jumps: list[tuple[int, str]] = field(default_factory=list)
    shared_arrays: dict[str, tuple[int, int]] = field(default_factory=dict)
    size: int = 0
    shared: int = 0
    own: int = 0

    def place(self, width: int) -> int:
        """A new register as an operand: its place in the file, its width above bit 32."""
        at = self.size
        self.size += (width * LANES) or 8
        return at | width << 32

    def declare(self, text: str) -> None:
        """.reg .b32 %r<10>;  .reg .f32 e, f;"""
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()  # type: ignore[union-attr]
        if kind not in WIDTHS:
            raise Unknown(f"registers of type .{kind}")
        for name in re.split(r"\s*,\s*", names.strip()):
            several = re.fullmatch(r"(\S+?)<(\d+)>", name)
            if several is None:
                self.scopes[-1][name] = self.place(WIDTHS[kind])
            else:  # placed as they come up
                self.ranges.append((several[1], int(several[2]), WIDTHS[kind]))

    def local(self, text: str) -> None:
        """.local .align 4 .b8 depot[16];"""
        found = re.fullmatch(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", text)
        if found is None:
            raise Unknown(text)
        self.symbols[found[2]] = -(-self.own // int(found[1])) * int(found[1])
        self.own = self.symbols[found[2]] + int(found[3])

    def register(self, name: str) -> int | None:
        """The operand for a register, or None where there is none of this name."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        if name in SPECIALS:
            if name not in self.specials:
                self.specials[name] = self.place(4)
            return self.specials[name]
        for prefix, count, width in self.ranges:
            number = name[len(prefix) :]
            if name.startswith(prefix) and number.isdigit() and int(number) < count:
                return self.scopes[0].setdefault(name, self.place(width))
        return None

    def constant(self, value: int, width: int) -> int:
        """A register that holds a number."""
        key = value & (1 << (8 * width or 32)) - 1, width
        if key not in self.constants:
            self.constants[key] = self.place(width)
        return self.constants[key]

    def number(self, text: str) -> int:
        """A number, the bits of a float, or the address of a shared array."""
        if NUMBER.match(text):
            return int(text.rstrip("U"), 0)
        bits = FLOAT.match(text)
        if bits:
            return int(bits[1] or bits[2], 16)
        if text in self.symbols:
            return self.symbols[text]
        if text in self.shared_arrays:
            alignment, size = self.shared_arrays[text]
            self.symbols[text] = -(-self.shared // alignment) * alignment
            self.shared = self.symbols[text] + size
            return self.symbols[text]
        raise Unknown(f"operand {text!r}")

    def operand(self, text: str, letter: str) -> list[int]:
        """One operand as the signature's letter asks for it."""
        if letter == "i":
            return [self.number(text)]
        if letter == "a":
            base, _, offset = (part.strip() for part in text.strip("[] \t").partition("+"))
            register, distance = self.register(base), self.number(offset or "0")
            return [self.constant(0, 8), self.number(base) + distance] if register is None else [register, distance]
        width = LETTERS[letter]
        if text == "_":
            return [self.place(width)]
        register = self.register(text)
        if register is None:
            value = self.number(text)
            return [self.constant(-(value != 0), 0) if letter == "p" else self.constant(value, width)]
        if letter != "v" and register >> 32 != width:
            raise Unknown(f"register {text} has {register >> 32} bytes, the instruction takes {width}")
        return [register]


def _operands(text: str) -> list[str]:
    """Split at commas; braces only group."""
    parts: list[str] = []
    depth, part = 0, ""
    for char in text.replace("{", " ").replace("}", " "):
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += char
    return [*parts, part.strip()] if part.strip() or parts else []


def _canonical(name: str, text: str, count: int) -> str:
    """The machine's name of an instruction: without what changes nothing."""
    if name.startswith("cp.async.c") and ".shared.global" in name:
        return "cp.async"
    if name.startswith("bra"):
        return "bra"
    if name.startswith("wgmma.mma"):
        # The matrix a comes in four registers, braced, or by a descriptor.
        return name + (".a" if text.count("{") == 2 else "")
    if name.startswith("mov."):
        name = SAME_WIDTH.sub(r".b\1", name)
        if "{" in text:
            return f"{name}.{'unpack' if text.lstrip().startswith('{') else 'pack'}{count - 1}"
        return name
    if name.startswith(("cvta.to.", "cvta.local")):
        return "mov.b64"  # an address is the same in both spaces
    if name.startswith("shfl.sync") and "|" in text:
        return name + ".p"
    if name.startswith(("ld.", "st.")):
        name = re.sub(r"\.[uf](16|32|64)$", r".b\1", IDLE.sub("", name))
    return name


@functools.lru_cache(maxsize=16)
def _stripped(ptx: str) -> str:
    """Without comments and positions."""
    ptx = re.sub(r"/\*.*?\*/|//[^\n]*", "", ptx, flags=re.S)
    return re.sub(r"^\s*\.(?:loc|file)\s[^\n]*$", "", ptx, flags=re.M)


def _body(ptx: str, kernel: str) -> tuple[str, str, str, str]:
    """Name, parameters, directives and body of a kernel, by its name or the only one."""
    found = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", ptx))
    chosen = [entry for entry in found if kernel in ("", entry[1])]
    if len(chosen) != 1:
        raise Unknown(f"PTX with {len(chosen)} kernels {kernel or 'of any name'}, expected one")
    start = chosen[0].end()
    depth, end = 1, start
    for brace in re.finditer(r"[{}]", ptx[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            end = start + brace.start()
            break
    return chosen[0][1], chosen[0][2], chosen[0][3], ptx[start:end]


def _parameters(reader: _Reader, text: str) -> list[tuple[int, int]]:
    """Places of the parameters in the block, aligned as they ask or to their sizes."""
    at = 0
    for entry in filter(None, (part.strip() for part in text.split(","))):
        found = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([usbf])(\d+)\s+(?:\.ptr\s+)?(?:\.global\s+)?(?:\.align\s+\d+\s+)?"
            r"([\w$]+)(?:\[(\d+)\])?$",
            entry,
        )
        if found is None:
            raise Unknown(f"parameter {entry!r}")
        each = int(found[3]) // 8
        size = each * int(found[5] or 1)
        alignment = int(found[1] or each)
        at = -(-at // alignment) * alignment
        reader.parameters[found[4]] = (at, size)
        at += size
    return list(reader.parameters.values())


def _shared_arrays(reader: _Reader, text: str) -> None:
    """.shared .align 4 .b8 name[64];  .shared .f32 name;  they get their places when they are used."""
    declared = r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.[usbf](\d+)\s+([\w$]+)(?:\[(\d*)\])?\s*;"
    for alignment, bits, name, count in re.findall(declared, text):
        size = int(bits) // 8
        reader.shared_arrays[name] = (int(alignment or size), size * int(count or 1))


def parse(ptx: str, kernel: str = "") -> Program:
    """The kernel of that name, or the only one, in ``ptx``; Unknown where there is something in it that the machine
    does not know."""
    known = entries()
    reader = _Reader()
    ptx = _stripped(ptx)
    name, parameter_text, head, body = _body(ptx, kernel)
    parameters = _parameters(reader, parameter_text)
    reader.symbols.update({symbol: place[0] for symbol, place in reader.parameters.items()})
    for symbol in re.findall(r"\.extern\s+\.shared[^;]*?([\w$]+)\[\]\s*;", ptx):
        reader.symbols[symbol] = 0
    _shared_arrays(reader, ptx)
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", head)
    code: list[int] = []
    starts: list[int] = []
    lines: list[str] = []
    approximate: list[str] = []
    for text in re.findall(r"\s*([\w$]+:(?!:)|(?:[^;{}:]|\{[^{};]*\}|::)+;|\{|\})", body):
        if text == "{":
            reader.scopes.append({})
        elif text == "}":
            reader.scopes.pop()
        elif text.endswith(":"):
            reader.labels[text[:-1]] = len(lines)
        elif text.startswith(".reg"):
            reader.declare(text[:-1].strip())
        elif text.startswith(".local"):
            reader.local(text[:-1].strip())
        elif text.startswith((".pragma", ".shared")):
            pass
        else:
            text = " ".join(text[:-1].split())
            try:
                starts.append(len(code))
                code.extend(_instruction(reader, text, known, approximate, len(lines)))
            except Unknown as error:
                raise Unknown(f"{name}: {error}, in {text!r}") from None
            lines.append(text)
    for number, label in reader.jumps:
        code[starts[number] + 4] = reader.labels[label]
    return _finished(reader, name, code, lines, parameters, approximate, int(threads[1]) if threads else 0)


def _instruction(
    reader: _Reader, text: str, known: dict[str, tuple[int, str]], approximate: list[str], number: int
) -> list[int]:
    """An instruction as numbers: entry, guard, whether it is negated, count of operands, operands."""
    found = re.match(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)$", text, re.S)
    if found is None or text.startswith("."):
        raise Unknown("a directive")
    negated, guard, mnemonic, rest = found.groups()
    operands = _operands(rest.replace("|", ",") if mnemonic.startswith("shfl") else rest)
    name = _canonical(mnemonic, rest, len(operands))
    if name not in known:
        raise Unknown(f"unknown instruction {mnemonic}")
    entry, signature = known[name]
    if ".approx" in name or ".full" in name:
        approximate.append(name)
    if name == "bra":
        reader.jumps.append((number, operands[0]))
        operands = ["0"]
    if len(operands) != len(signature) and not (name == "cp.async" and len(operands) == 3):
        raise Unknown(f"{len(operands)} operands, expected {len(signature)}")
    places = [
        place for operand, letter in zip(operands, signature, strict=False) for place in reader.operand(operand, letter)
    ]
    predicate = -1
    if guard is not None:
        register = reader.register(guard)
        if register is None:
            raise Unknown(f"operand {guard!r}")
        predicate = register
    return [entry, predicate, int(bool(negated)), len(places), *places]


def _finished(
    reader: _Reader,
    name: str,
    code: list[int],
    lines: list[str],
    parameters: list[tuple[int, int]],
    approximate: list[str],
    threads: int,
) -> Program:
    file = np.full(reader.size, POISON, np.uint8)
    for (value, width), place in reader.constants.items():
        at = place & 0xFFFFFFFF
        if width == 0:
            file[at : at + 4] = np.frombuffer(value.to_bytes(4, "little"), np.uint8)
        else:
            file[at : at + width * LANES] = np.tile(np.frombuffer(value.to_bytes(width, "little"), np.uint8), LANES)
    numbers = np.array(code, np.int64)
    specials = np.array([reader.specials.get(special, -1) for special in SPECIALS], np.int64)
    handle = library().ptx_program(
        numbers.ctypes.data_as(ctypes.c_void_p),
        len(numbers),
        file.ctypes.data_as(ctypes.c_void_p),
        len(file),
        specials.ctypes.data_as(ctypes.c_void_p),
        reader.own,
    )
    return Program(name, handle, lines, parameters, approximate, threads, reader.shared)
