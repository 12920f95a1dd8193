"""A step with fused groups compiled against the same step op by op, in one process.

    python -m benchmarks.fused [MODEL] [--tokens N] [--rounds N]

MODEL is anything that `ringcompile transform` takes; without one it is SmolLM2-135M. Both sides run
the same program and take turns; CPU seconds count, as other processes may run beside.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

import click
import torch

import ringcompile as rc
from ringcompile.capture.loaders import load_model
from ringcompile.runtime.data import name_inputs
from ringcompile.runtime.executor import Executor, run_alone
from ringcompile.runtime.runner import read_weights

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))


@torch.no_grad()
def compare(model: str, tokens: int, rounds: int, compiler: str = "inductor") -> dict[str, float]:
    """CPU seconds of a step, medians: `fused`, `apart`, and the median of the ratio of each pair.

    Args:
        model: as `load_model` takes it; its first input is token ids or hidden states.
        tokens: of the one sequence.
        rounds: how many pairs of runs.
        compiler: a backend of torch.compile.
    """
    loaded = load_model(model)
    made = rc.transform(
        rc.capture(loaded.module, loaded.args, loaded.kwargs, name=model), "ring=1", length=tokens
    )
    program = made.rank(0)
    repeats = -(-tokens // loaded.args[0].shape[1])
    given = loaded.args[0][:1].repeat(1, repeats, *[1] * (loaded.args[0].dim() - 2))[:, :tokens]
    whole = name_inputs(program, (given,))
    values = {**read_weights(program, made.source, torch.device("cpu")), **whole}
    lengths = program.bindings(whole)
    sides = [Executor(program, lengths, compiler=name) for name in (compiler, None)]
    for side in sides:
        run_alone(side, values)
    seconds = [[_seconds(side, values) for side in sides] for _ in range(rounds)]
    fused, apart = (median(times) for times in zip(*seconds, strict=True))
    return {"fused": fused, "apart": apart, "ratio": median(a / b for a, b in seconds)}


def _seconds(side: Executor, values: dict[str, torch.Tensor]) -> float:
    started = time.process_time()
    run_alone(side, values)
    return time.process_time() - started


@click.command()
@click.argument("model", required=False)
@click.option("--tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
def main(model: str | None, tokens: int, rounds: int) -> None:
    """Print the CPU seconds of both sides and their ratio."""
    if model is None:
        from real_models import smollm2_checkpoint  # examples are no package

        model = str(smollm2_checkpoint(ROOT / "build"))
    found = compare(model, tokens, rounds)
    click.echo(f"{tokens} tokens: fused {found['fused']:.4g} s, op by op {found['apart']:.4g} s of "
               f"CPU time, ratio {found['ratio']:.3f}")


if __name__ == "__main__":
    main()
