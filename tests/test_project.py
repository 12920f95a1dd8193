"""The project's own plumbing: make targets, the CI script, the pins."""

import itertools
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = ["help", "setup", "demo", "test", "test-all", "lint", "golden", "bench", "clean"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT, env=os.environ | {"MAKEFLAGS": ""}, capture_output=True, text=True, check=True,
    ).stdout
    assert re.findall(r"(?m)^  ([a-z-]+)  +\S", listed) == TARGETS


FAKE = """#!/bin/sh
# In place of .venv/bin/python: says which tool it is asked for, and fails if that one is to fail.
for tool in ruff mypy pytest; do
    case "$*" in "-m $tool"*) echo "$tool said so"; test "$FAILS" != "$tool"; exit;; esac
done
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("fails", ["", "ruff", "mypy", "pytest"])
def test_make_test_fails_where_one_of_its_tools_does(fails: str, tmp_path: Path) -> None:
    """mypy runs beside the tests."""
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "--no-print-directory", "--old-file=setup", "test", f"PY={python}"],
        cwd=ROOT, env=os.environ | {"MAKEFLAGS": "", "FAILS": fails}, capture_output=True,
        text=True, check=False,
    )
    assert (done.returncode == 0) == (not fails), done.stderr
    ran = re.findall(r"(?m)^(\w+) said so$", done.stdout)
    assert ran == (["ruff"] if fails == "ruff" else ["ruff", "pytest", "mypy"])


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "make test"


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = set(re.findall(r"(?m)^([\w-]+)==", constraints))
    assert {re.match(r"[\w-]+", name)[0] for name in direct} <= pinned
