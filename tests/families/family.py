"""What a row of the catalogue is: a small model of one family, with weights that make it think.

Freshly initialised models attend almost uniformly, so that a wrong mask or position would hardly
show. Weights are drawn anew: scores spread over several units, biases and norms not trivial.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

Inputs = Callable[[int, int, torch.Generator], dict[str, torch.Tensor]]

VOCABULARY = 97
SEED = 20240229
# What every family gets where its config has such a field; a row overrides it.
DEFAULTS = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_SCORES = re.compile(
    r"(^|[._])(q|k|qk|qkv|query|key|query_key_value|q_proj|k_proj|qkv_proj|q_lin|k_lin|c_attn|Wqkv"
    r"|in_proj|q_b_proj|q_norm|k_norm|query_layernorm|key_layernorm|q_layernorm|k_layernorm)[._]"
)


def tokens(length: int, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Token ids without special ones."""
    return {"input_ids": ids(length, batch, generator)}


def ids(length: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        name: as transformers names its folder, with a variant behind it where there are several.
        model: class of transformers that a user would bring.
        config: fields of its config.
        attention: which attention the config asks for, in words.
        positions: how positions enter, in words.
        inputs: makes inputs of a length and batch size.
        padding: the side on which a batch is padded; None: the family takes no padding.
        two_sequences: inputs are an encoder's and a decoder's; padding is the encoder's.
        sharpen: factor on the weights that attention scores come from.
        matters: config fields with a value that must change the outputs.
        first_seen: whether the last position sees the first.
        called: whether it has to be called once before it is captured, since its first call
            changes its weights.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    attention: str
    positions: str
    inputs: Inputs = tokens
    padding: str | None = "left"
    two_sequences: bool = False
    sharpen: float = 1.5
    matters: Mapping[str, Any] = field(default_factory=dict)
    first_seen: bool = True
    called: bool = False

    def build(self, **changes: Any) -> nn.Module:
        """The model, in float32 and eval mode; the same every time."""
        config_class = getattr(transformers, self.model).config_class
        config = config_class(**{**DEFAULTS, **self.config, **changes})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = getattr(transformers, self.model)(config).float().eval()
        _draw_weights(model, self.sharpen)
        if self.called:
            with torch.no_grad():
                model(**self.example(2))
        return model

    def example(self, length: int, batch: int = 1) -> dict[str, torch.Tensor]:
        """Inputs by name."""
        return self.inputs(length, batch, torch.Generator().manual_seed(SEED + length))


@torch.no_grad()
def _draw_weights(model: nn.Module, sharpen: float) -> None:
    generator = torch.Generator().manual_seed(SEED)
    of_module = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        factor = sharpen if _SCORES.search(name) else 1.0
        if parameter.dim() < 2:
            parameter.add_(0.15 * noise).mul_(factor)
        else:
            fan_in = _fan_in(of_module[id(parameter)], parameter)
            parameter.copy_(noise * factor / math.sqrt(fan_in))


def _fan_in(module: nn.Module, parameter: torch.Tensor) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return math.prod(parameter.shape[1:])
    if isinstance(module, transformers.pytorch_utils.Conv1D):
        return parameter.shape[0]
    return parameter.shape[-1]
