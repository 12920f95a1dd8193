"""Random modules, not only transformers, each from a seed, and what becomes of them.

`python -m tests.random_modules SEED [COUNT]` prints each case and its outcome: right, refused
(with the layer, the line and the reason), WRONG (how far), or crashed; then how often each reason
was given. `--short` leaves out what came out right or was refused.

A module is an embedding or the caller's hidden states, one to four pieces of the grammar in
`tests/random_module_grammar.py`, and a head. Every piece has to matter: one whose removal, or the
removal of whose mask, does not change the outputs is left out.
"""

from __future__ import annotations

import argparse
import random
import re
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.inprocess import run_lockstep
from tests import random_module_attention, random_module_parts
from tests.random_module_grammar import HEADS, PIECES, Context, Parts, Sizes
from tests.support import furthest

# Importing them registers their pieces and heads.
MODULES: Final = (random_module_attention, random_module_parts)
# Of each output's own largest value.
TOLERANCE: Final = {torch.float64: 1e-9, torch.float32: 1e-4}
MATTERS: Final = 1e-4
AXES: Final = ("ring", "ring", "tp", "tp", "pp", "dp", "ulysses", "ep", "time")
MOST_RANKS: Final = 8
RIGHT, REFUSED, WRONG, CRASHED, IDLE = "right", "refused", "WRONG", "crashed", "idle"


@dataclass(frozen=True)
class Case:
    """Everything that a seed decides; parameters and inputs come from it as well."""

    seed: int
    sizes: Sizes
    dtype: torch.dtype
    tokens: bool
    pieces: tuple[str, ...]
    head: str
    padding: str  # right, left, holes: of the mask, where a piece takes one
    batch: int
    captured: int
    spec: str
    order: str
    runs: tuple[tuple[int, int], ...]  # length, batch

    @property
    def needs(self) -> set[str]:
        """The inputs besides the first one."""
        entries = [*(PIECES[name] for name in self.pieces), HEADS[self.head]]
        return {name for entry in entries for name in entry.needs} - {"tokens"}

    def words(self) -> str:
        """All choices on one line."""
        runs = " ".join(f"{length}x{batch}" for length, batch in self.runs)
        dtype = str(self.dtype).removeprefix("torch.")
        return (f"{self.spec} {self.order}: {' + '.join(self.pieces)} -> {self.head}; captured "
                f"{self.captured}x{self.batch} {dtype}, run {runs}; {self.sizes}")


def case_of(seed: int) -> Case:
    """The case of a seed."""
    draw = random.Random(seed)
    heads = draw.choice((2, 4))
    sizes = Sizes(D=draw.choice((8, 12, 16)), H=heads, E=draw.choice((2, 3, 4)),
                  V=draw.choice((33, 37, 48, 50)), T=draw.choice((24, 33, 40)))
    tokens = draw.random() < 0.6
    pieces = [name for name, entry in PIECES.items() if tokens or "tokens" not in entry.needs]
    names = [draw.choice(pieces) for _ in range(draw.choice((1, 1, 2, 2, 3, 4)))]
    if draw.random() < 0.7:  # most modules attend somewhere
        forms = [name for name in pieces if PIECES[name].group == "attention"]
        names.insert(draw.randrange(len(names) + 1), draw.choice(forms))
    ends = [name for name, entry in HEADS.items() if tokens or "tokens" not in entry.needs]
    spec = _spec(draw)
    ranks = prod(size for _, size in spec)
    times = prod(size for axis, size in spec if axis == "dp")
    batch = draw.choice((1, 2, 2, 3))
    runs = [
        (draw.choice((1, 2, 3)), batch * times), (2 * ranks * draw.randint(1, 2), batch * times),
        (draw.randint(5, 23), batch * times * 2),
        (draw.randint(24, 70), draw.randint(1, 4) * times),
    ]
    return Case(
        seed=seed, sizes=sizes, dtype=draw.choice([torch.float64] * 4 + [torch.float32]),
        tokens=tokens, pieces=tuple(names), head=draw.choice(["logits", "logits", *ends]),
        padding=draw.choice(("right", "left", "holes")), batch=batch,
        captured=draw.choice((13, 17, 19, 23)), order=draw.choice(("auto", "contiguous")),
        spec=",".join(f"{axis}={size}" for axis, size in spec), runs=tuple(runs),
    )


def _spec(draw: random.Random) -> list[tuple[str, int]]:
    """Axes and sizes, in any order."""
    while True:
        count = draw.choice((1, 1, 1, 2, 2, 3))
        axes = list(dict.fromkeys(draw.choice(AXES) for _ in range(count)))
        sizes = [(axis, draw.choice((2, 2, 3, 4))) for axis in axes]
        if prod(size for _, size in sizes) <= MOST_RANKS:
            return sizes


class RandomModule(nn.Module):
    """The module of a case.

    Args:
        case: of the seed.
        kept: which of its pieces, by number; all of them by default.
    """

    def __init__(self, case: Case, kept: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.case, self.kept = case, range(len(case.pieces)) if kept is None else kept
        make = lambda shapes, place: Parts(  # noqa: E731
            shapes, case.sizes, 1000 * case.seed + place, case.dtype)
        self.embedding = make({"table": ("V", "D")}, 99) if case.tokens else None
        self.parts = nn.ModuleList(
            make(PIECES[name].shapes, i) for i, name in enumerate(case.pieces))
        self.head = make(HEADS[case.head].shapes, 98)
        self.eval().requires_grad_(False)

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Any:
        context = Context(inputs if self.case.tokens else None, mask, bias)
        x = inputs if self.embedding is None else self.embedding.table[inputs] * 2
        for i in self.kept:
            y = PIECES[self.case.pieces[i]].run(self.parts[i], x, context)
            x = x + torch.nn.functional.layer_norm(y, y.shape[-1:]) if i % 2 else x + y
        return HEADS[self.case.head].run(self.head, x, context)


def inputs_of(case: Case, length: int, batch: int) -> dict[str, Tensor]:
    """Inputs of a length and a batch, by name."""
    generator = torch.Generator().manual_seed(1000 * case.seed + 10 * length + batch)
    draw = lambda *shape: torch.randn(  # noqa: E731
        shape, generator=generator, dtype=torch.float64).to(case.dtype)
    if case.tokens:
        found = {"inputs": torch.randint(case.sizes.V, (batch, length), generator=generator)}
    else:
        found = {"inputs": draw(batch, length, case.sizes.D)}
    if "mask" in case.needs:
        found["mask"] = _mask(case.padding, batch, length, generator)
    if "bias" in case.needs:
        rows = 1 if case.seed % 2 else batch
        found["bias"] = draw(rows, case.sizes.H, length, length) * 2
    return found


def _mask(padding: str, batch: int, length: int, generator: torch.Generator) -> Tensor:
    kept = torch.randint(1, length + 1, (batch, 1), generator=generator)
    mask = torch.arange(length) < kept
    if padding == "holes":
        mask = torch.rand(batch, length, generator=generator) < 0.6
        mask[:, 0] = True
    return (mask.flip(1) if padding == "left" else mask).long()


# -- what becomes of it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a case, and why."""

    kind: str
    detail: str = ""

    @property
    def reason(self) -> str:
        """The detail without what differs from case to case."""
        text = re.sub(r"'[^']*'|%\w+|\[[^\]]*\]|\d+(\.\d+)?(e-?\d+)?", "_", self.detail)
        return re.sub(r"^.*?: error: ", "", text.split(" | ")[0])[:110]


def trial(case: Case) -> Outcome:
    """Compile a case, run it at its lengths and batches, and hold it against the module itself."""
    module = RandomModule(case, _mattering(case))
    if not module.kept:
        return Outcome(IDLE, "no piece changes the outputs")
    try:
        parallel = compiled(module)
    except RingCompileError as error:
        return Outcome(REFUSED, _message(error))
    except Exception as error:
        return Outcome(CRASHED, f"while compiling: {_trace(error)}")
    refused = ""
    for length, batch in _possible(case, parallel):
        outcome = _run(module, parallel, inputs_of(case, length, batch))
        if outcome.kind == WRONG and _is_rounding(module, parallel, (length, batch)):
            continue
        if outcome.kind in (WRONG, CRASHED):
            return Outcome(outcome.kind, f"at {length}x{batch}: {outcome.detail}")
        refused = outcome.detail if outcome.kind == REFUSED else refused
    return Outcome(REFUSED, f"at run: {refused}") if refused else Outcome(RIGHT)


@torch.no_grad()
def _is_rounding(module: RandomModule, parallel: ParallelProgram, run: tuple[int, int]) -> bool:
    """Whether float32 itself is off so far: choices and near ties make much of little.

    Against float64 with the same weights, over seven batches, the ranks have to be no more off
    than twice what the module itself is, in the median; and the case right in float64.
    """
    case = module.case
    if case.dtype != torch.float32:
        return False
    exact = replace(case, dtype=torch.float64)
    wide = RandomModule(exact, tuple(module.kept))
    wide.load_state_dict(module.state_dict())
    length, batch = run
    offs: list[tuple[float, float]] = []
    for times in range(1, 8):
        inputs = inputs_of(case, length, batch * times)
        right = _leaves(wide(**{
            name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}))
        found = run_lockstep(parallel.ranks(), parallel.mesh, parallel.source, inputs).outputs
        ranks, own = (furthest(map(_distance, _leaves(side), right))
                      for side in (found, module(**inputs)))
        offs.append((ranks, own))
    ranks, own = map(median, zip(*offs, strict=True))
    return bool(ranks <= 2 * own) and trial(exact).kind == RIGHT


def _possible(case: Case, parallel: ParallelProgram) -> list[tuple[int, int]]:
    """The runs of a case at lengths that the program takes; where its length is fixed, that one."""
    length = parallel.program.inputs[0].type.shape[1]
    if isinstance(length, int):
        return list({(length, batch) for _, batch in case.runs})
    low, high = parallel.program.length_range
    return [(n, batch) for n, batch in case.runs if low <= n <= (high or n)]


@torch.no_grad()
def _mattering(case: Case) -> tuple[int, ...]:
    """The pieces of a case whose removal, and that of whose mask, changes the outputs."""
    inputs = inputs_of(case, 23, 2)
    module = RandomModule(case)
    whole, kept = module(**inputs), []
    for i in range(len(case.pieces)):
        module.kept = tuple(k for k in range(len(case.pieces)) if k != i)
        changed = _differ(module(**inputs), whole)
        module.kept = tuple(range(len(case.pieces)))
        if PIECES[case.pieces[i]].group == "attention" and "both" not in case.pieces[i]:
            module.parts[i].plain = True
            changed = changed and (_differ(module(**inputs), whole) or "linear" in case.pieces[i])
            module.parts[i].plain = False
        if changed:
            kept.append(i)
    return tuple(kept)


def _differ(one: Any, other: Any) -> bool:
    return any(_distance(a, b) > MATTERS for a, b in zip(_leaves(one), _leaves(other), strict=True))


def compiled(module: RandomModule) -> ParallelProgram:
    """The parallel program, with the programs of all ranks."""
    case = module.case
    example = inputs_of(case, case.captured, case.batch)
    parallel = transform(
        capture(module, (example.pop("inputs"),), example), case.spec, order=case.order)
    parallel.verify()
    return parallel


@torch.no_grad()
def _run(module: RandomModule, parallel: ParallelProgram, inputs: dict[str, Tensor]) -> Outcome:
    """One run, held against the module; what the module cannot do, ranks have to refuse."""
    try:
        expected = _leaves(module(**inputs))
    except (RuntimeError, IndexError):
        expected = None
    try:
        found = _leaves(run_lockstep(
            parallel.ranks(), parallel.mesh, parallel.source, inputs, check_types=True).outputs)
    except RingCompileError as error:
        return Outcome(RIGHT if expected is None else REFUSED, _message(error))
    except Exception as error:
        return Outcome(CRASHED, _trace(error))
    if expected is None:
        return Outcome(WRONG, "there are outputs where the module itself raises")
    if any(not bool(e.isfinite().all()) for e in expected if e.is_floating_point()):
        return Outcome(IDLE, "the module itself gives what is not finite")
    return _compared(found, expected)


def _compared(found: list[Tensor], expected: list[Tensor]) -> Outcome:
    kinds = [[(tuple(t.shape), t.dtype) for t in side] for side in (found, expected)]
    if kinds[0] != kinds[1]:
        return Outcome(WRONG, f"outputs {kinds[0]}, the module's are {kinds[1]}")
    for number, (f, e) in enumerate(zip(found, expected, strict=True)):
        off = _distance(f, e)
        if not off <= TOLERANCE.get(e.dtype, 0.0):
            return Outcome(WRONG, f"output {number} is off by {off:.1e} of its largest value")
    return Outcome(RIGHT)


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if torch.is_tensor(leaf)]


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest expected value; NaN where there is one."""
    if not expected.numel():
        return 0.0
    off = (found.double() - expected.double()).abs().max()
    return float(off / expected.double().abs().max().clamp(min=1e-30))


def _message(error: RingCompileError) -> str:
    return " | ".join(line.strip() for line in str(error).splitlines()[:3])


def _trace(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.name}: {first}"


def main() -> None:
    """Try seeds; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Random modules against the compiler")
    parser.add_argument("seed", type=int)
    parser.add_argument("count", type=int, nargs="?", default=1)
    parser.add_argument("--short", action="store_true", help="print wrong and crashed ones only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for seed in range(options.seed, options.seed + options.count):
        case = case_of(seed)
        outcome = trial(case)
        kinds[outcome.kind] += 1
        reasons[outcome.reason] += outcome.kind == REFUSED
        if outcome.kind in (WRONG, CRASHED) or not options.short:
            print(f"{seed}: {outcome.kind} {outcome.detail}\n    {case.words()}", flush=True)
    for reason, count in reasons.most_common():
        print(f"{count:5} refused: {reason}" if count else "", end="\n" if count else "")
    print(dict(kinds))


if __name__ == "__main__":
    main()
