"""Time per output token of SmolLM2-135M with a cache, against Hugging Face's own.

    python -m benchmarks.decode [--context N] [--new-tokens N] [--rounds N]

All sides hold the same prompt in their caches and take turns: each goes back to the end of the
prompt and makes the same new tokens, one by one. TPOT is vLLM's: the first new token is not
counted. Ratios are medians of the ratios within a round.
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

import ringcompile as rc
from ringcompile.cost.hardware import load_cluster
from ringcompile.errors import RingCompileError
from ringcompile.generation_plans import GenerationRequest, simulate_request
from ringcompile.parallel_program import ParallelProgram

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from real_models import english_text, smollm2_checkpoint  # noqa: E402  (examples is no package)
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache  # noqa: E402

# Makes one round's tokens; returns them, and the seconds of each.
Round = Callable[[], tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Side:
    """One way to generate.

    Attributes:
        name: what the table calls it.
        threads: of the one process, or of all processes together.
        run: makes the tokens of a round.
        against: the side that it is held against.
    """

    name: str
    threads: int
    run: Round
    against: str = ""


def _timed(step: Callable[[torch.Tensor], torch.Tensor], first: int, count: int) -> Any:
    """Greedy tokens after `first`, and the seconds of each."""
    token, made, seconds = torch.tensor([[first]]), list[int](), list[float]()
    for _ in range(count):
        started = time.perf_counter()
        token = step(token)[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - started)
        made.append(int(token))
    return made, seconds


def hugging_face(model: Any, ids: torch.Tensor, count: int, threads: int) -> Round:
    """The model with its own cache."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def run() -> tuple[list[int], list[float]]:
        torch.set_num_threads(threads)
        if behind := cache.get_seq_length() - (ids.shape[1] - 1):
            cache.crop(-behind)
        return _timed(
            lambda token: model(token, past_key_values=cache, use_cache=True).logits,
            int(ids[0, -1]), count,
        )

    return run


def ours(session: rc.Session, ids: torch.Tensor, count: int, threads: int) -> Round:
    """A session, in this process or with processes of its own."""
    session.reset()
    session.extend(ids[:, :-1], last=True)

    def run() -> tuple[list[int], list[float]]:
        torch.set_num_threads(threads)
        session.rewind(ids.shape[1] - 1)
        return _timed(lambda token: session.extend(token, last=True), int(ids[0, -1]), count)

    return run


def measure(
    model: Any, ids: torch.Tensor, count: int, rounds: int, cluster: str | None = None
) -> list[dict[str, Any]]:
    """A row for each side.

    Args:
        model: of Hugging Face, with heads that divide by three.
        ids: the prompt, [1, tokens].
        count: new tokens of a round.
        rounds: how many.
        cluster: the tables for what is predicted.
    """
    context, program = ids.shape[1], rc.capture(model, (ids[:, :24],))
    made = {spec: rc.transform(program, spec, cache=context + count)
            for spec in ("ring=1", "tp=3", "ring=2")}
    # First: a table that is too small for a side is told before minutes are spent on measuring.
    request = GenerationRequest(context, count)
    predicted = {spec: _predicted(one, request, cluster) for spec, one in made.items()}
    with ExitStack() as stack:
        def session(spec: str, backend: str) -> rc.Session:
            return stack.enter_context(rc.Session(made[spec], backend, threads=1))

        alone = session("ring=1", "lockstep")
        sides = [
            Side("Hugging Face", 2, hugging_face(model, ids, count, 2)),
            Side("ring=1", 2, ours(alone, ids, count, 2), "Hugging Face"),
            Side("ring=1 x 3", 3, ours(alone, ids, count, 3)),
            Side("tp=3", 3, ours(session("tp=3", "gloo"), ids, count, 1), "ring=1 x 3"),
            Side("ring=2", 2, ours(session("ring=2", "gloo"), ids, count, 1), "ring=1"),
        ]
        found = [{side.name: side.run() for side in sides} for _ in range(rounds)]
    tokens = {tuple(made) for one in found for made, _ in one.values()}
    if len(tokens) != 1:
        raise SystemExit(f"sides make other tokens: {sorted(tokens)}")
    return [_row(side, found, count, predicted) for side in sides]


def _row(
    side: Side, found: list[dict[str, Any]], count: int, predicted: dict[str, float | None]
) -> dict[str, Any]:
    tpot = {name: [sum(one[name][1][1:]) / (count - 1) for one in found] for name in found[0]}
    mine, ratio = tpot[side.name], None
    if side.against:
        ratio = median(a / b for a, b in zip(mine, tpot[side.against], strict=True))
    return {"side": side.name, "threads": side.threads, "tpot_ms": median(mine) * 1e3,
            "against": side.against, "ratio": ratio,
            "predicted_ms": predicted.get(side.name.partition(" ")[0])}


def _predicted(
    made: ParallelProgram, request: GenerationRequest, cluster: str | None
) -> float | None:
    """By the tables of a CPU, or of the machine that is named."""
    try:
        hardware = load_cluster(cluster or "cpu").sized(made.world_size)
        return simulate_request(made, hardware, request).step.seconds * 1e3
    except RingCompileError:
        if cluster is not None:
            raise
        return None


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| side | threads | TPOT | of | predicted |", "|---|---|---|---|---|"]
    for row in rows:
        of = f"{row['ratio']:.2f} of {row['against']}" if row["ratio"] else ""
        told = f"{row['predicted_ms']:.1f} ms" if row["predicted_ms"] else ""
        lines.append(f"| {row['side']} | {row['threads']} | {row['tpot_ms']:.1f} ms | {of} | "
                     f"{told} |")
    return "\n".join(lines)


def run(
    rounds: int, context: int = 1024, new_tokens: int = 32, cluster: str | None = None
) -> list[dict[str, Any]]:
    """A row for each side, of SmolLM2 on an English text; see `measure`."""
    checkpoint = smollm2_checkpoint(ROOT / "build")
    ids = english_text(context, AutoTokenizer.from_pretrained(checkpoint))
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    return measure(model, ids, new_tokens, rounds, cluster)


@click.command()
@click.option("--context", default=1024, show_default=True, help="Tokens of the prompt.")
@click.option("--new-tokens", default=32, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--cluster", help="Tables for what is predicted, as `calibrate --ranks 3` writes "
              "them.")
def main(context: int, new_tokens: int, rounds: int, cluster: str | None) -> None:
    """Measure TPOT of every side, interleaved."""
    click.echo(table(run(rounds, context, new_tokens, cluster)))


if __name__ == "__main__":
    main()
