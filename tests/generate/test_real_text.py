"""SmolLM2's own text: as Hugging Face generates it with its cache, on many layouts."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import ringcompile as rc
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram
from tests.support import TOLERANCE, difference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
transformers = pytest.importorskip("transformers")
real_models = pytest.importorskip("real_models")
PROMPTS = (1, 3, 31, 32, 33, 700)
NEW = 24


@lru_cache
def smollm2() -> tuple[Any, Program, torch.Tensor]:
    folder = real_models.smollm2_checkpoint(ROOT / "build")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = real_models.english_text(1000, tokenizer)
    model.config.use_cache = False
    return model, rc.capture(model, (text[:, :24],)), text


@lru_cache
def compiled(spec: str) -> ParallelProgram:
    return rc.transform(smollm2()[1], spec, cache=1024)


@lru_cache
def by_transformers(prompt: int, new: int) -> torch.Tensor:
    model, _, text = smollm2()
    return model.generate(
        text[:, :prompt], max_new_tokens=new, do_sample=False, use_cache=True,
        eos_token_id=None, pad_token_id=0,
    )


@pytest.mark.parametrize(
    "spec", ["ring=2", "ring=4", "tp=3", "pp=2", "ulysses=3", "ring=2,tp=3", "pp=2,ring=2"]
)
def test_the_same_tokens(spec: str) -> None:
    """Also the likeliest tokens of the model run whole on all of them."""
    model, _, text = smollm2()
    with rc.Session(compiled(spec)) as session:
        for prompt in PROMPTS:
            session.reset()
            expected = by_transformers(prompt, NEW)
            logits = [session.extend(text[:, :prompt], last=True)]
            for token in expected[:, prompt:-1].split(1, 1):
                logits.append(session.extend(token))
            found = torch.cat(logits, 1)
            with torch.no_grad():
                whole = model(expected[:, :-1], use_cache=False).logits[:, prompt - 1 :]
            assert difference(found, whole) <= TOLERANCE
            assert torch.equal(found.argmax(-1), expected[:, prompt:])
            assert torch.equal(whole.argmax(-1), expected[:, prompt:])


@pytest.mark.parametrize("prompt", [33, 700])
def test_256_tokens_on_processes(prompt: int) -> None:
    text = smollm2()[2][:, :prompt]
    found = rc.generate(compiled("ring=2"), text, 256, chunk=256, backend="gloo")
    assert torch.equal(found, by_transformers(prompt, 256))
