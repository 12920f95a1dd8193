"""Experts of Hugging Face that a Python loop runs one after another, captured row by row.

Most models ask a registry how to run their experts (`huggingface_experts`). These have loops of
their own over the experts that any token chose, and how many those are depends on the data. Each
is captured as what its loop adds up to: every token through the experts that it chose. Where
weights are loaded, capture compares what comes of it with the model as it is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from ringcompile.ops.schemas import op


@contextlib.contextmanager
def experts_by_row(model: nn.Module) -> Iterator[None]:
    """While inside, modules of transformers with such a loop compute the same without it."""
    kinds = dict.fromkeys(type(module) for module in model.modules())
    with contextlib.ExitStack() as patches:
        for kind in kinds:
            if kind.__module__.startswith("transformers."):
                for name, other in _REPLACED.get(kind.__name__, {}).items():
                    patches.enter_context(mock.patch.object(kind, name, other))
        yield


def _through(
    x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """Each row times the matrix of its own expert; 0 for a row whose index is no expert."""
    return op("expert_linear")(x, expert, weight, bias, transposed=transposed)


def _for_each_choice(x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """Tokens [T,D], once for each expert [T,k] that they chose: [T,k,D]."""
    return x.unsqueeze(1).expand(*expert.shape, x.shape[-1])


def _added_up(out: torch.Tensor, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What the choices [T,k,D] of each token come to, in the dtype of the tokens."""
    return (out * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def _dbrx(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    rows = hidden_states.reshape(-1, module.hidden_size)
    mlp, each = module.mlp, _for_each_choice(rows, top_k_index)
    w1, v1, w2 = (
        weight.view(module.num_experts, module.ffn_hidden_size, module.hidden_size)
        for weight in (mlp.w1, mlp.v1, mlp.w2)
    )
    inner = mlp.activation_fn(_through(each, top_k_index, w1)) * _through(each, top_k_index, v1)
    out = _added_up(_through(inner, top_k_index, w2, transposed=True), top_k_weights, rows)
    return out.view(hidden_states.shape[0], -1, module.hidden_size)


def _longcat(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts whose index is not below those with weights return the token as it is."""
    each = _for_each_choice(hidden_states, top_k_index)
    num_experts = module.num_routed_experts
    out = torch.where((top_k_index >= num_experts).unsqueeze(-1), each, 0.0)
    if num_experts:
        gate, up = _through(each, top_k_index, module.gate_up_proj[:num_experts]).chunk(2, dim=-1)
        out = out + _through(module.act_fn(gate) * up, top_k_index, module.down_proj)
    return _added_up(out, top_k_weights, hidden_states)


def _step(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    each = _for_each_choice(hidden_states, top_k_index)
    inner = module._apply_gate(_through(each, top_k_index, module.gate_up_proj))
    out = _through(inner, top_k_index, module.down_proj)
    return _added_up(out, top_k_weights, hidden_states)


def _switch(
    module: Any, hidden_states: torch.Tensor, selected_experts: torch.Tensor,
    routing_weights: torch.Tensor,
) -> torch.Tensor:
    """One choice a token, [T,1,E] with a 1 for it; none where an expert was full."""
    chosen = selected_experts.sum(-1) > 0
    expert = torch.where(chosen, selected_experts.argmax(-1), module.num_experts)
    return _in_modules(module, hidden_states, expert, routing_weights, ("wi", "wo"))


def _nllb(
    module: Any, hidden_states: torch.Tensor, router_mask: torch.Tensor, router_probs: torch.Tensor
) -> torch.Tensor:
    """The numbers [T,E] of the router's mask are read as the experts' own."""
    out = _in_modules(module, hidden_states, router_mask, router_probs, ("fc1", "fc2"))
    kept = 1 - module.moe_token_dropout
    return out if module.moe_token_dropout == 0 else out * kept


def _in_modules(
    module: Any, x: torch.Tensor, expert: torch.Tensor, weights: torch.Tensor,
    layers: tuple[str, str],
) -> torch.Tensor:
    """Experts that are modules of their own, each of two linear layers around an activation."""
    first, second = (
        [getattr(module[f"expert_{i}"], name) for i in range(module.num_experts)] for name in layers
    )
    each = _for_each_choice(x, expert)
    inner = module["expert_0"].act(_through(each, expert, *_stacked(first)))
    return _added_up(_through(inner, expert, *_stacked(second)), weights, x)


def _stacked(layers: list[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    biases = [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.stack(biases)
    return torch.stack([layer.weight for layer in layers]), bias


def _jetmoe_router(module: Any, hidden_states: torch.Tensor) -> tuple[Any, ...]:
    """Five results as before, the last of them the logits; the chosen experts' weights, and they.

    The first two are the order of rows by experts, and how many each expert gets, in the original;
    what reads them is captured without them.
    """
    logits = module.layer(hidden_states).float()
    chosen, expert = logits.topk(module.top_k, dim=1)
    return None, None, torch.softmax(chosen, dim=1).type_as(hidden_states), expert, logits


def _jetmoe_mlp(module: Any, layer_input: torch.Tensor) -> torch.Tensor:
    rows = layer_input.reshape(-1, module.input_size)
    _, _, gates, expert, _ = module.router(rows)
    each = _for_each_choice(rows, expert)
    gate, up = _through(each, expert, module.input_linear.weight).chunk(2, dim=-1)
    out = _through(module.activation(gate) * up, expert, module.output_linear.weight)
    return _added_up(out, gates, rows).view(layer_input.shape) + module.bias


def _jetmoe_queries(module: Any, layer_input: torch.Tensor) -> tuple[Any, ...]:
    """Queries of the experts that each token chose: [B,S,k,hidden]."""
    rows = layer_input.reshape(-1, module.input_size)
    _, _, gates, expert, logits = module.router(rows)
    out = _through(_for_each_choice(rows, expert), expert, module.input_linear.weight)
    return out.view(*layer_input.shape[:2], module.top_k, -1), logits, (gates, expert)


def _jetmoe_outputs(
    module: Any, layer_input: torch.Tensor, topo_info: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    gates, expert = topo_info
    out = _through(layer_input.flatten(0, 1), expert, module.output_linear.weight)
    added = _added_up(out, gates, layer_input)
    return added.view(*layer_input.shape[:2], module.input_size) + module.bias


# For a class its methods, and what computes the same without a loop.
_REPLACED: dict[str, dict[str, Callable[..., Any]]] = {
    "DbrxExperts": {"forward": _dbrx},
    "JetMoeMoA": {"map": _jetmoe_queries, "reduce": _jetmoe_outputs},
    "JetMoeMoE": {"forward": _jetmoe_mlp},
    "JetMoeTopKGating": {"forward": _jetmoe_router},
    "LongcatFlashExperts": {"forward": _longcat},
    "NllbMoeExperts": {"forward": _nllb},
    "Step3p7Experts": {"forward": _step},
    "SwitchTransformersExperts": {"forward": _switch},
}
