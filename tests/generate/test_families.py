"""Small models of Hugging Face families, turn by turn, against the model on all tokens so far."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ringcompile as rc

transformers = pytest.importorskip("transformers")
catalogue = pytest.importorskip("tests.families.catalogue")
trial = pytest.importorskip("tests.families.trial")

CACHE, LENGTH, TURNS = 32, 27, (1, 1, 10, 1)
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neo",
    "gpt_neox", "falcon", "opt", "diffllama", "mixtral", "qwen2_moe", "olmoe", "granitemoe",
    "gpt_oss", "deepseek_v2", "deepseek_v3", "llama4",
)
# The masks of these hide later keys with numbers that are added, which is not proved to hide them.
UNPROVED = ("bloom", "falcon-alibi")


def compiled(name: str, spec: str, batch: int) -> tuple[Any, Any, rc.ParallelProgram]:
    family = catalogue.FAMILIES[name]
    module = family.build()
    program = rc.capture(module, (), trial._inputs(family, 24, batch))
    return family, module, rc.transform(program, spec, cache=CACHE)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", ["ring=4", "pp=2"])
def test_families(name: str, spec: str) -> None:
    family, module, parallel = compiled(name, spec, 1)
    _hold(family, module, parallel, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama4"])
def test_padded_batches(name: str) -> None:
    """Two sequences, one of them padded on the left."""
    family, module, parallel = compiled(name, "ring=2,tp=2", 2)
    _hold(family, module, parallel, 2)


@torch.no_grad()
def _hold(family: Any, module: Any, parallel: rc.ParallelProgram, batch: int) -> None:
    inputs = trial._inputs(family, LENGTH, batch)
    expected = trial.reference(module, inputs)["logits"]
    real = inputs.get("attention_mask", torch.ones(batch, LENGTH)).bool()
    allowed = 2e-5 * max(1.0, float(expected.abs().max()))
    prompt = LENGTH - sum(TURNS)
    with rc.Session(parallel, check_types=True) as session:
        first = session.extend({name: x[:, :prompt] for name, x in inputs.items()}, last=True)
        assert float((first - expected[:, prompt - 1 : prompt]).abs().max()) <= allowed
        for new in TURNS:
            now = slice(session.length, session.length + new)
            found = session.extend({name: x[:, now] for name, x in inputs.items()})
            apart = ((found - expected[:, now]).abs() * real[:, now, None]).max()
            assert float(apart) <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("name", UNPROVED)
def test_masks_that_are_not_proved_to_be_causal(name: str) -> None:
    with pytest.raises(rc.RingCompileError, match="must not see keys behind its query"):
        compiled(name, "ring=2", 1)
