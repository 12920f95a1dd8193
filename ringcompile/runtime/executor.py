"""Runs one rank's program, node by node; where ranks must meet it asks whoever drives it.

`Executor.run` is a generator: it computes until the program communicates, yields a request, and
goes on with the answer. A driver over torch.distributed answers at once; the lock-step driver
answers when the other ranks, which it runs too, have come as far. The same code runs in both.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import map_values
from ringcompile.ir.expr import BATCH, OWN, PART, SEQUENCE, bind, depends_on_data, is_symbolic
from ringcompile.ir.nodes import error_at, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.ops import schemas
from ringcompile.ops.bodies import CREATION, body_of
from ringcompile.runtime.budget import check_memory
from ringcompile.runtime.collectives import Collective, asked, used
from ringcompile.runtime.groups import with_groups
from ringcompile.runtime.steps import Slot, Step, holds_slot


@dataclass(frozen=True)
class Shift:
    """Start sending `tensor` to one rank and receiving from another; answered by a handle."""

    node: str
    axis: str
    tensor: torch.Tensor | None
    to: int | None
    source: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    sends: tuple[int, ...] = ()
    takes: tuple[int, ...] = ()
    of: str = ""


@dataclass(frozen=True)
class Wait:
    """Wait for a transfer; answered by the tensor that arrived, empty if none was expected."""

    node: str
    handle: Any


@dataclass(frozen=True)
class Replayed:
    """A recorded run is launched with all that it exchanges; answered by nothing."""

    node: str
    num_bytes: int


Request = Shift | Wait | Collective | Replayed


# Called with a node, its arguments and what computes it; returns the result. For measuring.
Watch = Callable[[fx.Node, list[Any], dict[str, Any], Callable[..., Any]], Any]


class Executor:
    """A rank's program prepared for given lengths.

    Args:
        program: a program of one rank (or one for a single device).
        lengths: the values of its length symbols.
        device: where tensors that the program makes are put.
        check_types: hold every value against the type that its node declares.
        compiler: a backend of torch.compile, such as "inductor", for fused groups; None to run op
            by op. See `groups`.
        at_once: compile before the first run, not before the second: lengths that come once are not
            worth it.
        watch: called in place of every op that does not communicate.
        on_device: run bodies that ask the device for nothing; see `bodies.ON_DEVICE`.

    Raises:
        RingCompileError: a program from a file would take more memory than there is, or than its
            types say.
    """

    def __init__(
        self,
        program: Program,
        lengths: dict[str, int],
        device: torch.device | str = "cpu",
        check_types: bool = False,
        *,
        compiler: str | None = None,
        at_once: bool = True,
        watch: Watch | None = None,
        on_device: bool = False,
    ) -> None:
        self.program, self.check_types, self.on_device = program, check_types, on_device
        self.lengths = _with_own(program, lengths)
        self.device = torch.device(device)
        nodes = list(program.graph.nodes)
        self.slots = {node: i for i, node in enumerate(nodes)}
        self.placeholders = [node for node in nodes if node.op == "placeholder"]
        last_use: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            for operand in node.all_input_nodes:
                last_use[operand] = node
        frees: dict[fx.Node, list[int]] = {}
        for operand, user in last_use.items():
            frees.setdefault(user, []).append(self.slots[operand])
        self.steps = [
            self._prepare(node, frees.get(node, [])) for node in nodes if node.op == "call_function"
        ]
        if program.from_file:
            check_memory(nodes, self.steps, self._local_shape, self.device, self._pairs())
        self.watch, self.num_slots = watch, len(nodes)
        self.compiler = compiler
        if at_once:
            self._compile()

    def _compile(self) -> None:
        """Make one step of each fused group."""
        if self.compiler is not None:
            kept = [self.slots[node] for node in self.program.outputs]
            self.steps, self.num_slots = with_groups(
                self.steps, self.num_slots, kept, self.compiler
            )
        self.compiler = None

    def _pairs(self) -> int:
        """Sequences times tokens times tokens, as far as lengths tell."""
        known = {**self.program.lengths, **self.lengths}
        return int(known.get(PART, known.get(BATCH, 1)) * known.get(SEQUENCE, 1) ** 2)

    def _prepare(self, node: fx.Node, frees: list[int]) -> Step:
        args, kwargs = map_values((list(node.args), dict(node.kwargs)), self._argument)
        if str(node.target) in CREATION or _makes_anew(node):
            kwargs["device"] = self.device
        name = schemas.name_of(node.target)
        communicates = name if name in schemas.COMMUNICATION else None
        fill = [(i, a.index) for i, a in enumerate(args) if isinstance(a, Slot)]
        nested = holds_slot([a for a in args if not isinstance(a, Slot)]) or holds_slot(kwargs)
        if not node.users:
            frees = [*frees, self.slots[node]]
        function: Any = node.target if communicates else body_of(node.target, self.on_device)
        return Step(
            node, function, args, kwargs, fill, nested, self.slots[node], frees, communicates
        )

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return Slot(self.slots[value])
        return bind(value, self.lengths) if is_symbolic(value) else value

    def run(
        self, values: dict[str, torch.Tensor]
    ) -> Generator[Request, Any, tuple[torch.Tensor, ...]]:
        """Run once.

        Args:
            values: by placeholder name: weights, and this rank's share of the inputs.

        Returns:
            this rank's share of every output, in order.
        """
        held: list[Any] = [None] * self.num_slots
        for node in self.placeholders:
            held[self.slots[node]] = values[node.name]
        for step in self.steps:
            args, kwargs = step.filled(held)
            if step.communicates is None:
                held[step.out] = self._called(step, args, kwargs)
            else:
                held[step.out] = yield from self._communicate(step, args, kwargs)
            if self.check_types:
                self._check(step.node, held[step.out])
            for slot in step.frees:
                held[slot] = None
        self._compile()
        return tuple(held[self.slots[node]] for node in self.program.outputs)

    def _called(self, step: Step, args: list[Any], kwargs: dict[str, Any]) -> Any:
        try:
            if self.watch is not None:
                return self.watch(step.node, args, kwargs, step.function)
            return step.function(*args, **kwargs)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise error_at(step.node, f"{step.node.target} failed: {first}") from error

    def _communicate(
        self, step: Step, args: list[Any], kwargs: dict[str, Any]
    ) -> Generator[Request, Any, Any]:
        name = step.node.name
        if step.communicates == "wait":
            return (yield Wait(name, args[0]))
        if step.communicates == "shift_start":
            type_ = type_of(step.node)
            return (
                yield Shift(
                    name, kwargs["axis"], None if kwargs["to"] is None else args[0].contiguous(),
                    kwargs["to"], kwargs["source"],
                    self._local_shape(type_), type_.dtype,
                    tuple(kwargs["sends"]), tuple(kwargs["takes"]), kwargs["of"],
                )
            )
        kind, mesh = step.communicates, self.program.mesh
        assert kind is not None
        assert mesh is not None
        answer = yield asked(name, kind, args, kwargs, mesh.size(kwargs["axis"]))
        shape = self._local_shape(type_of(step.node))
        return used(kind, answer, args, kwargs, self.program.sequence, shape)

    def _local_shape(self, type_: TensorType) -> tuple[Any, ...]:
        """Sizes that only the data tells stay symbols."""
        shape = local_shape(type_, self.program.mesh, self.program.sequence)
        return tuple(bind(size, self.lengths) for size in shape)

    def _check(self, node: fx.Node, value: Any) -> None:
        """A value that is not what its type says is a bug of a rule or a pass."""
        types = node.meta["type"]
        if not isinstance(value, torch.Tensor | list):
            return
        pairs: Iterable[tuple[Any, TensorType]] = (
            zip(value, types, strict=True) if isinstance(types, tuple) else [(value, types)]
        )
        for tensor, type_ in pairs:
            expected = list(self._local_shape(type_))
            if "rows" in node.meta:  # some of them alone: see `tail`
                dim, expected[dim] = node.meta["rows"]
            fits = tensor.dtype == type_.dtype and len(expected) == tensor.dim() and all(
                depends_on_data(e) or e == size
                for e, size in zip(expected, tensor.shape, strict=True)
            )
            assert fits, (
                f"%{node.name} ({node.target}) is {tensor.dtype} {list(tensor.shape)}, "
                f"its type says {type_}, here {expected}"
            )


def _makes_anew(node: fx.Node) -> bool:
    """Whether an op reads no tensor and has to be told the device."""
    arguments = node.target._schema.arguments if hasattr(node.target, "_schema") else ()
    return not node.all_input_nodes and any(a.name == "device" for a in arguments)


def _with_own(program: Program, lengths: dict[str, int]) -> dict[str, int]:
    """The lengths, and how many tokens this very rank holds."""
    sequence, coordinates = program.sequence, program.coordinates
    if sequence is None or coordinates is None:
        return lengths
    return {**lengths, OWN: sequence.own_length(coordinates, lengths)}


def run_alone(
    executor: Executor, values: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Run a program that never communicates."""
    generator = executor.run(values)
    try:
        request = next(generator)
    except StopIteration as done:
        return done.value
    raise AssertionError(f"a program for one device asks for {request}")
