"""The comparison itself: which inputs are tried, in what time, and what is said of a difference."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import fx, nn

from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import SEQUENCE
from ringcompile.ir.nodes import location_of
from ringcompile.ir.program import Program, WeightSource
from ringcompile.numerics.compare import (
    ALLOWED,
    Mismatch,
    compare,
    outputs_by_name,
    row_distances,
)
from ringcompile.numerics.draw import Draw, draw_inputs, token_mask
from ringcompile.numerics.gain import Jolted, Strengthened
from ringcompile.numerics.lengths import LONGEST, lengths_to_try, longer, windows
from ringcompile.numerics.reference import Eager, Reference
from ringcompile.numerics.roles import MASK, Role, roles_of
from ringcompile.numerics.widen import WideSource, wide_by_default, wide_tensors, widened
from ringcompile.options import TRIES
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.join import first_line

SECONDS = 60.0
# Special ids go first, then the range of indices is halved until the model takes them.
_PLAINEST = 12
# A difference this many times what rounding does to the model itself proves nothing.
_UNSTABLE, _JOLTS = 8.0, 2


@dataclass(frozen=True)
class Request:
    """What is to be compared.

    Attributes:
        length: one sequence length, in tokens; by default those that may show something.
        seed: the first seed.
        tries: seeds for each length.
        inputs: whole inputs by name, in place of drawn ones.
        named: what to call them in messages.
        seconds: no further length is begun after so long.
    """

    length: int | None = None
    seed: int = 0
    tries: int = TRIES
    inputs: Mapping[str, torch.Tensor] | None = None
    named: str = "the inputs given"
    seconds: float = SECONDS


@dataclass(frozen=True)
class Numerics:
    """All ranks against the model, on one set of inputs.

    Attributes:
        length: of the sequence, in tokens; 0 for inputs that were given.
        seed: of the inputs.
        inputs: what they are, in words.
        difference: the largest, of the scale that it is held against.
        allowed: how large it may be.
        wrong: what differs, where, and how to see it again; empty where nothing does.
    """

    length: int
    seed: int
    inputs: str
    difference: float
    allowed: float
    wrong: str = ""


@dataclass(frozen=True)
class _Way:
    """One way to run the model and the ranks: with their own weights, or wide and at a gain."""

    reference: Reference | Eager
    ranks: list[Program]
    source: WeightSource | None
    wide: bool = False


@dataclass
class Comparison:
    """All ranks of a program against a model.

    Attributes:
        parallel: the ranks.
        module: the user's model; None to compare with what was kept of it alone.
        notes: what could not be tried, once it has run.
    """

    parallel: ParallelProgram
    module: nn.Module | None
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        kept, ranks, source = self.parallel.reference, self.parallel.ranks(), self.parallel.source
        if kept is None and self.module is None:
            raise RingCompileError(
                "there is nothing to compare numbers with: the program for one device is not kept",
                hint="name the model: `ringcompile verify OUT --numerics --model MODEL`",
            )
        self.program = self.parallel.program if kept is None else kept
        self.roles: dict[str, Role] = roles_of(self.program)
        self.kept = None if kept is None else Reference(kept)
        own = self.kept if self.module is None else Eager(self.module)
        assert own is not None
        self.own, self.strong = _Way(own, ranks, source), None
        if kept is not None and source is not None:
            # Others were read as constants while compiling, or ranks hold pieces: `weight[0:64]`.
            held = {w.name for p in ranks for w in p.weights.values()}
            cut = {name.partition("[")[0] for name in held if "[" in name}
            names = frozenset((held & {w.name for w in kept.weights.values()}) - cut)
            self.strong = _Way(
                Reference(widened(kept)), [widened(rank) for rank in ranks],
                Strengthened(WideSource(source), names), wide=True,
            )

    @torch.no_grad()
    def run(self, request: Request) -> Iterator[Numerics]:
        """Compare, one set of inputs after another, up to the first that differs.

        Raises:
            RingCompileError: the model fails, or it differs because its weights are others.
        """
        for row in self._rows(request):
            if row.wrong:
                self._check_weights()
            yield row
            if row.wrong:
                return

    def _check_weights(self) -> None:
        """Raise RingCompileError if the module's weights are not those that ranks have."""
        source = self.parallel.source
        if self.module is None or source is None:
            return
        tensors = [*self.module.named_parameters(remove_duplicate=False),
                   *self.module.named_buffers(remove_duplicate=False)]
        known = {weight.name for weight in self.program.weights.values()}
        for name, tensor in tensors:
            if name in known and not _equal(source(name), tensor.detach()):
                raise RingCompileError(
                    f"the weight '{name}' of the model is not the one that was compiled, so the "
                    "numbers cannot agree",
                    hint="load the same weights on every call, for example with load_state_dict, "
                    "or call torch.manual_seed before the module is made; or compile it again",
                )

    def _rows(self, request: Request) -> Iterator[Numerics]:
        if request.inputs is not None:
            yield from self._on_given(request)
            return
        start, seed = time.monotonic(), request.seed
        for length in self._lengths(request):
            if seed > request.seed and time.monotonic() - start > request.seconds:
                self.notes.append(
                    f"length {length} and longer ones were not tried: shorter ones took more than "
                    f"{request.seconds:.0f} s; --seq names one"
                )
                break
            for _ in range(request.tries):
                yield self._drawn(length, seed)
                seed += 1
        self._note_left_out()
        for node in self._one_sided:
            where = location_of(node).short
            self.notes.append(f"{where}: %{node.name} always gave the same result when it compared "
                              "numbers; a longer sequence (--seq) may reach its threshold")

    def _on_given(self, request: Request) -> Iterator[Numerics]:
        assert request.inputs is not None
        for way in filter(None, (self.own, self.strong)):
            try:
                yield self._compared(way, request.inputs, Draw(0, 0), request.named)
            except _RefusedError as error:
                failure = first_line(error.__cause__ or error)
                if not way.wide:
                    raise RingCompileError(
                        f"the model itself fails on {request.named}: {failure}"
                    ) from None
                self.left_out.append(f"{request.named}: {failure}")
        self._note_left_out()

    def _note_left_out(self) -> None:
        """Say how many comparisons of the model in float64 it does not take, and why."""
        if self.left_out:
            count = len(self.left_out)
            self.notes.append(
                f"{count} {'comparison' if count == 1 else 'comparisons'} in float64 with larger "
                f"weights {'was' if count == 1 else 'were'} left out, because the model itself "
                f"fails in them; the first is {self.left_out[0]}"
            )

    @property
    def _one_sided(self) -> list[fx.Node]:
        """Comparisons in the model of which no input has shown both results."""
        sides = [w.reference.outcomes for w in filter(None, (self.own, self.strong))
                 if isinstance(w.reference, Reference)]
        return [] if self.kept is None else [
            node for node in self.kept.outcomes
            if len({side for found in sides for n, seen in found.items() if n.name == node.name
                    for side in seen}) < 2
        ]

    def _lengths(self, request: Request) -> Iterator[int]:
        """Those asked for; else all that the graphs show, then longer ones while these may tell."""
        fixed = self.parallel.program.lengths.get(SEQUENCE)
        varies = any(not isinstance(n, int) for s in self.program.inputs for n in s.type.shape)
        if request.length is not None or fixed is not None or not varies:
            yield request.length or fixed or 1
            return
        sequence = self.parallel.program.sequence
        num_ranks, chunks = (sequence.num_ranks, sequence.num_chunks) if sequence else (1, 1)
        every = [self.program, *self.parallel.ranks()]
        self.notes += [
            f"a window of {width} tokens was not reached; --seq {width + 2} reaches it"
            for width in sorted(set(windows(every))) if width >= LONGEST
        ]
        planned = lengths_to_try(every, num_ranks, chunks)
        yield planned[0]
        reached, waits = planned[0], bool(self._one_sided)
        for length in chain(planned[1:], longer(max(planned), self.program.length_range[1])):
            if length not in planned and not self._one_sided:
                break
            yield length
            reached = max(reached, length)
        if waits and not self._one_sided:  # the first rank alone has to reach it as well
            yield from longer(reached, self.program.length_range[1], num_ranks)

    def _drawn(self, length: int, seed: int) -> Numerics:
        """Inputs of a length and a seed, as many-sided as the model takes them."""
        failure: BaseException | None = None
        strong = self.strong if seed % 3 > 0 else None
        ways = [strong, self.own] if strong is not None else [self.own]
        for plain in range(_PLAINEST):
            draw = Draw(length, seed, plain)
            mesh = self.parallel.mesh
            inputs = draw_inputs(
                self.program, self.roles, draw, mesh.size("dp"), mesh.size("tp"),
                self.parallel.program,
            )
            for way in ways:
                try:
                    found = self._compared(way, inputs, draw, self._words(draw, way))
                except _RefusedError as error:
                    failure = error.__cause__ or error
                    continue
                if failure is not None and way is not ways[0]:
                    self.left_out.append(f"length {length}, seed {seed}: {first_line(failure)}")
                return found
        raise RingCompileError(
            f"the model itself fails on random inputs of length {length}: {failure}",
            hint="compare on inputs of yours: --inputs FILE",
        )

    def _words(self, draw: Draw, way: _Way) -> str:
        masked = any(role.kind == MASK for role in self.roles.values())
        weights = "float64, larger weights" if way.wide else ""
        return ", ".join(filter(None, [draw.padding if masked else "", weights]))

    def _compared(
        self, way: _Way, inputs: Mapping[str, torch.Tensor], draw: Draw, words: str
    ) -> Numerics:
        """One run of the model and one of all ranks; raises _RefusedError where the model fails."""
        real = token_mask(inputs, self.roles)
        with wide_by_default() if way.wide else nullcontext():
            taken = wide_tensors(dict(inputs)) if way.wide else inputs
            expected = _expected(way, taken)
            found = outputs_by_name(run_lockstep(
                way.ranks, self.parallel.mesh, way.source, taken, check_types=True
            ).outputs)
            worst, mismatches = compare(found, expected, real)
            if mismatches:
                mismatches = _not_explained(way, taken, mismatches)
        allowed = max((ALLOWED.get(e.dtype, 0.0) for e in expected.values()), default=0.0)
        wrong = _message(mismatches[0], draw, words) if mismatches else ""
        return Numerics(draw.length, draw.seed, words, worst, allowed, wrong)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())


class _RefusedError(Exception):
    """The model itself cannot compute something finite from these inputs."""


def _expected(way: _Way, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    try:
        expected = outputs_by_name(way.reference.run(inputs, way.source))
    except RingCompileError as error:
        if error.node is None:  # not an op that failed: no weights, or a length that is refused
            raise
        raise _RefusedError from error
    except (RuntimeError, IndexError, ValueError) as error:
        raise _RefusedError from error
    for name, tensor in expected.items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise _RefusedError(f"its output '{name}' has NaN")
    return expected


def _not_explained(
    way: _Way, inputs: Mapping[str, torch.Tensor], mismatches: list[Mismatch]
) -> list[Mismatch]:
    """The differences that rounding errors in the model's own weights do not explain."""
    reference, source = way.reference, way.source
    if not isinstance(reference, Reference) or source is None:
        return mismatches
    if any(m.rows is None for m in mismatches):
        return mismatches
    plain = outputs_by_name(reference.run(inputs, source))
    jolted = [
        outputs_by_name(reference.run(inputs, Jolted(source, seed))) for seed in range(_JOLTS)
    ]
    moved = {
        name: torch.stack([row_distances(one[name], x)[0] for one in jolted]).amax(0)
        for name, x in plain.items()
    }
    return [m for m in mismatches if not _explained(m, moved[m.output])]


def _explained(mismatch: Mismatch, moved: torch.Tensor) -> bool:
    """Whether all rows that differ move as far when the model's own weights are jolted."""
    assert mismatch.rows is not None
    assert mismatch.distance is not None
    within = mismatch.distance <= _UNSTABLE * moved
    return bool((within | ~mismatch.rows).all())


def _message(mismatch: Mismatch, draw: Draw, words: str) -> str:
    name = f"output '{mismatch.output}' " if mismatch.output else ""
    if not draw.length:
        return f"{name}{mismatch.text} ({words})"
    text = f"length {draw.length}, seed {draw.seed}" + (f": {words}" if words else "")
    return (f"{name}{mismatch.text} ({text}); "
            f"to repeat: --seq {draw.length} --seed {draw.seed} --tries 1")
