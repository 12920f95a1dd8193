"""Imports go down only: the layers of docs/architecture.md."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "ringcompile").rglob("*.py"))

# From the top down; units on one floor do not import one another.
FLOORS = [
    {"__init__"},
    {"__main__"},
    {"cli"},
    {"commands"},
    {"calibration", "generation_plans", "latency", "planning", "prompts"},
    {"generation", "parallelize"},
    {"execution", "view"},
    {"session"},
    {"stages"},
    {"numerics"},
    {"compiler"},
    {"decode_choice"},
    {"parallel_program"},
    {"pass_list"},
    {"runtime"},
    {"traces"},
    {"artifact", "capture", "cost", "dump", "extension", "kernel_extension", "tokenwise"},
    {"linear_attention", "passes"},
    {"ops"},
    {"ir"},
    {"mesh", "options"},
    {"axes"},
    {"interrupt"},
    {"errors", "held", "later", "garbage", "progress"},
]
# Folders of passes/, from the bottom up; modules beside them are below all.
PASSES = (
    "canonicalize", "masks", "attention", "windows", "experts", "sequence", "tensor", "stages",
    "carry", "shares", "rank",
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
MODELS_USERS = {"models", "compiler", "commands", "capture"}
# May be imported where they are needed.
OPTIONAL = {"accelerate", "blake3", "cryptography", "gguf", "matplotlib", "transformers"}


def names(node: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The dotted names, as tuples, that an import statement inside `package` names."""
    if isinstance(node, ast.Import):
        yield from (tuple(alias.name.split(".")) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) + 1 - node.level] if node.level else ()
        base += tuple(node.module.split(".")) if node.module else ()
        yield from ((*base, alias.name) for alias in node.names)


def allowed(importer: str, imported: str) -> bool:
    if imported == importer:
        return True
    if "models" in (importer, imported):
        return imported == "models" and importer in MODELS_USERS
    return FLOOR_OF[importer] < FLOOR_OF[imported]


def violations(path: Path, source: str) -> Iterator[str]:
    package, unit, tree = path.parts[:-1], path.with_suffix("").parts[1], ast.parse(source)
    if unit not in FLOOR_OF and unit != "models":
        yield f"{path}: '{unit}' has no floor"
        return
    for node in ast.walk(tree):
        for name in names(node, package):
            if name[0] != "ringcompile":
                continue
            # A name that is no unit is one of `ringcompile/__init__.py`'s own.
            other = name[1] if name[1:] and name[1] in {*FLOOR_OF, "models"} else "__init__"
            if not allowed(unit, other):
                yield f"{path}:{node.lineno}: '{unit}' imports '{other}'"
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    local = {n for function in functions for n in ast.walk(function)}
    for node in local:
        for name in names(node, package):
            if name[0] not in OPTIONAL:
                yield f"{path}:{node.lineno}: '{name[0]}' is imported inside a function"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down_only(path: Path) -> None:
    assert list(violations(path, (ROOT / path).read_text(encoding="utf-8"))) == []


def floor_in_passes(unit: str) -> int:
    return PASSES.index(unit) + 1 if unit in PASSES else 0


def test_folders_of_passes_import_those_below_only() -> None:
    folder, wrong = ROOT / "ringcompile" / "passes", []
    assert {path.name for path in folder.iterdir() if (path / "__init__.py").exists()} == {*PASSES}
    for path in folder.rglob("*.py"):
        inside = path.relative_to(folder)
        unit = inside.with_suffix("").parts[0]
        package = ("ringcompile", "passes", *inside.parts[:-1])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in names(node, package):
                other = name[2] if name[:2] == ("ringcompile", "passes") and name[2:] else unit
                if other != unit and floor_in_passes(other) >= max(floor_in_passes(unit), 1):
                    wrong.append(f"{inside} imports {other}")
    assert wrong == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("ir/rules.py", "from ringcompile.ops import ring", "'ir' imports 'ops'"),
        ("ir/rules.py", "from ringcompile import ops", "'ir' imports 'ops'"),
        ("ir/rules.py", "from ..ops import ring", "'ir' imports 'ops'"),
        ("passes/sequence/place.py", "import ringcompile.capture.hf", "'passes' imports 'capture'"),
        ("passes/sequence/place.py", "import ringcompile", "'passes' imports '__init__'"),
        ("cli.py", "from ringcompile import transform", "'cli' imports '__init__'"),
        ("errors.py", "from .mesh import Mesh", "'errors' imports 'mesh'"),
        ("models/zoo.py", "from ringcompile.errors import E", "'models' imports 'errors'"),
        ("passes/sequence/place.py", "from ringcompile import models", "'passes' imports 'models'"),
        ("helpers.py", "", "'helpers' has no floor"),
        ("mesh.py", "def f():\n    import math", "'math' is imported inside a function"),
    ],
)
def test_a_forbidden_import_is_rejected(path: str, source: str, message: str) -> None:
    found = list(violations(Path("ringcompile") / path, source))
    assert len(found) == 1
    assert found[0].endswith(message)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("passes/sequence/place.py", "from ringcompile.ops import ring\nfrom ..base import Pass"),
        ("capture/loaders.py", "from ringcompile.models import zoo"),
        ("capture/hf.py", "def f():\n    from transformers import AutoModel"),
        ("__init__.py", "from ringcompile.compiler import transform"),
    ],
)
def test_an_import_that_goes_down_is_accepted(path: str, source: str) -> None:
    assert list(violations(Path("ringcompile") / path, source)) == []
