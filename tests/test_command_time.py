"""A small run of `python -m benchmarks.command_time`, and that its cases are commands."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.command_time import CASES, least, timed
from ringcompile.cli import cli


def test_a_small_run() -> None:
    found = least(
        "transform gpt-tiny --parallel ring=2 --no-weights -o {folder}/out",
        "simulate {folder}/out --cluster cpu --seq 64", rounds=1, layers=1,
    )
    assert min(found.cpu, found.wall) > 0


def test_a_command_that_fails_is_not_timed(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        timed("simulate {folder}/nothing --cluster cpu", tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_cases_are_commands_with_their_options(case: str) -> None:
    for words in filter(None, CASES[case]):
        name, *given = words.format(folder="out").split()
        cli.commands[name].make_context(name, given)
