"""Attention as people write it out, captured and compiled."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram
from tests.passes.hand_written import (
    WIDTH,
    Style,
    Weights,
    bloom,
    gpt_j,
    gpt_neo,
    gpt_oss,
    llama,
    llama_of_meta,
    mpt,
    t5,
)

# Their code says float32.
SINGLE = (gpt_neo, llama, llama_of_meta, bloom, mpt, gpt_j, t5, gpt_oss)
BATCH, LENGTH = 2, 23


@cache
def captured(style: Style, dtype: torch.dtype) -> tuple[Weights, Program]:
    torch.manual_seed(3)
    module = Weights(style).eval().to(dtype)
    return module, capture(module, (torch.randn(BATCH, 17, WIDTH, dtype=dtype),))


def named(styles: object) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("style", styles, ids=lambda style: style.__name__)


def widest(style: Style) -> torch.dtype:
    return torch.float32 if style in SINGLE else torch.float64


def compiled(style: Style, spec: str = "ring=3") -> ParallelProgram:
    return transform(captured(style, widest(style))[1], spec)
