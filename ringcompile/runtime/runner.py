"""One rank's programs with their weights and its cache: how it does what a session asks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, assert_never

import torch

from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import SEQUENCE
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program, WeightSource
from ringcompile.ir.types import TensorType
from ringcompile.ops import kernels
from ringcompile.ops.memory_order import column_by_column, read_by_few
from ringcompile.runtime.batches import Deal, Part, deal, part_of, uses_numbers
from ringcompile.runtime.cache import Memory
from ringcompile.runtime.data import (
    Ranges,
    share_keys,
    share_of,
    share_ranges,
    share_slices,
    shares_of,
)
from ringcompile.runtime.decode_step import DecodeSteps, recorder
from ringcompile.runtime.executor import Executor, Request, Watch
from ringcompile.runtime.finite import finite_watch
from ringcompile.runtime.groups import INDUCTOR, bodies_of
from ringcompile.runtime.outputs import EVERYTHING, Kept, Summary
from ringcompile.runtime.tail import has_last_positions, last_rows
from ringcompile.runtime.tasks import CARRIED, WHOLE, Extend, Inputs, Prompt, Run, Task
from ringcompile.runtime.tracer import Tracer

_MAX_EXECUTORS = 16  # of a program, one for each combination of lengths lately seen


def read_weights(
    program: Program, source: WeightSource | None, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """The weights a program takes, by placeholder name."""
    if program.weights and source is None:
        raise RingCompileError("the program has no weights at hand")
    types = {node.name: type_of(node) for node in program.graph.nodes if node.op == "placeholder"}
    return {
        placeholder: _read(program, source, weight.name, types[placeholder]).to(device)  # type: ignore[arg-type]
        for placeholder, weight in program.weights.items()
    }


def _read(program: Program, source: WeightSource, name: str, type_: TensorType) -> torch.Tensor:
    """One rank's share of a weight; nothing else of a file is read, if the share is one piece."""
    slices = share_slices(program, type_)
    if slices and hasattr(source, "share"):
        piece: torch.Tensor = source.share(name, slices)
        return piece
    return share_of(program, source(name), type_, {})


@dataclass
class OpenWeights:
    """Weights on a device; programs and ranks that take the same share of one have it once.

    Attributes:
        source: where their data comes from.
        device: where they are put.
        held: by `share_keys`.
        ranges: of the weights that were read, by name: where in the whole they lie.
    """

    source: WeightSource | None
    device: torch.device
    held: dict[Any, torch.Tensor] = field(default_factory=dict)
    ranges: dict[str, list[tuple[Ranges, torch.Tensor]]] = field(default_factory=dict)

    def of(self, program: Program) -> dict[str, torch.Tensor]:
        """The weights of a rank's program by placeholder name."""
        keys = share_keys(program)
        types = {n.name: type_of(n) for n in program.graph.nodes if n.op == "placeholder"}
        ranges = {p: share_ranges(program, types[p]) for p in keys}
        for p, key in keys.items():
            if key not in self.held and (part := self._part(program.weights[p].name, ranges[p])):
                self.held[key] = part[0]
        new = {p: program.weights[p] for p, key in keys.items() if key not in self.held}
        only = program.with_graph(program.graph, weights=new)
        few = {keys[p] for p in read_by_few(program, new)}
        for p, weight in read_weights(only, self.source, self.device).items():
            if keys[p] in few:
                weight = column_by_column(weight)
            self.held[keys[p]] = weight
            held = ranges[p]
            if held is not None:
                self.ranges.setdefault(program.weights[p].name, []).append((held, weight))
        return {p: self.held[key] for p, key in keys.items()}

    def _part(self, name: str, ranges: Ranges | None) -> tuple[torch.Tensor] | None:
        """A part of a weight, as a view of a larger one that is held already."""
        if ranges is None:
            return None
        for have, weight in self.ranges.get(name, ()):
            if all(a.start <= b.start and b.stop <= a.stop
                   for a, b in zip(have, ranges, strict=True)):
                moved = (slice(b.start - a.start, b.stop - a.start)
                         for a, b in zip(have, ranges, strict=True))
                return (weight[tuple(moved)],)
        return None


@dataclass(frozen=True)
class Settings:
    """How ranks compute.

    Attributes:
        check_types: hold every value against the type that its node declares.
        compiler: a backend of torch.compile for fused groups, from the first run on; see
            `Executor`. By default GPUs compile groups when a length comes for the second time.
        check_finite: look for the first NaN or infinity, and have ranks compare what they are about
            to exchange; see `finite_watch` and `stamps`.
        trace: write down what ranks do when; nothing is compiled then. A run is done twice, as the
            first one takes time that later ones do not: to load kernels, to get memory.
        cuda_graphs: how the step of one new token runs, one of `options.CUDA_GRAPHS`.
    """

    check_types: bool = False
    compiler: str | None = None
    check_finite: bool = False
    trace: bool = False
    cuda_graphs: str = "auto"

    def compiler_on(self, device: torch.device) -> str | None:
        """The backend of torch.compile for fused groups, if they are compiled."""
        watched = self.check_types or self.check_finite or self.trace
        if device.type != "cuda" or watched:
            return self.compiler
        return self.compiler or INDUCTOR


class Runs(Protocol):
    """What computes a call: an `Executor`, or a step that was recorded."""

    program: Program
    lengths: dict[str, int]

    def run(
        self, values: Inputs, /
    ) -> Generator[Request, Any, tuple[torch.Tensor, ...]]:
        """See `Executor.run`."""


def why_not_recorded(settings: Settings) -> str | None:
    """Why ranks that compute in this way cannot record steps; None if they can."""
    if settings.check_finite:
        return "with check_finite the host looks at every value"
    if settings.trace:
        return "with trace every op is timed"
    if settings.cuda_graphs == "rehearse":
        if settings.compiler is not None:
            return "the rehearsal sees no ops of compiled code"
        if unseen := kernels.unseen():
            return f"the rehearsal sees no ops of the kernel '{unseen}'"
    return None


@dataclass(frozen=True)
class Prepared:
    """A task that a rank is about to do.

    Attributes:
        dealt: how the batch is dealt out.
        calls: of each microbatch, the program and what it takes, by placeholder name.
        keep: what is kept of the outputs.
        last: whether outputs of the last of the new tokens alone are wanted.
        tracer: writes down what the rank does when, if that is wanted.
    """

    dealt: Deal
    calls: Sequence[tuple[Runs, Inputs]]
    keep: Kept = EVERYTHING
    last: bool = False
    tracer: Tracer | None = None


def freed(program: Program) -> Program:
    """Without the model's own weights, which stay in memory as long as a program names them."""
    return replace(program, source=None, captured=None)


def _copied(share: torch.Tensor) -> torch.Tensor:
    """A share without the whole weight that it may be a view of."""
    return share.clone() if share.untyped_storage().nbytes() > share.nbytes else share


@dataclass(frozen=True)
class _Opened:
    """A program that is ready to run."""

    program: Program
    weights: Inputs
    numbered: bool
    executors: dict[Any, Executor] = field(default_factory=dict)


class Runner:
    """One rank's programs, its weights and its cache.

    Args:
        programs: gives the rank's program of a kind.
        weights: of this rank; other ranks of the process may share them.
        settings: how it computes.
        tracer: writes down what the rank does when, if that is wanted.
    """

    def __init__(
        self, programs: Callable[[str], Program], weights: OpenWeights, settings: Settings,
        tracer: Tracer | None = None,
    ) -> None:
        self.programs, self.weights, self.settings = programs, weights, settings
        self.tracer = tracer
        self.opened: dict[str, _Opened] = {}
        self._memory: Memory | None = None
        self._record = recorder(settings.cuda_graphs, weights.device)
        self._steps: DecodeSteps | None = None
        self._told: set[str] = set()

    def open(self, kind: str) -> _Opened:
        """The program of a kind, its weights read."""
        if kind not in self.opened:
            program = self.programs(kind)
            self.opened[kind] = _Opened(program, self.weights.of(program), uses_numbers(program))
        return self.opened[kind]

    def let_go(self) -> Program:
        """Keep shares of weights alone, and a program that does not name the model; returns it."""
        whole = self.open(WHOLE)
        weights = {name: _copied(weight) for name, weight in whole.weights.items()}
        program = freed(whole.program)
        self.opened = {WHOLE: _Opened(program, weights, whole.numbered)}
        self.weights, self.programs = OpenWeights(None, self.weights.device), lambda kind: program
        return program

    @property
    def memory(self) -> Memory:
        """What the rank keeps of a sequence from task to task."""
        if self._memory is None:
            self._memory = Memory(self.open(CARRIED).program, self.weights.device)
        return self._memory

    def length(self) -> int:
        """The tokens in its cache."""
        return 0 if self._memory is None else self._memory.length

    def rewind(self, length: int) -> None:
        """Forget the tokens from position `length` on."""
        if self._memory is not None:
            self._memory.rewind(length)

    def prepare(self, task: Task) -> Prepared:
        """Deal the batch out, take this rank's share of the inputs, and make room in its cache.

        Raises:
            RingCompileError: inputs that do not fit the program.
        """
        opened = self.open(task.kind)
        dealt = deal(opened.program, task.inputs)
        parts, steps = dealt.of(opened.program), self._recorded(task, opened)
        last = isinstance(task, Extend) and task.last
        computed = Kept(1) if _cuts(task, opened.program) else task.keep
        fixed = steps is not None
        calls = [
            self._call(opened, part, computed, values) if steps is None
            else (steps.step(part.needed(opened.numbered), values, self.weights.device), values)
            for part, values in zip(parts, self._taken(task, opened, parts, fixed), strict=True)
        ]
        return Prepared(dealt, calls, task.keep, last, self.tracer)

    def _recorded(self, task: Task, opened: _Opened) -> DecodeSteps | None:
        """The steps that are recorded, if the task is one of them: a single new token."""
        if self._record is None or not isinstance(task, Extend) or task.new != 1:
            return None
        if self._steps is None:
            self._steps = DecodeSteps(
                opened.program, opened.weights, lambda lengths: self._fixed(opened, lengths),
                self._record, why_not_recorded(self.settings),
            )
        return self._steps if self._steps.refusal is None else None

    def _fixed(self, opened: _Opened, lengths: dict[str, int]) -> list[Executor]:
        """Executors of fixed shapes: one that can be watched, and the compiled one, if any."""
        settings = self.settings
        return [
            Executor(opened.program, lengths, self.weights.device, settings.check_types,
                     compiler=compiler, on_device=True)
            for compiler in dict.fromkeys((None, self._compiler))
        ]

    def notes(self) -> tuple[str, ...]:
        """Why steps are not recorded, or groups not compiled, though they should be; said once."""
        refusals = {
            "decode steps run op by op instead of as CUDA graphs":
                None if self._steps is None else self._steps.refusal,
            "some fused groups run op by op instead of as one kernel":
                None if self._compiler is None else bodies_of(self._compiler).refusal,
        }
        new = {what: why for what, why in refusals.items() if why and what not in self._told}
        self._told |= new.keys()
        return tuple(f"{what}: {why}" for what, why in new.items())

    @property
    def _compiler(self) -> str | None:
        return self.settings.compiler_on(self.weights.device)

    def _taken(
        self, task: Task, opened: _Opened, parts: Iterable[Part], fixed: bool
    ) -> Iterator[Inputs]:
        """What the program takes besides weights, for each microbatch."""
        program = opened.program
        for part in parts:
            match task:
                case Run():
                    own = part_of(program, task.inputs, part)
                    yield shares_of(program, own, part.lengths)
                case Extend():
                    yield self.memory.begin(task.inputs, task.new, part, fixed)
                case Prompt():
                    yield self.memory.begin_prompt(program, task.inputs, task.new, part)
                case _:
                    assert_never(task)

    def on_shares(self, values: Inputs, lengths: dict[str, int]) -> Prepared:
        """A run of the whole program on this rank's share of the inputs, by placeholder name."""
        opened, part = self.open(Run.kind), Part(0, 0, lengths)
        replicas = opened.program.mesh.size("dp") if opened.program.mesh is not None else 1
        call = self._call(opened, part, EVERYTHING, values)
        return Prepared(Deal(lengths, ((part,),) * replicas), [call])

    def _call(
        self, opened: _Opened, part: Part, keep: Kept, values: Inputs
    ) -> tuple[Executor, Inputs]:
        device = self.weights.device
        needed = part.needed(opened.numbered)
        own = {name: tensor.to(device) for name, tensor in values.items()}
        return self._executor(opened, needed, keep), {**opened.weights, **own}

    def _executor(self, opened: _Opened, lengths: dict[str, int], keep: Kept) -> Executor:
        key, made = (tuple(sorted(lengths.items())), keep.last), opened.executors
        if key not in made:
            if len(made) == _MAX_EXECUTORS:
                made.clear()
            program, settings = keep.program(opened.program, lengths), self.settings
            made[key] = Executor(
                program, lengths, self.weights.device, settings.check_types,
                compiler=self._compiler, at_once=settings.compiler is not None,
                watch=self._watch(program),
            )
        return made[key]

    def _watch(self, program: Program) -> Watch | None:
        watch = finite_watch(program) if self.settings.check_finite else None
        return watch if self.tracer is None else self.tracer.watching(watch)


@dataclass(frozen=True)
class Computed:
    """What a rank made: see `RankRun`."""

    microbatches: tuple[tuple[torch.Tensor, ...], ...]
    dealt: Deal
    summaries: tuple[tuple[Summary, ...], ...]


def computed(prepared: Prepared) -> Generator[Request, Any, Computed]:
    """Compute one microbatch after another; whoever drives this answers the rank's requests."""
    outputs, summaries = [], []
    for number, (executor, values) in enumerate(prepared.calls):
        if prepared.tracer is not None:
            prepared.tracer.begin(number, executor.lengths)
        made = yield from executor.run(values)
        kept, summary = prepared.keep.of(executor.program, made, executor.lengths)
        outputs.append(last_rows(executor.program, kept) if prepared.last else kept)
        summaries.append(summary)
    dealt = _of_last(prepared.dealt) if prepared.last else prepared.dealt
    return Computed(tuple(outputs), dealt, tuple(summaries))


def _cuts(task: Task, program: Program) -> bool:
    """Whether the head is computed for the last of several new tokens only."""
    return isinstance(task, Extend) and task.last and task.new > 1 and has_last_positions(program)


def _of_last(dealt: Deal) -> Deal:
    """How the batch was dealt, with one token of each sequence."""
    hands = tuple(
        tuple(replace(part, lengths={**part.lengths, SEQUENCE: 1}) for part in hand)
        for hand in dealt.hands
    )
    return Deal({**dealt.lengths, SEQUENCE: 1}, hands)
