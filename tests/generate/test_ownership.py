"""Each key is stored once and seen once: what the proof accepts, and the faults that it finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import fx

import ringcompile as rc
from ringcompile.ir.calls import Call
from ringcompile.ir.program import Program
from ringcompile.ir.types import SequenceSplit
from ringcompile.ops import ownership, slots
from ringcompile.ops.ownership import check_ownership
from ringcompile.ops.schemas import op
from ringcompile.parallel_program import ParallelProgram
from tests.generate.models import Rotary, Shared, captured
from tests.generate.test_stages import SharedByLayers


def compiled(kind: type[Rotary] = Rotary, spec: str = "ring=2") -> ParallelProgram:
    """Anew, to be damaged."""
    return rc.transform(captured(kind)[1], spec, cache=80)


def check(parallel: ParallelProgram) -> None:
    assert parallel.carried is not None
    prompts = [] if parallel.prefill is None else parallel.prefill.ranks()
    check_ownership(
        parallel.carried.program, parallel.carried.ranks(), prompts, parallel.mesh
    )


@pytest.mark.parametrize(
    ("kind", "spec"),
    [(Rotary, "ring=2,tp=2"), (Shared, "ulysses=2"),
     pytest.param(SharedByLayers, "pp=2,ring=2", marks=pytest.mark.slow), (Rotary, "tp=6")],
)
def test_sound_programs(kind: type[Rotary], spec: str) -> None:
    check(compiled(kind, spec))


def nodes(program: Program, name: str) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is op(name)]


def not_stored(next_: Program, prompt: Program) -> None:
    store = nodes(next_, "store")[0]
    store.replace_all_uses_with(Call(store)["x"])
    next_.graph.erase_node(store)


def stored_in_another_layer(next_: Program, prompt: Program) -> None:
    first, _, third, _ = nodes(next_, "store")
    first.args = (first.args[0], third.args[1], first.args[2])


def keys_as_values(next_: Program, prompt: Program) -> None:
    attention = nodes(next_, "cached_attention")[0]
    q, k, _, keys, _, *rest = attention.args
    attention.args = (q, k, k, keys, keys, *rest)


def other_slots(next_: Program, prompt: Program) -> None:
    store = nodes(next_, "store")[1]
    store.args = (*store.args[:2], Call(nodes(next_, "cached_attention")[0])["positions"])


def places_for_positions(next_: Program, prompt: Program) -> None:
    attention = nodes(next_, "cached_attention")[1]
    attention.args = (*attention.args[:6], attention.args[5], *attention.args[7:])


def sees_later_keys(next_: Program, prompt: Program) -> None:
    attention = nodes(next_, "cached_attention")[1]
    attention.kwargs = {**attention.kwargs, "lower": -3}


def another_window(next_: Program, prompt: Program) -> None:
    attention = nodes(next_, "cached_attention")[0]
    attention.kwargs = {**attention.kwargs, "upper": 5}


def not_brought_together(next_: Program, prompt: Program) -> None:
    finish, merged = nodes(next_, "finish")[0], nodes(next_, "merge_states")[0]
    merged.replace_all_uses_with(nodes(next_, "cached_attention")[0])
    assert finish.args[0] is nodes(next_, "cached_attention")[0]


def over_another_axis(next_: Program, prompt: Program) -> None:
    gather = nodes(next_, "gather")[0]
    gather.kwargs = {**gather.kwargs, "axis": "tp"}


def too_few_slots(next_: Program, prompt: Program) -> None:
    cache = Call(nodes(next_, "store")[0])["cache"]
    type_ = cache.meta["type"]
    cache.meta["type"] = replace(type_, shape=(*type_.shape[:2], 20, type_.shape[3]))


def fewer_heads(next_: Program, prompt: Program) -> None:
    cache = Call(nodes(next_, "store")[0])["cache"]
    type_ = cache.meta["type"]
    cache.meta["type"] = replace(type_, shape=(type_.shape[0], 3, *type_.shape[2:]))


def prompt_without_values(next_: Program, prompt: Program) -> None:
    prompt.graph.erase_node(nodes(prompt, "store")[1])


def prompt_into_another_layer(next_: Program, prompt: Program) -> None:
    first, _, third, _ = nodes(prompt, "store")
    third.args = (third.args[0], first.args[1], third.args[2])


def prompt_whole_on_each_rank(next_: Program, prompt: Program) -> None:
    x = Call(nodes(prompt, "store")[0])["x"]
    type_ = x.meta["type"]
    x.meta["type"] = type_.with_layout(type_.layout.with_dim(2, ()))


FAULTS: dict[Callable[[Program, Program], None], str] = {
    not_stored: "rank 1: .* which its new tokens are not stored in",
    stored_in_another_layer: "rank 1: cached_.* is written by %.* and by another one",
    keys_as_values: "rank 1: cached_values.* is written and never read",
    other_slots: "rank 1: %store.* takes %new_positions for slots",
    places_for_positions: "rank 1: %.* takes %used_places for positions",
    sees_later_keys: "rank 1: %.* sees keys -3 to None positions before, and should see 0 to",
    another_window: "rank 1: %.* sees keys 0 to 5 positions before",
    not_brought_together: "rank 1: %.* has to go to pack_state, and goes to",
    over_another_axis: "rank 1: .* is brought together over tp, and keys lie along ring",
    too_few_slots: "rank 1: cached_.* has room for 20 tokens, and 74 are needed",
    fewer_heads: r"rank 1: cached_.* is f64\[b, 3, 74, 4\], and %.* is stored in it",
    prompt_without_values: "rank 1: cached_values.* is written not by a prompt",
    prompt_into_another_layer: "rank 1: cached_.* is written by %.* and by another one",
    prompt_whole_on_each_rank: "rank 1: .* does not lie along the prompt's axes",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_are_found(fault: Callable[[Program, Program], None]) -> None:
    parallel = compiled()
    assert parallel.carried is not None
    assert parallel.prefill is not None
    fault(parallel.carried.rank(1), parallel.prefill.rank(1))
    with pytest.raises(rc.RingCompileError, match=FAULTS[fault]):
        check(parallel)


def test_verify_and_save_prove_it() -> None:
    parallel = compiled()
    assert parallel.carried is not None
    other_slots(parallel.carried.rank(1), parallel.carried.rank(1))
    with pytest.raises(rc.RingCompileError, match="takes %new_positions for slots"):
        parallel.verify()


def test_a_layer_in_two_stages_or_none() -> None:
    parallel = compiled(spec="pp=2")
    assert parallel.carried is not None
    first, second = parallel.carried.ranks()
    program = parallel.carried.program
    check_ownership(program, [first, second], [], parallel.mesh)
    for ranks, mesh, found in (([first, first], "pp=2", "0, 1"), ([first], "tp=1", "")):
        with pytest.raises(rc.RingCompileError, match=rf"is in the stages \[{found}\], and should"):
            check_ownership(program, ranks, [], rc.Mesh.parse(mesh))


def test_a_prompts_chunk_on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = compiled()
    monkeypatch.setattr(SequenceSplit, "chunks", lambda self, rank: (0, 3))
    with pytest.raises(rc.RingCompileError, match=r"lie on the ranks as \[0, 3, 0, 3\]"):
        check(parallel)


def test_who_keeps_a_position(monkeypatch: pytest.MonkeyPatch) -> None:
    ownership._positions(80, 2)
    with monkeypatch.context() as patched:
        patched.setattr(slots.Ledger, "_open", lambda self: (0, slots.BLOCK))
        with pytest.raises(rc.RingCompileError, match="a rank keeps 80, and has room for 73"):
            ownership._positions(80, 2)
    add = slots.Ledger._add
    monkeypatch.setattr(slots.Ledger, "_add", lambda self, rank, stop: add(self, rank, stop + 1))
    with pytest.raises(rc.RingCompileError):
        ownership._positions(80, 2)


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("all_to_all", {"axis": "tp"}, "is brought together over tp, and keys lie along ring"),
        ("all_to_all", {"split": 1}, "is brought together along the wrong dim"),
        ("all_to_all", {"concat": 1}, "is brought together along the wrong dim"),
        ("pack_state", {"dim": 2}, "is brought together along the wrong dim"),
        ("pack_state", {"ways": 1}, "is brought together along the wrong dim"),
        ("pack_state", {"runs": 2}, "is brought together along the wrong dim"),
    ],
)
def test_heads_are_brought_together_over_all_that_keep_them(
    name: str, how: dict[str, Any], reason: str
) -> None:
    parallel = rc.transform(captured(Rotary)[1], "ring=2", cache=80, decode="helix")
    assert parallel.carried is not None
    exchange = nodes(parallel.carried.rank(1), name)[1]
    exchange.kwargs = {**exchange.kwargs, **how}
    with pytest.raises(rc.RingCompileError, match=f"rank 1: .* {reason}"):
        check(parallel)
