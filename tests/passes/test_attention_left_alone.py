"""Attention that is written out in ways that have no op: left alone, with a reason."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ringcompile.compiler import transform
from ringcompile.dump.report import attention_of
from ringcompile.mesh import Mesh
from ringcompile.pass_list import front_passes
from ringcompile.passes.base import Pipeline
from tests.passes.hand_written import HEADS, INF, WIDTH, Style, Weights, key, merged, query
from tests.passes.hand_written_programs import BATCH, LENGTH, captured, named
from tests.support import difference, run


def returned_weights(m: Weights, x: Tensor) -> object:
    q, k, v = m.heads(x)
    p = (q @ k.mT).softmax(-1)
    return merged(p @ v), p


def returned_scores(m: Weights, x: Tensor) -> object:
    q, k, v = m.heads(x)
    w = q @ k.mT * 0.5
    return merged(w.softmax(-1) @ v), w


def head_mask(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return merged(((q @ k.mT).softmax(-1) * m.slopes) @ v)


def mask_behind(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return merged((q @ k.mT).softmax(-1).masked_fill(query(x) < key(x), 0) @ v)


def other_mask_behind(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    p = (q @ k.mT).masked_fill(query(x) < key(x), INF).softmax(-1)
    return merged(p.masked_fill(query(x) <= key(x), 0) @ v)


def talking_heads(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    w = torch.einsum("bhqk,hg->bgqk", q @ k.mT, torch.eye(HEADS) + 0.1)
    return merged(w.softmax(-1) @ v)


def talking_heads_behind(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    p = F.linear((q @ k.mT).softmax(-1).permute(0, 2, 3, 1), torch.eye(HEADS) + 0.1)
    return merged(p.permute(0, 3, 1, 2) @ v)


def softmax_over_queries(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return merged((q @ k.mT).softmax(-2) @ v)


def high_fill(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return merged((q @ k.mT).masked_fill(query(x) < key(x), -5.0).softmax(-1) @ v)


def clamped(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return merged((q @ k.mT).clamp(-2, 2).softmax(-1) @ v)


def mask_before_cap(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return merged(torch.tanh((q @ k.mT).masked_fill(query(x) < key(x), INF)).softmax(-1) @ v)


def scaled_key_by_key(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return merged((q @ k.mT * x[:, None, None, :, 0]).softmax(-1) @ v)


def negative_scale(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return merged((q @ k.mT * -0.5).softmax(-1) @ v)


def flags_added(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return merged((q @ k.mT + (query(x) >= key(x))).softmax(-1) @ v)


def best_keys(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    w = q @ k.mT
    return merged(w.masked_fill(w < w.mean(-1, keepdim=True), INF).softmax(-1) @ v)


def disentangled(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    p = (q @ k.mT).softmax(-1)
    return merged(p @ v + p.mT @ v)


def wider_softmax(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return merged((q @ k.mT).double().softmax(-1).to(v.dtype) @ v)


def sigmoid(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return merged((q @ k.mT).sigmoid() @ v)


def by_hand(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    w = (q @ k.mT).exp()
    return merged(w / (1 + w.sum(-1, keepdim=True)) @ v)


def limited_scores(m: Weights, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    scores = torch.max(q @ k.transpose(-1, -2), torch.tensor(-0.5, dtype=x.dtype))
    return merged(scores.softmax(-1) @ v)


LEFT: dict[Style, str | None] = {
    returned_weights: "its attention weights are also used elsewhere",
    returned_scores: "its scores are also used elsewhere",
    head_mask: "aten.mul.Tensor changes its attention weights",
    mask_behind: "aten.masked_fill.Scalar changes its attention weights",
    other_mask_behind: "aten.masked_fill.Scalar changes its attention weights",
    talking_heads: "its scores are not a matmul of queries and keys",
    talking_heads_behind: "aten.permute.default changes its attention weights",
    softmax_over_queries: "its softmax is not taken over the last dim",
    high_fill: "-5 in place of a masked score leaves some attention weight on that key, and which "
               "keys are masked differs from row to row",
    clamped: "aten.clamp.default is applied to its scores before the softmax, which is not "
             "supported",
    mask_before_cap: "its scores are masked before the soft cap",
    scaled_key_by_key: "its scores are multiplied by a factor that differs from key to key",
    negative_scale: "its scores are scaled by a number that is not positive",
    flags_added: "bool[s, s] is added to its scores",
    best_keys: "its scores are also used elsewhere",
    disentangled: "its attention weights are also used elsewhere",
    limited_scores: "its scores are clamped from below",
    wider_softmax: "its softmax is in float64, but its queries are not",
    sigmoid: None,
    by_hand: None,
}


@named(LEFT)
def test_left_alone(style: Style) -> None:
    program = captured(style, torch.float32)[1]
    made = Pipeline(front_passes(Mesh.parse("ring=3"))[:2]).run(program)
    assert not any("attention" in str(node.target) for node in made.graph.nodes)
    reasons = [n.meta["why_not"] for n in made.graph.nodes if "why_not" in n.meta]
    assert reasons == [LEFT[style]] * (LEFT[style] is not None)


@named(LEFT)
def test_left_alone_and_gathered(style: Style) -> None:
    """Each rank computes its rows of the scores, with a note that says why and what is gathered."""
    module, program = captured(style, torch.float32)
    x, reason = torch.randn(BATCH, LENGTH, WIDTH), LEFT[style]
    parallel = transform(program, "ring=3")
    notes = [note for note in parallel.notes if "pairs every token with every other" in note]
    assert notes
    assert all(note.startswith(Path(__file__).name) and " bytes gathered" in note for note in notes)
    elsewhere = style is talking_heads  # the reason is said of the product that mixes the heads
    assert reason is None or elsewhere or any(f"({reason})" in note for note in notes)
    with torch.no_grad():
        assert difference(run(parallel, (x,)).outputs, module(x)) < 2e-5


def test_attention_over_features_is_no_attention_over_tokens() -> None:
    """Its scores sum over tokens."""

    def features(m: Weights, x: Tensor) -> Tensor:
        q, k, v = m.heads(x)
        return merged(((q.mT @ k).softmax(-1) @ v.mT).mT)

    module, program = captured(features, torch.float32)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    parallel = transform(program, "ring=3")
    assert not attention_of(parallel.program)
    with torch.no_grad():
        assert difference(run(parallel, (x,)).outputs, module(x)) < 2e-5
