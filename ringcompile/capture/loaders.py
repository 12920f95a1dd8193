"""MODEL on the command line: a zoo name, a checkpoint folder, a GGUF file, `module:function`."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ringcompile.capture import checkpoints, gguf_files
from ringcompile.errors import RingCompileError, SourceLocation
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
    extra: Sequence[str] = (),
) -> LoadedModel:
    """Load what a model spec names.

    Args:
        spec: a zoo name, a folder with a Hugging Face checkpoint, a GGUF file, or
            `package.module:function` where the function returns a module and its example inputs,
            see `_parts`.
        batch: dim 0 of the example inputs; a function chooses its own.
        length: sequence length of the example inputs, likewise.
        dtype: cast parameters and buffers to it.
        weights: False builds the model without memory for its parameters.
        extra: what a Hugging Face model takes besides token ids, of `EXTRA_INPUTS`; by default
            `attention_mask` where it is no causal language model, and `decoder_input_ids` where it
            is an encoder and a decoder.

    Raises:
        RingCompileError: nothing of that name, or what is there cannot be loaded.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RingCompileError(f"unknown dtype '{dtype}'", hint=f"dtypes are: {', '.join(DTYPES)}")
    if unknown := [name for name in extra if name not in checkpoints.EXTRA_INPUTS]:
        raise RingCompileError(
            f"unknown input '{unknown[0]}'", hint=f"one of: {', '.join(checkpoints.EXTRA_INPUTS)}"
        )
    if extra and not (os.path.isdir(spec) or gguf_files.is_file(spec)):
        raise RingCompileError(
            f"'{spec}' is not a Hugging Face checkpoint, so it determines its inputs itself",
            hint="leave --extra-inputs out",
        )
    if spec in zoo.names():
        return _zoo(spec, batch, length, dtype, weights)
    if os.path.isdir(spec):
        return _checkpoint(Path(spec), batch, length, dtype, weights, extra)
    if gguf_files.is_file(spec):
        module = _gguf(Path(spec), dtype, weights)
        return _of_tokens(module, Path(spec).stem, batch, length, extra)
    if ":" in spec:
        return _function(spec, dtype)
    raise RingCompileError(
        f"no model '{spec}'",
        hint=checkpoints.hub_hint(spec) or "give a zoo name (`ringcompile models`), a checkpoint "
        "folder, a GGUF file, or package.module:function",
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
    folder: Path,
    batch: int,
    length: int | None,
    dtype: str | None,
    weights: bool,
    extra: Sequence[str],
) -> LoadedModel:
    try:
        import transformers
    except ImportError:
        raise RingCompileError(
            f"'{folder}' looks like a Hugging Face checkpoint, and transformers is not installed",
            hint="pip install 'ringcompile[hf]'",
        ) from None
    settings = checkpoints.read_config(folder)
    cls = checkpoints.model_class(folder, settings, transformers)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a config's own checks raise many kinds
        first = (str(error).strip().splitlines() or [""])[0]
        raise RingCompileError(
            f"transformers cannot read '{folder / checkpoints.CONFIG}': "
            f"{type(error).__name__}: {first}"
        ) from error
    wanted = None if dtype is None else getattr(torch, dtype)
    module = (
        checkpoints.load_weights(folder, cls, wanted) if weights
        else checkpoints.without_weights(cls, config, wanted)
    )
    return _of_tokens(module, folder.name, batch, length, extra or _usual_inputs(module))


def _usual_inputs(module: nn.Module) -> tuple[str, ...]:
    """What a model of transformers is given besides token ids where nobody says."""
    if "CausalLM" in type(module).__name__:
        return ()
    decodes = "decoder_input_ids" in inspect.signature(module.forward).parameters
    return ("attention_mask", *(("decoder_input_ids",) if decodes else ()))


def _gguf(file: Path, dtype: str | None, weights: bool) -> nn.Module:
    try:
        import gguf
        import transformers
    except ImportError as error:
        raise RingCompileError(
            f"'{file}' is a GGUF file, and {error.name} is not installed",
            hint="pip install 'ringcompile[hf]'",
        ) from None
    held = gguf_files.GgufFile(file, gguf, transformers)
    wanted = None if dtype is None else getattr(torch, dtype)
    return held.load(wanted) if weights else held.without_weights(wanted)


def _of_tokens(
    module: nn.Module, name: str, batch: int, length: int | None, extra: Sequence[str]
) -> LoadedModel:
    """A model that takes token ids, and `extra` besides."""
    ids = torch.zeros((batch, length or DEFAULT_LENGTH), dtype=torch.int64)
    kwargs = {each: checkpoints.EXTRA_INPUTS[each](ids) for each in extra}
    return LoadedModel(module.eval(), (ids,), kwargs, name)


def _function(spec: str, dtype: str | None) -> LoadedModel:
    module_name, _, function_name = spec.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RingCompileError(f"cannot import '{spec}': {error}") from None
    finally:
        sys.path.pop(0)
    try:
        made = function()
    except RingCompileError:
        raise
    except Exception as error:  # it is the user's code: their line, without our frames
        frame = traceback.extract_tb(error.__traceback__)[-1]
        first = (str(error).strip().splitlines() or [""])[0]
        raise RingCompileError(
            f"'{spec}' raised {type(error).__name__}: {first}",
            location=SourceLocation(frame.filename, frame.lineno or 0),
        ) from error
    module, args, kwargs = _parts(spec, made)
    if dtype is not None:
        module = module.to(getattr(torch, dtype))
        args, kwargs = _cast((args, kwargs), getattr(torch, dtype))
    return LoadedModel(module, args, kwargs, function_name)


def _parts(spec: str, made: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The module, its arguments and its keyword arguments, from what a user's function returns.

    That is (module, args), (module, kwargs), (module, args, kwargs), or a dict with `module`, and
    `args`, `kwargs` or both; `args` that are no tuple are the only argument.
    """
    if isinstance(made, Mapping):
        parts = [made.get("module"), made.get("args", ()), made.get("kwargs", {})]
        fits = set(made) <= {"module", "args", "kwargs"} and len(made) > 1
    elif isinstance(made, tuple) and len(made) in (2, 3):
        by_name = len(made) == 2 and isinstance(made[1], Mapping)
        parts = [made[0], (), made[1]] if by_name else [*made, {}][:3]
        fits = True
    else:
        parts, fits = [None, (), {}], False
    module, args, kwargs = parts
    if not (fits and isinstance(module, nn.Module) and isinstance(kwargs, Mapping)):
        raise RingCompileError(
            f"'{spec}' returns {_described(made)}",
            hint="return (module, args), (module, args, kwargs), or a dict with 'module', 'args' "
            "and 'kwargs': args a tuple of example inputs, kwargs a dict of them by name",
        )
    return module, args if isinstance(args, tuple) else (args,), dict(kwargs)


def _described(made: Any) -> str:
    """`int`, `a tuple of (Net, int)`, `a dict of 'model'`."""
    if isinstance(made, tuple):
        return f"a tuple of ({', '.join(type(part).__name__ for part in made)})"
    if isinstance(made, Mapping):
        return f"a dict of {', '.join(map(repr, made))}"
    return type(made).__name__


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Floating inputs in another dtype."""
    return torch.utils._pytree.tree_map(
        lambda x: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x, inputs
    )
