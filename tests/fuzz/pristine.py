"""The artifacts that are spoilt, and how each is used."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from torch import nn
from torch.nn import functional as F

from ringcompile import compiler, execution
from ringcompile.capture.export import capture
from ringcompile.models import zoo
from ringcompile.parallel_program import ParallelProgram
from ringcompile.session import Session
from tests.support import tensors

LENGTH, CACHE = 12, 16


class Small(nn.Module):
    """One attention and two matrices: quick to spoil, load and run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = layer(x).view(*x.shape[:2], 2, 4).transpose(1, 2)
            y = F.scaled_dot_product_attention(y, y, y, is_causal=True)
            x = x + y.transpose(1, 2).reshape(x.shape) * torch.arange(x.shape[1])[:, None]
        return x


@dataclass(frozen=True)
class Recipe:
    """How an artifact is made.

    Attributes:
        spec: how it is divided.
        model: of the zoo; `Small` where none is named.
        batch: sequences of the example; several are any number.
        signed: whether it is signed, and used by somebody who asks for the signature.
        options: of `transform`.
        weight: how often it is drawn.
    """

    spec: str
    model: str = ""
    batch: int = 1
    signed: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    weight: int = 1


RECIPES: dict[str, Recipe] = {
    "small": Recipe("ring=2", weight=6),
    "small in stages": Recipe("pp=2", weight=4),
    "small, any batch": Recipe("dp=2", batch=2, weight=3),
    "small with a cache": Recipe("ring=2", options={"cache": CACHE}, weight=4),
    "small and signed": Recipe("tp=2", signed=True, weight=2),
    "llama-tiny": Recipe("ring=2", "llama-tiny", weight=1),
}


@dataclass(frozen=True)
class Pristine:
    """An artifact before it is spoilt, inputs for it, and its outputs.

    Attributes:
        folder: where it lies.
        inputs: of a run.
        outputs: of what `use` does.
        use: runs an artifact, and gives all outputs.
        key: the public key of who signed it, if it is signed.
    """

    folder: Path
    inputs: tuple[torch.Tensor, ...]
    outputs: list[torch.Tensor]
    use: Callable[[ParallelProgram], list[torch.Tensor]]
    key: Path | None


@cache
def pristine(name: str) -> Pristine:
    """The artifact of a recipe; it is made once, in a folder in memory where there is one."""
    recipe = RECIPES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if recipe.model:
            module, args = zoo.build(recipe.model, sequence=LENGTH)
        else:
            module, args = Small().eval(), (torch.randn(recipe.batch, LENGTH, 8),)
    made = compiler.transform(capture(module, args), recipe.spec, **recipe.options)
    place = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory()))
    # Workers are forked with these folders made: only the process that made them removes them.
    atexit.register(_remove, place, os.getpid())
    private, public = _keys(place) if recipe.signed else (None, None)
    made.save(place / "out", **({} if private is None else {"sign_with": private}))
    use = _in_turns(args[0]) if "cache" in recipe.options else _at_once(args)
    outputs = use(compiler.load(place / "out"))  # weights elsewhere in memory may round otherwise
    return Pristine(place / "out", args, outputs, use, public)


def _remove(folder: Path, maker: int) -> None:
    if os.getpid() == maker:
        shutil.rmtree(folder, ignore_errors=True)


def memory() -> str | None:
    """A folder whose files need no disk, if there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _at_once(inputs: tuple[torch.Tensor, ...]) -> Callable[[ParallelProgram], list[torch.Tensor]]:
    return lambda made: tensors(execution.run(made, inputs))


def _in_turns(x: torch.Tensor) -> Callable[[ParallelProgram], list[torch.Tensor]]:
    """A prompt that the ranks divide, one that they do not, and one token; then all at once."""

    def use(made: ParallelProgram) -> list[torch.Tensor]:
        with Session(made) as session:
            first = session.extend(x[:, :7], last=True)
            found = [first, session.extend(x[:, 7:10]), session.extend(x[:, 10:11])]
            return [*tensors(found), *tensors(session.run((x,)))]

    return use


def _keys(folder: Path) -> tuple[Path, Path]:
    """Files with a private key and its public one."""
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = folder / "key.pem", folder / "key.pub"
    private.write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ))
    public.write_bytes(key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ))
    return private, public
