"""Facts on every way of writing a mixture in `moe_styles`, and its numbers by loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tests.moe_parts import (
    Mixture,
    capacity_of,
)
from tests.moe_styles import (
    BestFirst,
    BooleanLoop,
    CountsOnHost,
    DenseLoop,
    DenseLoopInPlace,
    DenseWeights,
    ExpertChoice,
    GatheredWeights,
    GroupedMM,
    GroupedMMIndexAdd,
    GroupLimited,
    GShardGroups,
    GShardTokens,
    OneHotSlots,
    PaddedBuffer,
    ScatterAdd,
    ScatteredGates,
    SharedExpert,
    SkipIdle,
    WhereLoop,
    WithLoss,
)


@dataclass(frozen=True)
class Style:
    """Facts on one way of writing it.

    Attributes:
        factory: makes the module; takes size, num_experts and top_k.
        order: which choices come first where capacity drops the later ones: "tokens" (all choices
            of a token before the next token's), "choices" (all first choices before the second),
            "scores" (tokens by their first weight, then as "tokens"); None if nothing is dropped.
        by_sequence: slots are counted for each sequence alone, not over the batch.
        tokenwise: a token's result depends on other tokens at most through the slots they take.
        captured: torch.export takes it (non-strict, symbolic length).
        any_length: what it captured holds for any length.
        mutates: aten ops in the captured graph that write into an argument.
        dtype: the dtype in which torch.export takes it; grouped products have only this one.
    """

    factory: Callable[..., Mixture]
    order: str | None = None
    by_sequence: bool = False
    tokenwise: bool = True
    captured: bool = True
    any_length: bool = True
    mutates: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32


STYLES: Final = {
    "one-hot products, slots by sequence": Style(
        GShardGroups, order="choices", by_sequence=True),
    "one-hot products, slots by batch": Style(GShardTokens, order="choices"),
    "one-hot products, one-hot slots": Style(OneHotSlots, order="choices", any_length=False),
    "dense, one-hot weights": Style(DenseWeights),
    "loop, nonzero and index_add_": Style(WhereLoop, mutates=("index_add_",)),
    "loop, boolean indexing": Style(BooleanLoop, mutates=("add_", "index_put_")),
    "loop, dense": Style(DenseLoop),
    "loop, dense in place": Style(DenseLoopInPlace, mutates=("add_",)),
    "sort, grouped product": Style(GroupedMM, dtype=torch.bfloat16),
    "sort, grouped product, index_add": Style(GroupedMMIndexAdd, dtype=torch.bfloat16),
    "sort, padded buffer": Style(
        PaddedBuffer, order="tokens", mutates=("index_add_", "index_put_")),
    "scatter_add": Style(ScatterAdd, order="tokens", mutates=("scatter_add_",)),
    "gathered weights": Style(GatheredWeights),
    "scattered gates": Style(ScatteredGates, mutates=("scatter_",)),
    "shared expert": Style(SharedExpert),
    "sigmoid, groups of experts": Style(GroupLimited, mutates=("scatter_",)),
    "experts choose": Style(ExpertChoice, tokenwise=False),
    "best tokens first": Style(BestFirst, order="scores", tokenwise=False),
    "counts on the host": Style(CountsOnHost, captured=False),
    "idle experts skipped": Style(SkipIdle, captured=False),
    "loss beside the output": Style(WithLoss, tokenwise=False),
}


# -- the slow way --------------------------------------------------------------------------------


def kept_choices(
    experts: list[list[int]], num_experts: int, capacity: int | None, turns: list[tuple[int, int]]
) -> set[tuple[int, int]]:
    """The (token, choice) pairs that find a slot, when they come one by one in these turns."""
    taken = [0] * num_experts
    kept = set()
    for token, choice in turns:
        expert = experts[token][choice]
        if capacity is None or taken[expert] < capacity:
            taken[expert] += 1
            kept.add((token, choice))
    return kept


def turns_of(order: str | None, weights: Tensor) -> list[tuple[int, int]]:
    """All (token, choice) pairs in the order in which they take slots."""
    tokens, choices = range(weights.shape[0]), range(weights.shape[1])
    if order == "choices":
        return [(token, choice) for choice in choices for token in tokens]
    if order == "scores":
        tokens = sorted(tokens, key=lambda token: -float(weights[token, 0]))  # type: ignore[assignment]
    return [(token, choice) for token in tokens for choice in choices]


def slow_mixture(
    tokens: Tensor,
    weights: Tensor,
    experts: list[list[int]],
    kept: set[tuple[int, int]],
    expert: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """The mixture row by row: what a style has to compute, given who goes where."""
    out = torch.zeros_like(tokens)
    for token, choice in sorted(kept):
        row = expert(experts[token][choice], tokens[token : token + 1])[0]
        out[token] = out[token] + weights[token, choice] * row
    return out


def reference(style: Style, module: Mixture, x: Tensor) -> Tensor:
    """What a module of this style has to give for x [B, S, D]; not for experts that choose."""
    groups = x.unbind(0) if style.by_sequence else [x.flatten(0, 1)]
    outputs = []
    for tokens in groups:
        weights, chosen = module.route(tokens)
        capacity = None
        if style.order is not None:
            capacity = capacity_of(len(tokens), module.top_k, module.num_experts)
        experts = chosen.tolist()
        kept = kept_choices(
            experts, module.num_experts, capacity, turns_of(style.order, weights))
        out = slow_mixture(tokens, weights, experts, kept, module.expert)
        outputs.append(out + module.for_all(tokens) if isinstance(module, SharedExpert) else out)
    return torch.cat(outputs).view(x.shape)
