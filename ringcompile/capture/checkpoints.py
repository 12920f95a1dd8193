"""A folder with a Hugging Face checkpoint: what is wrong with it is said of the file it is in."""

from __future__ import annotations

import contextlib
import json
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ringcompile.capture.surroundings import fake_weights
from ringcompile.errors import RingCompileError

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What a model may be captured with besides token ids: how to make an example of [batch, tokens].
EXTRA_INPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "attention_mask": torch.ones_like,
    "position_ids": lambda ids: torch.arange(ids.shape[1]).expand_as(ids).contiguous(),
    "token_type_ids": torch.zeros_like,
    # Of another length, so that the two lengths are told apart.
    "decoder_input_ids": lambda ids: ids[:, : ids.shape[1] // 2 + 1].contiguous(),
}
_AGAIN = "download the checkpoint again, or name another folder"


def hub_hint(spec: str) -> str | None:
    """How to get the folder of a model that is named as on the Hub; None where it is not."""
    if not _HUB_NAME.fullmatch(spec):
        return None
    name = spec.rpartition("/")[2]
    return (
        f"if this is a model on the Hugging Face Hub: `hf download {spec} --local-dir {name}`, "
        f"then name the folder {name}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` says.

    Raises:
        RingCompileError: there is none, or it cannot be read.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise RingCompileError(
            f"'{folder}' is not a Hugging Face checkpoint: it has no {CONFIG}",
            hint="name the folder that `hf download` or save_pretrained wrote",
        )
    config = _json(file)
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise RingCompileError(
            f"'{file}' does not say which class the model is: it has no 'architectures'",
            hint="load it yourself, and name a function that returns it: package.module:function",
        )
    return config


def model_class(folder: Path, config: dict[str, Any], transformers: Any) -> Any:
    """The class of transformers that a checkpoint is for.

    Raises:
        RingCompileError: transformers has no such class; the checkpoint may bring code of its own.
    """
    name = config["architectures"][0]
    found = getattr(transformers, name, None)
    if found is not None:
        return found
    if config.get("auto_map"):
        raise RingCompileError(
            f"'{folder / CONFIG}': {name} is code that comes with the checkpoint "
            "(trust_remote_code), which is not run",
            hint="if you trust it, load it yourself, and name a function that returns it: "
            "package.module:function",
        )
    raise RingCompileError(
        f"'{folder / CONFIG}': transformers {transformers.__version__} has no class {name}",
        hint="install the version that the model was made for",
    )


def check_weight_files(folder: Path) -> None:
    """See that the files with the weights are there and whole; reads their headers only.

    Raises:
        RingCompileError: naming the first file that is missing or damaged.
    """
    index = folder / INDEX
    if index.is_file():
        table = _json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise RingCompileError(f"'{index}' has no 'weight_map'", hint=_AGAIN)
        for name in sorted(set(map(str, table.values()))):
            if not (folder / name).is_file():
                raise RingCompileError(f"'{folder / name}', which {INDEX} names, is missing",
                                       hint=_AGAIN)
            _check_size(folder / name)
        return
    if (folder / SINGLE).is_file():
        _check_size(folder / SINGLE)
        return
    if not any(folder.glob("*.bin")):
        raise RingCompileError(
            f"'{folder}' has no weights: neither {SINGLE} nor {INDEX}",
            hint=f"{_AGAIN}; `check`, `plan` and --no-weights need none",
        )


def _check_size(file: Path) -> None:
    """A safetensors file is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        (width,) = struct.unpack("<Q", start) if len(start) == 8 else (size,)
        if width + 8 > size:
            raise RingCompileError(f"'{file}' is truncated: it has {size:,} bytes, and its header "
                                   "does not fit", hint=_AGAIN)
        header = stream.read(width)
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items()
                if name != "__metadata__"]
        expected = 8 + width + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise RingCompileError(f"'{file}' is not a safetensors file: its header cannot be read",
                               hint=_AGAIN) from None
    if size < expected:
        raise RingCompileError(
            f"'{file}' is truncated: it has {size:,} bytes of {expected:,}", hint=_AGAIN
        )


def load_weights(folder: Path, cls: Any, dtype: torch.dtype | None) -> nn.Module:
    """The model with its weights.

    Raises:
        RingCompileError: files that are missing or damaged, or weights that they lack.
    """
    check_weight_files(folder)
    try:
        with bars_on_terminals_only():
            module, info = cls.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=dtype or "auto"
            )
    except Exception as error:  # transformers raises many kinds
        first = (str(error).strip().splitlines() or [""])[0]
        raise RingCompileError(
            f"transformers cannot load '{folder}': {type(error).__name__}: {first}", hint=_AGAIN
        ) from error
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise RingCompileError(
            f"'{folder}' lacks {len(missing)} of the weights of {cls.__name__}, such as "
            f"'{missing[0]}'; transformers would fill in random numbers",
            hint=f"{_AGAIN}; or the checkpoint is for another class",
        )
    return module


@contextlib.contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Keep the progress bars of transformers out of pipes and log files."""
    logging = sys.modules["transformers"].utils.logging
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def without_weights(cls: Any, config: Any, dtype: torch.dtype | None) -> nn.Module:
    """The model with parameters that take no memory."""
    wanted = dtype or config.dtype or torch.get_default_dtype()
    with fake_weights(), _default_dtype(wanted):
        return cls(config)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RingCompileError(f"cannot read '{file}': {error}", hint=_AGAIN) from None
    if not isinstance(found, dict):
        raise RingCompileError(f"'{file}' does not hold a JSON object", hint=_AGAIN)
    return found
