"""Saving and loading: which files an artifact has, and what they must agree on.

manifest.json           what was compiled, and the size and digest of every other file
program.json            the program for all ranks, mesh coordinates as symbols
rank0.json ...          each rank's own program
cached-program.json ... with a cache, the same for the next tokens of a sequence
prefill-program.json .. with a cache that lies along a ring, the same for taking in a prompt
reference.json          the model for one device, which `verify --numerics` compares the ranks with
program.py, rank0.py    the same to read, of the first ranks; never imported, and never read back
weights.safetensors     weights, each once; weights-0001.safetensors and on if they are large

Long programs are packed, `rank0.json.gz`. `ringcompile dump OUT --rank N --format python` prints
the program of any rank, as `rankN.py` has it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ringcompile.artifact.files import (
    MANIFEST,
    SIGNATURE,
    await_swap,
    check_size,
    json_text,
    new_folder,
    parse_json,
    read_checked,
    tidy,
    write_text,
)
from ringcompile.artifact.graph import program_from_json
from ringcompile.artifact.manifest import (
    CARRIED,
    DIGESTS,
    PREFILL,
    PROGRAM,
    REFERENCE,
    in_file,
    made_with_this,
    manifest_of,
    programs_digest,
    read_digests,
    read_manifest,
)
from ringcompile.artifact.opened import DAMAGED, OpenFolder, unreadable
from ringcompile.artifact.ops import AllowedOps
from ringcompile.artifact.packed import stored_name, unpacked, write_program_text
from ringcompile.artifact.shards import SHARD_BYTES, write_weights
from ringcompile.artifact.signature import check_signature, read_private_key, sign
from ringcompile.artifact.weights import Weights, open_weight_files
from ringcompile.errors import RingCompileError, one_error
from ringcompile.ir.nodes import error_at, kinds_of_nodes
from ringcompile.ir.program import Program, Weight, WeightSource
from ringcompile.ir.serialize import op_name, program_to_text
from ringcompile.mesh import Mesh
from ringcompile.progress import counted

View = Callable[[Program], str]
# Programs of so many ranks are also written to read. Nobody reads more, and they take as long to
# write as all else.
VIEWED_RANKS = 16


def save(
    folder: str | Path,
    *,
    spmd: Program,
    ranks: Iterable[Program],
    mesh: Mesh,
    source: WeightSource | None,
    options: Mapping[str, Any],
    reference: Program | None = None,
    view: View | None = None,
    references: Mapping[str, tuple[str | Path, str]] | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    cross_checked: bool = False,
    carried: tuple[Program, Iterable[Program]] | None = None,
    prefill: tuple[Program, Iterable[Program]] | None = None,
    sign_with: Path | None = None,
) -> Path:
    """Write an artifact, whole or not at all.

    Args:
        folder: where to; it must not exist, be empty, or be an artifact and `overwrite` given.
        spmd: the program for all ranks.
        ranks: each rank's program, in order.
        mesh: the parallel plan.
        source: the data of weights; fake and meta tensors are noted as not saved, as is None.
        options: how the model was compiled; anything that JSON can hold.
        reference: the model for one device, with the weights that `source` has; left out where it
            has ops that an artifact may not hold.
        view: the text of a program for people; written for the first `VIEWED_RANKS` ranks.
        references: weight -> (safetensors file, tensor name) for data that stays where it is.
        overwrite: replace an artifact that is there, once the new one is complete.
        shard_bytes: the size at which another weight file is begun.
        cross_checked: whether the programs passed the check across ranks, so that runs need not
            repeat it.
        carried: the program for the next tokens of a sequence, for all ranks and for each.
        prefill: likewise, the one that takes in a prompt.
        sign_with: a PEM file with the ed25519 key to sign it with.

    Returns:
        the folder.

    Raises:
        RingCompileError: the folder is in the way or cannot be written, or a program or weight
            cannot be saved.
    """
    target = Path(folder).resolve()
    key = None if sign_with is None else read_private_key(sign_with)
    with new_folder(target, overwrite) as temporary:
        files: dict[str, Any] = {}
        weights: dict[str, Weight] = {}
        sets = {"": (spmd, ranks), CARRIED: carried, PREFILL: prefill}
        for name, program, viewed in counted("programs", _named(sets)):
            _check_ops(program)
            files.update(_write_program(temporary, name, program, view if viewed else None))
            weights.update({weight.name: weight for weight in program.weights.values()})
        if reference is not None and not _unknown_ops(reference):
            text = json_text(program_to_text(reference))
            files.update(write_program_text(temporary, REFERENCE, text))
            weights.update({weight.name: weight for weight in reference.weights.values()})
        written = write_weights(temporary, weights.values(), source, references or {}, shard_bytes)
        files[DIGESTS] = write_text(temporary / DIGESTS, json_text(written.digests))
        files.update(written.records)
        manifest = manifest_of(spmd, mesh, written, options, files, cross_checked)
        write_text(temporary / MANIFEST, json_text(manifest))
        if key is not None:
            write_text(temporary / SIGNATURE, sign(manifest["sha256"], key))
    return target


def _write_program(
    folder: Path, name: str, program: Program, view: View | None
) -> dict[str, Any]:
    """Writes a program as JSON, and as text for people; what the manifest records of each file."""
    text = json_text(program_to_text(program))
    records = write_program_text(folder, f"{name}.json", text)
    if view is not None:
        records[f"{name}.py"] = write_text(folder / f"{name}.py", view(program))
    return records


def _named(
    sets: Mapping[str, tuple[Program, Iterable[Program]] | None]
) -> list[tuple[str, Program, bool]]:
    """The programs of all sets, each with the name of its file, and whether people get a text."""
    named: list[tuple[str, Program, bool]] = []
    for prefix, programs in sets.items():
        if programs is not None:
            spmd, ranks = programs
            named.append((f"{prefix}program", spmd, True))
            named += [(f"{prefix}rank{rank}", program, rank < VIEWED_RANKS)
                      for rank, program in enumerate(ranks)]
    return named


def _unknown_ops(program: Program) -> list[fx.Node]:
    """Calls of ops that an artifact may not hold, one of each kind of block at least."""
    allowed = AllowedOps()
    calls = (node for node in kinds_of_nodes(program.graph) if node.op == "call_function")
    return [node for node in calls if op_name(node.target) not in allowed]


def _check_ops(program: Program) -> None:
    for node in _unknown_ops(program):
        raise error_at(
            node,
            f"'{op_name(node.target)}' is not one of torch's functions of tensors, and has no "
            "sharding rule: such an op cannot be saved in a program",
            hint="run the program without saving it, or register the op with rc.register_op",
        )


@dataclass(frozen=True)
class Artifact:
    """A saved model; programs and weights are read when they are asked for.

    Attributes:
        folder: where it lies, held open.
        manifest: what `manifest.json` says.
        mesh: the parallel plan.
        source: the data of weights, whole (`source(name)`) or a piece (`source.share`).
        prefix: what the names of the programs' files begin with.
    """

    folder: OpenFolder
    manifest: dict[str, Any]
    mesh: Mesh
    source: Weights
    prefix: str = ""

    @cached_property
    def carried(self) -> Artifact | None:
        """The programs for the next tokens of a sequence; None if there are none."""
        return self._set(CARRIED)

    @cached_property
    def prefill(self) -> Artifact | None:
        """The programs that take in a prompt; None if there are none."""
        return self._set(PREFILL)

    def _set(self, prefix: str) -> Artifact | None:
        there = stored_name(self.manifest["files"], f"{prefix}{PROGRAM}") is not None
        return replace(self, prefix=prefix) if there and not self.prefix else None

    @property
    def identity(self) -> str:
        """The manifest's digest: two artifacts that share it hold the same bytes throughout."""
        return str(self.manifest["sha256"])

    @property
    def cross_checked(self) -> bool:
        """Whether these very programs passed the check across ranks when they were saved.

        The claim is a digest of the programs themselves: after a change to any of them it is void.
        """
        return self.manifest.get("cross_checked") == programs_digest(self.manifest["files"])

    @property
    def made_here(self) -> bool:
        """Whether this version of ringcompile made it, so that it would make the same again."""
        return made_with_this(self.manifest)

    @cached_property
    def spmd(self) -> Program:
        """The program for all ranks.

        Raises:
            RingCompileError: its file is damaged.
        """
        name = f"{self.prefix}{PROGRAM}"
        program = self._read(name)
        if program.coordinates is not None or program.mesh != self.mesh:
            raise RingCompileError(f"'{name}' is not the program for all ranks", hint=DAMAGED)
        return program

    def rank(self, rank: int) -> Program:
        """The program of one rank; only its file is read.

        Raises:
            RingCompileError: there is no such rank, or its file is damaged.
        """
        if not 0 <= rank < self.mesh.world_size:
            raise RingCompileError(
                f"rank {rank} does not exist", hint=f"ranks are 0 to {self.mesh.world_size - 1}"
            )
        name = f"{self.prefix}rank{rank}.json"
        program = self._read(name)
        if program.coordinates != self.mesh.coordinates(rank) or program.mesh != self.mesh:
            raise RingCompileError(f"'{name}' is not the program of rank {rank}", hint=DAMAGED)
        return program

    @cached_property
    def reference(self) -> Program | None:
        """The model for one device; None where the artifact was saved without it.

        Raises:
            RingCompileError: its file is damaged.
        """
        if stored_name(self.manifest["files"], REFERENCE) is None:
            return None
        program = self._read(REFERENCE)
        if program.mesh is not None or program.coordinates is not None:
            raise RingCompileError(f"'{REFERENCE}' is not a program for one device", hint=DAMAGED)
        return program

    def share(self, weight: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A piece of a weight; see `Weights.share`."""
        return self.source.share(weight, slices)

    def check(self) -> None:
        """Read and check every file, the weights' data too.

        Raises:
            RingCompileError: naming the first file that is damaged.
        """
        for name, record in self.manifest["files"].items():
            if "sha256" in record:
                read_checked(self.folder, name, record)
        for programs in filter(None, (self, self.carried, self.prefill)):
            _ = programs.spmd, programs.reference
            for rank in range(self.mesh.world_size):
                programs.rank(rank)
        for _ in self.source.check():
            pass

    def _read(self, plain_name: str) -> Program:
        files = self.manifest["files"]
        name = stored_name(files, plain_name)
        assert name is not None, "the manifest names all files"
        content = read_checked(self.folder, name, files[name])
        try:
            with one_error("reading the program"):
                text = unpacked(name, content, files[name])
                program = program_from_json(parse_json(text), AllowedOps())
            self._check_weights(program)
        except RingCompileError as error:
            raise in_file(self.folder.path / name, error) from None
        return replace(program, source=self.source, from_file=True)

    def _check_weights(self, program: Program) -> None:
        for weight in program.weights.values():
            place = self.source.places.get(weight.name)
            if place is None or place.weight != weight:
                raise RingCompileError(f"weight '{weight.name}' is not as in the manifest")


def load(folder: str | Path, *, verify_key: str | Path | None = None) -> Artifact:
    """Open an artifact: the manifest, the sizes of all files and the headers of weight files.

    Args:
        folder: where it lies.
        verify_key: a PEM file with the ed25519 public key of who has to have signed it.

    Raises:
        RingCompileError: it is missing, not an artifact, of another version, incomplete, damaged,
            names files outside the folder, or is not signed by that key.
    """
    folder = Path(folder)
    with one_error(f"reading '{folder}'"):
        try:
            return _open(folder, None if verify_key is None else Path(verify_key))
        except OSError as error:
            raise unreadable(folder, error) from error


def _open(folder: Path, verify_key: Path | None) -> Artifact:
    if not folder.exists():
        await_swap(folder.absolute())
        tidy(folder.absolute())
    if not folder.is_dir():
        raise RingCompileError(
            f"there is no folder '{folder}'", hint="`ringcompile transform MODEL -o OUT` writes one"
        )
    if not os.path.lexists(folder / MANIFEST):
        checkpoint = os.path.lexists(folder / "config.json")
        raise RingCompileError(
            f"'{folder}' is not an artifact: it has no {MANIFEST}",
            hint="this looks like a checkpoint; compile it first: `ringcompile transform "
            f"{shlex.quote(str(folder))} -o out --parallel ring=2`" if checkpoint else
            "name the folder that `ringcompile transform -o` wrote",
        )
    opened = OpenFolder(folder)
    manifest, mesh, places = read_manifest(opened)
    if verify_key is not None:
        check_signature(opened, manifest["sha256"], verify_key)
    records = manifest["files"]
    for name, record in records.items():
        check_size(folder / name, opened.size(name), record)
    files = open_weight_files(opened, places, records)
    digests = read_digests(opened, records[DIGESTS])
    source = Weights(places, files, manifest["references"], digests)
    return Artifact(opened, manifest, mesh, source)
