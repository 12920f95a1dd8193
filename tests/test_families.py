"""Small models of many Hugging Face families: compiled right, or refused, and on record."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from ringcompile.errors import RingCompileError, SourceLocation
from tests.families import products, table, trial
from tests.families.catalogue import FAMILIES
from tests.families.family import Family
from tests.families.health import problems
from tests.families.sweep import sweep
from tests.families.trial import CRASHED, MATCHED, REFUSED, WRONG, Outcome, Trial, try_family
from tests.support import captured

# One of each kind, quick to compile.
FAST = ["gemma2", "vit", "bart"]
LEAST_MATCHED = 0.9


@pytest.mark.parametrize("name", FAST)
def test_matches_one_device(name: str) -> None:
    found = try_family(FAMILIES[name])
    assert found.plain.kind == MATCHED, table.terminal(found)
    assert found.padding is None or found.padding.kind == MATCHED, table.terminal(found)
    assert found.masks


@pytest.mark.parametrize("name", FAST)
def test_what_should_matter_does(name: str) -> None:
    assert problems(FAMILIES[name]) == []


def test_a_window_that_is_too_long_would_be_noticed() -> None:
    family = replace(FAMILIES["gemma2"], matters={"sliding_window": trial.LENGTH + 1})
    assert problems(family) == []
    assert problems(replace(family, matters={"sliding_window": 8})) == [
        "sliding_window=8 changes nothing"
    ]
    assert problems(replace(family, first_seen=False)) == ["the last position sees the first: True"]


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> Family:
    """A family whose model is built and captured once for all tests of what is said of a trial."""
    monkeypatch.setattr(trial, "capture", captured)
    monkeypatch.setattr(Family, "build", lambda family: built(family.name))
    return FAMILIES["gpt2"]


@cache
def built(name: str) -> nn.Module:
    return _BUILD(FAMILIES[name])


_BUILD = Family.build


@pytest.mark.parametrize(
    ("fault", "kind", "reason", "line"),
    [
        (RingCompileError("no", location=SourceLocation("/x/transformers/models/a.py", 3)),
         REFUSED, "no", "transformers/models/a.py:3"),
        (RingCompileError("see /y/ringcompile/mesh.py"), REFUSED, "see ringcompile/mesh.py", ""),
        (KeyError("/z/torch/a.py"), CRASHED, "KeyError: '/z/torch/a.py'", None),
    ],
    ids=["refused", "refused without a line", "crashed"],
)
def test_exceptions_become_outcomes(
    fault: Exception, kind: str, reason: str, line: str | None, gpt2: Family,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise fault

    monkeypatch.setattr(trial, "transform", fails)
    found = try_family(gpt2)
    assert (found.plain.kind, found.plain.reason) == (kind, reason)
    assert line is None or found.plain.line == line
    assert found.padding == found.plain


@pytest.mark.parametrize(
    ("where", "plain", "padding"),
    [((0, 0), WRONG, WRONG), ((1, 0), MATCHED, MATCHED), ((1, -1), MATCHED, WRONG)],
    ids=["a real token", "a padded one", "a real one of the padded sequence"],
)
def test_outputs_that_differ_are_wrong(
    where: tuple[int, int], plain: str, padding: str, gpt2: Family,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = trial.reference

    def slightly_off(model: Any, inputs: Any) -> dict[str, torch.Tensor]:
        outputs = original(model, inputs)
        if where[0] < outputs["logits"].shape[0]:
            outputs["logits"][where] += 1e-3
        return outputs

    monkeypatch.setattr(trial, "reference", slightly_off)
    found = try_family(gpt2)
    assert found.padding is not None
    assert (found.plain.kind, found.padding.kind) == (plain, padding)


def test_nan_and_missing_outputs_are_wrong() -> None:
    family, value = FAMILIES["gpt2"], torch.zeros(1, 3)
    for outputs in ({"x": value * torch.nan}, {}, {"x": value, "y": value}, {"x": value[:, :2]}):
        assert trial.judged(family, outputs, {"x": value}, {}).kind == WRONG
    assert trial.judged(family, {"x": value}, {"x": value}, {}).kind == MATCHED


def test_a_trial_without_end_is_stopped() -> None:
    def forever() -> Outcome:
        while True:
            pass

    assert trial.guarded(forever, 1) == Outcome(
        CRASHED, reason="_TimeoutError: longer than 1 s", line=trial.guarded(forever, 1).line
    )


def test_a_family_counts_by_its_worse_outcome() -> None:
    trials = {
        "a": Trial("a", Outcome(MATCHED), Outcome(WRONG)),
        "b": Trial("b", Outcome(MATCHED)),
        "c": Trial("c", Outcome(REFUSED), Outcome(MATCHED)),
    }
    assert table.summary(trials) == "tried 3: 1 matched, 1 refused, 1 wrong, 0 crashed"


def test_the_page_gives_reason_and_line_without_figures() -> None:
    reason = "aten.rand.default has no rule. See elsewhere. And more"
    assert table.verdict(Outcome(REFUSED, reason=reason, line="a.py:3")) == (
        "**refused**: aten.rand.default has no rule (`a.py:3`)"
    )
    assert table.verdict(Outcome(MATCHED, 4.2e-7)) == MATCHED
    assert table.verdict(Outcome(WRONG, 0.3, "'x' differs")) == "**wrong**: 'x' differs"
    assert table.verdict(None) == "-"


def test_the_catalogue_is_broad() -> None:
    assert len(FAMILIES) >= 65
    assert all(family.name == name for name, family in FAMILIES.items())
    assert sum(len(families) for families in table.CHAPTERS.values()) == len(FAMILIES)


def test_the_page_lists_every_family() -> None:
    listed = rows(table.PAGE.read_text(encoding="utf-8"))
    assert [line.split(" | ")[0].removeprefix("| ") for line in listed] == list(FAMILIES)


def rows(page: str) -> list[str]:
    """The rows of all tables, without headers; versions may differ from those at hand."""
    lines = [x for x in page.partition(table.PRODUCTS)[0].splitlines() if x.startswith("| ")]
    return [line for line in lines if not line.startswith(("| family |", "| --- |"))]


@pytest.fixture(scope="module")
def all_trials() -> dict[str, Trial]:
    return {found.family: found for found in sweep(tuple(FAMILIES))}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_families(all_trials: dict[str, Trial]) -> None:
    found = table.counts(all_trials)
    bad = [table.terminal(t) for t in all_trials.values()
           if {WRONG, CRASHED} & {o.kind for o in (t.plain, t.padding) if o}]
    assert bad == []
    assert found[MATCHED] >= LEAST_MATCHED * len(FAMILIES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_is_up_to_date(all_trials: dict[str, Trial]) -> None:
    assert rows(table.page(all_trials)) == rows(table.PAGE.read_text(encoding="utf-8")), (
        "`python -m tests.families --write` makes it anew"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_what_should_matter_does_everywhere(family: Family) -> None:
    assert problems(family) == []


def test_rows_of_the_page_can_be_written_anew() -> None:
    """Nothing changes where nothing is tried again; a row that changes is counted anew."""
    text = table.PAGE.read_text(encoding="utf-8")
    assert table.updated(text, {}) == text
    refused = Trial("llama", Outcome(REFUSED, reason="for a test"))
    changed = table.updated(text, {"llama": refused})
    assert "**refused**: for a test" in changed
    before, after = (re.search(r"(\d+) matched", t) for t in (text, changed))
    assert before
    assert after
    assert int(after[1]) == int(before[1]) - 1


# -- under products of axes ------------------------------------------------------------------------


def test_a_record_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, matched = tmp_path / "record.jsonl", asdict(Outcome(MATCHED))
    tried = [{"family": "gpt2", "spec": spec, **matched} for spec in products.SPECS]
    half = [{"family": "bert", "spec": spec, **matched} for spec in products.SPECS[:3]]
    again = {"family": "gpt2", "spec": "tp=4", **asdict(Outcome(REFUSED, reason="no", line="a:1"))}
    path.write_text("".join(json.dumps(entry) + "\n" for entry in (*tried, *half, again)))
    record = products.read_record(path)
    assert products.missing(record, ["gpt2", "bert", "vit"]) == ["bert", "vit"]
    assert record["gpt2"]["tp=4"].kind == REFUSED
    text = products.chapter(record)
    assert "2 families under 9 specs: tried 12: 11 matched, 1 refused, 0 wrong, 0 crashed" in text
    assert "| gpt2 | matched | **refused** (1) | matched |" in text
    assert text.endswith("1. no (`a:1`)\n")


def test_the_chapter_of_products_is_its_own() -> None:
    """Rows of other chapters are written anew without it, and it without them."""
    page = table.PAGE.read_text(encoding="utf-8")
    record = {"llama": {"tp=2": Outcome(MATCHED)}}
    text = products.with_chapter(page, record)
    assert table.updated(text, {}) == text
    assert products.with_chapter(text, record) == text
    assert rows(text) == rows(page)


@pytest.mark.slow
def test_products_of_a_family() -> None:
    found = dict(products.try_specs(FAMILIES["gpt2"]))
    assert {outcome.kind for outcome in found.values()} == {MATCHED}
    assert list(found) == list(products.SPECS)


def test_an_error_behind_transform_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any, **kwargs: Any) -> None:
        raise RingCompileError("too late")

    monkeypatch.setattr(products, "run", refuses)
    (found,) = products.try_specs(FAMILIES["gpt2"], ["tp=2"])
    assert found[1] == Outcome(CRASHED, reason="refused behind transform: too late")
