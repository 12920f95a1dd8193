"""The manifest: what was compiled, and what every other file of the artifact must be."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ringcompile.artifact.fields import expect, member, mesh_from_json
from ringcompile.artifact.files import (
    FORMAT,
    MANIFEST,
    digest,
    json_text,
    parse_json,
    plain_name,
    read_checked,
)
from ringcompile.artifact.opened import DAMAGED, OpenFolder
from ringcompile.artifact.packed import plain_program_name
from ringcompile.artifact.shards import WrittenWeights
from ringcompile.artifact.weights import WeightPlace
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.ir.serialize import inputs_to_json
from ringcompile.mesh import Mesh

VERSION = 3
PROGRAM = "program.json"
# What the names of the programs for the next tokens of a sequence begin with, and of those that
# take in a prompt.
CARRIED, PREFILL = "cached-", "prefill-"
DIGESTS = "digests.json"
REFERENCE = "reference.json"
_HEX = re.compile(r"([0-9a-f]{64})*")


def manifest_of(
    spmd: Program,
    mesh: Mesh,
    written: WrittenWeights,
    options: Mapping[str, Any],
    files: Mapping[str, Any],
    cross_checked: bool,
) -> dict[str, Any]:
    """The manifest of what was written.

    Raises:
        RingCompileError: options that JSON has no word for.
    """
    data = {
        "format": FORMAT,
        "version": VERSION,
        "made_with": {"ringcompile": _own_version(), "torch": str(torch.__version__)},
        "model": spmd.name,
        "parallel": str(mesh),
        "order": None if spmd.sequence is None else spmd.sequence.order,
        "inputs": inputs_to_json(spmd),
        "length_range": list(spmd.length_range),
        "batch_range": list(spmd.batch_range),
        "lengths": dict(spmd.lengths),
        "weights": {name: place.to_json() for name, place in written.places.items()},
        "options": dict(options),
        "files": dict(files),
        "references": dict(written.references),
        "cross_checked": programs_digest(files) if cross_checked else None,
    }
    data = parse_json(json_text(data).encode())  # as it will be read: lists, and texts for keys
    return {**data, "sha256": _manifest_digest(data)}


def programs_digest(files: Mapping[str, Any]) -> str:
    """A digest of the programs' own digests, and of the version whose checks they passed."""
    programs = {
        name: record.get("sha256")
        for name, record in files.items()
        if plain_program_name(name).endswith(".json") and name != DIGESTS
    }
    return digest(json.dumps([_own_version(), programs], sort_keys=True).encode())


def _manifest_digest(data: Mapping[str, Any]) -> str:
    """The digest of all members but the digest itself."""
    members = {key: value for key, value in data.items() if key != "sha256"}
    return digest(json.dumps(members, sort_keys=True).encode())


def _own_version() -> str:
    try:
        return metadata.version("ringcompile")
    except metadata.PackageNotFoundError:
        return "unknown"


def made_with_this(manifest: Mapping[str, Any]) -> bool:
    """Whether this version of ringcompile wrote a manifest."""
    made = manifest.get("made_with")
    return isinstance(made, dict) and made.get("ringcompile") == _own_version()


def read_manifest(folder: OpenFolder) -> tuple[dict[str, Any], Mesh, dict[str, WeightPlace]]:
    """The manifest, with its mesh and weight table read.

    Raises:
        RingCompileError: it is not one of this version, or is damaged.
    """
    path, content = folder.path / MANIFEST, folder.file(MANIFEST).read()
    try:
        data = parse_json(content)
        _check_format(data)
        mesh = mesh_from_json(member(data, "parallel", str))
        member(data, "options", dict)
        member(data, "references", dict)
        _check_complete(member(data, "files", dict), mesh)
        table = member(data, "weights", dict)
        return data, mesh, {name: WeightPlace.from_json(name, row) for name, row in table.items()}
    except RingCompileError as error:
        raise in_file(path, error) from None


def _check_format(manifest: dict[str, Any]) -> None:
    if manifest.get("format") != FORMAT:
        raise RingCompileError("this is not a ringcompile artifact")
    version = member(manifest, "version", int)
    if version != VERSION:
        made = expect(manifest.get("made_with", {}), dict, "'made_with'").get("ringcompile")
        raise RingCompileError(
            f"format version {version}, this ringcompile reads version {VERSION}",
            hint=f"it was saved by ringcompile {made}; use that, or transform the model again",
        )
    if manifest.get("sha256") != _manifest_digest(manifest):
        raise RingCompileError("the manifest was changed after it was saved")


def _check_complete(files: dict[str, Any], mesh: Mesh) -> None:
    for name in files:
        plain_name(name)
    present = [plain_program_name(name) for name in files]
    others = (p for p in (CARRIED, PREFILL) if any(name.startswith(p) for name in files))
    for prefix in ("", *others):
        ranks = [name for name in present
                 if name.startswith(f"{prefix}rank") and name.endswith(".json")]
        if len(ranks) != mesh.world_size:
            raise RingCompileError(f"{len(ranks)} rank files for {mesh.world_size} ranks")
        own = {f"{prefix}rank{rank}.json" for rank in range(mesh.world_size)}
        if missing := {f"{prefix}{PROGRAM}", DIGESTS, *own} - set(present):
            raise RingCompileError(f"'{min(missing)}' is not among the files")


def read_digests(folder: OpenFolder, record: dict[str, Any]) -> dict[str, dict[str, str]]:
    """By file and tensor, the digests of the data's blocks; see `blocks.block_digests`.

    Raises:
        RingCompileError: the file is missing or damaged.
    """
    content = read_checked(folder, DIGESTS, record)
    try:
        return {
            file: {name: _hexadecimal(text, name) for name, text in expect(row, dict, file).items()}
            for file, row in parse_json(content).items()
        }
    except RingCompileError as error:
        raise in_file(folder.path / DIGESTS, error) from None


def _hexadecimal(text: Any, name: str) -> str:
    if not _HEX.fullmatch(expect(text, str, f"the digests of '{name[:80]}'")):
        raise RingCompileError(f"the digests of '{name[:80]}' are not hexadecimal")
    return str(text)


def in_file(path: Path, error: RingCompileError) -> RingCompileError:
    """The error, with the file that it is about."""
    return RingCompileError(f"{path}: {error.message}", hint=error.hint or DAMAGED, node=error.node)
