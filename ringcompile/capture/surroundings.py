"""What is different while a model is built or traced, and as it was before behind that."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore attributes that modules set while they run: what was traced would stay in them."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*assigned during export")
            yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


@contextlib.contextmanager
def without_casts_of_modules() -> Iterator[None]:
    """`self.classifier.to(dtype)` inside a forward, to the dtype that it has, changes nothing.

    It would exchange parameters while they are traced, which cannot be captured.
    """
    original: Any = nn.Module._apply

    def apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        if all(function(p).dtype == p.dtype for p in module.parameters()):
            return module
        return original(module, function, recurse)

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


@contextlib.contextmanager
def without_logs() -> Iterator[None]:
    """What torch logs on the way to an error is in the error that becomes ours."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def fake_weights() -> Any:
    """Build a model whose parameters have shapes but no memory (buffers stay real)."""
    original = nn.Module.register_parameter
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            with mode:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            parameter = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[assignment,method-assign]
    try:
        yield mode
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
