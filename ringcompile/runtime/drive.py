"""Runs an executor to its end with someone who answers what it asks for."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

from ringcompile.runtime.executor import Request

Made = TypeVar("Made")


def drive(generator: Generator[Request, Any, Made], answer: Callable[[Request], Any]) -> Made:
    """What a rank's generator returns, each of its requests answered at once."""
    reply = None
    while True:
        try:
            request = generator.send(reply)
        except StopIteration as done:
            return done.value
        reply = answer(request)
