"""Whether a captured program holds for one sequence, and for sequences of one token or very few.

torch.export traces the model with several sequences of several tokens. Code may ask whether there
is only one (to leave out a mask, say), a size of one is broadcast (that of `x[:, :-1]`, where there
are two tokens), and torch reads `min(2, s)` as 2 for all lengths that it knows of. So where the
weights are at hand, the first tokens and sequences of the example go through both the model and the
captured graph, as they are and, of floats, many times as large. Results must be the same, and every
value must have the shape that the graph's types say of it. Without weights, one sequence is taken
if the model, exported for it, is the same graph.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ringcompile.capture.dims import BATCH, OTHERS, SEQUENCE, Example, Leaf
from ringcompile.capture.flat_call import FlatCall
from ringcompile.capture.guards import Range
from ringcompile.capture.same_as_eager import NOT_COMPARED, Kept, compare
from ringcompile.capture.sizes import SYMBOLS, Sizes
from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import bind
from ringcompile.ir.torch_sizes import from_torch

# What floats among the inputs are multiplied with: code for one sequence alone may differ where
# numbers are large only, or of the other sign (a clamp, a threshold).
_GAINS = (1.0, 40.0, -1000.0)
# Sizes from here on are left to what torch says of them.
FEW = 4
_MEANT = {BATCH: ("one sequence alone", "{} sequences alone"),
          SEQUENCE: ("one token alone", "{} tokens alone"),
          **{role: (f"one token of '{role}' alone", f"{{}} tokens of '{role}' alone")
             for role in OTHERS}}


def refused(role: str, size: int) -> str:
    """How a note begins that says why there cannot be so few sequences, or tokens."""
    one, several = _MEANT[role]
    return f"{one if size == 1 else several.format(size)} {'is' if size == 1 else 'are'} refused"


@dataclass(frozen=True)
class Few:
    """Runs few sequences and tokens through the model and through what was captured of it.

    Attributes:
        call: the model and its example.
        exported: what was captured of it.
        example: which dims of the inputs are the batch, and which the sequence.
        sizes: what torch's symbols mean.
    """

    call: FlatCall
    exported: ExportedProgram
    example: Example
    sizes: Sizes

    def smallest(
        self, role: str, ranges: Mapping[str, Range]
    ) -> tuple[Range | None, tuple[str, ...]]:
        """The range of a role, down to the fewest that are computed alike; a note on fewer.

        Few tokens are tried with one sequence and with two, where the batch may have as many.
        """
        if role not in ranges or ranges[role][0] > FEW:
            return ranges.get(role), ()
        low, high = ranges[role]
        for size in range(low - 1, 0, -1):
            for others in self._batches(ranges) if role != BATCH else [{}]:
                reason = self.why_not(role, {**others, role: size})
                if reason:
                    return (size + 1, high), (reason,)
        return (1, high), ()

    def _batches(self, ranges: Mapping[str, Range]) -> list[dict[str, int]]:
        if BATCH not in ranges:
            return [{}]
        low, high = ranges[BATCH]
        sizes = [size for size in dict.fromkeys((low, 2)) if high is None or low <= size <= high]
        return [{BATCH: size} for size in sizes]

    def why_not(self, role: str, numbers: Mapping[str, int]) -> str:
        """Run as many sequences and tokens, all of them where a role is not in `numbers`.

        Returns:
            why the program is not for so few of that role, as a note; empty where it is.
        """
        begin = refused(role, numbers[role])
        kept: Kept = []
        floats = any(leaf.tensor.is_floating_point() for leaf in self.example.leaves)
        for gain in _GAINS if floats else _GAINS[:1]:
            reason = self._differs(numbers, gain, kept)
            if reason:
                return f"{begin}: {reason}"
        sizes = {BATCH: 1, SEQUENCE: 1, **self.example.sizes, **numbers}
        known = {SYMBOLS[of]: size for of, size in sizes.items()}
        wrong = next((n for n, value in kept if not _fits(n, value, self.sizes, known)), None)
        return "" if wrong is None else (
            f"{begin}: the shape of '{wrong.name}' is known only for {numbers[role] + 1} and more"
        )

    def _differs(self, numbers: Mapping[str, int], gain: float, kept: Kept) -> str:
        """What becomes of so few at some gain of the inputs; empty where both runs are alike."""
        few = copy.copy(self.call)
        few.example = {leaf.name: _of_sizes(leaf, numbers, gain) for leaf in self.example.leaves}
        kept.clear()
        try:
            notes = compare(few, self.exported, kept)
        except RingCompileError as error:
            return error.message
        except Exception as error:  # whatever torch's ops say of sizes that do not fit
            said = (str(error).strip().splitlines() or [""])[0][:200]
            return f"the captured program raises {type(error).__name__}: {said}"
        return next((note for note in notes if note.startswith(NOT_COMPARED)), "")


def _of_sizes(leaf: Leaf, numbers: Mapping[str, int], gain: float) -> torch.Tensor:
    """The first sequences and tokens of an input; the same again where there are too few."""
    tensor = leaf.tensor
    for role, number in numbers.items():
        for dim in leaf.dims_of(role):
            times = -(-number // tensor.shape[dim])
            tensor = torch.cat([tensor] * times, dim).narrow(dim, 0, number)
    return (tensor * gain if tensor.is_floating_point() else tensor).contiguous()


def _fits(node: fx.Node, value: torch.Tensor, sizes: Sizes, known: dict[str, int]) -> bool:
    """Whether a value has the shape that its node declares; of several results, no check."""
    declared: Any = node.meta.get("val")
    if not torch.is_tensor(declared):
        return True
    if declared.dim() != value.dim():
        return False
    for size, found in zip(declared.shape, value.shape, strict=True):
        if isinstance(size, torch.SymInt):
            size = bind(from_torch(size.node.expr, sizes.symbols), known)
        if isinstance(size, int) and size != found:
            return False
    return True
