"""What one rank keeps from call to call of a program with a cache."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ringcompile.axes import KEEP_TOKENS
from ringcompile.ir.expr import SEQUENCE, bind, is_symbolic, symbol
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.ops.slots import Ledger, slots_of
from ringcompile.runtime.batches import Part, part_of

_KEPT = ("cache", "sums")


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
        self.ledger = Ledger(self.ranks)
        self.places = torch.empty(self.slots, dtype=torch.int64, device=self.device)
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
        self, inputs: Mapping[str, torch.Tensor], new: int, part: Part
    ) -> dict[str, torch.Tensor]:
        """Take in the new tokens of a call: what the program reads besides weights, by placeholder.

        Args:
            inputs: whole inputs by name, with an entry for each new token.
            new: how many tokens are new; there has to be room for them.
            part: of the batch, what the replica has; always the same.
        """
        if self.sizes is None:
            self.sizes = part.lengths
            self.kept = {name: self._zeros(name) for name, kind in self.program.state.items()
                         if kind in _KEPT}
        start, used = self.length, self.ledger.count(self.rank)
        slots = torch.full((new,), self.slots, dtype=torch.int64)
        for owner, first, end in self.ledger.extend(new):
            if owner == self.rank:
                count = end - first
                slots[first - start : end - start] = torch.arange(used, used + count)
                self.places[used : used + count] = torch.arange(first, end, device=self.device)
                used += count
        of_call = {
            "positions": torch.arange(start, start + new, device=self.device),
            "slots": slots.to(self.device),
            "places": self.places[:used],
        }
        values = {name: of_call[kind] for name, kind in self.program.state.items()
                  if kind in of_call}
        for placeholder, tensor in part_of(self.program, inputs, part).items():
            values[placeholder] = tensor.to(self.device)
            if self.program.state.get(placeholder) == "history":
                values[placeholder] = self._remembered(placeholder, values[placeholder], start)
        return {**values, **self.kept}

    def _remembered(self, placeholder: str, new: torch.Tensor, start: int) -> torch.Tensor:
        """An input with all tokens so far; those that are to come are 0."""
        if placeholder not in self.history:
            self.history[placeholder] = self._zeros(placeholder)
        whole = self.history[placeholder]
        name = self.program.placeholders[placeholder]
        dim = token_dim(next(spec.type for spec in self.program.inputs if spec.name == name))
        assert dim is not None
        whole.narrow(dim, start, new.shape[dim]).copy_(new)
        return whole

    def rewind(self, length: int) -> None:
        """Forget the tokens from position `length` on."""
        self.ledger.rewind(length)
