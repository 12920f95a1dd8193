"""Rotary embeddings of Hugging Face that choose their frequencies by the length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from tests.support import difference, run

SWITCH = 16
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 16, "vocab_size": 50, "max_position_embeddings": 64,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0,
    "rope_theta": 1e4, "original_max_position_embeddings": SWITCH,
}  # fmt: skip


def sharp(model: nn.Module) -> Any:
    """Weights so large that positions matter."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="module")
def phi3() -> Any:
    config = transformers.Phi3Config(
        **SIZES, original_max_position_embeddings=SWITCH, rope_scaling=LONG, pad_token_id=0,
        use_cache=False,
    )
    return sharp(transformers.Phi3ForCausalLM(config))


def ids(length: int) -> Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(length))


def test_longrope_takes_the_table_for_the_length(phi3: Any) -> None:
    """Captured below the switch, run below, at and above it."""
    buffer = phi3.model.rotary_emb.inv_freq
    before = buffer.clone()
    program = capture(phi3, (ids(13),))
    assert program.notes == ()
    assert phi3.model.rotary_emb.inv_freq is buffer
    assert torch.equal(buffer, before)
    parallel = transform(program, "ring=3")
    for length in (9, SWITCH, SWITCH + 1, 40):
        with torch.no_grad():
            expected = phi3(ids(length))
        assert difference(run(parallel, (ids(length),)).outputs, expected) < 2e-5


def test_the_tables_matter(phi3: Any) -> None:
    """The same tokens, with the frequencies for short sequences and for long ones."""
    positions = torch.arange(13)[None]
    with torch.no_grad():
        short = phi3(ids(13), position_ids=positions).logits
        long = phi3(ids(13), position_ids=positions + SWITCH).logits
    assert difference(long, short) > 1e-2


def test_scratch_buffers() -> None:
    """What is written before it is read is no state; what is read first is."""

    class Scratch(nn.Module):
        def __init__(self, reads: bool) -> None:
            super().__init__()
            self.reads = reads
            self.register_buffer("kept", torch.zeros(8))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scale = x.shape[1] * torch.ones(8)
            if self.reads:
                scale = scale + self.kept
            self.kept.copy_(scale)
            return x * self.kept, x

    x = torch.randn(2, 13, 8)
    parallel = transform(capture(Scratch(reads=False).eval(), (x,)), "ring=2")
    given = torch.randn(2, 22, 8)
    found = run(parallel, (given,)).outputs
    assert difference(found, (given * 22, given)) < 2e-6
    with pytest.raises(RingCompileError, match="the model changes 'kept' while it runs"):
        capture(Scratch(reads=True).eval(), (x,))


def test_dynamic_ntk_is_refused_at_its_branch() -> None:
    """Its tables grow with the longest sequence so far, and transformers branches on data."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_scaling=scaling))
    with pytest.raises(RingCompileError) as caught:
        capture(model.eval(), (ids(13),))
    assert caught.value.message == (
        "control flow or a size depends on the values of a tensor, not on shapes"
    )
    assert caught.value.location is not None
    assert caught.value.location.text.startswith("if seq_len > max_seq_len_cached")
