"""What `python -m benchmarks.structure` counts, on a small tree of its own, and that it runs."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.structure import Tree, main, rows

FILES = {
    "passes/one.py": (
        "from ringcompile.ir.two import Call\n"
        'TABLE = {"aten.add.Tensor": 1}\n'
        "class Step: ...\n"
        "def long(order, *, stages=()):\n" + "    x = 1\n" * 41
    ),
    "ir/two.py": (
        'NAMES = frozenset({"ringcompile.merge.default"})\n'
        'WORDS = {"add": 1}\n'
        "class Step: ...\n"
        "class Call: ...\n"
    ),
}


def test_counts(tmp_path: Path) -> None:
    for name, text in FILES.items():
        path = tmp_path / "ringcompile" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    found = rows(Tree(tmp_path))
    assert found["lines of `passes/`"] == "45"
    assert found["tables keyed by op"] == "2"
    assert found["places that spell one of seven options"] == "2"
    assert found["pairs of folders with an import between them"] == "1"
    assert found["longest file, longest function (lines)"] == "45, 42"
    assert found["files over 400 lines, functions over 40"] == "0, 1"
    assert found["names that several classes share"] == "1, Step"


@pytest.mark.slow
def test_the_command_prints_a_table() -> None:
    printed = CliRunner().invoke(main).output
    assert printed.startswith("| | now |")
    assert "| lines of `passes/` |" in printed
