"""How Hugging Face models run their experts while they are captured: row by row."""

from __future__ import annotations

from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.ops.schemas import op


def experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Every token through its k experts, weighted and summed.

    What `batched_mm` of transformers does, and in the same order, but without a copy of the
    matrices for every token.

    Args:
        module: the experts, as `use_experts_implementation` of transformers decorates them.
        hidden_states: [T,D].
        top_k_index: [T,k].
        top_k_weights: [T,k].

    Returns:
        [T,D].

    Raises:
        RingCompileError: the experts are spread over devices already.
    """
    if module._is_expert_parallel:
        raise RingCompileError(
            f"{type(module).__name__} is already expert parallel",
            hint="capture the model as it is for a single device",
        )
    shape = (*top_k_index.shape, hidden_states.shape[-1])
    each = hidden_states.unsqueeze(1).expand(shape)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    activate = module._apply_gate if module.has_gate else module.act_fn
    inner = activate(_linear(module, up, each, top_k_index))
    out = _linear(module, "down_proj", inner, top_k_index)
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    return (out * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _linear(module: Any, name: str, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    weight = getattr(module, name)
    return op("expert_linear")(x, expert, weight, bias, transposed=module.is_transposed)
