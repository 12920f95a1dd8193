"""Attention as people write it out: recognised with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.dump.report import attention_of
from ringcompile.ir.calls import Call
from ringcompile.ir.nodes import type_of
from tests.passes.hand_written import (
    WIDTH,
    Style,
    Weights,
    added_twice,
    annotated_transformer,
    behind_a_router,
    bert,
    bloom,
    bmm_only,
    einsum,
    einsum_groups,
    einsum_keys_first,
    even_rows,
    even_rows_before_others,
    even_rows_of_some,
    falcon,
    five_dims,
    five_dims_in_turns,
    gemma2,
    gpt2,
    gpt_j,
    gpt_neo,
    gpt_oss,
    llama,
    llama_of_meta,
    mpt,
    multi_query,
    nano_gpt,
    nano_gpt_in_place,
    one_head,
    one_more_in_the_sum,
    opt,
    other_value_dim,
    plain,
    repeat_interleave,
    scores_of_positions,
    stable_softmax,
    t5,
    temperatures,
    to_memory,
    to_one_more,
    torch_module,
    xglm,
    xlnet_content,
    zeros_behind,
)
from tests.passes.hand_written_programs import (
    BATCH,
    LENGTH,
    SINGLE,
    captured,
    compiled,
    named,
    widest,
)
from tests.support import difference, run, some_fast

RING, LOCAL = "ring: keys and values rotate", "local: queries are split, keys are replicated"
# What each style's mask is read as.
RECOGNISED: dict[Style, str] = {
    plain: "full",
    nano_gpt: "causal",
    nano_gpt_in_place: "causal",
    xglm: "causal",
    gpt2: "causal + key mask",
    gpt_neo: "causal",
    annotated_transformer: "full + data-dependent mask bool[b, 1, s/ring, s]",
    bert: "full + key mask",
    llama: "causal",
    llama_of_meta: "causal",
    repeat_interleave: "causal",
    five_dims: "causal",
    five_dims_in_turns: "full",
    multi_query: "causal",
    opt: "causal",
    bmm_only: "causal",
    one_head: "causal",
    bloom: "full + bias f32[b, 4, s/ring, s]",
    mpt: "causal + relative bias f32[1, 4, s/ring, s]",
    falcon: "causal + bias f32[1, 4, 1, s]",
    gpt_j: "causal",
    t5: "full + relative bias f32[1, 4, s/ring, s]",
    einsum: "causal",
    einsum_keys_first: "full",
    einsum_groups: "causal",
    xlnet_content: "full + bias f32[1, 1, s/ring, s]",
    gemma2: "causal + soft cap 2",
    gpt_oss: "causal + sink",
    one_more_in_the_sum: "full + sink",
    stable_softmax: "causal",
    temperatures: "causal",
    even_rows: "full + data-dependent mask + bias f32[b, 1, s/ring, s]",
    even_rows_of_some: "full + data-dependent mask bool[b, 1, s/ring, s]",
    even_rows_before_others: "band None..0 + data-dependent mask bool[b, 1, s/ring, s]",
    zeros_behind: "causal + key mask",
    added_twice: "causal window 5 + relative bias f32[1, 1, s/ring, s]",
    scores_of_positions: "full + bias f32[b, 4, s/ring, s]",
    other_value_dim: "full",
    torch_module: "causal",
    behind_a_router: "full",
    to_memory: "full",
    to_one_more: "full",
}
GROUPED = (llama, llama_of_meta, repeat_interleave, five_dims, einsum_groups, gpt_oss)
SLOW = pytest.mark.slow
# Styles that take no line of a pass which none of the others takes.
ALIKE = {
    plain, gpt_neo, llama_of_meta, five_dims, five_dims_in_turns, multi_query, opt, one_head, mpt,
    gpt_j, einsum, einsum_groups, stable_softmax, even_rows_of_some, other_value_dim, to_memory,
}


def some(styles: Iterable[Style]) -> list[Any]:
    return [
        pytest.param(style, marks=SLOW if style in ALIKE else ()) for style in styles
    ]


@pytest.mark.parametrize(
    ("style", "ranks", "order"),
    [
        pytest.param(style, *ring, marks=() if place % 2 == turn and style not in ALIKE else SLOW,
                     id=f"{'-'.join(map(str, ring))}-{style.__name__}")
        for place, style in enumerate(RECOGNISED)
        for turn, ring in enumerate([(3, "contiguous"), (4, "zigzag")])
    ],
)
def test_numbers(style: Style, ranks: int, order: str) -> None:
    """At a length that does not divide, in float64 where the model's code allows it."""
    dtype = widest(style)
    module, program = captured(style, dtype)
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype)
    with torch.no_grad():
        expected = module(x)
    found = run(transform(program, f"ring={ranks}", order=order), (x,)).outputs
    assert difference(found, expected) < (2e-5 if style in SINGLE else 1e-9)


@named(some(RECOGNISED))
def test_recognised(style: Style) -> None:
    (found,) = attention_of(compiled(style).program)
    assert found.form == (LOCAL if style in (to_memory, to_one_more) else RING)
    assert found.mask.replace("f64", "f32") == RECOGNISED[style]  # as the model's own dtype is
    assert found.line


@named(some(GROUPED))
def test_repeated_heads_are_not_sent(style: Style) -> None:
    nodes = compiled(style).program.graph.nodes
    (node,) = [n for n in nodes if "ring_attention" in str(n.target)]
    assert type_of(Call(node)["k"]).shape[1] == type_of(Call(node)["v"]).shape[1] == 2


@named([
    nano_gpt, five_dims, gpt_oss, *(
        pytest.param(style, marks=pytest.mark.slow)
        for style in (t5, plain, gpt2, gpt_j, bloom, einsum_groups)
    ),
])
def test_half_precision(style: Style) -> None:
    """Scores stay in float32 here, which no model's own code beats."""
    module, program = captured(style, torch.bfloat16)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    exact = Weights(style).eval()
    exact.load_state_dict(module.state_dict())
    with torch.no_grad():
        expected, own = exact(x.bfloat16().float()), module(x.bfloat16())
    found = run(transform(program, "ring=3"), (x.bfloat16(),)).outputs
    assert found.dtype == own.dtype
    assert difference(found.float(), expected) < 2 * difference(own.float(), expected)


def test_scores_that_code_casts_up_are_multiplied_in_half_precision() -> None:
    _, program = captured(gpt_j, torch.bfloat16)
    for node in transform(program, "ring=3").program.graph.nodes:
        if "ring_attention" in str(node.target):
            assert type_of(Call(node)["q"]).dtype == torch.bfloat16


# -- models of the library that write it out ------------------------------------------------------

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 96, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LAYERS = {"n_layer": 2, "n_head": 4}
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "bloom": (
        lambda: transformers.BloomModel(transformers.BloomConfig(
            **SMALL, hidden_size=32, **LAYERS)),
        ("causal + bias f32[b, 4, 1, s]",)),
    "gpt_neo": (
        lambda: transformers.GPTNeoModel(transformers.GPTNeoConfig(
            **SMALL, hidden_size=32, num_layers=2, num_heads=4, window_size=5,
            attention_types=[[["global", "local"], 1]], max_position_embeddings=128)),
        ("causal", "causal window 5")),
    "gptj": (
        lambda: transformers.GPTJModel(transformers.GPTJConfig(
            **SMALL, n_embd=32, **LAYERS, rotary_dim=4, n_positions=128)),
        ("causal",)),
    "codegen": (
        lambda: transformers.CodeGenModel(transformers.CodeGenConfig(
            **SMALL, n_embd=32, **LAYERS, rotary_dim=4, n_positions=128)),
        ("causal",)),
    "xlnet": (
        lambda: transformers.XLNetModel(transformers.XLNetConfig(
            vocab_size=96, d_model=32, **LAYERS, d_inner=48)),
        ("full + bias f32[b, 4, s/ring, s]",)),
    "mpnet": (
        lambda: transformers.MPNetModel(transformers.MPNetConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48)),
        ("full + relative bias f32[1, 4, s/ring, s]",)),
    "llama4": (
        lambda: transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(
            **SMALL, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            num_local_experts=2, attention_chunk_size=8, moe_layers=[], no_rope_layers=[1, 0])),
        ("causal", "causal + chunks of 8")),
}  # fmt: skip


@pytest.mark.parametrize(
    "family", some_fast(FAMILIES, fast=lambda name: name in ("llama4", "xlnet"))
)
def test_hugging_face(family: str) -> None:
    torch.manual_seed(1)
    module = FAMILIES[family][0]().eval()
    for parameter in module.parameters():  # larger weights: positions and masks must matter
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    program = capture(module, (torch.randint(0, 96, (BATCH, 24)),))
    parallel, ids = transform(program, "ring=4"), torch.randint(0, 96, (BATCH, 37))
    reports = attention_of(parallel.program)
    assert sorted({report.mask for report in reports}) == sorted(FAMILIES[family][1])
    assert {report.form for report in reports} == {RING}
    with torch.no_grad():
        expected = module(ids)
    found = run(parallel, (ids,)).outputs
    key = next(iter(found))
    assert difference(found[key], expected[key]) < 2e-5
