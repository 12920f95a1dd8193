"""How the code is built, now and at a commit: `python -m benchmarks.structure [REVISION]`.

Prints a table in Markdown: lines of the large folders, tables keyed by op, places that spell an
option, imports between folders, the longest and the median file and function, and names that
several classes share. Everything is read off the syntax tree of the files; nothing is imported.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
FOLDERS = ("passes", "cost", "runtime", "ir", "capture")
# Options of a compilation that both trees know; each spelling of one by name is a place.
OPTIONS = (
    "order", "capacity", "tp_sequence", "stages", "microbatches", "gather_unknown", "overlap"
)
# An op as a key of a table: its name in quotes, or the op itself.
OP = re.compile(r"""["']?(aten|ringcompile|prims|_operator|torch\.ops)\.\w""")


class Tree:
    """The modules of one version of the package."""

    def __init__(self, root: Path) -> None:
        """Parses every module below `root`/ringcompile."""
        self.package = root / "ringcompile"
        self.files = {path: path.read_text() for path in sorted(self.package.rglob("*.py"))}
        self.parsed = {path: ast.parse(text) for path, text in self.files.items()}

    def lines(self, folder: str) -> int:
        """Lines of all modules in a folder of the package."""
        inside = [text for path, text in self.files.items() if self._folder(path) == folder]
        return sum(text.count("\n") for text in inside)

    def op_tables(self) -> int:
        """Module-level dicts, sets and frozensets whose keys are ops of torch or of ours."""
        statements = [node for tree in self.parsed.values() for node in tree.body]
        return sum(_keyed_by_op(node) for node in statements)

    def option_places(self) -> int:
        """Parameters, fields, keyword arguments and click options that name a compile option."""
        return sum(
            name in OPTIONS for tree in self.parsed.values() for name in _names_given(tree)
        )

    def imports_between(self) -> int:
        """Pairs (folder, another folder) with an import from the one into the other."""
        pairs = set()
        for path, tree in self.parsed.items():
            for node in ast.walk(tree):
                module = str(node.module) if isinstance(node, ast.ImportFrom) else ""
                if module.startswith("ringcompile."):
                    pairs.add((self._folder(path), module.split(".")[1]))
        wings = {self._folder(path) for path in self.files} - {""}
        return sum(a != b and a in wings and b in wings for a, b in pairs)

    def lengths(self) -> tuple[list[int], list[int]]:
        """Lines of each file, and of each function without its docstring."""
        functions = [
            (node.end_lineno or node.lineno) - node.lineno + 1 - _lines_of_docstring(node)
            for tree in self.parsed.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        return [text.count("\n") for text in self.files.values()], functions

    def shared_names(self) -> list[str]:
        """Names that more than one class has."""
        classes = Counter(
            node.name
            for tree in self.parsed.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        )
        return sorted(name for name, count in classes.items() if count > 1)

    def _folder(self, path: Path) -> str:
        parts = path.relative_to(self.package).parts
        return parts[0] if len(parts) > 1 else ""


def _lines_of_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    if ast.get_docstring(node) is None:
        return 0
    return (first.end_lineno or first.lineno) - first.lineno + 1


def _keyed_by_op(node: ast.stmt) -> bool:
    value = getattr(node, "value", None)
    if not isinstance(node, ast.Assign | ast.AnnAssign) or value is None:
        return False
    return any(OP.match(ast.unparse(key)) for part in ast.walk(value) for key in _keys(part))


def _keys(value: ast.AST) -> list[ast.expr]:
    if isinstance(value, ast.Dict):
        return [key for key in value.keys if key is not None]
    return value.elts if isinstance(value, ast.Set) else []


def _names_given(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Constant) and str(node.value).startswith("--"):
            yield str(node.value)[2:].replace("-", "_")


def rows(tree: Tree) -> dict[str, str]:
    """What is measured, by the words of the table."""
    files, functions = tree.lengths()
    shared = tree.shared_names()
    return {
        **{f"lines of `{folder}/`": f"{tree.lines(folder):,}" for folder in FOLDERS},
        "lines in all": f"{sum(files):,}",
        "tables keyed by op": str(tree.op_tables()),
        "places that spell one of seven options": str(tree.option_places()),
        "pairs of folders with an import between them": str(tree.imports_between()),
        "longest file, longest function (lines)": f"{max(files)}, {max(functions)}",
        "median file, median function (lines)": (
            f"{statistics.median(files):.0f}, {statistics.median(functions):.0f}"
        ),
        "files over 400 lines, functions over 40": (
            f"{sum(n > 400 for n in files)}, {sum(n > 40 for n in functions)}"
        ),
        "names that several classes share": ", ".join([str(len(shared)), *shared]),
    }


def at(revision: str) -> dict[str, str]:
    """The rows of an earlier commit of this repository."""
    packed = subprocess.run(
        ["git", "archive", revision, "ringcompile"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(fileobj=io.BytesIO(packed)) as archive,
    ):
        archive.extractall(folder, filter="data")
        return rows(Tree(Path(folder)))


@click.command()
@click.argument("revision", required=False)
def main(revision: str | None) -> None:
    """Print the table; with a REVISION, that commit's figures before today's."""
    now = rows(Tree(ROOT))
    columns = {"now": now} if revision is None else {revision: at(revision), "now": now}
    click.echo(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in now:
        click.echo(f"| {row} | {' | '.join(column[row] for column in columns.values())} |")


if __name__ == "__main__":
    main()
