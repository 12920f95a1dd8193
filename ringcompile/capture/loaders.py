"""MODEL on the command line: a zoo name, a Hugging Face checkpoint folder, or `module:function`."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ringcompile.capture.surroundings import fake_weights
from ringcompile.errors import RingCompileError
from ringcompile.models import zoo
from ringcompile.options import DTYPES

DEFAULT_LENGTH = 24


@dataclass(frozen=True)
class LoadedModel:
    """A module in eval mode, and example inputs to capture it with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """The tensors among the example inputs, in order."""
        return tuple(v for v in (*self.args, *self.kwargs.values()) if torch.is_tensor(v))


def load_model(
    spec: str,
    *,
    batch: int = 1,
    length: int | None = None,
    dtype: str | None = None,
    weights: bool = True,
) -> LoadedModel:
    """Load what a model spec names.

    Args:
        spec: a zoo name, a folder with a Hugging Face checkpoint, or `package.module:function`
            where the function returns a module and its example inputs (a tuple, or a dict by name).
        batch: dim 0 of the example inputs; a function chooses its own.
        length: sequence length of the example inputs, likewise.
        dtype: cast parameters and buffers to it.
        weights: False builds the model without memory for its parameters.

    Raises:
        RingCompileError: nothing of that name, or what is there cannot be loaded.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RingCompileError(f"unknown dtype '{dtype}'", hint=f"dtypes are: {', '.join(DTYPES)}")
    if spec in zoo.names():
        return _zoo(spec, batch, length, dtype, weights)
    if os.path.isdir(spec):
        return _checkpoint(Path(spec), batch, length, dtype, weights)
    if ":" in spec:
        return _function(spec, dtype)
    raise RingCompileError(
        f"no model '{spec}'",
        hint="give a zoo name (`ringcompile models`), a checkpoint folder, or "
        "package.module:function",
    )


def _zoo(
    name: str, batch: int, length: int | None, dtype: str | None, weights: bool
) -> LoadedModel:
    mode = contextlib.nullcontext() if weights else torch._subclasses.FakeTensorMode()
    # Lengths are symbolic: a short example that no feature size equals costs least to capture.
    sequence = length or DEFAULT_LENGTH
    try:
        with mode:
            module, inputs = zoo.build(name, batch=batch, sequence=sequence, dtype=dtype)
    except ValueError as error:
        raise RingCompileError(f"cannot build '{name}': {error}") from None
    return LoadedModel(module.eval(), inputs, {}, name)


def _checkpoint(
    folder: Path, batch: int, length: int | None, dtype: str | None, weights: bool
) -> LoadedModel:
    try:
        import transformers
    except ImportError:
        raise RingCompileError(
            f"'{folder}' looks like a Hugging Face checkpoint, and transformers is not installed",
            hint="pip install 'ringcompile[hf]'",
        ) from None
    config_file = folder / "config.json"
    try:
        architecture = json.loads(config_file.read_text())["architectures"][0]
        model_class = getattr(transformers, architecture)
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise RingCompileError(
            f"'{folder}' is not a Hugging Face checkpoint that this transformers can read: "
            f"{type(error).__name__}: {error}",
            hint="it needs a config.json whose 'architectures' names a class of transformers",
        ) from None
    options: dict[str, Any] = {"dtype": getattr(torch, dtype) if dtype else "auto"}
    if weights:
        module = model_class.from_pretrained(folder, local_files_only=True, **options)
    else:
        wanted = getattr(torch, dtype) if dtype else (config.dtype or torch.get_default_dtype())
        with fake_weights(), _default_dtype(wanted):
            module = model_class(config)
    shape = (batch, length or DEFAULT_LENGTH)
    args = (torch.zeros(shape, dtype=torch.int64),)
    kwargs = {} if "CausalLM" in architecture else {
        "attention_mask": torch.ones(shape, dtype=torch.int64)
    }
    return LoadedModel(module.eval(), args, kwargs, folder.name)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _function(spec: str, dtype: str | None) -> LoadedModel:
    module_name, _, function_name = spec.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RingCompileError(f"cannot import '{spec}': {error}") from None
    finally:
        sys.path.pop(0)
    made = function()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise RingCompileError(
            f"'{spec}' returns {type(made).__name__}; it must return (module, example inputs)"
        )
    module, inputs = made
    if dtype is not None:
        module = module.to(getattr(torch, dtype))
        inputs = _cast(inputs, getattr(torch, dtype))
    if isinstance(inputs, Mapping):
        return LoadedModel(module, (), dict(inputs), function_name)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    return LoadedModel(module, args, {}, function_name)


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Floating inputs in another dtype."""
    return torch.utils._pytree.tree_map(
        lambda x: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x, inputs
    )
