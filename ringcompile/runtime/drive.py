"""Runs an executor to its end with someone who answers what it asks for."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch

from ringcompile.runtime.executor import Request

Outputs = tuple[torch.Tensor, ...]


def drive(
    generator: Generator[Request, Any, Outputs], answer: Callable[[Request], Any]
) -> Outputs:
    """The outputs of a rank's program, each of its requests answered at once."""
    reply = None
    while True:
        try:
            request = generator.send(reply)
        except StopIteration as done:
            return done.value
        reply = answer(request)
