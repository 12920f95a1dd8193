"""What is different while a model is built or traced, and as it was before behind that."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx.experimental import proxy_tensor
from torch.fx.passes import shape_prop
from torch.nn.modules import transformer

from ringcompile.capture.snapshot import Snapshot


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """While inside, a model may be run and traced; it and torch's settings are restored behind."""
    settings = _settings()
    before = Snapshot(model)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(_cuda_devices()):
            warnings.filterwarnings("ignore", "(?s).*assigned during export")
            yield
    finally:
        before.restore()
        for restore in settings:
            restore()


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def _settings() -> list[Callable[[], Any]]:
    """How to set again, as it is now, what a forward may set for the whole process."""
    restore: list[Callable[[], Any]] = [
        partial(torch.set_grad_enabled, torch.is_grad_enabled()),
        partial(torch.set_default_dtype, torch.get_default_dtype()),
        partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()),
        partial(
            torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        partial(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled()),
        partial(random.setstate, random.getstate()),
    ]
    for device in ("cpu", "cuda"):
        restore += [
            partial(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device)),
            partial(torch.set_autocast_dtype, device, torch.get_autocast_dtype(device)),
        ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        restore.append(partial(numpy.random.set_state, numpy.random.get_state()))
    return restore


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
def only_what_is_read() -> Iterator[None]:
    """While inside, torch records of a model what is read of its graph, and neither of these.

    Grad modes: they are set where a forward says so, but no op computes anything else for them, and
    torch would split the graph at each and join it again. Memory formats: for each value torch
    would prove from its sizes whether it is contiguous.
    """
    regions = [
        function for function in getattr(proxy_tensor, _REGIONS, ())
        if function is not torch._C._set_grad_enabled
    ]
    metadata = partial(shape_prop._extract_tensor_metadata, include_contiguity=False)
    with (
        mock.patch.object(proxy_tensor, _REGIONS, regions, create=True),
        mock.patch.object(proxy_tensor, _METADATA, metadata, create=True),
    ):
        yield


_REGIONS = "_side_effectful_need_to_be_preserved_pre_dispatch"
_METADATA = "_extract_tensor_metadata"


@contextlib.contextmanager
def without_looks_at_masks() -> Iterator[None]:
    """torch.nn's transformers use the mask that they are given, and do not look what is in it.

    They compare its values with a causal mask, to leave it to attention in that case. The result
    is the same, but a graph cannot depend on values.
    """

    def said(mask: Any, is_causal: bool | None = None, size: Any = None) -> bool:
        return is_causal is True

    with mock.patch.object(transformer, "_detect_is_causal_mask", said, create=True):
        yield


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
