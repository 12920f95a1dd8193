"""A model from one GGUF file: transformers reads it, and what it unpacks is packed again.

transformers knows the names and the order of rows of each architecture, but unpacks every weight
where no kernel of its own can be had. A linear layer's weight that is made of the rows of one
tensor in the file, value by value, gets these rows back as they are in the file.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from ringcompile.capture.checkpoints import bars_on_terminals_only, without_weights
from ringcompile.capture.gguf_blocks import BLOCK_TYPES, BlockLinear
from ringcompile.errors import RingCompileError

SUFFIX = ".gguf"
_AGAIN = "download the file again, or name another one"
_CONVERT = "take the model's safetensors instead, or a file with weights of another type"


def is_file(spec: str) -> bool:
    """Whether MODEL names a GGUF file that is there."""
    return spec.endswith(SUFFIX) and Path(spec).is_file()


def source(file: Path) -> dict[str, Any]:
    """How transformers is told to read a GGUF file; the first entry is the folder's."""
    folder = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    return {**folder, "local_files_only": True}


@dataclass
class GgufFile:
    """What a GGUF file holds.

    Attributes:
        path: the file.
        gguf: the package of that name.
        transformers: the package of that name.

    Raises:
        RingCompileError: it is no GGUF file, is damaged, or holds what is not read.
    """

    path: Path
    gguf: Any
    transformers: Any
    _reader: Any = field(init=False)

    def __post_init__(self) -> None:
        try:
            self._reader = self.gguf.GGUFReader(self.path)
        except Exception as error:  # struct, numpy, Unicode and enums raise what they raise
            first = (str(error).strip().splitlines() or [""])[0]
            if unknown := re.search(r"(\d+)\W* is not a valid GGMLQuantizationType", first):
                raise RingCompileError(
                    f"'{self.path}' holds weights of type {unknown[1]}, which the package gguf "
                    "does not know", hint=_CONVERT,
                ) from error
            raise RingCompileError(
                f"cannot read '{self.path}': {type(error).__name__}: {first}", hint=_AGAIN
            ) from error
        if self._says("split.count", 1) > 1:
            raise RingCompileError(
                f"'{self.path}' is one of {self._says('split.count', 1)} files of a model",
                hint="put them together: llama-gguf-split --merge",
            )
        self._check_types()

    def _check_types(self) -> None:
        for kind, tensor in {t.tensor_type: t for t in self._reader.tensors}.items():
            size = self.gguf.GGML_QUANT_SIZES[kind][1]
            try:
                self.gguf.dequantize(np.zeros((1, size), np.uint8), kind)
            except NotImplementedError:
                raise RingCompileError(
                    f"'{self.path}': weight '{tensor.name}' is of type {kind.name}, which the "
                    "package gguf cannot unpack", hint=_CONVERT,
                ) from None

    def _says(self, key: str, otherwise: Any) -> Any:
        entry = self._reader.fields.get(key)
        return otherwise if entry is None else entry.contents()

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def config(self) -> Any:
        """The model's config, as transformers reads it.

        Raises:
            RingCompileError: it cannot, or would leave out how positions are scaled.
        """
        try:
            config = self.transformers.AutoConfig.from_pretrained(**source(self.path))
        except Exception as error:
            raise self._unread(error) from error
        scaling = self._says(f"{self._architecture}.rope.scaling.type", "none")
        given = next((n for n in self._tensors if n.startswith("rope_")), None)
        said = given or (scaling != "none" and f"rope.scaling.type = {scaling}")
        if said and _is_unscaled(config):
            raise RingCompileError(
                f"'{self.path}' scales rotary positions ('{said}'), which transformers "
                f"{self.transformers.__version__} does not read from GGUF files",
                hint="take the model's safetensors, whose config.json says how",
            )
        return config

    @property
    def _architecture(self) -> str:
        return str(self._says("general.architecture", ""))

    @property
    def model_class(self) -> Any:
        """The class of transformers that the file is for.

        Raises:
            RingCompileError: it is for no causal language model.
        """
        classes = self.transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if type(self.config) not in classes:
            raise RingCompileError(
                f"'{self.path}' holds a model of type '{self.config.model_type}'; only causal "
                "language models are read from GGUF files",
                hint="load it yourself, and name a function that returns it: "
                "package.module:function",
            )
        return classes[type(self.config)]

    def _unread(self, error: Exception) -> RingCompileError:
        first = (str(error).strip().splitlines() or [""])[0]
        return RingCompileError(
            f"transformers cannot read '{self.path}': {type(error).__name__}: {first}",
            hint="docs/what-works.md says which GGUF files are read",
        )

    def load(self, dtype: torch.dtype | None) -> nn.Module:
        """The model with its weights, float32 unless said otherwise, packed where they can be.

        Raises:
            RingCompileError: transformers cannot read it, or weights are missing or left over.
        """
        plain = self.transformers.GgufConfig(dequantize=True)
        try:
            with bars_on_terminals_only(), _its_own_bar_too(self.transformers):
                module, info = self.model_class.from_pretrained(
                    **source(self.path), quantization_config=plain, output_loading_info=True,
                    dtype=dtype or torch.float32,
                )
        except RingCompileError:
            raise
        except Exception as error:
            raise self._unread(error) from error
        missing = sorted(info.get("missing_keys", ()))
        if missing:
            raise RingCompileError(
                f"'{self.path}' lacks {len(missing)} of the weights of {type(module).__name__}, "
                f"such as '{missing[0]}'; transformers would fill in random numbers", hint=_AGAIN,
            )
        self._check_biases(module)
        with torch.no_grad():
            for name, linear, tensor in list(self._packed(module)):
                weight = _rows(tensor, linear.weight)
                if weight is not None:
                    kind = tensor.tensor_type.name
                    module.set_submodule(name, BlockLinear(kind, weight, linear.bias))
        return module

    def without_weights(self, dtype: torch.dtype | None) -> nn.Module:
        """The model with weights that take no memory."""
        module = without_weights(self.model_class, self.config, dtype or torch.float32)
        self._check_biases(module)
        for name, linear, tensor in list(self._packed(module)):
            weight = linear.weight.new_empty(tensor.data.shape, dtype=torch.uint8)
            kind = tensor.tensor_type.name
            module.set_submodule(name, BlockLinear(kind, weight, linear.bias))
        return module

    def _packed(self, module: nn.Module) -> Iterator[tuple[str, nn.Linear, Any]]:
        """Linear layers whose weight has blocks in the file, and is no other layer's as well."""
        uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        for name, layer in module.named_modules():
            tensor = self._tensors.get(self._name_of(name, ".weight"))
            if type(layer) is not nn.Linear or tensor is None or uses[id(layer.weight)] > 1:
                continue
            fits = tuple(map(int, tensor.shape[::-1])) == tuple(layer.weight.shape)
            if fits and tensor.tensor_type.name in BLOCK_TYPES:
                yield name, layer, tensor

    @cached_property
    def _names(self) -> Any:
        """What the package knows of the names of an architecture's weights."""
        kinds = {name: kind for kind, name in self.gguf.MODEL_ARCH_NAMES.items()}
        count = int(self._says(f"{self._architecture}.block_count", 0))
        kind = kinds.get(self._architecture)
        return None if kind is None else self.gguf.get_tensor_name_map(kind, count)

    def _name_of(self, layer: str, suffix: str) -> str:
        """How a layer's weight is called in the file; some leave the model's own prefix out."""
        parts = layer.split(".")
        for start in range(len(parts)):
            known = self._names and self._names.get_name(".".join(parts[start:]))
            if known:
                return f"{known}{suffix}"
        return ""

    def _check_biases(self, module: nn.Module) -> None:
        """See that no biases are left out, as transformers does where its layers have none."""
        known = {self._name_of(name.removesuffix(".bias"), ".bias")
                 for name, _ in module.named_parameters() if name.endswith(".bias")}
        left = [n for n in self._tensors if ".attn_" in n and n.endswith(".bias")]
        if unread := [name for name in left if name not in known]:
            raise RingCompileError(
                f"'{self.path}' holds '{unread[0]}', which {type(module).__name__} of transformers "
                f"{self.transformers.__version__} does not have",
                hint="take the model's safetensors instead",
            )


@contextmanager
def _its_own_bar_too(transformers: Any) -> Iterator[None]:
    """The bar over weights that are unpacked asks nobody whether it is wanted."""
    if transformers.utils.logging.is_progress_bar_enabled():
        yield
        return
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    with mock.patch.object(reader, "tqdm", lambda entries, **_: entries):
        yield


def _is_unscaled(config: Any) -> bool:
    """Whether a config says nothing of how rotary positions are scaled."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return all(kind.get("rope_type", "default") == "default" for kind in kinds)


def _rows(tensor: Any, weight: torch.Tensor) -> torch.Tensor | None:
    """The bytes of a weight's rows, in the order of its rows; None if it has others.

    Args:
        tensor: as it is in the file, [rows, bytes].
        weight: [rows, values], what transformers made of it.
    """
    data = torch.from_numpy(np.array(tensor.data))
    unpacked = BlockLinear(tensor.tensor_type.name, data, None).unpacked().to(weight.dtype)
    if torch.equal(unpacked, weight):
        return data
    places = {_text(row): place for place, row in enumerate(unpacked)}
    order = [places.get(_text(row)) for row in weight]
    return None if None in order else data[torch.tensor(order)]


def _text(row: torch.Tensor) -> bytes:
    """The bytes of a row."""
    return row.contiguous().view(torch.uint8).numpy().tobytes()
