"""A long conversation: turns of random lengths, each against the model run whole on all so far."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ringcompile.ops.slots import BLOCK
from tests.generate.models import (
    HEADS,
    WIDTH,
    Alibi,
    Documents,
    Rotary,
    Window,
    cached,
    checked_session,
    difference,
    ids,
)
from tests.generate.test_shifts import EveryLayer

EXACT, TURNS, LONGEST = 1e-10, 20, 200


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", [Rotary, Window, Alibi, Documents, EveryLayer])
def test_turns_of_random_lengths(kind: Callable[[], nn.Module]) -> None:
    """20 turns of 1 to 200 tokens at ring=4; a rank keeps a quarter, within one block."""
    draw = random.Random(20)
    turns = [draw.randint(1, LONGEST) for _ in range(TURNS)]
    module, parallel = cached(kind, "ring=4", cache=sum(turns) + 1)
    tokens = ids(sum(turns))
    row = 2 * 2 * HEADS * (WIDTH // HEADS) * 8  # layers, keys and values, heads, head dim, bytes
    with checked_session(parallel) as session:
        for new in turns:
            at = session.length
            found = session.extend(tokens[:, at : at + new])
            assert difference(found, module(tokens[:, : at + new])[:, at:]) < EXACT
            for runner in session.driver.runners:
                even = row * session.length / 4
                assert abs(runner.memory.num_bytes - even) <= row * BLOCK
