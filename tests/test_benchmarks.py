"""What the benchmarks use of the package is there: most take too long to run in tests."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
# Those for GPUs import triton, which machines without one need not have.
FILES = sorted(
    file for file in (ROOT / "benchmarks").rglob("*.py") if "gpu" not in file.parts
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_names_of_modules(file: Path) -> None:
    """Every `module.name` of a module that a benchmark imports is a name in it."""
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    benchmark = importlib.import_module(name)
    modules = {k: v for k, v in vars(benchmark).items() if isinstance(v, ModuleType)}
    missing = [
        f"line {node.lineno}: {node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        and node.value.id in modules and not hasattr(modules[node.value.id], node.attr)
    ]
    assert not missing
