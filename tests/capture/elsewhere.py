"""Code that models of test_source_lines.py call, in a file of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def helper(x: Tensor) -> Tensor:
    return x.tan()  # in a helper


def wrapped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def inner(*args: Any) -> Tensor:
        return function(*args).sinh()  # in a decorator

    return inner


class Block(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.asinh(x)  # in a module elsewhere


def branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x  # decided by data


def number(x: Tensor) -> int:
    return int(x.sum())  # read from data
