"""Ways to spoil an artifact's folder. Every one draws all its choices from a generator."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ringcompile.artifact.blocks import block_digests
from ringcompile.artifact.files import digest
from ringcompile.artifact.manifest import _manifest_digest
from ringcompile.artifact.opened import OpenFile
from ringcompile.artifact.tensor_file import read_tensor_file
from tests import mutants

Change = Callable[[Path, random.Random], None]

EXPRESSIONS = [
    "Mod((s+n)**8, (n+m)**8+1)", "(s+n+m+1)**8", "9**8**8**8", "s/0", "Mod(s, 0)", "-s", "s*10**18",
    "u0", "u99999", "q", "ring", "floor()", "Max(s)", "s**9", "1/3", "s/7", "((((s))))", "s+" * 400,
    "__import__('os')", "Min(s, n, m, 2, 3)", "floor(floor(floor(s/2)/3)/5)", "10**11", "2*n",
    "b", "k", "k0", "b*s", "b - k", "k0 + k", "b/2", "b**8*s**8", "m", "n", "s + 1",
]
OPS = [
    "os.system", "torch.os.system", "aten.set_.source_Storage", "aten.from_file.default",
    "aten.full.default", "aten.arange.start_step", "aten.cat.default", "aten.repeat.default",
    "aten.linear.default", "operator.getitem", "ringcompile.positions.default", "eval", "",
]
NUMBERS = [-1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**62, 2**63, 2**70, -(2**40), 0.5, -0.0, 1e300, True]
TEXTS = ["", "x", "..", "/etc/passwd", "a\x00b", "é" * 50, "x" * 5000, "%s%n", "\ud800", "float16"]


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def junk(rng: random.Random) -> Any:
    """A value of any kind that JSON has."""
    deep: Any = []
    for _ in range(rng.choice((2, 50, 400))):
        deep = [deep]
    return rng.choice([
        None, rng.choice(NUMBERS), rng.choice(NUMBERS), rng.choice(TEXTS), rng.choice(TEXTS), [],
        {}, deep, [rng.choice(NUMBERS)] * 3, {"expr": rng.choice(EXPRESSIONS)}, {"node": "x"},
        {"tuple": [1, 2]}, {"dtype": "float64"}, {"float": "nan"}, {"device": "cuda:7"},
    ])


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    stack = [data]
    while stack:
        holder = stack.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])


def _json_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.json")))


def _rewrite(path: Path, change: Callable[[Any], None]) -> None:
    try:
        data = json.loads(path.read_text() if _plain(path) else "")
    except (OSError, ValueError):
        return  # an earlier change took it away
    change(data)
    path.write_text(json.dumps(data), errors="surrogatepass")


def replace_a_value(folder: Path, rng: random.Random) -> None:
    def change(data: Any) -> None:
        holder, key = rng.choice(list(_places(data)))
        holder[key] = junk(rng)

    _rewrite(_json_file(folder, rng), change)


def remove_a_value(folder: Path, rng: random.Random) -> None:
    def change(data: Any) -> None:
        holder, key = rng.choice(list(_places(data)))
        del holder[key]

    _rewrite(_json_file(folder, rng), change)


def move_a_value(folder: Path, rng: random.Random) -> None:
    """A value of the file in the place of another of its kind."""

    def change(data: Any) -> None:
        places = list(_places(data))
        holder, key = rng.choice(places)
        same = [h[k] for h, k in places if type(h[k]) is type(holder[key])]
        holder[key] = json.loads(json.dumps(rng.choice(same)))

    _rewrite(_json_file(folder, rng), change)


def _in_a_program(folder: Path, rng: random.Random, change: Callable[[Any], None]) -> None:
    """Change any program: of all ranks, of one, of the next tokens, of a prompt, the reference."""
    others = ("manifest.json", "digests.json")
    names = sorted(path for path in folder.glob("*.json") if path.name not in others)
    if names:
        _rewrite(rng.choice(names), change)


def change_an_expression(folder: Path, rng: random.Random) -> None:
    def change(data: Any) -> None:
        places = [(h, k) for h, k in _places(data) if k == "expr"]
        if places:
            holder, key = rng.choice(places)
            holder[key] = rng.choice(EXPRESSIONS)

    _in_a_program(folder, rng, change)


def change_an_op(folder: Path, rng: random.Random) -> None:
    def change(data: Any) -> None:
        rng.choice(data["nodes"])["op"] = rng.choice(OPS)

    _in_a_program(folder, rng, change)


def change_a_node(folder: Path, rng: random.Random) -> None:
    """One thing about one node, such that the program may well stay valid."""

    def change(data: Any) -> None:
        found = mutants.mutant(data, rng.choice(mutants.kinds_of(data)), rng.randrange(10**6))
        if found is not None:
            data.clear()
            data.update(found.data)

    _in_a_program(folder, rng, change)


def ask_for_memory(folder: Path, rng: random.Random) -> None:
    """A tensor of any size, in an argument or in a type too."""
    size = rng.choice((10**9, 10**10, 10**12, 2**62))

    def change(data: Any) -> None:
        node = rng.choice([n for n in data["nodes"] if "." in n["op"]])
        node["op"], node["kwargs"] = "aten.full.default", {"dtype": {"dtype": "float32"}}
        node["args"] = [[size], 1]
        if rng.random() < 0.5:
            data["types"].append({"dtype": "float32", "shape": [size]})
            node["type"] = len(data["types"]) - 1

    _in_a_program(folder, rng, change)


def flip_bits(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(path for path in folder.iterdir() if _plain(path)))
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 8))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut_or_grow(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(path for path in folder.iterdir() if _plain(path)))
    content = path.read_bytes()
    path.write_bytes(rng.choice((
        b"", content[: rng.randrange(len(content) + 1)], content + b"\0" * rng.randrange(1, 99),
        content * 2, b"[" * 100_000, b"{}",
    )))


def replace_a_file(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(path for path in folder.iterdir() if _plain(path)))
    other = rng.choice(sorted(folder.iterdir()))
    content = other.read_bytes() if other.is_file() and not other.is_symlink() else b""
    path.unlink()
    kind = rng.choice(("gone", "folder", "pipe", "link", "device", "other"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("link", "device"):
        path.symlink_to("/dev/zero" if kind == "device" else "/etc/hostname")
    elif kind == "other":
        path.write_bytes(content)


def refer_elsewhere(folder: Path, rng: random.Random) -> None:
    """A weight in a file somewhere, with or without what a manifest says of it."""
    target = rng.choice((
        "/dev/zero", "/etc/passwd", "/etc/passwd.safetensors", "weights.safetensors",
        str(folder.parent / "other.safetensors"), str(folder.parent / "pipe.safetensors"),
        "/proc/self/mem", str(folder / ".." / "other.safetensors"), "/nowhere/x.safetensors",
    ))
    save_file({"w": torch.ones(3)}, folder.parent / "other.safetensors")
    if not (folder.parent / "pipe.safetensors").exists():
        os.mkfifo(folder.parent / "pipe.safetensors")

    def change(manifest: Any) -> None:
        row = manifest["weights"][rng.choice(sorted(manifest["weights"]))]
        row.update(where="reference", file=target)
        if rng.random() < 0.7:
            size = rng.choice((0, 8, 76, 2**40))
            manifest["references"][target] = {"bytes": size, "header_sha256": "0" * 64}

    _rewrite(folder / "manifest.json", change)


def change_the_weights(folder: Path, rng: random.Random) -> None:
    """Other data, or a header that says something else of it."""
    path = folder / "weights.safetensors"
    if not _plain(path) or path.stat().st_size < 9:
        return
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.5:
        content[rng.randrange(len(content) // 2, len(content))] ^= 255
    elif rng.random() < 0.3:
        content[:8] = rng.choice((0, 2, 2**40, 2**63, length + 8)).to_bytes(8, "little")
    else:
        try:
            header = json.loads(content[8 : 8 + length])
        except ValueError:
            return
        holder, key = rng.choice(list(_places(header)))
        holder[key] = junk(rng)
        text = json.dumps(header).encode(errors="surrogatepass")
        content[: 8 + length] = len(text).to_bytes(8, "little") + text
    path.write_bytes(content)


def change_an_option(folder: Path, rng: random.Random) -> None:
    def change(manifest: Any) -> None:
        options = manifest["options"]
        names = [*sorted(options), "new"] if isinstance(options, dict) else []
        if names:
            options[rng.choice(names)] = rng.choice((junk(rng), "os:system", "../../x", "gpt-tiny"))

    _rewrite(folder / "manifest.json", change)


def change_the_state(folder: Path, rng: random.Random) -> None:
    """What a program with a cache keeps between calls: its kind, its name, or that it keeps it."""

    def change(data: Any) -> None:
        state = data.get("state")
        if not isinstance(state, dict) or not state:
            state = data["state"] = {rng.choice(sorted(data["placeholders"])): "cache"}
        name = rng.choice(sorted(state))
        kinds = ("cache", "slots", "places", "positions", "carried", "", 7, None, ["cache"])
        rng.choice((
            lambda: state.pop(name),
            lambda: state.update({name: rng.choice(kinds)}),
            lambda: state.update({f"{name}x": state.pop(name)}),
            lambda: state.update({rng.choice(sorted(data["placeholders"])): rng.choice(kinds)}),
        ))()

    _in_a_program(folder, rng, change)


def change_a_range(folder: Path, rng: random.Random) -> None:
    """Which lengths and batches a program is for, in its file or in the manifest."""

    def change(data: Any) -> None:
        ends = (None, -1, 0, 1, 2, 12, 13, 2**62, 0.5, "1", True)
        what = rng.choice(("length_range", "batch_range", "lengths", "microbatches"))
        data[what] = {
            "lengths": {rng.choice(("s", "b", "k", "n", "q")): rng.choice(ends)},
            "microbatches": rng.choice(ends),
        }.get(what, [rng.choice(ends) for _ in range(rng.choice((1, 2, 2, 2, 2, 3)))])

    if rng.random() < 0.3:
        _rewrite(folder / "manifest.json", change)
    else:
        _in_a_program(folder, rng, change)


def exchange_two_files(folder: Path, rng: random.Random) -> None:
    """One program for another: of another rank, of the next tokens, of a prompt."""
    a, b = rng.sample(sorted(path for path in folder.glob("*.json") if _plain(path)), 2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def leave_out_a_program(folder: Path, rng: random.Random) -> None:
    """The manifest no longer has a file, or has those of another set of programs."""

    def change(manifest: Any) -> None:
        files = manifest["files"]
        name = rng.choice(sorted(files))
        record = files.pop(name)
        if rng.random() < 0.5:
            files[rng.choice(("cached-", "prefill-")) + name] = record

    _rewrite(folder / "manifest.json", change)


def change_the_signature(folder: Path, rng: random.Random) -> None:
    path = folder / "manifest.sig"
    if path.exists() or path.is_symlink():
        path.unlink()
    kind = rng.choice(("gone", "empty", "zeros", "junk", "long", "link", "pipe", "folder"))
    if kind == "link":
        path.symlink_to("/etc/hostname")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes({
            "empty": b"", "zeros": b"00" * 64, "junk": rng.randbytes(64), "long": b"0" * 10**6,
        }[kind])


CHANGES: tuple[Change, ...] = (
    change_the_state, change_a_range, exchange_two_files, leave_out_a_program, change_the_signature,
    replace_a_value, remove_a_value, move_a_value, change_an_expression, change_an_op,
    change_a_node, change_a_node, ask_for_memory, flip_bits, cut_or_grow, replace_a_file,
    refer_elsewhere, change_the_weights, change_an_option,
)


def sign_again(folder: Path, rng: random.Random) -> bool:
    """Make all digests fit again, as somebody would who means harm; whether that worked."""
    try:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text() if _plain(path) else "")
        _digest_data(folder)
        for name, record in manifest["files"].items():
            if (folder / name).is_symlink() or not (folder / name).is_file():
                continue
            content = (folder / name).read_bytes()
            record["bytes"] = len(content)
            if "sha256" in record:
                record["sha256"] = digest(content)
            elif name.endswith(".safetensors"):
                length = int.from_bytes(content[:8], "little")
                record["header_sha256"] = digest(content[: 8 + min(length, len(content))])
        manifest["sha256"] = _manifest_digest(manifest)
        path.write_text(json.dumps(manifest), errors="surrogatepass")
    except Exception:  # what is broken so badly cannot be signed
        return False
    return True


def _digest_data(folder: Path) -> None:
    try:
        file = read_tensor_file(OpenFile(folder / "weights.safetensors"), "")
        rows = {name: block_digests(file.bytes_of(name)) for name in file.entries}
    except Exception:
        return
    _rewrite(
        folder / "digests.json", lambda data: data["weights.safetensors"].update(rows)
    )


def spoil(pristine: Path, folder: Path, seed: int) -> tuple[list[str], bool]:
    """A spoilt copy of an artifact.

    Args:
        pristine: the artifact.
        folder: where the copy goes; its parent is a folder of this case alone.
        seed: all choices follow from it.

    Returns:
        what was changed, and whether the copy was signed again.
    """
    rng = random.Random(seed)
    shutil.copytree(pristine, folder)
    chosen = [rng.choice(CHANGES) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    for change in chosen:
        try:
            change(folder, rng)
        except (OSError, LookupError, TypeError, AttributeError, ValueError, RecursionError):
            continue  # an earlier change left nothing for this one
    again = rng.random() < 0.75 and sign_again(folder, rng)
    return [change.__name__ for change in chosen], again
