"""Where the data of weights lies in safetensors files, and reading it, whole or by slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ringcompile.artifact.fields import expect, member, weight_from_json
from ringcompile.artifact.files import DAMAGED, check_size, digest, plain_name
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Weight
from ringcompile.ir.serialize import dtype_to_json, weight_to_json

_MOVED = "the weights were left in that file; put it back, or run `ringcompile transform` again"
# The dtypes that safetensors has, by its names for them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Place:
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
    def from_json(cls, name: str, entry: Any) -> Place:
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
        return cls(weight, where, file, member(data, "tensor", str))


def header_digest(path: Path) -> str:
    """The digest of the part that says which tensors lie where."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        # As much as there is: a damaged length may be beyond all memory.
        return digest(start + file.read(min(length, path.stat().st_size)))


def check_files(folder: Path, places: Mapping[str, Place], records: Mapping[str, Any]) -> None:
    """Compare the weight files with the manifest, without reading the data.

    Raises:
        RingCompileError: a file is missing, has another size or header, or lacks a weight.
    """
    by_file: dict[str, list[Place]] = {}
    for place in places.values():
        if place.where == "file":
            by_file.setdefault(place.file, []).append(place)
    for name, held in by_file.items():
        if name not in records:
            raise RingCompileError(f"the manifest has no record of '{name}'", hint=DAMAGED)
        check_size(folder / name, records[name])
        with opened(folder / name) as file:
            for place in held:
                checked(file, place)
        if header_digest(folder / name) != records[name].get("header_sha256"):
            raise RingCompileError(f"'{folder / name}' was changed after saving", hint=DAMAGED)


def opened(path: Path, hint: str = DAMAGED) -> Any:
    """A safetensors file, open for reading; RingCompileError if it is missing or damaged."""
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise RingCompileError(f"'{path}' is missing", hint=hint) from None
    except (OSError, SafetensorError) as error:
        raise RingCompileError(f"cannot read '{path}': {error}", hint=hint) from error


def checked(file: Any, place: Place) -> Any:
    """The tensor in an open file, not read yet, that a weight refers to.

    Raises:
        RingCompileError: there is none of that name, or it has another dtype or shape.
    """
    weight = place.weight
    try:
        found = file.get_slice(place.tensor)
    except SafetensorError:
        raise RingCompileError(
            f"'{place.file}' holds no tensor '{place.tensor}'", hint=DAMAGED
        ) from None
    if (DTYPES.get(found.get_dtype()), tuple(found.get_shape())) != (weight.dtype, weight.shape):
        raise RingCompileError(
            f"weight '{weight.name}' is {dtype_to_json(weight.dtype)} {list(weight.shape)}, "
            f"'{place.file}' holds {found.get_dtype()} {found.get_shape()}",
            hint=DAMAGED,
        )
    return found


@dataclass(frozen=True)
class Weights:
    """The weight source of a loaded artifact; every call reads what it returns, and no more."""

    folder: Path
    places: Mapping[str, Place]

    def __call__(self, name: str) -> torch.Tensor:
        """The whole weight; RingCompileError if it is unknown, was not saved or cannot be read."""
        return self.share(name, ())

    def share(self, name: str, slices: Sequence[slice]) -> torch.Tensor:
        """A piece of a weight; the rest of the file stays unread.

        Args:
            name: the weight.
            slices: the ranges of its leading dims; later dims are whole.

        Raises:
            RingCompileError: as for the whole weight, or slices that do not lie in its shape.
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
        hint = DAMAGED if place.where == "file" else _MOVED
        with opened(self.folder / place.file, hint) as file:
            found = checked(file, place)
            return found[tuple(slices)] if slices else file.get_tensor(place.tensor)


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
