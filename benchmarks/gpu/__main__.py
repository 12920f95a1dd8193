"""python -m benchmarks.gpu [--dry-run] [--only tests,kernels,decode,lockstep,step,calibrate]

Each section runs in a process of its own, in its own time, and writes its rows as it goes: what was
measured stays when a section fails, hangs or is killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import torch

from benchmarks.gpu import calibrate, decode, kernels, lockstep, step
from benchmarks.gpu.report import RESULTS, Report, environment, table

ROOT = Path(__file__).parents[2]
_SECTIONS = {"kernels": kernels.run, "decode": decode.run, "lockstep": lockstep.run,
             "step": step.run, "calibrate": calibrate.run}
# Seconds, on an H100; the first is for the whole suite of GPU tests.
_BUDGETS = {"tests": 120, "kernels": 100, "decode": 80, "lockstep": 90, "step": 100,
            "calibrate": 40}
_GPU_TESTS = ("tests/ops/test_kernels.py", "tests/ops/test_merges.py",
              "tests/ops/test_custom_kernels.py",
              "tests/ops/test_experts.py", "tests/runtime/test_alone.py",
              "tests/generate/test_recorded_steps.py")


@click.command()
@click.option("--dry-run", is_flag=True, help="Small shapes, on whatever there is.")
@click.option("--only", default=",".join(_BUDGETS), show_default=True, help="Sections to run.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder for JSON.")
@click.option("--budget", multiple=True, metavar="SECTION=SECONDS", help="Time of a section.")
@click.option("--section", hidden=True, type=click.Choice(list(_SECTIONS)))
def main(
    dry_run: bool, only: str, out: Path, budget: tuple[str, ...], section: str | None
) -> None:
    """Test and measure on a GPU; one JSON file a section, and tables at the end."""
    budgets = _BUDGETS | {n: int(s) for n, _, s in (text.partition("=") for text in budget)}
    if section is not None:
        report = Report(_file(out, section, dry_run), section)
        _SECTIONS[section](report, dry=dry_run, seconds=budgets[section] * 0.9)
        return
    where = environment()
    click.echo(f"on {where['device']}, torch {where['torch']}, triton {where['triton']}")
    if not torch.cuda.is_available() and not dry_run:
        raise click.UsageError("there is no GPU: nothing would be measured; try --dry-run")
    if dry_run:
        click.echo("a dry run: small shapes, to see that everything runs; no number means anything")
    names = [name for name in _BUDGETS if name in only.split(",")]
    ended = {name: _run(name, budgets[name], dry_run, out, sys.argv[1:]) for name in names}
    for name in names:
        file = _file(out, name, dry_run)
        if name in _SECTIONS and file.exists():
            click.echo(f"\n{name}\n{table(json.loads(file.read_text())['rows'])}")
    for name, how in ended.items():
        click.echo(f"{name}: {how}")
    sys.exit(any(how != "done" for how in ended.values()))


def _file(out: Path, section: str, dry: bool) -> Path:
    device = environment()["device"].lower().replace(" ", "-")
    return out / f"{'dry-' if dry else ''}{device}-{section}.json"


def _run(name: str, seconds: int, dry: bool, out: Path, options: list[str]) -> str:
    """Run a section in a process of its own; how it ended."""
    click.echo(f"\n== {name}, at most {seconds} s")
    if name == "tests":
        command = [sys.executable, "-m", "pytest", *_GPU_TESTS, "-m", "gpu", "-q", "-rs",
                   *_parallel(), "-p", "no:cacheprovider"]
    else:
        command = [sys.executable, "-m", "benchmarks.gpu", *options, "--section", name]
    if name != "tests":
        _file(out, name, dry).unlink(missing_ok=True)
    environment_ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=seconds, env=environment_, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds} s"
    return "done" if done.returncode == 0 else f"failed with {done.returncode}"


def _parallel() -> list[str]:
    """Compiling kernels is most of the tests' time: several processes share it, and the GPU."""
    if not torch.cuda.is_available():
        return []
    return ["-n", str(min(8, os.cpu_count() or 1)), "-p", "no:benchmark"]


if __name__ == "__main__":
    main()
