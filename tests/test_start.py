"""What is imported when: the package and usage texts come without torch, and processes end soon."""

from __future__ import annotations

import ast
import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

import ringcompile
from ringcompile.axes import AXES
from ringcompile.cli import cli
from ringcompile.commands.examples import EXAMPLES
from ringcompile.later import Later, package_with

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "sympy", "networkx", "transformers")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def imports_for_types() -> Iterator[tuple[str, str]]:
    """What `ringcompile/__init__.py` imports for type checkers alone, with the modules."""
    tree = ast.parse((ROOT / "ringcompile" / "__init__.py").read_text(encoding="utf-8"))
    for block in tree.body:
        if isinstance(block, ast.If):
            for line in block.body:
                assert isinstance(line, ast.ImportFrom)
                yield from ((alias.name, str(line.module)) for alias in line.names)


def test_the_package_is_imported_without_torch() -> None:
    done = python(
        "import sys, ringcompile as rc; rc.Mesh.parse('ring=4'); dir(rc)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_type_checkers_see_every_public_name() -> None:
    known = dict(imports_for_types())
    assert known == ringcompile._MODULES
    assert {*known, "Mesh", "RingCompileError"} == set(ringcompile.__all__)
    for name, module in known.items():
        assert getattr(ringcompile, name) is getattr(importlib.import_module(module), name)
        assert name in dir(ringcompile)


def test_a_submodule_of_the_same_name_does_not_take_the_place_of_a_function() -> None:
    done = python(
        "import ringcompile as rc, ringcompile.capture.loaders, ringcompile.tokenwise\n"
        "from ringcompile import capture, tokenwise\n"
        "print(rc.capture is capture, capture.__module__, callable(tokenwise))"
    )
    assert done.stdout == "True ringcompile.capture.export True\n", done.stderr


def test_a_public_name_can_be_replaced_and_an_unknown_one_is_an_error() -> None:
    made = package_with({"sqrt": "math"})("made")
    assert made.sqrt(4.0) == 2.0
    made.sqrt = abs
    assert made.sqrt is abs
    made.sqrt = ModuleType("another.sqrt")
    assert isinstance(made.sqrt, ModuleType)
    with pytest.raises(AttributeError, match="no attribute 'cube'"):
        _ = made.cube
    with pytest.raises(AttributeError, match="module 'ringcompile' has no attribute 'captured'"):
        _ = ringcompile.captured


def test_a_later_module_is_imported_at_its_first_use() -> None:
    done = python(
        "import sys; from ringcompile.later import Later\n"
        "module = Later('colorsys'); print('colorsys' in sys.modules)\n"
        "print(module.ONE_THIRD > 0.3, 'colorsys' in sys.modules)"
    )
    assert done.stdout == "False\nTrue True\n", done.stderr
    with pytest.raises(AttributeError, match="'math' has no attribute 'cube'"):
        _ = Later("math").cube


def test_what_reads_an_artifact_does_not_import_what_captures_models() -> None:
    done = python(
        "import sys, ringcompile.compiler, ringcompile.cost.simulate\n"
        "late = ('ringcompile.capture.export', 'torch._dynamo', 'networkx', 'transformers')\n"
        "print([name for name in late if name in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


# -- usage -----------------------------------------------------------------------------------------

COMPLETION = "bash_complete"
USAGE: dict[str, tuple[dict[str, str], str]] = {  # what is set, what stands in the answer
    "--help": ({}, "Commands:"),
    "--version": ({}, "version"),
    "transform --help": ({}, "--tp-sequence"),
    "plan --help": ({}, "h100x16"),
    "calibrate --help": ({}, "--quick"),
    "": ({"_RINGCOMPILE_COMPLETE": COMPLETION, "COMP_WORDS": "ringcompile ", "COMP_CWORD": "1"},
         "plain,simulate"),
    " ": ({"_RINGCOMPILE_COMPLETE": COMPLETION, "COMP_CWORD": "2",
           "COMP_WORDS": "ringcompile transform --or"}, "plain,--order"),
    "  ": ({"_RINGCOMPILE_COMPLETE": COMPLETION, "COMP_CWORD": "3",
            "COMP_WORDS": "ringcompile transform --parallel ring=2,u"}, "plain,ring=2,ulysses="),
    "   ": ({"_RINGCOMPILE_COMPLETE": COMPLETION, "COMP_CWORD": "3",
             "COMP_WORDS": "ringcompile plan --cluster h2"}, "plain,h200x16"),
    "    ": ({"_RINGCOMPILE_COMPLETE": COMPLETION, "COMP_CWORD": "2",
              "COMP_WORDS": "ringcompile check mixt"}, "plain,mixtral-tiny"),
    "models": ({}, "llama-tiny"),
}


def test_every_command_has_examples_that_it_takes() -> None:
    assert set(EXAMPLES) == set(cli.commands)
    for name, examples in EXAMPLES.items():
        text = cli.commands[name].get_help(click.Context(cli.commands[name], info_name=name))
        for example in examples:
            assert f"  ringcompile {example}\n" in f"{text}\n"
            first, *words = shlex.split(example)
            assert first == name
            cli.commands[name].make_context(name, words)
    help_ = cli.commands["run"].get_help(click.Context(cli.commands["run"], info_name="run"))
    assert "by an environment variable, such as\n  RINGCOMPILE_RUN_SEQ." in help_
    assert "  torchrun --nproc-per-node 8 -m ringcompile run out" in help_


def test_the_list_of_commands_says_whole_sentences() -> None:
    text = cli.get_help(click.Context(cli, info_name="ringcompile"))
    listed = text.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == sorted(cli.commands)
    assert all(line.endswith(".") and "..." not in line for line in listed), listed


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_option_is_explained_in_a_sentence(command: str) -> None:
    options = [x for x in cli.commands[command].params if isinstance(x, click.Option)]
    for option in options:
        assert option.help, option.name
        assert option.help.endswith("."), option.help


def test_a_parallel_specs_axes_are_explained_where_one_is_asked_for() -> None:
    for name in ("transform", "check"):
        text = cli.commands[name].get_help(click.Context(cli.commands[name], info_name=name))
        for axis in AXES.values():
            assert f"  {axis.name:8} {axis.splits}\n" in text


@pytest.mark.parametrize("words", USAGE)
def test_usage_is_told_without_torch_in_less_than_half_a_second(words: str) -> None:
    env, answer = USAGE[words]
    code = (
        "import atexit, os, sys\n"
        "sys.argv[0] = 'ringcompile'\n"
        "from ringcompile import cli\n"
        f"told = lambda: print([n for n in {HEAVY} if n in sys.modules], sum(os.times()[:2]))\n"
        "atexit.register(told)\n"
        "cli.main()"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code, *words.split()], cwd=ROOT, text=True, check=False,
            env={**os.environ, **env}, capture_output=True,
        )
        assert answer in done.stdout, done.stderr
        heavy, _, spent = done.stdout.splitlines()[-1].rpartition(" ")
        assert heavy == "[]"
        seconds.append(float(spent))
        if seconds[-1] < 0.4:
            return
    raise AssertionError(f"CPU seconds: {seconds}")


def modules(name: str) -> Iterator[tuple[str, str]]:
    """Every `Later` of a module: the name it is under, and the module it stands for."""
    found = vars(importlib.import_module(name)).items()
    yield from ((known, value.__name__) for known, value in found if type(value) is Later)


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_what_a_command_imports_later_is_what_type_checkers_see(command: str) -> None:
    name = f"ringcompile.commands.{command}"
    tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))
    block = next(part for part in tree.body if isinstance(part, ast.If))
    seen = dict[str, str]()
    for line in block.body:
        assert isinstance(line, ast.Import | ast.ImportFrom)
        base = f"{line.module}." if isinstance(line, ast.ImportFrom) else ""
        seen |= {alias.asname or alias.name: base + alias.name for alias in line.names}
    made = dict(modules(name))
    assert made
    for known, module in made.items():
        assert seen[known] == module
        importlib.import_module(module)


# -- the end of a process ----------------------------------------------------------------------

def entry(body: str) -> str:
    """The entry point with another command line behind it."""
    return (
        "import atexit, sys, threading, time\n"
        "from ringcompile import __main__, cli\n"
        f"def run():\n    {body}\n"
        "cli.main = run\n__main__.main()"
    )


@pytest.mark.parametrize(
    ("body", "code", "out", "err"),
    [
        ("sys.exit(0)", 0, "", ""),
        ("sys.exit()", 0, "", ""),
        ("sys.exit(2)", 2, "", ""),
        ("sys.exit('no')", 1, "", "no\n"),
        ("print('x' * 100_000); sys.exit(3)", 3, "x" * 100_000 + "\n", ""),
        ("atexit.register(print, 'behind'); print('before'); sys.exit(0)", 0,
         "before\nbehind\n", ""),
        ("threading.Thread(target=lambda: (time.sleep(0.2), print('slow'))).start(); sys.exit(0)",
         0, "slow\n", ""),
    ],
)
def test_what_ends_with_a_process_still_does(body: str, code: int, out: str, err: str) -> None:
    done = python(entry(body))
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_an_error_of_ours_that_nobody_caught_is_a_traceback() -> None:
    done = python(entry("raise ValueError('ours')"))
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: ours\n")


def test_a_closed_pipe_is_told_as_python_does() -> None:
    read, write = os.pipe()
    os.close(read)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-c", entry("print('x'); sys.exit(0)")],
            cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, check=False, env=env,
        )
    assert done.returncode == 120
    assert "BrokenPipeError" in done.stderr
