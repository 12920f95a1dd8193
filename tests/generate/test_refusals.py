"""What cannot be generated with a cache is refused in these words, at the line that is at fault."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

import ringcompile as rc
from tests.generate.models import Rotary, cached, captured, given, ids
from tests.generate.test_mixtures import HalfOfAll, Routed
from tests.generate.test_session import Encoder, Furthest, Mean, TwoWays

BOTH_WAYS = (
    "error: with a cache, no query may see later keys: in this attention queries do, or its mask "
    "cannot be shown to hide them, so that later tokens could change the results for earlier ones"
)
CAUSAL = "  hint: pass is_causal=True, or a mask that hides later keys"
ALL = (
    "error: with a cache, this reads the whole sequence, but later tokens are not known yet, and "
    "they may change the results for earlier tokens"
)
AT_ONCE = (
    "error: with a cache, this needs all tokens of the sequence at once, and later tokens may "
    "change the results for earlier ones"
)
BEFORE = (
    "  hint: leave out --cache, or compute each result from the current and earlier tokens only"
)
COUNTED = "; if it is a capacity of experts, --capacity local counts the new tokens of each call"


class Earlier(Rotary):
    """Each token reads the one before it, by a number that is computed: no later one matters."""

    def run(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = super().run(x, mask)
        return x + x[:, (torch.arange(x.shape[1]) - 1).clamp(min=0)]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...]]] = {
    "an encoder": (given(Encoder, layers=1), "test_session.py", (
        BOTH_WAYS, "    x = x + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)",
        "  node: %scaled_dot_product_attention", CAUSAL,
    )),
    "attention both ways": (given(TwoWays, layers=1), "models.py", (
        BOTH_WAYS,
        "    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)",
        "  node: %scaled_dot_product_attention", "  layer: layers.0.attention", CAUSAL,
    )),
    "a mean": (given(Mean, layers=1), "test_session.py", (
        ALL, "    return x - x.mean(1, keepdim=True)", "  node: %mean", BEFORE,
    )),
    "a scale by the last position": (given(Furthest, layers=1), "test_session.py", (
        ALL, "    return self.embed(ids) + self.positions(at) * (at.max() + 1)", "  node: %max_1",
        BEFORE,
    )),
    "earlier tokens by number": (given(Earlier, layers=1), "test_refusals.py", (
        AT_ONCE, "    return x + x[:, (torch.arange(x.shape[1]) - 1).clamp(min=0)]",
        "  node: %index_1", BEFORE,
    )),
    "a capacity": (given(Routed, HalfOfAll), "test_mixtures.py", (
        ("error: with a cache, the length of the sequence (floor(s/2)) is used as a number, which "
         "would change with every new token"),
        "    kept = (hot.cumsum(1) * hot).sum(-1) <= x.shape[1] // 2", "  node: %le",
        "  layer: mixture", BEFORE + COUNTED,
    )),
}


@pytest.mark.parametrize("name", REFUSED)
def test_in_these_words(name: str) -> None:
    kind, file, lines = REFUSED[name]
    with pytest.raises(rc.RingCompileError) as refused:
        cached(kind, "ring=2")
    where, text = re.fullmatch(r"(\S+):\d+: (.*)", str(refused.value), re.DOTALL).groups()
    assert where.endswith(f"/{file}")
    assert text == "\n".join(lines)


def test_dynamic_ntk() -> None:
    """Rotary scales that follow the length: refused when the model is captured, at that line."""
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40, max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )
    with pytest.raises(rc.RingCompileError) as refused:
        rc.capture(transformers.LlamaForCausalLM(config).eval(), (ids(12),))
    where, text = str(refused.value).split(": ", 1)
    assert "modeling_rope_utils.py:" in where
    assert text == (
        "error: control flow or a size depends on the values of a tensor, not on shapes\n"
        "    if seq_len > max_seq_len_cached:  # growth\n"
        "  hint: compute both ways and choose with torch.where, or keep the size fixed"
    )


def test_what_a_session_is_asked_for() -> None:
    with rc.Session(cached(Rotary, "ring=2")[1]) as session:
        session.extend(ids(50))
        for tokens, text in (
            (ids(31), ("error: the cache is for 80 tokens: 50 are in it, and 31 more do not fit\n"
                      "  hint: compile with a larger cache, or rewind the session")),
            (ids(3, batch=2), ("error: input 'ids' has 2 sequences, the session is for 1\n"
                              "  hint: open another session for another batch")),
        ):
            with pytest.raises(rc.RingCompileError) as refused:
                session.extend(tokens)
            assert str(refused.value) == text
    with rc.Session(rc.transform(captured(Rotary)[1], "ring=2")) as session:
        with pytest.raises(rc.RingCompileError) as refused:
            session.extend(ids(3))
        assert str(refused.value) == (
            "error: the program was compiled without a cache\n"
            "  hint: pass cache=N to transform, or --cache N on the command line"
        )
