"""What stands in for transformers' own attention and experts while a model is captured."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.t5.modeling_t5 import eager_attention_forward

from ringcompile.capture.export import capture
from ringcompile.capture.huggingface import prepared
from ringcompile.capture.huggingface_attention import attention, mask
from ringcompile.compiler import transform
from ringcompile.dump.report import attention_of
from ringcompile.errors import RingCompileError
from ringcompile.ir.printer import print_program
from ringcompile.parallel_program import ParallelProgram
from tests.support import difference, run

HEADS, GROUPS, DIM = 4, 4, 8
EXAMPLE = torch.linspace(-2, 2, 2 * 13 * 32).reshape(2, 13, 32).sin()
Extra = Callable[[Tensor], dict[str, Any]]


class Attention(nn.Module):
    """Hands its queries to `interface` as models of transformers do, with `extra` arguments."""

    def __init__(self, extra: Extra, is_causal: bool = False) -> None:
        super().__init__()
        self.extra, self.is_causal = extra, is_causal
        self.interface: Callable[..., Any] = attention
        self.sinks = nn.Parameter(torch.tensor([-1.0, 0.0, 1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for y in (x * 2, x.sin(), x - 0.5)
        )
        extra = {"attention_mask": None, **self.extra(x)}
        out, _ = self.interface(self, q, k, v, extra.pop("attention_mask"), **extra)
        return out.flatten(2)


def index(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def causal(x: Tensor) -> Tensor:
    return (index(x)[:, None] >= index(x)[None, :])[None, None]


def padded(x: Tensor) -> Tensor:
    """Causal, and some tokens hidden, but not all that a query sees."""
    seen = (x[:, :, 0] < 0.9) | (index(x) == 0)
    return causal(x) & seen[:, None, None, :]


def additive(condition: Tensor) -> Tensor:
    return torch.where(condition, 0.0, -math.inf)


def bias(x: Tensor) -> Tensor:
    """Another one for every head, of distances that the model counts."""
    distance = index(x)[:, None] - index(x)[None, :]
    return torch.linspace(0.1, 0.4, HEADS).view(1, HEADS, 1, 1) * distance.abs().neg()


def dense(
    module: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *,
    position_bias: Tensor | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    scaling: float | None = None,
) -> tuple[Tensor, None]:
    """As the models' own functions, which take no two of these together, write it."""
    if mask is not None and mask.dtype == torch.bool:
        mask = additive(mask)
    if softcap is None and s_aux is None:
        out, _ = eager_attention_forward(
            module, q, k, v, mask, scaling, position_bias=position_bias
        )
        return out, None
    scores = q @ k.mT * (DIM**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    for part in (position_bias, mask):
        scores = scores if part is None else scores + part
    if s_aux is not None:
        column = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return (torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v).transpose(1, 2), None
    return (scores.softmax(-1) @ v).transpose(1, 2), None


def told(parallel: ParallelProgram) -> list[str]:
    """What each mask is, without the word for what is left over of it."""
    masks = (report.mask for report in attention_of(parallel.program))
    return [re.sub(r"[a-z ]+ (?=f32\[)", " ", mask) for mask in masks]


ROWS = "f32[1, 4, s/ring, s]"
EXTRAS: dict[str, tuple[Extra, str]] = {
    "nothing": (lambda x: {}, "full"),
    "mask": (lambda x: {"attention_mask": causal(x)}, "causal"),
    "bias": (lambda x: {"position_bias": bias(x)}, f"full + {ROWS}"),
    "bias, mask": (
        lambda x: {"position_bias": bias(x), "attention_mask": causal(x)}, f"causal + {ROWS}"
    ),
    "bias, padding": (
        lambda x: {"position_bias": bias(x), "attention_mask": padded(x)},
        f"causal + key mask + {ROWS}",
    ),
    "bias, additive mask": (
        lambda x: {"position_bias": bias(x), "attention_mask": additive(causal(x))},
        f"causal + {ROWS}",
    ),
    "cap": (lambda x: {"softcap": 0.7, "scaling": 0.9}, "full + soft cap 0.7"),
    "cap, mask": (
        lambda x: {"softcap": 0.7, "attention_mask": padded(x)}, "causal + key mask + soft cap 0.7"
    ),
    "cap, additive mask": (
        lambda x: {"softcap": 0.7, "attention_mask": additive(causal(x))}, "causal + soft cap 0.7"
    ),
    "cap, bias, mask": (
        lambda x: {"softcap": 0.7, "position_bias": bias(x), "attention_mask": causal(x)},
        f"causal + {ROWS} + soft cap 0.7",
    ),
}  # fmt: skip


def compiled(module: nn.Module, spec: str = "ring=4") -> ParallelProgram:
    return transform(capture(module.eval(), (EXAMPLE,)), spec)


def check(module: Attention, says: str) -> None:
    parallel = compiled(module)
    assert told(parallel) == [says]
    x = torch.randn(2, 22, 32)
    module.interface = dense
    with torch.no_grad():
        expected = module(x)
    assert difference(run(parallel, (x,)).outputs, expected) < 2e-6


@pytest.mark.parametrize("name", EXTRAS)
def test_what_models_hand_on(name: str) -> None:
    extra, says = EXTRAS[name]
    check(Attention(extra), says)


@pytest.mark.parametrize("name", ["nothing", "bias", "cap"])
def test_causal_by_the_module(name: str) -> None:
    extra, says = EXTRAS[name]
    module = Attention(extra, is_causal=True)
    parallel = compiled(module)
    assert told(parallel) == [says.replace("full", "causal")]
    explicit = Attention(lambda x: {"attention_mask": causal(x), **extra(x)})
    explicit.interface = dense
    x = torch.randn(2, 22, 32)
    with torch.no_grad():
        assert difference(run(parallel, (x,)).outputs, explicit(x)) < 2e-6


def test_sinks() -> None:
    module = Attention(lambda x: {})
    module.extra = lambda x: {"s_aux": module.sinks, "attention_mask": padded(x)}
    check(module, "causal + key mask + sink")


def test_no_sinks_is_none() -> None:
    """Layers without sinks hand on None."""
    check(Attention(lambda x: {"s_aux": None, "softcap": None, "position_bias": None}), "full")


REFUSED: dict[str, tuple[Extra, str]] = {
    "sparse attention": (
        lambda x: {"indices": index(x)}, "Attention uses attention with 'indices', which is not"
    ),
    "blocks": (lambda x: {"block_indices": index(x)}, "with 'block_indices'"),
    "sinks for each query": (lambda x: {"sinks": x}, "with 'sinks'"),
    "what nobody knows": (lambda x: {"temperature": 0.5}, "with 'temperature'"),
    "weights as a result": (lambda x: {"output_attentions": True}, "with 'output_attentions'"),
    "a cache": (lambda x: {"past_key_values": object()}, "with 'past_key_values'"),
    "sinks of another shape": (
        lambda x: {"s_aux": x.new_zeros(2, HEADS)}, r"has sinks of shape \[2, 4\]"
    ),
    "dropout": (lambda x: {"softcap": 1.0, "dropout": 0.1}, "dropout with p=0.1 is left on"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str) -> None:
    extra, message = REFUSED[name]
    with pytest.raises(RingCompileError, match=message):
        capture(Attention(extra).eval(), (EXAMPLE,))


IGNORED = {
    "use_cache": True, "output_attentions": False, "sliding_window": 4, "position_ids": EXAMPLE,
    "cu_seq_lens_q": EXAMPLE, "anything": None,
}  # fmt: skip


def test_what_other_kernels_need_changes_nothing() -> None:
    """As in the models' own functions, which leave it out."""
    found, expected = (
        compiled(Attention(extra), "ring=2") for extra in (lambda x: dict(IGNORED), lambda x: {})
    )
    assert print_program(found.program) == print_program(expected.program)


SIZES = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 16, "head_dim": 8, "vocab_size": 50,
}  # fmt: skip


def test_configs_are_as_before() -> None:
    models: list[Any] = [
        GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
        Gemma2ForCausalLM(Gemma2Config(**SIZES)),
    ]
    model = nn.ModuleList(models)
    models[0].set_experts_implementation("batched_mm")
    models[0].set_attn_implementation("eager")
    models[1].config.use_cache = False

    def settings() -> list[tuple[Any, ...]]:
        return [
            (m.config._attn_implementation, m.config._experts_implementation, m.config.use_cache)
            for m in models
        ]

    before, functions = settings(), registered()
    with prepared(model):
        assert registered() != functions
        assert settings() == [("sdpa", "ringcompile", False)] * 2
    assert settings() == before
    assert before[0] == ("eager", "batched_mm", True)
    with pytest.raises(ZeroDivisionError), prepared(model):
        _ = 1 / 0
    assert settings() == before
    assert registered() == functions


def registered() -> list[dict[str, Any]]:
    """What transformers looks up by name."""
    registries = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS)
    return [dict(registry) for registry in registries]


@pytest.mark.parametrize(
    "kind", [pytest.param(Gemma2ForCausalLM, marks=pytest.mark.slow), GptOssForCausalLM]
)
def test_one_sequence_is_exported_once_for_any_batch(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks for one sequence only to leave out what changes nothing for one."""
    module = importlib.import_module("ringcompile.capture.export")
    calls: list[Any] = []
    original = module.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "export", counted)
    model = kind(kind.config_class(**SIZES)).eval()
    ids = torch.arange(13)[None]
    program = capture(model, (ids,))
    assert len(calls) == 1
    assert [str(spec.type) for spec in program.inputs] == ["i64[b, s]"]
    assert program.batch_range == (1, None)
    parallel = transform(program, "dp=2,ring=2")
    given = torch.arange(3 * 11).reshape(3, 11) % 50
    found = run(parallel, (given,)).outputs
    with torch.no_grad():
        assert difference(found["logits"], model(given).logits) < 1e-5


class InBlocks(Attention):
    """Causal, and both ways among the tokens of a block, as text with images in it is."""

    def __init__(self) -> None:
        super().__init__(lambda x: {})

    def forward(self, x: Tensor, blocks: Tensor) -> Tensor:
        seen = mask(
            batch_size=x.shape[0], q_length=x.shape[1], kv_length=x.shape[1], use_vmap=True,
            mask_function=or_masks(causal_mask_function, blockwise_overlay(blocks)),
        )
        self.extra = lambda _: {"attention_mask": seen}
        return super().forward(x)


def test_a_mask_of_blocks() -> None:
    """What a model adds to a mask's function is applied to all indices at once."""
    module = InBlocks()
    example, inputs = ((y, (torch.arange(y.shape[1]) - 4).clamp(-1, 1).expand(2, -1))
                       for y in (EXAMPLE, torch.cat([EXAMPLE, EXAMPLE.flip(1)], 1)))
    program = capture(module, example)
    for spec in ("ring=4", "tp=2"):
        found = run(transform(program, spec), inputs).outputs
        assert difference(found, module(*inputs)) < 1e-6
    other = (inputs[0], torch.full_like(inputs[1], -1))
    assert difference(module(*other), module(*inputs)) > 0.01
