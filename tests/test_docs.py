"""The documentation: links lead somewhere, commands exist, pages from docstrings are current."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

from ringcompile.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")


def name(path: Path) -> str:
    return path.name


def commands(text: str) -> Iterator[str]:
    """What stands behind `$ ` in blocks, and in a table between backticks."""
    for _, body in FENCE.findall(text):
        yield from re.findall(r"(?m)^\$ (ringcompile .*?)(?:  +#.*)?$", body)
    yield from re.findall(r"`(?:torchrun [^`]*-m )?(ringcompile (?:run|transform) [^`]*)`", text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", FENCE.sub("", page.read_text())):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_are_understood(page: Path) -> None:
    """Each is parsed by the command line itself; nothing is run."""
    for line in commands(page.read_text()):
        words = shlex.split(line)[1:]
        command = cli.commands[words[0]]
        try:
            command.make_context(words[0], list(words[1:]))
        except click.UsageError as error:
            raise AssertionError(f"{page.name}: {line}: {error.message}") from None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_is_python(page: Path) -> None:
    for language, body in FENCE.findall(page.read_text()):
        if language == "python" and not re.match(r"(class )?\w+(\(.*)?$", body.split("\n")[0]):
            ast.parse(body)


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "generate_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_from_docstrings_are_current() -> None:
    """`python docs/generate_pages.py` writes them."""
    for page, write in generator().PAGES.items():
        assert (ROOT / "docs" / page).read_text() == write(), page


def test_files_that_pages_name_exist() -> None:
    """Paths from the root of the checkout, or of the package; bare names anywhere in it."""
    every = {path.relative_to(ROOT).as_posix() for folder in ("ringcompile", "tests", "docs")
             for path in (ROOT / folder).rglob("*")}
    named = set()
    for page in (ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"):
        text = page.read_text()
        named |= set(re.findall(r"`([\w/]+\.(?:py|md|json|png))`", text))
        named |= {found.rstrip("/") for found in re.findall(r"`((?:\w+/)+)`", text)}
    made_by_users = {"reference.json"}
    missing = {name for name in named - made_by_users
               if not any(f"/{path}".endswith(f"/{name}") for path in every)}
    assert not missing
    assert "runtime/exchange.py" in named
