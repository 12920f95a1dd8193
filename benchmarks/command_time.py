"""What whole commands take: CPU seconds and wall seconds of `ringcompile` in a process of its own.

    python -m benchmarks.command_time [--case "plan moe-4l"]... [--rounds 3]

Importing torch, loading and capturing the model are all in it. CPU seconds are those of the process
and of all that it starts, by `getrusage`; the least of all rounds counts, because other work on the
machine only ever adds to them.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.compile_time import LLAMA_70B

# What a case needs first, and the command that is timed; {folder} is empty at first, and
# {folder}/llama has the configuration of Llama-3-70B and no weights.
CASES: dict[str, tuple[str | None, str]] = {
    "plan dense-4l": (None, "plan dense-4l --gpus 16 --cluster h100x16 --seq 16384"),
    "plan moe-4l": (None, "plan moe-4l --gpus 16 --cluster h100x16 --seq 16384"),
    "plan 70B": (None, "plan {folder}/llama --gpus 16 --cluster h100x16 --seq 16384"),
    "transform 70B ring=16": (
        None, "transform {folder}/llama --parallel ring=16 --no-weights -o {folder}/out --overwrite"
    ),
    "simulate dense-4l ring=128": (
        "transform dense-4l --parallel ring=128 --no-weights -o {folder}/out --overwrite",
        "simulate {folder}/out --cluster h100x8x2 --seq 1048576",
    ),
}


@dataclass(frozen=True)
class Taken:
    """The seconds of one command: of all processors together, and by the clock."""

    cpu: float
    wall: float


def timed(words: str, folder: Path) -> Taken:
    """Run a command of `ringcompile`; raises CalledProcessError where it fails."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "ringcompile", *words.format(folder=folder).split()],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Taken(cpu, time.perf_counter() - start)


def least(prepare: str | None, command: str, rounds: int, layers: int = 80) -> Taken:
    """The least of several rounds, of CPU seconds and of wall seconds each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "llama").mkdir()
        config = {**LLAMA_70B, "num_hidden_layers": layers}
        (folder / "llama" / "config.json").write_text(json.dumps(config))
        if prepare is not None:
            timed(prepare, folder)
        found = [timed(command, folder) for _ in range(rounds)]
    return Taken(min(one.cpu for one in found), min(one.wall for one in found))


@click.command()
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)),
              default=tuple(CASES), help="What to time; by default everything.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
def main(cases: tuple[str, ...], rounds: int) -> None:
    """Print CPU seconds and wall seconds of whole commands, the least of several rounds."""
    for case in cases:
        found = least(*CASES[case], rounds)
        click.echo(f"{case:<28} {found.cpu:6.1f} CPU s  {found.wall:6.1f} s")


if __name__ == "__main__":
    main()
