"""Real weights on real text: SmolLM2-135M and the MiniLM sentence encoder."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from tests.support import TOLERANCE, difference, run

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
transformers = pytest.importorskip("transformers")
real_models = pytest.importorskip("real_models")

SENTENCES = [
    "A ring is a closed chain of ranks, each passing on what it was given.",
    "Short.",
    (
        "The quick brown fox jumps over the lazy dog, and then, because nobody stops it, it jumps "
        "back over the dog once more and runs into the forest before the rain begins."
    ),
    "Attention weighs every key by how well it fits the query.",
    "How far is it to the next station?",
]


@pytest.fixture(scope="module")
def minilm() -> Any:
    """The model, the sentences, and the program they are captured as."""
    folder = real_models.minilm_checkpoint(ROOT / "build")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    program = capture(model, (inputs["input_ids"],), {"attention_mask": inputs["attention_mask"]})
    return model, inputs, program


@pytest.mark.parametrize(
    "ranks", [4, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 8, 16))]
)
def test_sentence_embeddings(minilm: Any, ranks: int) -> None:
    """Sentences of different lengths, padded: hidden states of real tokens and mean embeddings."""
    model, inputs, program = minilm
    tokens = inputs["attention_mask"].bool()
    with torch.no_grad():
        reference = model(**inputs)
        expected = reference.last_hidden_state
        exact = model.double()(**inputs).last_hidden_state
        model.float()
    own = difference(expected[tokens].double(), exact[tokens])
    for order in ("contiguous", "zigzag"):
        found = run(transform(program, f"ring={ranks}", order=order), inputs).outputs
        hidden = found["last_hidden_state"]
        assert difference(hidden[tokens], expected[tokens]) <= TOLERANCE
        assert difference(hidden[tokens].double(), exact[tokens]) <= 2 * own
        assert difference(embeddings(hidden, tokens), embeddings(expected, tokens)) <= TOLERANCE
        assert difference(found["pooler_output"], reference.pooler_output) <= TOLERANCE


def embeddings(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean over real tokens, normalised: what sentence similarity is computed from."""
    weights = tokens[..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@cache
def smollm2(num_layers: int) -> Any:
    """The first layers of the model, the program, and the tokenizer."""
    folder = real_models.smollm2_checkpoint(ROOT / "build")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.config.use_cache = False
    del model.model.layers[num_layers:]
    model.config.num_hidden_layers = num_layers
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return model, capture(model, (torch.zeros(1, 24, dtype=torch.int64),)), tokenizer


@pytest.mark.parametrize(
    ("num_layers", "length", "ranks"),
    [(6, 203, 4), (30, 203, 4), (30, 4096, 2), (30, 4096, 16)],
)
@pytest.mark.slow  # to unpack the 4-bit weights takes half a minute; the encoder's are fast
def test_language_model(num_layers: int, length: int, ranks: int) -> None:
    model, program, tokenizer = smollm2(num_layers)
    ids = real_models.english_text(length, tokenizer)
    with torch.no_grad():
        expected = model(ids).logits
    found = run(transform(program, f"ring={ranks}"), (ids,)).outputs["logits"]
    assert difference(found, expected) <= TOLERANCE
    if length < 1000:
        with torch.no_grad():
            exact = model.double()(ids).logits
            model.float()
        own = difference(expected.double(), exact)
        assert difference(found.double(), exact) <= 2 * own
