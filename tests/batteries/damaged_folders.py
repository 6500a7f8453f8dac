"""Checkpoint folders with one thing wrong: every change that a disk, a network or a hand can make."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

REQUIRED = ("config.json", "metadata.json")


def damage(folder: Path, seed: int, only: str | None = None) -> str:
    """Change something that loading depends on, of any kind or ``only`` of one; say what in words."""
    rng = random.Random(seed)
    name = only or rng.choice(sorted(_DAMAGES))
    return f"{seed}: {name}: {_DAMAGES[name](folder, rng)}"


def _target(folder: Path, rng: random.Random) -> Path:
    weights = sorted(folder.glob("model*.safetensors*"))
    return rng.choice([*weights, *weights, *(folder / name for name in REQUIRED)])


def _flip_bit(folder: Path, rng: random.Random) -> str:
    path = _target(folder, rng)
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{path.name} at byte {at}"


def _cut(folder: Path, rng: random.Random) -> str:
    path = _target(folder, rng)
    size = path.stat().st_size
    length = rng.choice([0, 1, 4, 8, size - 1, size // 2, rng.randrange(size)])
    os.truncate(path, length)
    return f"{path.name} to {length} bytes"


def _grow(folder: Path, rng: random.Random) -> str:
    path = _target(folder, rng)
    with open(path, "ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 4096)))
    return path.name


def _remove(folder: Path, rng: random.Random) -> str:
    path = _target(folder, rng)
    path.unlink()
    return path.name


def _overwrite(folder: Path, rng: random.Random) -> str:
    path = _target(folder, rng)
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    piece = rng.randbytes(rng.randrange(1, 64))
    data[at : at + len(piece)] = bytes(byte ^ 0xFF for byte in data[at : at + len(piece)])
    path.write_bytes(data)
    return f"{path.name} from byte {at}"


def _swap(folder: Path, rng: random.Random) -> str:
    first, second = rng.sample(sorted(path for path in folder.glob("*.json*") if path.name != "manifest.json"), 2)
    if {first.name, second.name} <= {"generation_config.json", "scheduler.json"}:
        first = folder / "config.json"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    return f"{first.name} and {second.name}"


def _header(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.glob("model*.safetensors")))
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    change: Callable[[], None] = rng.choice(
        [
            lambda: header[name].update(data_offsets=[0, 2**40]),
            lambda: header[name].update(data_offsets=header[rng.choice(names)]["data_offsets"][::-1]),
            lambda: header[name].update(dtype=rng.choice(["I8", "F64", "F8_E4M3", "X9"])),
            lambda: header[name].update(shape=[*header[name]["shape"], 3]),
            lambda: header.pop(name),
            lambda: header.update({f"{name}.copy": dict(header[name])}),
        ]
    )
    change()
    text = json.dumps(header).encode()
    size = rng.choice([len(text), len(text), 2**40, 2**63, 0])
    path.write_bytes(struct.pack("<Q", size) + text + data[8 + length :])
    return f"{path.name}, {name}, header of {size} bytes"


def _replace_by(folder: Path, rng: random.Random) -> str:
    path = _target(folder, rng)
    path.unlink()
    kind = rng.choice(["folder", "pipe", "link to nowhere", "link outside", "device"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        goals = {"link to nowhere": "/nowhere/at/all", "link outside": __file__, "device": "/dev/zero"}
        path.symlink_to(goals[kind])
    return f"{path.name} by a {kind}"


def _index(folder: Path, rng: random.Random) -> str:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return "no index; " + _flip_bit(folder, rng)
    content = json.loads(path.read_text())
    name = rng.choice(sorted(content["weight_map"]))
    goal = rng.choice(
        ["../model.safetensors", "/etc/passwd", "absent.safetensors", "sub/model.safetensors", "", None, 7]
    )
    content["weight_map"][name] = goal
    path.write_text(json.dumps(content))
    return f"{name} -> {goal!r}"


def _manifest(folder: Path, rng: random.Random) -> str:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    entry = rng.choice([entry for entry in content["artifacts"] if entry["required"]])
    value = rng.choice([None, -1, True, "", "sha256:", "../config.json", "/etc/passwd", [], {}, 1e300])
    key = rng.choice(["path", "kind", "required", "bytes", "sha256", "schema_version", "artifacts", "new"])
    if key == "new":
        entry["surprise"] = 1
    elif key in content:
        content[key] = value
    elif not (key == "required" and value is True):
        entry[key] = value
    else:
        del entry[key]
    path.write_text(json.dumps(content))
    return f"{entry.get('path')}: {key} = {value!r}"


def _manifest_text(folder: Path, rng: random.Random) -> str:
    path = folder / "manifest.json"
    text = path.read_text()
    kind, new = rng.choice(
        [
            ("cut", text[: rng.randrange(1, len(text) - 3)]),
            ("nested", "[" * 100_000),
            ("NaN", text.replace('"schema_version": 1', '"schema_version": NaN')),
            ("key twice", text.replace('"schema_version": 1', '"schema_version": 1, "schema_version": 1')),
            ("version 2", text.replace('"schema_version": 1', '"schema_version": 2')),
            ("empty", ""),
            ("no object", "3"),
        ]
    )
    path.write_text(new)
    return kind


_DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {
    "bit flipped": _flip_bit,
    "cut": _cut,
    "bytes appended": _grow,
    "removed": _remove,
    "overwritten": _overwrite,
    "swapped": _swap,
    "header edited": _header,
    "replaced": _replace_by,
    "index edited": _index,
    "manifest edited": _manifest,
    "manifest damaged": _manifest_text,
}
