"""Writing the data of weights: each once, a shard at a time."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch._subclasses import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from ringcompile.artifact.blocks import block_digests
from ringcompile.artifact.opened import DAMAGED, OpenFile
from ringcompile.artifact.tensor_file import DTYPES, TensorFile, read_tensor_file
from ringcompile.artifact.weights import WeightPlace, entry_of, open_reference
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Weight, WeightSource
from ringcompile.ir.serialize import dtype_to_json
from ringcompile.progress import counted

# At most so many bytes of weights are in memory while they are saved (more if one tensor has more).
SHARD_BYTES = 2 * 10**9


def write_weights(
    folder: Path,
    weights: Collection[Weight],
    source: WeightSource | None,
    references: Mapping[str, tuple[str | Path, str]],
    shard_bytes: int = SHARD_BYTES,
) -> WrittenWeights:
    """Write what has data and no reference, one shard in memory at a time.

    Files that are referred to are read once, for the digests of their data.

    Raises:
        RingCompileError: data that does not fit the weight, or that safetensors does not take.
    """
    writer, elsewhere = _ShardWriter(folder, shard_bytes), _References()
    places: dict[str, WeightPlace] = {}
    for weight in counted("weights", weights):
        if weight.name in references:
            place = elsewhere.add(weight, *references[weight.name])
        else:
            data = None if source is None else source(weight.name)
            if data is None or isinstance(data, FakeTensor) or data.is_meta:
                place = WeightPlace(weight, "none")
            else:
                place = writer.add(weight, data)
        places[weight.name] = place
    renamed, records = writer.finish()
    return WrittenWeights(
        {n: replace(p, file=renamed.get(p.file, p.file)) for n, p in places.items()},
        records,
        {path: file.record() for path, file in elsewhere.files.items()},
        {**{renamed[file]: rows for file, rows in writer.digests.items()}, **elsewhere.digests},
    )


@dataclass(frozen=True)
class WrittenWeights:
    """What a manifest says of weights.

    Attributes:
        places: where each weight lies.
        records: of the files that were written, by name.
        references: of the files that stay where they are, by path.
        digests: by file and tensor, the digests of the data's blocks.
    """

    places: dict[str, WeightPlace]
    records: dict[str, Any]
    references: dict[str, Any]
    digests: dict[str, dict[str, str]]


@dataclass
class _References:
    """The files elsewhere that weights were found in."""

    files: dict[str, TensorFile] = field(default_factory=dict)
    digests: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, weight: Weight, path: str | Path, tensor: str) -> WeightPlace:
        resolved = os.path.abspath(path)  # a link keeps its name, which says what is behind it
        written = WeightPlace(weight, "reference", resolved, tensor).to_json()
        place = WeightPlace.from_json(weight.name, written)
        if resolved not in self.files:
            self.files[resolved] = open_reference(resolved)
        entry_of(self.files[resolved], place)
        known = self.digests.setdefault(resolved, {})
        if tensor not in known:
            known[tensor] = block_digests(self.files[resolved].bytes_of(tensor))
        return place


@dataclass
class _ShardWriter:
    """Collects tensors, and writes them when a shard is full."""

    folder: Path
    shard_bytes: int
    pending: dict[str, torch.Tensor] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    digests: dict[str, dict[str, str]] = field(default_factory=dict)
    # A weak reference to a storage keeps its address from being given to another one, so that a
    # tensor which a source made and dropped is never taken for the next one's twin.
    known: dict[Any, WeightPlace] = field(default_factory=dict)

    def add(self, weight: Weight, data: torch.Tensor) -> WeightPlace:
        _check_data(weight, data)
        key = (
            StorageWeakRef(data.untyped_storage()),
            data.storage_offset(),
            data.shape,
            data.stride(),
            data.dtype,
        )
        if key in self.known:
            return replace(self.known[key], weight=weight)
        held = sum(tensor.nbytes for tensor in self.pending.values())
        if self.pending and held + data.nbytes > self.shard_bytes:
            self._flush()
        self.pending[weight.name] = self._own(data)
        place = WeightPlace(weight, "file", self._next_file, weight.name)
        self.known[key] = place
        return place

    def _own(self, data: torch.Tensor) -> torch.Tensor:
        """The data alone: safetensors refuses views, and tensors that share memory."""
        data = data.detach().cpu().resolve_conj().resolve_neg().contiguous()
        used = {tensor.data_ptr() for tensor in self.pending.values()}
        if data.untyped_storage().nbytes() != data.nbytes or data.data_ptr() in used:
            return data.clone()
        return data

    @property
    def _next_file(self) -> str:
        return f"weights-{len(self.files) + 1:04d}.safetensors"

    def _flush(self) -> None:
        file = self._next_file
        self.digests[file] = {name: block_digests(data) for name, data in self.pending.items()}
        try:
            save_file(self.pending, self.folder / file)
        except SafetensorError as error:
            raise RingCompileError(f"cannot write the weights: {error}") from error
        # safetensors makes the file for its owner only; others get what they get for the folder.
        (self.folder / file).chmod(self.folder.stat().st_mode & 0o666)
        self.files.append(file)
        self.pending = {}

    def finish(self) -> tuple[dict[str, str], dict[str, Any]]:
        if self.pending:
            self._flush()
        names = {file: file for file in self.files}
        if len(self.files) == 1:
            names[self.files[0]] = "weights.safetensors"
            (self.folder / self.files[0]).rename(self.folder / "weights.safetensors")
        return names, {name: _record(self.folder / name) for name in names.values()}


def _check_data(weight: Weight, data: torch.Tensor) -> None:
    if data.dtype != weight.dtype or tuple(data.shape) != weight.shape:
        raise RingCompileError(
            f"weight '{weight.name}' is {dtype_to_json(data.dtype)} {list(data.shape)} now, "
            f"it was captured as {dtype_to_json(weight.dtype)} {list(weight.shape)}"
        )
    if data.dtype not in DTYPES.values() or data.layout != torch.strided:
        raise RingCompileError(
            f"weight '{weight.name}' is {dtype_to_json(data.dtype)} ({data.layout}), "
            "which safetensors cannot hold",
            hint="convert it before capture",
        )


def _record(path: Path) -> dict[str, Any]:
    return read_tensor_file(OpenFile(path), DAMAGED).record()
