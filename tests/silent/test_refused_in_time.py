"""What cannot be run is refused by `transform`; models of a fixed length run on tp as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ringcompile as rc
from ringcompile.errors import RingCompileError
from tests.silent.small import WIDTH, Attention, matches, normal, with_gain
from tests.support import compiled, some_fast


class Patches(nn.Module):
    """17 places, a table of positions and attention both ways; `rows` of the table are cut out."""

    def __init__(self, rows: int = 17) -> None:
        super().__init__()
        self.patch, self.first = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, rows, WIDTH))
        self.attention, self.head = Attention(causal=False), nn.Linear(WIDTH, 7)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        with_gain(self)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.positions[:, -17:]
        x = x + self.attention(x)
        return self.head(x + self.down(torch.relu(self.up(x))))


SPECS = ["ring=2,tp=2", "ulysses=2,tp=2", "tp=2", "ring=2", "pp=2,time=4", "ring=2,ulysses=2,tp=2"]


@pytest.mark.parametrize(
    ("rows", "spec"), some_fast([17, 20], SPECS, fast=lambda rows, spec: spec == SPECS[0])
)
def test_a_fixed_length(rows: int, spec: str) -> None:
    matches(Patches(rows), spec, lambda n: (normal(2, 3, 16, 16, seed=n),), lengths=(1,))


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ring=2,tp=2", "ulysses=2,tp=2"])
@pytest.mark.parametrize("kind", ["ViT", "SiglipVision"])
def test_images_of_transformers(kind: str, spec: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=32, patch_size=8,
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    x = torch.randn(2, 3, 32, 32)
    found = rc.run(compiled(model, (x,), spec), (x,))
    with torch.no_grad():
        expected = model(x)
    assert torch.allclose(found["last_hidden_state"], expected.last_hidden_state, atol=1e-5)


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "doge in time": (
        "DogeForCausalLM",
        {"num_key_value_heads": 2, "keep_window_size": 16, "num_hidden_layers": 2,
         "num_attention_heads": 4, "intermediate_size": 48},
        "time=2", "along time is not known",
    ),
    "prophetnet on groups of ranks": (
        "ProphetNetForConditionalGeneration",
        {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_encoder_attention_heads": 4,
         "num_decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
         "num_buckets": 8, "relative_max_distance": 16, "max_position_embeddings": 128},
        "tp=4", r"groups of ranks \(tp//2\)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_by_transform(kind: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    name, sizes, spec, reason = REFUSED[kind]
    config_class = getattr(transformers, name.split("For")[0] + "Config")
    config = config_class(vocab_size=60, hidden_size=32, **sizes)
    model = getattr(transformers, name)(config).eval()
    ids = torch.randint(0, 60, (2, 24))
    inputs = {"input_ids": ids}
    if "ConditionalGeneration" in name:
        inputs["decoder_input_ids"] = ids
    with pytest.raises(RingCompileError, match=reason) as caught:
        compiled(model, (), spec, {**inputs, "use_cache": False})
    assert caught.value.location is not None
    assert caught.value.location.line > 0
