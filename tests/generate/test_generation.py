"""Greedy and sampled text against choosing from the whole model's logits."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import ringcompile as rc
from ringcompile.generation import Sampling
from tests.generate.models import (
    ALL,
    VOCABULARY,
    LastAsSlice,
    LastToken,
    Learned,
    Padded,
    Rotary,
    cached,
    ids,
    padded,
)


@torch.no_grad()
def uncached(module: nn.Module, tokens: torch.Tensor, new: int) -> torch.Tensor:
    """The likeliest token, from all tokens so far, again and again."""
    for _ in range(new):
        logits = module(tokens)
        last = logits if logits.dim() == 2 else logits[:, -1]
        tokens = torch.cat([tokens, last.argmax(-1, keepdim=True)], 1)
    return tokens


@pytest.mark.parametrize(
    ("kind", "chunk"),
    [(Learned, None), pytest.param(LastToken, 4, marks=pytest.mark.slow), (LastAsSlice, 4)],
)
def test_greedy(kind: type[nn.Module], chunk: int | None) -> None:
    module, parallel = cached(kind, "ring=2")
    prompt = ids(9)
    found = rc.generate(parallel, prompt, 24, chunk=chunk)
    assert torch.equal(found, uncached(module, prompt, 24))


def test_a_prompt_that_starts_like_another_one() -> None:
    module, parallel = cached(Rotary, "ring=4")
    prompt = ids(9)
    other = prompt.clone()
    other[0, -1] += 1
    for tokens in (prompt, other % VOCABULARY):
        assert torch.equal(rc.generate(parallel, tokens, 12), uncached(module, tokens, 12))


@torch.no_grad()
def test_rows_of_unequal_length_end_on_their_own() -> None:
    """Each row as if it were alone; behind its end token there is padding."""
    module, program = padded()
    parallel = rc.transform(program, "ring=2", cache=64)
    short, long = ids(5), ids(8)
    prompt = torch.cat([torch.cat([torch.full((1, 3), 7), short], 1), long])
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    alone = [_alone(module, row) for row in (short, long)]
    assert rc.generate(parallel, prompt, 16, attention_mask=mask)[:, 8:].tolist() == alone
    end = alone[0][4]
    found = rc.generate(
        parallel, prompt, 16, attention_mask=mask, eos_token_id=[end, 41], pad_token_id=39
    )
    for row, expected in zip(found[:, 8:].tolist(), alone, strict=True):
        stop = expected.index(end) + 1 if end in expected else len(row)
        assert row == expected[:stop][: len(row)] + [39] * (len(row) - stop)


def _alone(module: nn.Module, row: torch.Tensor) -> list[int]:
    tokens = row
    for _ in range(16):
        logits = module(tokens, torch.ones_like(tokens))
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens[0, row.shape[1] :].tolist()


def test_everything_ended_ends_it() -> None:
    module, parallel = cached(Learned, "ring=2")
    expected = uncached(module, ids(9), 24)[0, 9:].tolist()
    found = rc.generate(parallel, ids(9), 24, eos_token_id=expected[0])
    assert found[0, 9:].tolist() == expected[:1]


def test_chance_is_the_same_for_the_same_seed() -> None:
    _, parallel = cached(Learned, "ring=2")
    texts = [
        rc.generate(parallel, ids(9), 16, temperature=1.5, seed=seed)[0].tolist()
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_what_may_be_chosen() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, -9.0]])
    random = torch.Generator().manual_seed(0)

    def chosen(**options: float) -> set[int]:
        sampling = Sampling(**options)  # type: ignore[arg-type]
        return {int(sampling.choose(logits, random)) for _ in range(200)}

    assert chosen() == chosen(temperature=0.0) == chosen(top_k=1) == chosen(top_p=0.01) == {0}
    assert chosen(top_k=2) == chosen(top_p=0.8) == {0, 1}
    assert chosen(temperature=1.0) == {0, 1, 2}
    assert chosen(temperature=100.0) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 73}, "9 tokens and 73 new ones do not fit the cache, which is for 80"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"chunk": 0}, "chunk=0: it must be at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1: it must be 0 or more"),
        ({"input_ids": ids(9)[0]}, "the prompt has shape"),
        ({"attention_mask": torch.zeros(1, 9)}, "takes no attention_mask"),
        ({"attention_mask": torch.zeros(1, 8)}, "the mask has shape"),
        ({"backend": "mpi"}, "unknown backend 'mpi'"),
    ],
)
def test_what_is_refused(arguments: dict[str, object], message: str) -> None:
    _, parallel = cached(ALL["Learned"], "ring=2")
    with pytest.raises(rc.RingCompileError, match=message):
        rc.generate(parallel, **{"input_ids": ids(9), "max_new_tokens": 4, **arguments})  # type: ignore[arg-type]


def test_padding_on_the_right_is_refused() -> None:
    parallel = rc.transform(padded()[1], "tp=2", cache=64)
    mask = torch.ones(1, 9, dtype=torch.int64)
    mask[0, -2:] = 0
    with pytest.raises(rc.RingCompileError, match="padded on the left"):
        rc.generate(parallel, ids(9), 4, attention_mask=mask)


class ByPlace(Padded):
    """Its positions do not know of the mask."""

    def positions_of(self, attention_mask: torch.Tensor) -> torch.Tensor:
        return torch.arange(attention_mask.shape[1])


@pytest.mark.parametrize("kind", [Padded, ByPlace])
def test_padding_that_takes_places_is_said(kind: type[Padded]) -> None:
    """Learned positions count padding too, unless they are counted from the mask."""
    mask = torch.ones(1, 9, dtype=torch.int64)
    parallel = rc.transform(padded(kind)[1], "tp=2", cache=64)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rc.generate(parallel, ids(9), 2, attention_mask=mask)
        assert not said
        mask[0, :2] = 0
        rc.generate(parallel, ids(9), 2, attention_mask=mask)
    expected = "it numbers tokens by their place, padding included"
    assert [expected in str(warning.message) for warning in said] == (
        [True] if kind is ByPlace else [])


def test_an_option_that_a_session_does_not_have() -> None:
    """Also in lock-step, where ranks are no processes and options of processes mean nothing."""
    _, parallel = cached(ALL["Learned"], "ring=2")
    with pytest.raises(rc.RingCompileError, match="unknown option of a Session 'treads'"):
        rc.Session(parallel, treads=2)  # type: ignore[call-arg]
