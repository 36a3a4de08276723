"""Ways to damage the files of a checkpoint: fields that lie, and bytes that are wrong, drawn from a `Random`.

Each mutation takes a file's bytes and gives others. `byte_level` knows nothing of what it damages; the rest know one
format, and leave it whole but for what they changed, so that checksums and lengths do not catch the lie before the
reader has to.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

SIZES = [0, 1, 2, 3, 64, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
NUMBERS = [*SIZES, -1, -(2**31), -(2**63), 2**64, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")]
WORDS = [
    "",
    "8",
    "F32",
    "BF16",
    "U32",
    "I8",
    "F8_E4M3",
    "__metadata__",
    "../../etc/passwd",
    "/dev/zero",
    "\x00",
    "é",
    "x" * 9999,
]
WRAPPED = [None, True, False, [], {}, [[]], [2**31] * 8, [1] * 5000, [0, 0], [0, 2**63], {"dtype": "F32"}, {"": {}}]
DIGITS = "@digits@"  # json refuses to write as many as a file may hold
DEEP = "@deep@"


def byte_level(data: bytes, rng: Random) -> bytes:
    """Flip, cut out, put in, move or repeat bytes; the beginning, where headers are, twice as often."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        reach = len(out) if rng.random() < 0.5 else min(len(out), 4096)
        at, count = rng.randrange(reach + 1), rng.choice((1, 2, 4, 8, 64, 4096))
        way = rng.randrange(7)
        if way == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            del out[at:]
        elif way == 2:
            del out[at : at + count]
        elif way == 3:
            out[at:at] = rng.randbytes(count)
        elif way == 4:
            out[at : at + count] = rng.randbytes(count)
        elif way == 5:
            begin = rng.randrange(len(out) + 1)
            out[at : at + count] = out[begin : begin + count]
        else:
            out[at : at + count] = bytes([rng.choice((0, 255, ord("["), ord("9")))]) * count
    return bytes(out)


# ---------------------------------------- JSON


def json_object(data: bytes, rng: Random) -> bytes:
    """Change a few values of a JSON object, wherever in it."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _change(value, rng)
    text = json.dumps(value).replace(f'"{DIGITS}"', "9" * rng.choice((400, 4300, 5000)))
    if rng.random() < 0.02:  # a key that is there twice
        text = text.replace("{", '{"dim": 1, "dim": [], ', 1)
    depth = rng.choice((50, rng.randrange(900, 1000), 100_000))  # a parser's limit, and a little less
    return text.replace(f'"{DEEP}"', "[" * depth + "]" * depth).encode()


def _change(value: Any, rng: Random) -> None:
    """Change one place of a nested value."""
    places = list(_places(value))
    if not places:
        return
    inside, key = rng.choice(places)
    way = rng.randrange(6)
    if way == 0:
        inside[key] = _nonsense(rng)
    elif way == 1 and isinstance(inside[key], int):
        inside[key] = rng.choice((inside[key] + 1, inside[key] - 1, inside[key] * 2, inside[key] // 2, -inside[key]))
    elif way == 2:
        del inside[key]
    elif way == 3:
        other, name = rng.choice(places)
        inside[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else other[name : name + 1]))
    elif way == 4 and isinstance(inside, dict):
        inside[rng.choice([str(_nonsense(rng))[:999], "model.norm.weight", f"{key}x"])] = inside.pop(key)
    elif isinstance(inside[key], list):
        rng.shuffle(inside[key])
        inside[key] += rng.choice(([], [1], [_nonsense(rng)]))
    else:
        inside[key] = rng.choice(([inside[key]], {"x": inside[key]}, str(inside[key])))


def _nonsense(rng: Random) -> Any:
    kind = rng.random()
    # A copy, as the next change may be made inside of it.
    return deepcopy(rng.choice(NUMBERS if kind < 0.5 else WORDS if kind < 0.7 else [*WRAPPED, DIGITS, DEEP, DEEP]))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a nested value: a container, and a key or index."""
    found = []
    pending = [value]
    while pending and len(found) < 10_000:
        inside = pending.pop()
        keys = list(inside) if isinstance(inside, dict) else range(len(inside))
        found += [(inside, key) for key in keys]
        pending += [inside[key] for key in keys if isinstance(inside[key], dict | list)]
    return found


# ---------------------------------------- safetensors


def safetensors_header(data: bytes, rng: Random) -> bytes:
    """Change the header's JSON, or the length before it."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + length], data[8 + length :]
    way = rng.random()
    if way < 0.1:
        return struct.pack("<Q", rng.choice([*SIZES, length - 1, length + 1, len(data), len(data) - 8])) + data[8:]
    if way < 0.3:
        header = _plausible_lie(json.loads(header), rng)
    else:
        header = json_object(header, rng)
    return struct.pack("<Q", len(header)) + header + body


def _plausible_lie(header: dict[str, Any], rng: Random) -> bytes:
    """An entry changed so that its size stays right; or many entries that lie on the same bytes."""
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    way = rng.randrange(5)
    if way == 0:
        entry["shape"] = entry["shape"][::-1]
    elif way == 1:
        entry["shape"] = [1] * rng.choice((1, 62, 5000)) + entry["shape"]
    elif way == 2:
        entry["dtype"] = {"BF16": "F16", "F16": "I16", "U32": "I32", "F32": "I32"}.get(entry["dtype"], "U8")
    elif way == 3:
        header[name], header[other] = header[other], entry
    else:
        empty = {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}
        header |= {f"{n}.weight": rng.choice((entry, empty)) for n in range(rng.choice((2, 20_000)))}
    return json.dumps(header).encode()


def store_metadata(data: bytes, rng: Random) -> bytes:
    """Change what a store's header says of its tensors; the header is as long as it needs to be."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = header["__metadata__"]["octavo"].encode()
    changed = json_object(text, rng) if rng.random() < 0.7 else _plausible_store(json.loads(text), rng)
    header["__metadata__"]["octavo"] = changed.decode()
    new = json.dumps(header).encode()
    return struct.pack("<Q", len(new)) + new + data[8 + length :]


def _plausible_store(said: dict[str, Any], rng: Random) -> bytes:
    """A format, dtype or shape that others have; or the entries of two tensors exchanged."""
    tensors = said["tensors"]
    name, other = rng.sample(sorted(tensors), 2)
    quantised = [entry for entry in tensors.values() if "shape" in entry]
    entry, way = rng.choice(quantised), rng.randrange(5)
    if way == 0:
        entry["format"] = rng.choice(("q8", "q4", "q3", "q2", "q5"))
    elif way == 1:
        entry["dtype"] = rng.choice(("F32", "F16", "BF16", "F64", "U8"))
    elif way == 2:
        entry["shape"] = [n + rng.choice((-1, 0, 1, 16)) for n in entry["shape"]]
    elif way == 3:
        entry["shape"] = entry["shape"][::-1]
    else:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return json.dumps(said).encode()


# ---------------------------------------- GGUF


def gguf_header(data: bytes, rng: Random) -> bytes:
    """Change numbers of the header: counts, lengths, types, dimensions, offsets, values."""
    out = bytearray(data)
    fields = _gguf_fields(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, width = rng.choice(fields)
        old = int.from_bytes(out[at : at + width], "little")
        new = rng.choice((rng.choice(SIZES), rng.randrange(48), old + 1, old - 1, old * 2, old + 32))
        out[at : at + width] = (new % 2 ** (8 * width)).to_bytes(width, "little")
    if rng.random() < 0.1:  # a value of arrays in arrays
        depth = rng.choice((1, 3, 4, 1000))
        value = (
            struct.pack("<Q", 1) + b"x" + struct.pack("<I", 9) + struct.pack("<IQ", 9, rng.choice((1, *SIZES))) * depth
        )
        out[24:24] = value + struct.pack("<IQ", 4, 0)
        out[16:24] = struct.pack("<Q", (struct.unpack("<Q", out[16:24])[0] + 1) % 2**64)
    return bytes(out)


def _gguf_fields(data: bytes) -> list[tuple[int, int]]:
    """Place and width of every number of a header that is whole."""
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    fields = [(4, 4), (8, 8), (16, 8)]
    at = 24

    def number(width: int) -> int:
        nonlocal at
        fields.append((at, width))
        at += width
        return int.from_bytes(data[at - width : at], "little")

    def skip_string() -> None:
        nonlocal at
        length = number(8)
        at += length

    def skip_value(kind: int) -> None:
        if kind == 8:
            skip_string()
        elif kind == 9:
            inner = number(4)
            for _ in range(number(8)):
                skip_value(inner)
        else:
            number(widths[kind])

    for _ in range(int.from_bytes(data[16:24], "little")):
        skip_string()
        skip_value(number(4))
    for _ in range(int.from_bytes(data[8:16], "little")):
        skip_string()
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return fields


# ---------------------------------------- npz, and torch's zip archives

DESCRS = [
    "<f4",
    ">f4",
    "|O",
    "O",
    "<U8",
    "V2",
    "|V2",
    "<V2",
    "V1000000000",
    "<c8",
    "|b1",
    "<f8",
    "<f2",
    "<i8",
    "<m8[ns]",
    "|S0",
    "",
    "<f4' + '",
]
SHAPES = [
    "",
    "0,",
    "64, 64",
    "4096,",
    "-1,",
    "2147483648, 2147483648",
    "18446744073709551616,",
    "9" * 3000,
    "1, " * 5000,
    "None,",
    "(" * 5000,
    "0, 9223372036854775807",
]
ZIP_RECORDS = {b"PK\x03\x04": 30, b"PK\x01\x02": 46, b"PK\x05\x06": 22}


def zip_fields(data: bytes, rng: Random) -> bytes:
    """Change numbers of a zip archive's directory, or of the headers before its members."""
    out = bytearray(data)
    places = [(m.start(), n) for signature, n in ZIP_RECORDS.items() for m in re.finditer(re.escape(signature), data)]
    for _ in range(rng.choice((1, 2, 4))):
        at, nbytes = rng.choice(places)
        width = rng.choice((1, 2, 4))
        begin = at + rng.randrange(4, nbytes - width + 1)
        old = int.from_bytes(out[begin : begin + width], "little")
        new = rng.choice((rng.choice(SIZES), old + 1, old - 1, old ^ 1, old ^ 8))
        out[begin : begin + width] = (new % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(out)


def npy_header(data: bytes, rng: Random) -> bytes:
    """Change what a member of an npz says of itself; the archive stays whole."""

    def change(member: bytes) -> bytes:
        length = struct.unpack("<H", member[8:10])[0]
        text, body = member[10 : 10 + length].decode("latin1"), member[10 + length :]
        way = rng.randrange(8)
        if way < 2:
            text = re.sub("'descr': '[^']*'", lambda _: f"'descr': '{rng.choice(DESCRS)}'", text)
        elif way < 4:
            text = re.sub(r"'shape': \([^)]*\)", lambda _: f"'shape': ({rng.choice(SHAPES)})", text)
        elif way == 4:
            text = text.replace("False", rng.choice(("True", "None", "0", "__import__('os').abort()")))
        elif way == 5:
            text = rng.choice(("", "{}", "[" * 9000, "{'descr': [('a', '<f4')], " + text[1:], "\x00" * 64, text * 50))
        elif way == 6:
            return byte_level(member[:200], rng) + member[200:]
        length = len(text) if way < 7 else rng.choice((0, 1, length - 1, length + 1, 9999, 65535))
        version = member[:8] if way < 6 else member[:6] + bytes([rng.choice((0, 2, 3, 255)), 0])
        return version + struct.pack("<H", length % 65536) + text.encode("latin1") + body

    return _rezipped(data, rng, ".npy", change)


def torch_pickle(data: bytes, rng: Random) -> bytes:
    """Change bytes of the pickle in a torch file; the archive stays whole."""
    return _rezipped(data, rng, "data.pkl", lambda member: byte_level(member, rng))


def _rezipped(data: bytes, rng: Random, ending: str, change: Callable[[bytes], bytes]) -> bytes:
    """The same archive with one of the members of that kind changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = rng.choice([name for name in names if name.endswith(ending)])
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info, change(content) if info.filename == chosen else content)
    return out.getvalue()
