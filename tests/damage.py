"""Damage saved artifacts in one place, and see whether `verify --numerics` finds it.

`python -m tests.damage SEED [N]` makes N damages from SEED on, prints each with what was said of
it, and lists what was missed. Graphs are damaged on one rank or on all alike and saved anew, so
that every digest fits; the data of weights is changed in its file. What is not found is run beside
the right program on other inputs: damage that changes no output there is told apart from what was
missed, and does not count.

The model that the artifact was made from is not used: only what the artifact keeps.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile import artifact
from ringcompile.ir.expr import bind
from ringcompile.ir.program import Input, Program
from ringcompile.numerics.widen import WideSource, wide_by_default, wide_tensors, widened
from ringcompile.passes.base import Builder
from ringcompile.runtime.inprocess import run_lockstep
from tests import damage_kinds
from tests.damage_kinds import Site
from tests.support import tensors, zoo_program

# -- the models ------------------------------------------------------------------------------------


class Windowed(nn.Module):
    """Rotary attention in windows of 6, causal, over hidden states; a running mean between."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = torch.arange(x.shape[1])
        apart = index[:, None] - index[None, :]
        angle = index[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        for _ in range(2):
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            q, k = (_turned(t, angle.cos(), angle.sin()) for t in (q, k))
            mask = (apart >= 0) & (apart < 6)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            y = self.out(y.transpose(1, 2).flatten(2))
            x = self.norm(x + y + y.cumsum(1) / (index + 1)[:, None] * 0.5)
        return x


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Capacity(nn.Module):
    """Attention under a padding mask, then experts of 24 slots each, whatever the length."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv = nn.Embedding(40, 16), nn.Linear(16, 48)
        self.router = nn.Linear(16, 3, bias=False)
        self.up, self.head = nn.Parameter(torch.randn(3, 16, 16) * 0.3), nn.Linear(16, 40)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        seen = mask.bool()[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + y.transpose(1, 2).flatten(2)
        weight, choice = self.router(x).softmax(-1).max(-1)
        one = F.one_hot(choice, 3)
        kept = one * ((one.cumsum(1) * one).sum(-1, keepdim=True) <= 24)
        every = torch.einsum("bsd,edf->bsef", x, self.up).tanh()
        return self.head(x + (every * (kept * weight[..., None])[..., None]).sum(2))


def _masked_encoder() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    from transformers import BertConfig, BertModel

    module = BertModel(BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64), add_pooling_layer=False)
    ids = torch.zeros(2, 24, dtype=torch.int64)
    return module, (ids,), {"attention_mask": ids + 1}




def _capacity() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    ids = torch.zeros(2, 23, dtype=torch.int64)
    return Capacity(), (ids, ids + 1), {}


# How to build each, or its name in the zoo.
MODELS: dict[str, tuple[Callable[[], Any] | str, str]] = {
    "dense ring": ("llama-tiny", "ring=2"),
    "masked encoder": (_masked_encoder, "ring=2"),
    "capacity": (_capacity, "ring=2"),
    "vocabulary": ("gpt-tiny", "tp=4"),
    "window": (lambda: (Windowed(), (torch.randn(1, 24, 16),), {}), "ring=4"),
    "stages": ("llama-tiny", "pp=2,tp=2"),
}


@cache
def compiled(name: str) -> rc.ParallelProgram:
    """The program of a model, as it should be."""
    build, spec = MODELS[name]
    parallel = rc.transform(_captured(build), spec)
    assert parallel.reference is not None
    return parallel


def _captured(build: Callable[[], Any] | str) -> Program:
    if isinstance(build, str):
        return zoo_program(build, sequence=24)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, args, kwargs = build()
    return rc.capture(module.eval(), args, kwargs)


# -- damage ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """What was done to an artifact.

    Attributes:
        model: its name in `MODELS`.
        kind: of damage, as in `damage_kinds.KINDS` or `WEIGHT_KINDS`.
        scope: "rank N", "all ranks" or "weights".
        text: the place, before and after.
    """

    model: str
    kind: str
    scope: str
    text: str

    def __str__(self) -> str:
        return f"{self.model}, {self.scope}: {self.kind}: {self.text}"


def damaged(seed: int, folder: Path) -> Damage:
    """Save a damaged artifact in a folder; all of it follows from the seed."""
    rng = random.Random(seed)
    name = rng.choice(list(MODELS))
    if rng.random() < 0.2:
        return damage_weights(name, rng.choice(list(WEIGHT_KINDS)), rng, folder)
    while True:
        kind, everywhere = rng.choice(list(damage_kinds.KINDS)), rng.random() < 0.5
        made = damage_graphs(name, kind, everywhere, rng, folder)
        if made is not None:
            return made


def damage_graphs(
    name: str, kind: str, everywhere: bool, rng: random.Random, folder: Path,
    site: str | None = None,
) -> Damage | None:
    """Damage one rank's graph, or the one that all ranks' are made from; None if nothing fits.

    Args:
        name: of the model.
        kind: of the damage.
        everywhere: whether all ranks are damaged alike.
        rng: chooses the place and the numbers.
        folder: where the artifact is saved.
        site: the op that is damaged, if it matters which.
    """
    right = compiled(name)
    index = rng.randrange(right.world_size)
    program = copied(right.program if everywhere else right.rank(index))
    sites = [s for s in damage_kinds.sites(program, kind) if site in (None, s.op)]
    if not sites:
        return None
    chosen: Site = rng.choice(sites)
    text = chosen.damage(rng)
    if everywhere:
        try:
            ranks = rc.ParallelProgram(program, right.mesh, right.options).ranks()
        except (AssertionError, TypeError, ValueError, rc.RingCompileError):
            return None  # the passes behind take no such program, so that there is no artifact
    else:
        ranks = [program if i == index else right.rank(i) for i in range(right.world_size)]
    artifact.save(
        folder, spmd=program if everywhere else right.program, ranks=ranks, mesh=right.mesh,
        source=right.source, options=right.options, reference=right.reference, cross_checked=True,
    )
    return Damage(name, kind, "all ranks" if everywhere else f"rank {index}", text)


def copied(program: Program) -> Program:
    """The same program over nodes of its own."""
    builder = Builder()
    for node in program.graph.nodes:
        builder.env[node] = builder.copy(node)
    return program.with_graph(builder.graph)


# -- weights ---------------------------------------------------------------------------------------


def _flip(data: torch.Tensor, rng: random.Random) -> None:
    data.view(-1).view(torch.uint8)[rng.randrange(data.nbytes)] ^= 1 << rng.randrange(8)


def _zero(data: torch.Tensor, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = 0


def _swap(data: torch.Tensor, rng: random.Random) -> None:
    i, j = rng.sample(range(len(data)), 2)
    data[[i, j]] = data[[j, i]]


WEIGHT_KINDS: dict[str, Callable[[torch.Tensor, random.Random], None]] = {
    "a bit flipped": _flip, "a row of zeros": _zero, "two rows swapped": _swap,
}


def damage_weights(
    name: str, kind: str, rng: random.Random, folder: Path, weight: str | None = None
) -> Damage:
    """Change the data of one weight in an artifact's file: that of this name, or any."""
    compiled(name).save(folder)
    file = folder / "weights.safetensors"
    content, tensors = bytearray(file.read_bytes()), load_file(file)
    weight = weight or rng.choice(
        [n for n, x in sorted(tensors.items()) if x.dim() > 1 and len(x) > 1]
    )
    before = tensors[weight].contiguous()
    after = before.clone()
    while torch.equal(before, after):
        WEIGHT_KINDS[kind](after, rng)
    start = content.index(_bytes(before))
    content[start : start + before.nbytes] = _bytes(after)
    file.write_bytes(content)
    return Damage(name, kind, "weights", weight)


def _bytes(data: torch.Tensor) -> bytes:
    return data.reshape(-1).view(torch.uint8).numpy().tobytes()


# -- what is found ---------------------------------------------------------------------------------


def found(folder: Path) -> str:
    """What `verify --numerics` says of an artifact; empty where it finds nothing."""
    try:
        return rc.verify(rc.load(folder), numerics=True).wrong
    except rc.RingCompileError as error:
        return error.message


@dataclass(frozen=True)
class Trial:
    """A damage and what was said of it; nothing where it was not found.

    Attributes:
        matters: whether any output changes, where nothing was found.
    """

    seed: int
    damage: Damage
    said: str
    matters: bool = True


def trial(seed: int) -> Trial:
    """Damage an artifact by a seed and verify it."""
    with tempfile.TemporaryDirectory(prefix="damage-") as folder:
        out = Path(folder) / "out"
        damage = damaged(seed, out)
        said = found(out)
        return Trial(seed, damage, said, bool(said) or changes(damage.model, out))


def changes(name: str, folder: Path) -> bool:
    """Whether an artifact gives other outputs than the right program on any of many inputs."""
    return differs(compiled(name), rc.load(folder))


@torch.no_grad()
def differs(right: rc.ParallelProgram, wrong: rc.ParallelProgram) -> bool:
    """Whether two programs give other outputs on any of many inputs."""
    generator = torch.Generator().manual_seed(1)
    longest = right.program.length_range[1] or 200
    fixed = right.program.lengths.get("s")
    lengths = (2, 3, 5, 8, 13, 21, 34, 55, 64, min(200, longest)) if fixed is None else [fixed] * 5
    for length in lengths:
        inputs = {spec.name: _any(spec, length, generator) for spec in right.program.inputs}
        both = [widened_run(side, inputs) for side in (right, wrong)]
        pairs = zip(*map(tensors, both), strict=True)
        if any(not torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in pairs):
            return True
    return False


def _any(spec: Input, length: int, generator: torch.Generator) -> torch.Tensor:
    """Values for an input: ids below 40, masks of 0 and 1, normal numbers."""
    shape = [int(bind(size, {"s": length, "b": 2})) for size in spec.type.shape]
    if spec.type.dtype.is_floating_point:
        return torch.randn(shape, generator=generator)
    values = torch.randint(0, 2 if "mask" in spec.name else 40, shape, generator=generator)
    if "mask" in spec.name:
        values[..., 0] = 1
    return values


def widened_run(parallel: rc.ParallelProgram, inputs: dict[str, torch.Tensor]) -> Any:
    """The outputs of all ranks, in float64."""
    assert parallel.source is not None
    with wide_by_default():
        return run_lockstep(
            [widened(rank) for rank in parallel.ranks()], parallel.mesh,
            WideSource(parallel.source), wide_tensors(inputs),
        ).outputs


def summary(trials: Sequence[Trial]) -> str:
    """How many were found, each that was missed, and each that changes no output."""
    real = [one for one in trials if one.matters]
    missed = [one for one in real if not one.said]
    lines = [f"found {len(real) - len(missed)} of {len(real)} that change an output"]
    lines += [f"missed: seed {one.seed}: {one.damage}" for one in missed]
    lines += [f"changes nothing: seed {t.seed}: {t.damage}" for t in trials if not t.matters]
    kinds = Counter(one.damage.kind for one in real)
    return "\n".join([*lines, *(f"{count:4} {kind}" for kind, count in kinds.most_common())])


def trials_from(seed: int, count: int) -> Iterator[Trial]:
    """Trials up to `count` that change an output; those that do not come besides."""
    while count:
        done = trial(seed)
        yield done
        seed, count = seed + 1, count - done.matters


def main() -> None:
    """Damage and verify; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Damaged artifacts against verify --numerics")
    parser.add_argument("seed", type=int)
    parser.add_argument("count", type=int, nargs="?", default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trials = []
    for done in trials_from(options.seed, options.count):
        trials.append(done)
        missed = "MISSED" if done.matters else "changes no output"
        said = done.said.splitlines()[0][:150] if done.said else missed
        print(f"{done.seed}: {done.damage}\n    {said}", flush=True)
    print(summary(trials))


if __name__ == "__main__":
    main()
