"""Where the data of weights lies, and reading it: whole or by slices, and never unchecked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ringcompile.artifact.blocks import blocks_of, first_damaged, num_digits
from ringcompile.artifact.fields import expect, member, weight_from_json
from ringcompile.artifact.files import check_size, plain_name
from ringcompile.artifact.opened import DAMAGED, OpenFile, OpenFolder, regular_size
from ringcompile.artifact.tensor_file import DTYPES, TensorEntry, TensorFile, read_tensor_file
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Weight
from ringcompile.ir.serialize import dtype_to_json, weight_to_json

_MOVED = "the weights were left in that file; put it back, or run `ringcompile transform` again"
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class WeightPlace:
    """Where the data of a weight lies.

    Attributes:
        weight: its name, dtype and shape.
        where: "file" (of the artifact), "reference" (a file elsewhere) or "none" (not saved).
        file: a plain name in the artifact's folder, or the path of a reference.
        tensor: its name in that file; tied weights share one.
    """

    weight: Weight
    where: str
    file: str = ""
    tensor: str = ""

    def to_json(self) -> dict[str, Any]:
        """The entry of the manifest's weight table."""
        data = {**weight_to_json(self.weight), "where": self.where}
        if self.where != "none":
            data.update(file=self.file, tensor=self.tensor)
        return data

    @classmethod
    def from_json(cls, name: str, entry: Any) -> WeightPlace:
        """Reads an entry that need not be ours."""
        data = expect(entry, dict, f"weight '{name}'")
        weight, where = weight_from_json(name, data), member(data, "where", str)
        if where == "none":
            return cls(weight, where)
        if where not in ("file", "reference"):
            raise RingCompileError(f"weight '{name}' lies in '{where[:40]}', which is not known")
        file = member(data, "file", str)
        if where == "file":
            plain_name(file)
        elif not Path(file).is_absolute():
            raise RingCompileError(f"weight '{name}' lies in '{file[:80]}', which is no full path")
        elif not file.endswith(_SUFFIX):
            raise RingCompileError(f"weight '{name}' lies in '{file[:80]}', no {_SUFFIX} file")
        return cls(weight, where, file, member(data, "tensor", str))


def open_reference(path: str, record: Mapping[str, Any] | None = None) -> TensorFile:
    """Open a checkpoint file that stays where it is.

    Args:
        path: its full path.
        record: what the manifest says of it; a file of another size is not even opened.

    Raises:
        RingCompileError: it is missing, no regular file, no safetensors file, or another one.
    """
    try:
        if record is not None:
            check_size(Path(path), regular_size(Path(path)), record, _MOVED)
        found = read_tensor_file(OpenFile(Path(path)), _MOVED)
    except FileNotFoundError:
        raise RingCompileError(f"'{path}' is missing", hint=_MOVED) from None
    except (OSError, ValueError) as error:
        raise RingCompileError(f"cannot read '{path}': {error}", hint=_MOVED) from error
    if record is not None and found.record() != record:
        raise RingCompileError(f"'{path}' is not the file that the artifact refers to", hint=_MOVED)
    return found


def open_weight_files(
    folder: OpenFolder, places: Mapping[str, WeightPlace], records: Mapping[str, Any]
) -> dict[str, TensorFile]:
    """Open the artifact's weight files and compare them with the manifest; reads no data.

    Raises:
        RingCompileError: a file is missing, has another size or header, or lacks a weight.
    """
    files: dict[str, TensorFile] = {}
    for place in places.values():
        if place.where != "file":
            continue
        if place.file not in files:
            files[place.file] = _open_weights(folder, place.file, records)
        entry_of(files[place.file], place)
    for name, found in files.items():
        if found.header_sha256 != records[name].get("header_sha256"):
            raise RingCompileError(f"'{found.file.path}' was changed after saving", hint=DAMAGED)
    return files


def _open_weights(folder: OpenFolder, name: str, records: Mapping[str, Any]) -> TensorFile:
    if name not in records:
        raise RingCompileError(f"the manifest has no record of '{name}'", hint=DAMAGED)
    file = folder.file(name)
    check_size(file.path, file.size, records[name])
    return read_tensor_file(file, DAMAGED)


def entry_of(file: TensorFile, place: WeightPlace) -> TensorEntry:
    """The tensor that a weight refers to.

    Raises:
        RingCompileError: there is none of that name, or it has another dtype or shape.
    """
    weight, found = place.weight, file.entries.get(place.tensor)
    if found is None:
        raise RingCompileError(f"'{place.file}' holds no tensor '{place.tensor}'", hint=DAMAGED)
    if (DTYPES.get(found.dtype), found.shape) != (weight.dtype, weight.shape):
        raise RingCompileError(
            f"weight '{weight.name}' is {dtype_to_json(weight.dtype)} {list(weight.shape)}, "
            f"'{place.file}' holds {found.dtype} {list(found.shape)}",
            hint=DAMAGED,
        )
    return found


@dataclass(frozen=True)
class Weights:
    """The weight source of a loaded artifact; every call reads what it returns, and checks it.

    Attributes:
        places: where each weight lies.
        files: the artifact's own weight files.
        references: what the manifest says of files that lie elsewhere, by path.
        digests: by file and tensor, the digests of the data's blocks.
    """

    places: Mapping[str, WeightPlace]
    files: Mapping[str, TensorFile]
    references: Mapping[str, Mapping[str, Any]]
    digests: Mapping[str, Mapping[str, str]]
    _elsewhere: dict[str, TensorFile] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, name: str) -> torch.Tensor:
        """The whole weight; RingCompileError if it is unknown, was not saved or cannot be read."""
        return self.share(name, ())

    def share(self, name: str, slices: Sequence[slice]) -> torch.Tensor:
        """A piece of a weight; the rest of the file stays unread, but for the blocks it begins in.

        Args:
            name: the weight.
            slices: the ranges of its leading dims; later dims are whole.

        Raises:
            RingCompileError: as for the whole weight, slices that do not lie in its shape, or data
                that is not what was saved.
        """
        place = self.places.get(name)
        if place is None:
            raise RingCompileError(f"the artifact has no weight '{name}'")
        if place.where == "none":
            raise RingCompileError(
                f"weight '{name}' was not saved: the model was compiled without weights",
                hint="transform the model again with its weights",
            )
        _check_slices(place.weight, slices)
        file = self.files[place.file] if place.where == "file" else self._reference(place.file)
        entry_of(file, place)
        data, weight = file.bytes_of(place.tensor), place.weight
        self._check(place, data, [
            range(*cut.indices(size)) for cut, size in zip(slices, weight.shape, strict=False)
        ])
        if data.data_ptr() % weight.dtype.itemsize:  # a file of others' need not be aligned
            data = data.clone()
        return data.view(weight.dtype).reshape(weight.shape)[tuple(slices)]

    def check(self) -> Iterator[str]:
        """Read and check all data, one weight at a time, and give its name.

        Raises:
            RingCompileError: naming the first weight whose data cannot be read or was changed.
        """
        for name, place in self.places.items():
            if place.where != "none":
                self.share(name, ())
                yield name

    def _check(self, place: WeightPlace, data: torch.Tensor, ranges: list[range]) -> None:
        digests = self.digests.get(place.file, {}).get(place.tensor, "")
        weight = place.weight
        if len(digests) != num_digits(len(data)):
            raise RingCompileError(f"weight '{weight.name}' has no digests of its data")
        asked = blocks_of(weight.shape, weight.dtype.itemsize, ranges)
        bad = first_damaged(data, digests, asked)
        if bad is not None:
            raise RingCompileError(
                f"weight '{weight.name}' in '{place.file}' was changed after it was saved "
                f"(block {bad} of its data)",
                hint=DAMAGED if place.where == "file" else _MOVED,
            )

    def _reference(self, path: str) -> TensorFile:
        if path not in self._elsewhere:
            if path not in self.references:
                raise RingCompileError(f"the manifest has no record of '{path}'", hint=DAMAGED)
            self._elsewhere[path] = open_reference(path, self.references[path])
        return self._elsewhere[path]


def _check_slices(weight: Weight, slices: Sequence[slice]) -> None:
    for cut, size in zip(slices, weight.shape, strict=False):
        start, stop, step = cut.indices(size)
        inside = cut.start in (None, start) and cut.stop in (None, stop) and start <= stop
        if step != 1 or not inside:
            break
    else:
        if len(slices) <= len(weight.shape):
            return
    raise RingCompileError(f"{list(slices)} is not a piece of '{weight.name}' {list(weight.shape)}")
