"""What one rank keeps from call to call of a program with a cache."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ringcompile.axes import KEEP_TOKENS
from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import SEQUENCE, bind, is_symbolic, symbol
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.state import KEPT
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.ops.slots import Ledger, Reach, bucket_of, slots_of
from ringcompile.runtime.batches import Part, part_of
from ringcompile.runtime.data import shares_of


def reach_of(program: Program) -> Reach:
    """How far back a sequence of a program with a cache can go."""
    return Reach("recent" in program.state.values())


def token_dim(type_: TensorType) -> int | None:
    """The dim with an entry for each token, or None."""
    return next(
        (i for i, size in enumerate(type_.shape)
         if is_symbolic(size) and symbol(SEQUENCE) in size.free_symbols), None
    )


class Memory:
    """The state of one rank's program.

    Args:
        program: of the rank, with a cache.
        device: where its tensors are put.
    """

    def __init__(self, program: Program, device: torch.device | str = "cpu") -> None:
        assert program.mesh is not None
        self.program, self.device = program, torch.device(device)
        self.types = {n.name: type_of(n) for n in program.graph.nodes if n.op == "placeholder"}
        axes = ",".join(axis for axis in KEEP_TOKENS if program.mesh.size(axis) > 1)
        self.ranks = program.mesh.size(axes) if axes else 1
        self.rank = program.mesh.index(program.coordinates or {}, axes) if axes else 0
        capacity = program.length_range[1]
        assert capacity is not None
        self.capacity, self.slots = capacity, slots_of(capacity, self.ranks)
        self.ledger, self.reach = Ledger(self.ranks), reach_of(program)
        # A slot that is not in use has a position behind every query: masks hide it.
        self.places = torch.full((self.slots,), capacity, device=self.device)
        self.sizes: dict[str, int] | None = None
        self.kept: dict[str, torch.Tensor] = {}
        self.history: dict[str, torch.Tensor] = {}

    @property
    def length(self) -> int:
        """The tokens so far."""
        return self.ledger.length

    @property
    def num_bytes(self) -> int:
        """The bytes of keys and values in the slots that are in use."""
        used = self.ledger.count(self.rank)
        caches = (x for name, x in self.kept.items() if self.program.state[name] == "cache")
        return sum(x.nbytes // x.shape[2] * used for x in caches)

    def _zeros(self, name: str) -> torch.Tensor:
        type_, program = self.types[name], self.program
        assert self.sizes is not None
        shape = [int(bind(size, {**self.sizes, **program.lengths}))
                 for size in local_shape(type_, program.mesh, program.sequence)]
        return torch.zeros(shape, dtype=type_.dtype, device=self.device)

    def begin(
        self, inputs: Mapping[str, torch.Tensor], new: int, part: Part, fixed: bool = False
    ) -> dict[str, torch.Tensor]:
        """Take in the new tokens of a call: what the program reads besides weights, by placeholder.

        What is kept lies where it lies at every call. The rest is on the host.

        Args:
            inputs: whole inputs by name, with an entry for each new token.
            new: how many tokens are new; there has to be room for them.
            part: of the batch, what the replica has; always the same.
            fixed: whether `places` has an entry for every slot of a bucket, used or not; see
                `bucket_of`. All ranks have the same.
        """
        self._made(part)
        start, used = self.length, self.ledger.count(self.rank)
        if not self.reach.holds(start):
            raise RingCompileError(
                "a failed call has overwritten the state of earlier tokens",
                hint="reset the session",
            )
        self.reach.extend(start + new)
        slots = torch.full((new,), self.slots, dtype=torch.int64)
        for owner, first, end in self.ledger.extend(new):
            if owner == self.rank:
                count = end - first
                slots[first - start : end - start] = torch.arange(used, used + count)
                self.places[used : used + count] = torch.arange(first, end, device=self.device)
                used += count
        read = bucket_of(max(self.ledger.counts), self.slots) if fixed else used
        of_call = {
            "positions": torch.arange(start, start + new), "slots": slots,
            "places": self.places[:read],
        }
        values = {name: of_call[kind] for name, kind in self.program.state.items()
                  if kind in of_call}
        own = part_of(self.program, inputs, part)
        return {**values, **own, **self._noted(own, start), **self.kept}

    def begin_prompt(
        self, prompt: Program, inputs: Mapping[str, torch.Tensor], length: int, part: Part
    ) -> dict[str, torch.Tensor]:
        """Take in a prompt, whose tokens stay on the ranks that compute them; as `begin`.

        Args:
            prompt: the rank's program that takes a prompt in.
            inputs: whole inputs by name.
            length: how many tokens they have.
            part: of the batch, what the replica has.
        """
        self._made(part)
        sequence, lengths = prompt.sequence, part.lengths
        assert sequence is not None
        chunk, local = (int(bind(size, lengths)) for size in (sequence.chunk, sequence.local))
        held = [[int(bind(c, {})) for c in sequence.chunks(rank)] for rank in range(self.ranks)]
        self.ledger.place(
            (rank, c * chunk, min((c + 1) * chunk, length))
            for rank, chunks in enumerate(held) for c in chunks if c * chunk < length
        )
        slots, used = torch.full((local,), self.slots, dtype=torch.int64), 0
        for i, c in enumerate(held[self.rank]):
            first, count = c * chunk, min(max(length - c * chunk, 0), chunk)
            slots[i * chunk : i * chunk + count] = torch.arange(used, used + count)
            self.places[used : used + count] = torch.arange(
                first, first + count, device=self.device
            )
            used += count
        self._noted(part_of(self.program, inputs, part), 0)
        state = {name: slots.to(self.device) if kind == "slots" else self.kept[name]
                 for name, kind in prompt.state.items()}
        return {**shares_of(prompt, part_of(prompt, inputs, part), lengths), **state}

    def _made(self, part: Part) -> None:
        """Memory for what is kept, once it is known of how many sequences."""
        if self.sizes is None:
            self.sizes = part.lengths
            self.kept = {name: self._zeros(name) for name, kind in self.program.state.items()
                         if kind in KEPT}

    def _noted(self, own: Mapping[str, torch.Tensor], start: int) -> dict[str, torch.Tensor]:
        """Inputs, by placeholder, of which all tokens so far are read; later ones are 0."""
        for placeholder, kind in self.program.state.items():
            if kind != "history":
                continue
            if placeholder not in self.history:
                self.history[placeholder] = self._zeros(placeholder)
            name, new = self.program.placeholders[placeholder], own[placeholder]
            dim = token_dim(next(spec.type for spec in self.program.inputs if spec.name == name))
            assert dim is not None
            self.history[placeholder].narrow(dim, start, new.shape[dim]).copy_(new)
        return self.history

    def rewind(self, length: int) -> None:
        """Forget the tokens from position `length` on."""
        before = self.ledger.count(self.rank)
        self.ledger.rewind(length)
        self.reach.rewind(length)
        used = self.ledger.count(self.rank)
        # Hidden keys have a weight of 0, which leaves nothing of a number, but NaN.
        self.places[used:before] = self.capacity
        for name, kept in self.kept.items():
            if self.program.state[name] == "cache":
                kept[:, :, used:before] = 0
