"""Ids that no table has a row for are refused, with the input, the place and the line."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import ringcompile as rc
from ringcompile import artifact
from ringcompile.errors import RingCompileError
from ringcompile.runtime.launcher import LocalRanks
from tests.silent.small import CAPTURED, VOCABULARY, WIDTH, Attention, ids, matches, with_gain
from tests.support import compiled, run, some_fast

PLACES = 30


class Decoder(nn.Module):
    """Token and position tables, tied to no head.

    Args:
        places: from the tokens and the position ids that are passed to those that are looked up.
    """

    def __init__(self, places: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__()
        self.places = places
        self.embedding, self.attention = nn.Embedding(VOCABULARY, WIDTH), Attention()
        self.positions = nn.Embedding(PLACES, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        with_gain(self)

    def forward(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        looked_up = places if self.places is None else self.places(tokens, places)
        x = self.embedding(tokens) + self.positions(looked_up)
        return self.head(x + self.attention(x))


decoder = cache(Decoder)  # one model, which is captured once


def inputs(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return ids(length), torch.arange(length).expand(2, -1).contiguous()


def with_one(value: int, which: int) -> tuple[torch.Tensor, ...]:
    """Inputs of ten tokens of which one, of the second sequence, is another id."""
    given = inputs(10)
    given[which][1, 7] = value
    return given


@pytest.mark.parametrize(
    ("spec", "which", "value"),
    [("tp=2", 0, VOCABULARY), ("ulysses=2,tp=2", 1, -1),
     *(pytest.param(*case, marks=pytest.mark.slow) for case in (
         ("tp=2", 0, -1), ("ring=2", 0, VOCABULARY + 5), ("tp=2", 1, PLACES), ("dp=2", 0, 2**40)
     ))],
)
def test_an_id_outside_of_its_table(spec: str, which: int, value: int) -> None:
    parallel = compiled(decoder(), inputs(CAPTURED), spec)
    with pytest.raises(RingCompileError) as caught:
        run(parallel, with_one(value, which))
    name, rows = ("tokens", VOCABULARY) if which == 0 else ("places", PLACES)
    assert caught.value.message == (
        f"input '{name}' holds {value} at [1, 7]: the table that it indexes has rows for 0 to "
        f"{rows - 1}"
    )
    location = caught.value.location
    assert location is not None
    assert location.file.endswith("test_ids.py")
    assert "self.embedding(tokens)" in location.text


def test_what_is_added_to_ids_counts() -> None:
    model = Decoder(lambda tokens, places: places + 2)
    parallel = compiled(model, inputs(CAPTURED), "tp=2")
    with pytest.raises(RingCompileError, match=r"holds 28 at \[1, 7\]: .* has rows for -2 to 27"):
        run(parallel, with_one(PLACES - 2, 1))
    given = with_one(-2, 1)
    with torch.no_grad():
        expected = model(*given)
    assert torch.allclose(run(parallel, given).outputs, expected)


COMPUTED: dict[str, Callable[..., torch.Tensor]] = {
    "counted from a mask": lambda tokens, places: (places >= 0).cumsum(-1) + PLACES - 20,
    "clamped from below": lambda tokens, places: places.clamp(min=0),
    "another where a token stands": lambda tokens, places: torch.where(tokens == 0, 0, places),
    "in reverse, without the first": lambda tokens, places:
        torch.cat([places[:, :1], places[:, 1:].flip(1)], 1),
}


@pytest.mark.parametrize("kind", some_fast(COMPUTED, fast=lambda kind: kind.startswith("clamp")))
def test_computed_ids_are_looked_up_in_a_replicated_table(kind: str) -> None:
    """What cannot be checked before a run fails in it, as in the model, and never reads zeros."""
    model = Decoder(COMPUTED[kind])
    parallel = compiled(model, inputs(10), "tp=2")
    assert any("their table is replicated" in note for note in parallel.program.notes)
    given = inputs(29)
    given[1][1, 7] = PLACES + 4
    with pytest.raises(IndexError):
        model(*given)
    with pytest.raises(RingCompileError, match="index out of range"):
        run(parallel, given)
    matches(model, "tp=2", inputs, lengths=(10,))


def test_every_process_says_so_and_none_hangs(tmp_path: Path) -> None:
    folder = tmp_path / "program"
    compiled(decoder(), inputs(CAPTURED), "tp=2").save(folder)
    with LocalRanks(artifact.load, (folder,), backend="gloo", timeout=60) as ranks:
        with pytest.raises(RingCompileError, match=r"input 'tokens' holds 99 at \[1, 7\]"):
            ranks.run(with_one(99, 0))
        assert ranks.run(inputs(10)).outputs.shape == (2, 10, VOCABULARY)


def test_limits_are_saved_and_read(tmp_path: Path) -> None:
    parallel = compiled(decoder(), inputs(CAPTURED), "ring=2")
    parallel.save(tmp_path / "program")
    limits = [spec.limits for spec in rc.load(tmp_path / "program").program.inputs]
    assert [[(limit.low, limit.high) for limit in found] for found in limits] == [
        [(0, VOCABULARY - 1)], [(0, PLACES - 1)]
    ]
