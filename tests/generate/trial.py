"""Try one family token by token: compiled with a cache, held against the model run whole.

Each step's likeliest token has to be that of the model's own file on all tokens so far, without any
cache; so do all logits of the step, within what rounding does in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import ringcompile as rc
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.pass_list import prepare
from tests.families.catalogue import CHAPTERS, FAMILIES
from tests.families.trial import CAPTURED, WRONG, Outcome, guarded, reference
from tests.support import TOLERANCE

SPECS = ("ring=4", "tp=2", "pp=2")
# The prompt does not divide over the ranks; with the new tokens it is longer than a block of 32,
# than every window and than the example.
PROMPT, NEW, CAPACITY = 9, 32, 48
IDENTICAL, UNMATCHED = "identical", "unmatched"
_DECODERS = ("Decoders", "Decoders with experts", "State space and recurrence")


@dataclass(frozen=True)
class Text:
    """What became of a family.

    Attributes:
        family: its name.
        outcomes: by parallel spec: identical, refused, wrong, crashed, or unmatched where the
            program without a cache is refused already.
        ties: how many tokens were another one of two that are equally likely.
    """

    family: str
    outcomes: dict[str, Outcome]
    ties: int = 0


def candidates() -> list[str]:
    """The families that take tokens alone, which see those before them only."""
    return [
        family.name
        for chapter, families in CHAPTERS.items()
        for family in families
        if not family.two_sequences and (
            "causal" in family.attention or (chapter in _DECODERS and "full" not in
                                             family.attention)
        ) and len(family.example(CAPTURED)) == 1
    ]


@dataclass(frozen=True)
class _Expected:
    """What the model itself gives.

    Attributes:
        name: the input that takes tokens.
        tokens: [1, prompt + new tokens].
        logits: [new tokens, vocabulary], each from the whole model on all tokens so far.
    """

    name: str
    tokens: torch.Tensor
    logits: torch.Tensor


def try_generating(name: str, seconds: int = 240) -> Text:
    """All specs; exceptions become outcomes."""
    family, ties = FAMILIES[name], [0]
    model = family.build()
    found: list[tuple[Program, _Expected]] = []

    def begin() -> Outcome:
        try:
            program = prepare(rc.capture(model, (), family.example(CAPTURED)))
        except RingCompileError as error:
            return Outcome(UNMATCHED, reason=error.message)
        found.append((program, expected_text(model, family.example(PROMPT))))
        return Outcome(IDENTICAL)

    begun = guarded(begin, seconds)
    if not found:
        return Text(name, dict.fromkeys(SPECS, begun))
    return Text(
        name,
        {spec: guarded(partial(_attempt, *found[0], spec, ties), seconds) for spec in SPECS},
        ties[0],
    )


@torch.no_grad()
def expected_text(
    model: nn.Module, inputs: dict[str, Any], run: Callable[..., Any] = reference
) -> _Expected:
    ((name, tokens),), logits = inputs.items(), []
    for _ in range(NEW):
        whole = next(iter(run(model, {name: tokens}).values()))
        logits.append(whole[0, -1])
        tokens = torch.cat([tokens, whole[:, -1:].argmax(-1)], 1)
    return _Expected(name, tokens, torch.stack(logits))


def _attempt(program: Program, expected: _Expected, spec: str, ties: list[int]) -> Outcome:
    try:
        parallel = rc.transform(program, spec, cache=CAPACITY)
    except RingCompileError as refusal:
        try:
            rc.transform(program, spec)
        except RingCompileError as error:
            return Outcome(UNMATCHED, reason=error.message)
        raise refusal from None
    return outcome_of(parallel, expected, ties)


@torch.no_grad()
def outcome_of(
    parallel: rc.ParallelProgram, expected: _Expected, ties: list[int], cuda_graphs: str = "off"
) -> Outcome:
    worst, (first, *new) = 0.0, expected.tokens.split([PROMPT, *(1,) * NEW], 1)
    with rc.Session(parallel, check_types=True, cuda_graphs=cuda_graphs) as session:
        for step, tokens in enumerate([first, *new[:-1]]):
            found = _first(session.extend({expected.name: tokens}, last=True))[0, -1]
            logits = expected.logits[step]
            gap = float((found - logits).abs().max() / logits.abs().max().clamp(min=1))
            worst = max(worst, gap)
            if not gap <= TOLERANCE:
                return Outcome(WRONG, gap, f"the logits of new token {step} differ")
            # With logits that close, another token is one that is as likely but for rounding.
            ties[0] += int(found.argmax() != logits.argmax())
    return Outcome(IDENTICAL, worst)


def _first(outputs: Any) -> torch.Tensor:
    """The logits, or the states where a model has no head."""
    leaves: list[torch.Tensor] = pytree.tree_leaves(
        dict(outputs) if hasattr(outputs, "keys") else outputs
    )
    return leaves[0]
