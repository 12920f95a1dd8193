"""SmolLM2's own text: as Hugging Face generates it with its cache, on many layouts."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ringcompile as rc
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram
from tests.support import TOLERANCE, difference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
transformers = pytest.importorskip("transformers")
real_models = pytest.importorskip("real_models")
SPECS = ["ring=2", "ring=4", "tp=3", "pp=2", "ulysses=3", "ring=2,tp=3", "pp=2,ring=2"]
PROMPTS = (1, 3, 31, 32, 33, 700)
LONGEST = max(PROMPTS)
NEW, MANY = 24, 256


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
def compiled_padded(spec: str) -> ParallelProgram:
    """Of a program that takes a mask and positions too."""
    model, _, text = smollm2()
    ids = text[:, :48].view(2, 24)
    ones = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": ones, "position_ids": ones.cumsum(1) - 1}
    return rc.transform(rc.capture(model, (), inputs), spec, cache=1024)


@lru_cache
def by_transformers(prompt: int, new: int) -> torch.Tensor:
    model, _, text = smollm2()
    return model.generate(
        text[:, :prompt], max_new_tokens=new, do_sample=False, use_cache=True,
        eos_token_id=None, pad_token_id=0,
    )


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_tokens(spec: str) -> None:
    """Also the likeliest tokens of the model run whole on all of them."""
    text = smollm2()[2]
    with rc.Session(compiled(spec)) as session:
        for prompt in PROMPTS:
            session.reset()
            expected = by_transformers(prompt, NEW)
            logits = [session.extend(text[:, :prompt], last=True)]
            for token in expected[:, prompt:-1].split(1, 1):
                logits.append(session.extend(token))
            hold(torch.cat(logits, 1), expected, prompt)


@pytest.mark.parametrize("spec", SPECS)
def test_256_tokens_after_six_prompts_at_once(spec: str) -> None:
    """Rows of one batch, the shorter ones padded on the left; each as it is generated alone."""
    expected = [by_transformers(prompt, MANY) for prompt in PROMPTS]
    inputs = padded(expected)
    with rc.Session(compiled_padded(spec)) as session:
        logits = [session.extend(share(inputs, 0, LONGEST), last=True)]
        for place in range(LONGEST, LONGEST + MANY - 1):
            logits.append(session.extend(share(inputs, place, place + 1)))
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, expected, strict=True)):
        hold(torch.cat([x[row : row + 1] for x in logits], 1), tokens, prompt)


@pytest.mark.parametrize("spec", SPECS)
def test_256_tokens_on_processes(spec: str) -> None:
    expected = [by_transformers(prompt, MANY) for prompt in PROMPTS]
    prompts = share(padded(expected), 0, LONGEST)
    found = rc.generate(
        compiled_padded(spec), prompts["input_ids"], MANY,
        attention_mask=prompts["attention_mask"], backend="gloo",
    )
    for row, tokens in zip(found, expected, strict=True):
        assert torch.equal(row[LONGEST:], tokens[0, -MANY:])


def test_256_tokens_of_a_prompt_in_chunks() -> None:
    text = smollm2()[2][:, :LONGEST]
    found = rc.generate(compiled("ring=2"), text, MANY, chunk=256, backend="gloo")
    assert torch.equal(found, by_transformers(LONGEST, MANY))


def hold(logits: torch.Tensor, expected: torch.Tensor, prompt: int) -> None:
    """Logits [1, new, vocabulary] against the model run whole, and its likeliest tokens."""
    with torch.no_grad():
        whole = smollm2()[0](expected[:, :-1], use_cache=False).logits[:, prompt - 1 :]
    assert difference(logits, whole) <= TOLERANCE
    assert torch.equal(logits.argmax(-1), expected[:, prompt:])
    assert torch.equal(whole.argmax(-1), expected[:, prompt:])


def padded(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The texts as rows that end together, with the mask and the positions that they then have."""
    widths = [LONGEST + MANY - text.shape[1] for text in texts]
    ids = torch.cat([F.pad(text, (width, 0)) for text, width in zip(texts, widths, strict=True)])
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(widths)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def share(inputs: dict[str, torch.Tensor], first: int, end: int) -> dict[str, torch.Tensor]:
    return {name: x[:, first:end] for name, x in inputs.items()}
