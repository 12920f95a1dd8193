"""Is every key stored once, and seen once by every later query? Decided from the programs' graphs.

For each layer, head and position, over prompts, turns and single tokens:

- a rank's attention reads the caches that this very rank writes its new keys and values to, in the
  slots that the call says, and no cache is written by two;
- a cache has the heads of what is stored in it; how heads and layers are divided is what
  `ir/shares.py` and the stages say of weights, and each attention is in one stage;
- of the ranks that share a sequence, one keeps each position: which one follows from the lengths
  (`slots.Ledger`), and the prompt's chunks are divided over them without gaps;
- what these ranks see is brought together once, over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import fx

from ringcompile.axes import KEEP_TOKENS
from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call
from ringcompile.ir.expr import bind
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.ops.slots import BLOCK, Ledger, slots_of

_ATTENTION, _STORE = op("cached_attention"), op("store")
Stored = dict[str, tuple[fx.Node, TensorType]]  # by cache: what is stored, and the cache's type


def check_ownership(
    spmd: Program, ranks: Sequence[Program], prompts: Sequence[Program], mesh: Mesh
) -> None:
    """Check the programs of all ranks that keep a sequence.

    Args:
        spmd: the program for the next tokens, for all ranks.
        ranks: each rank's, in order.
        prompts: those that take a prompt in, in order; empty if there are none.
        mesh: the parallel plan.

    Raises:
        RingCompileError: naming the rank and the node: keys that no rank keeps, that two keep, or
            that a query sees twice or not at all.
    """
    axes = tuple(axis for axis in KEEP_TOKENS if mesh.size(axis) > 1)
    checker = _Owners(spmd, mesh, axes)
    stored = [checker.rank(index, program) for index, program in enumerate(ranks)]
    checker.stages(ranks)
    _positions(checker.capacity, checker.num_ranks)
    for index, program in enumerate(prompts):
        _prompt(index, program, stored[index])
    if prompts:
        _chunks(prompts[0], checker.capacity, checker.num_ranks)


class _Owners:
    def __init__(self, spmd: Program, mesh: Mesh, axes: tuple[str, ...]) -> None:
        capacity = spmd.length_range[1]
        assert capacity is not None
        self.spmd, self.mesh, self.axes, self.capacity = spmd, mesh, axes, capacity
        self.num_ranks = mesh.size(",".join(axes)) if axes else 1
        self.bands = {n.name: _band(n) for n in spmd.graph.nodes if n.target is _ATTENTION}

    def rank(self, index: int, program: Program) -> Stored:
        """What one rank keeps; checked."""
        stored = _stored(index, program)
        read: set[str] = set()
        for node in program.graph.nodes:
            if node.target is _ATTENTION:
                read |= self._attention(index, program, node)
        if unread := sorted(set(stored) - read):
            _refuse(index, f"{unread[0]} is written and never read")
        for name, (_, type_) in stored.items():
            if type_.shape[2] != slots_of(self.capacity, self.num_ranks) + 1:
                _refuse(index, f"{name} has room for {type_.shape[2]} tokens, and "
                        f"{slots_of(self.capacity, self.num_ranks) + 1} are needed")
        return stored

    def _attention(self, index: int, program: Program, node: fx.Node) -> set[str]:
        """The caches that an attention reads; checked."""
        call, names = Call(node), set()
        for new, cache in (("k", "cached_k"), ("v", "cached_v")):
            written, kept = call[new], call[cache]
            if written.target is not _STORE or Call(written)["cache"] is not kept:
                _refuse(index, f"%{node.name} reads {kept.name}, which its new tokens are not "
                        "stored in")
            names.add(kept.name)
        for name in ("places", "positions"):
            if program.state.get(call[name].name) != name:
                _refuse(index, f"%{node.name} takes %{call[name].name} for {name}")
        band = _band(node)
        if band != self.bands.get(node.name) or not isinstance(band[0], int) or band[0] < 0:
            _refuse(index, f"%{node.name} sees keys {_text(band)}, and should see "
                    f"{_text(self.bands.get(node.name))}")
        self._merged(index, node)
        return names

    def _merged(self, index: int, node: fx.Node) -> None:
        """The states over each rank's keys are brought together once, over all that share them."""
        last = node
        if self.num_ranks > 1:
            packed = _only_user(index, last, "pack_state")
            every = _only_user(index, packed, "gather", "all_to_all")
            self._exchange(index, node, Call(packed), Call(every))
            last = _only_user(index, every, "merge_states")
        _only_user(index, last, "finish")

    def _exchange(self, index: int, node: fx.Node, packed: Call, call: Call) -> None:
        """All ranks' states, of all heads or of this rank's, one behind the other."""
        along = ",".join(self.axes)
        if call["axis"] != along:
            _refuse(index, f"%{node.name} is brought together over {call['axis']}, and keys lie "
                    f"along {along}")
        gathers = call.target is op("gather")
        dims = (call["dim"],) if gathers else (call["split"], call["concat"])
        ways = 1 if gathers else self.num_ranks
        if any(dims) or (packed["dim"], packed["ways"], packed["runs"]) != (1, ways, 1):
            _refuse(index, f"%{node.name} is brought together along the wrong dim")

    def stages(self, ranks: Sequence[Program]) -> None:
        """Each attention is in one stage of a pipeline, of every replica and share of it."""
        where: dict[str, set[int]] = {}
        for index, program in enumerate(ranks):
            stage = self.mesh.coordinates(index).get("pp", 0)
            for node in program.graph.nodes:
                if node.target is _ATTENTION:
                    where.setdefault(node.name, set()).add(stage)
        for name in self.bands:
            found = sorted(where.get(name, ()))
            if len(found) != 1:
                raise RingCompileError(f"%{name} is in the stages {found}, and should be in one")
        for index, program in enumerate(ranks):
            stage = self.mesh.coordinates(index).get("pp", 0)
            here = {node.name for node in program.graph.nodes}
            for name, stages in where.items():
                if stage in stages and name not in here:
                    _refuse(index, f"%{name} is missing, which other ranks of its stage have")


def _stored(index: int, program: Program) -> Stored:
    """What a rank's program stores, and where; no cache is written by two."""
    stored: Stored = {}
    for node in program.graph.nodes:
        if node.target is not _STORE:
            continue
        call = Call(node)
        x, cache, slots = call["x"], call["cache"], call["slots"]
        if program.state.get(cache.name) != "cache":
            _refuse(index, f"%{node.name} writes to %{cache.name}, which is no cache")
        if program.state.get(slots.name) != "slots":
            _refuse(index, f"%{node.name} takes %{slots.name} for slots")
        if cache.name in stored and stored[cache.name][0] is not x:
            _refuse(index, f"{cache.name} is written by %{node.name} and by another one")
        kept, new = type_of(cache), type_of(x)
        for dim in (0, 1, 3):
            same = (kept.shape[dim], kept.layout.dims[dim]) == (new.shape[dim],
                                                               new.layout.dims[dim])
            if not same:
                _refuse(index, f"{cache.name} is {kept}, and %{x.name} {new} is stored in it")
        stored[cache.name] = x, kept
    return stored


def _prompt(index: int, program: Program, kept: Stored) -> None:
    """A rank's prompt program writes what its program for the next tokens reads, and no more."""
    stored = _stored(index, program)
    if set(stored) != set(kept):
        name = sorted(set(stored) ^ set(kept))[0]
        _refuse(index, f"{name} is written {'' if name in stored else 'not '}by a prompt, and "
                f"{'' if name in kept else 'not '}by the tokens that follow")
    for name, (x, type_) in stored.items():
        if type_ != kept[name][1]:
            _refuse(index, f"{name} is {type_} in a prompt, and {kept[name][1]} later")
        assert program.sequence is not None
        along = [axis for atom in type_of(x).layout.dims[2] for axis in atom.axes]
        if along != list(program.sequence.names):
            _refuse(index, f"%{x.name} {type_of(x)} does not lie along the prompt's axes")


def _chunks(prompt: Program, capacity: int, num_ranks: int) -> None:
    """Each chunk of a prompt is on one rank, and fits there beside what follows."""
    split = prompt.sequence
    assert split is not None
    held = [int(bind(c, {})) for rank in range(num_ranks) for c in split.chunks(rank)]
    if sorted(held) != list(range(split.num_chunks)):
        raise RingCompileError(
            f"the chunks of a prompt lie on the ranks as {held}, and should be 0 to "
            f"{split.num_chunks - 1}, each once"
        )
    for length in {split.num_chunks, capacity // 2, capacity - 1} - {0}:
        chunk = -(-length // split.num_chunks)
        ledger = Ledger(num_ranks)
        ledger.place(
            (rank, int(bind(c, {})) * chunk, min((int(bind(c, {})) + 1) * chunk, length))
            for rank in range(num_ranks) for c in split.chunks(rank)
            if int(bind(c, {})) * chunk < length
        )
        _fill(ledger, capacity)


def _positions(capacity: int, num_ranks: int) -> None:
    """Token by token and in turns of any length, each position is on one rank and has room."""
    for turn in (1, BLOCK - 1, BLOCK + 1, capacity):
        ledger = Ledger(num_ranks)
        while ledger.length < min(capacity, 4 * BLOCK * num_ranks):
            ledger.extend(min(turn, capacity - ledger.length))
        _fill(ledger, capacity)


def _fill(ledger: Ledger, capacity: int) -> None:
    """Take in all that there is room for; each position has to be kept once."""
    if capacity > ledger.length:
        ledger.extend(min(capacity - ledger.length, 8 * BLOCK * ledger.ranks))
    end = 0
    for rank, start, stop in ledger.runs:
        if start != end:
            raise RingCompileError(f"position {min(start, end)} is kept by no rank, or by two")
        if not 0 <= rank < ledger.ranks:
            raise RingCompileError(f"position {start} is kept by rank {rank}, which is not there")
        end = stop
    most = max(map(ledger.count, range(ledger.ranks)))
    if most > slots_of(capacity, ledger.ranks) or end != ledger.length:
        raise RingCompileError(
            f"of {ledger.length} tokens a rank keeps {most}, and has room for "
            f"{slots_of(capacity, ledger.ranks)}"
        )


def _band(node: fx.Node) -> tuple[Any, Any]:
    call = Call(node)
    return call["lower"], call["upper"]


def _text(band: tuple[Any, Any] | None) -> str:
    return "none" if band is None else f"{band[0]} to {band[1]} positions before"


def _only_user(index: int, node: fx.Node, *wanted: str) -> fx.Node:
    """The one op that reads a state, which has to be one of these."""
    users = list(node.users)
    if len(users) != 1 or users[0].target not in [op(name) for name in wanted]:
        found = ", ".join(f"%{user.name}" for user in users) or "nothing"
        _refuse(index, f"%{node.name} has to go to {' or '.join(wanted)}, and goes to {found}")
    return users[0]


def _refuse(index: int, why: str) -> NoReturn:
    raise RingCompileError(f"rank {index}: {why}")
