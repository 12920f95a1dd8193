"""docs/api.md and docs/passes.md from docstrings: `python docs/generate_pages.py` writes them."""

from __future__ import annotations

import inspect
from itertools import takewhile
from pathlib import Path

import ringcompile as rc
from ringcompile.mesh import Mesh
from ringcompile.options import Options, option_fields
from ringcompile.pass_list import front_passes, rank_passes
from ringcompile.passes.base import Pass
from ringcompile.passes.shares.partition import Partition

DOCS = Path(__file__).parent


def api() -> str:
    """Every public name with its signature and docstring, and the options of `transform`."""
    head = (
        "All names are in the package: `import ringcompile as rc`. `python docs/generate_pages.py` "
        "writes this page from docstrings."
    )
    parts = ["# The Python API", "", head, ""]
    for name in sorted(rc.__all__):
        value = getattr(rc, name)
        parts += [f"## rc.{name}", "", "```python", _signature(name, value), "```", "",
                  "```text", _text(value), "```", ""]
    parts += ["## Options of transform and check", "", "| option | default | what it does |",
              "|---|---|---|"]
    for option in option_fields():
        choices = f" One of {', '.join(option.metadata['choices'])}." if (
            option.metadata["choices"]) else ""
        parts.append(f"| `{option.name}` | `{option.default!r}` | "
                     f"{option.metadata['help']}{choices} |")
    return "\n".join([*parts, ""])


def passes() -> str:
    """Every pass, in the order in which one compile may run them."""
    mesh = Mesh.parse("dp=2,pp=2,ring=2,ep=2,tp=2")
    whole, cache = front_passes(mesh, Options()), Options(cache=64)
    programs = (whole, front_passes(mesh, cache, prefill=True),
                front_passes(mesh, cache, carried=True))
    steps = [step for passes in programs for step in takewhile(_before_shares, passes)]
    steps += [*whole, *rank_passes(0, mesh.with_axis("time", 2))]
    head = (
        "A pass is one step of the compiler: it rewrites a program. This page lists all passes in "
        "the order in which they run; `clean-up` runs between them. `keep` is for prompts, and "
        "`expert-terms` (in place of `expert-parallel`) and `carry` for tokens that follow, both "
        "with a cache. `python "
        "docs/generate_pages.py` writes it from docstrings. [architecture.md](architecture.md) "
        "explains how they work together."
    )
    parts = ["# Passes", "", head, ""]
    for kind in dict.fromkeys(map(type, steps)):
        parts += [f"## {kind.name}", "", "```text", _text(kind), "```", ""]
    return "\n".join(parts)


def _before_shares(step: Pass) -> bool:
    return not isinstance(step, Partition)


def _signature(name: str, value: object) -> str:
    if inspect.isclass(value):
        return f"class {name}"
    return f"{name}{inspect.signature(value)}"  # type: ignore[arg-type]


def _text(value: object) -> str:
    return inspect.cleandoc(inspect.getdoc(value) or "").rstrip()


PAGES = {"api.md": api, "passes.md": passes}

if __name__ == "__main__":
    for page, write in PAGES.items():
        (DOCS / page).write_text(write(), encoding="utf-8")
