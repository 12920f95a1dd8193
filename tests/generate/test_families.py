"""Small models of Hugging Face families, token by token, against the model on all tokens so far."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ringcompile as rc

pytest.importorskip("transformers")

from tests.families import trial
from tests.families.catalogue import FAMILIES
from tests.families.sweep import DIED, each
from tests.families.trial import CRASHED, REFUSED, WRONG, Outcome
from tests.generate import table
from tests.generate.models import Learned, captured, ids
from tests.generate.trial import (
    IDENTICAL,
    SPECS,
    UNMATCHED,
    Text,
    candidates,
    expected_text,
    outcome_of,
    try_generating,
)

CACHE, LENGTH, TURNS = 32, 27, (1, 1, 10, 1)
LEAST_IDENTICAL = 0.9
PADDED = (
    "llama", "mistral", "qwen2", "gemma2", "gemma3", "gpt2", "gpt_neo", "falcon", "bloom", "opt",
    "diffllama", "mixtral", "qwen2_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3",
)


@pytest.fixture(scope="module")
def all_texts() -> dict[str, Text]:
    texts = each(candidates(), 2, 300, try_generating,
                 lambda name: Text(name, dict.fromkeys(SPECS, DIED)))
    return {text.family: text for text in texts}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_family(all_texts: dict[str, Text]) -> None:
    """The same tokens as the model run whole, at ring=4, tp=2 and pp=2; or refused."""
    kinds = {name: table.kind_of(table.row(text)) for name, text in all_texts.items()}
    assert {name for name, kind in kinds.items() if kind in (WRONG, CRASHED)} == set()
    matched = [kind for kind in kinds.values() if kind != UNMATCHED]
    assert matched.count(IDENTICAL) >= LEAST_IDENTICAL * len(matched)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_page_is_up_to_date(all_texts: dict[str, Text]) -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.rows_of(table.written(page, all_texts)) == table.rows_of(page), (
        "`python -m tests.generate --write` makes it anew"
    )


def test_the_page_lists_every_candidate() -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    assert list(table.rows_of(page)) == candidates()
    assert table.written(page, {}) == page
    kinds = [table.kind_of(cells) for cells in table.rows_of(page).values()]
    matched = [kind for kind in kinds if kind != UNMATCHED]
    assert not {WRONG, CRASHED} & set(matched)
    assert matched.count(IDENTICAL) >= LEAST_IDENTICAL * len(matched)


def test_rows_are_written_anew_and_counted() -> None:
    refused = Outcome(REFUSED, reason="for a test. And more", line="a.py:3")
    page = table.written("# Page\n", {
        "llama": Text("llama", dict.fromkeys(SPECS, Outcome(IDENTICAL, 1e-6))),
        "mistral": Text("mistral", dict.fromkeys(SPECS, refused)),
        "gpt1": Text("gpt1", dict.fromkeys(SPECS, Outcome(UNMATCHED))),
    })
    assert "| llama | identical | identical | identical |" in page
    assert "| mistral | **refused**: for a test (`a.py:3`) | likewise | likewise |" in page
    assert "| gpt1 | - | - | - |" in page
    counted = "Of 2 that are matched as a whole sequence: 1 identical, 1 refused, 0 wrong"
    assert counted in page
    wrong = dict.fromkeys(SPECS, Outcome(IDENTICAL)) | {"tp=2": Outcome(WRONG, 1.0, "differs")}
    page = table.written(page, {"llama": Text("llama", wrong)})
    assert "0 identical, 1 refused, 1 wrong" in page
    assert table.written(page, {}) == page


def test_another_text_is_wrong() -> None:
    """The trial notices logits that are off at one step, and another next token."""
    module, program = captured(Learned)
    parallel, expected = rc.transform(program, "ring=2", cache=48), _model_text(module)
    assert outcome_of(parallel, expected, [0]).kind == IDENTICAL
    expected.logits[20, 3] += 1e-3
    assert "new token 20 differ" in outcome_of(parallel, expected, [0]).reason
    expected = _model_text(module)
    expected.tokens[0, 15] = (expected.tokens[0, 15] + 1) % 40
    assert outcome_of(parallel, expected, [0]).kind == WRONG


def _model_text(module: Any) -> Any:
    class Named:
        def __call__(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": module(ids)}

    return expected_text(Named(), {"ids": ids(9)}, lambda model, inputs: model(**inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", PADDED)
def test_padded_batches(name: str) -> None:
    """Two sequences, one of them padded on the left."""
    family = FAMILIES[name]
    module = family.build()
    program = rc.capture(module, (), trial._inputs(family, 24, 2))
    _hold(family, module, rc.transform(program, "ring=2,tp=2", cache=CACHE))


@torch.no_grad()
def _hold(family: Any, module: Any, parallel: rc.ParallelProgram) -> None:
    inputs = trial._inputs(family, LENGTH, 2)
    expected = trial.reference(module, inputs)["logits"]
    real = inputs["attention_mask"].bool()
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
