"""Small diffusion transformers of diffusers: compiled right, or refused, and on record."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install '.[dev]'")

from tests.families import diffusion, table
from tests.families.denoisers import BY_NAME, DENOISERS
from tests.families.diffusion import SPECS, Trial, masks_matter, try_denoiser
from tests.families.trial import CRASHED, MATCHED, REFUSED, WRONG, Outcome

# One of each kind: one attention over text and image; attention over text, with a mask.
FAST = ["sd3", "pixart"]


@pytest.mark.parametrize("name", FAST)
def test_matches_one_device(name: str) -> None:
    found = try_denoiser(BY_NAME[name], ["ring=4", "ring=2,ulysses=2"])
    assert {outcome.kind for outcome in found.outcomes.values()} == {MATCHED}, found
    assert found.split >= 10  # what is of image tokens, behind the first attention


def test_the_text_matters() -> None:
    assert masks_matter(BY_NAME["pixart"])


def test_the_page_lists_every_family() -> None:
    listed = diffusion.rows(table.PAGE.read_text(encoding="utf-8"))
    assert [line.split(" | ")[0].removeprefix("| ") for line in listed] == list(BY_NAME)


def test_the_chapter_is_its_own() -> None:
    """Written anew it leaves all others as they are; a reason stands below the table once."""
    page = table.PAGE.read_text(encoding="utf-8")
    refused = Outcome(REFUSED, reason="no", line="a.py:3")
    outcomes = dict.fromkeys(SPECS, Outcome(MATCHED)) | {"tp=2": refused, "ulysses=2": refused}
    text = diffusion.chapter([Trial("sd3", outcomes, 34, 10, 2), Trial("dit", outcomes, 1, 1)])
    assert "6 models" not in text
    assert "2 models of diffusers under 6 specs, 0 matched under all of them" in text
    assert text.count("**refused** (1)") == 4
    assert text.endswith("1. no (`a.py:3`)\n")
    changed = table.with_chapter(page, diffusion.CHAPTER, text)
    before, _, own = page.partition(diffusion.CHAPTER)
    behind = own.partition("\n## ")[2]
    assert changed == before + text + (f"\n## {behind}" if behind else "")


@pytest.fixture(scope="module")
def all_trials() -> list[Trial]:
    return list(diffusion.sweep(tuple(BY_NAME)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_families(all_trials: list[Trial]) -> None:
    bad = [trial for trial in all_trials
           if {WRONG, CRASHED} & {outcome.kind for outcome in trial.outcomes.values()}]
    assert bad == []
    matched = [trial.name for trial in all_trials
               if {outcome.kind for outcome in trial.outcomes.values()} == {MATCHED}]
    assert len(matched) >= len(BY_NAME) - 3, matched


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_page_is_up_to_date(all_trials: list[Trial]) -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    assert diffusion.rows(diffusion.chapter(all_trials)) == diffusion.rows(page), (
        "`python -m tests.families.diffusion --write` makes it anew"
    )


@pytest.mark.slow
@pytest.mark.parametrize("denoiser", DENOISERS, ids=lambda denoiser: denoiser.name)
def test_the_text_matters_everywhere(denoiser) -> None:
    assert masks_matter(denoiser)
