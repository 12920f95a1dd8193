"""Strategies: SmolLM2 on two processes by ring, tp and pp, and how long transforming takes.

    python -m benchmarks.strategies [--rounds N] [--layers 32 --layers 80]

Sides take turns; ratios are of 2 ranks x 1 thread to one process x 2 threads, within a round.
"""

import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch._subclasses import FakeTensorMode

import ringcompile as rc
from benchmarks.pool import Pool, Step, Timing
from ringcompile.runtime.distributed import Session
from ringcompile.runtime.join import Rank

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from real_models import english_text, smollm2_checkpoint  # noqa: E402  (examples is no package)
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

SPECS = ("ring=2", "tp=2", "pp=2")
# Four sequences: a pipeline works on one while its other stage works on the next.
NUM_SEQUENCES, NUM_TOKENS = 4, 256
STRIDE = 64  # logits are compared on every 64th token
MAX_DIFFERENCE = 2e-5
PAUSE_SECONDS = 0.05
TRANSFORMED = ("ring=16", "tp=8,pp=2", "ring=4,ulysses=4", "pp=2,ring=4,tp=2")


@dataclass(frozen=True)
class Case:
    """A checkpoint, and the parallel spec; none for the model itself."""

    checkpoint: str
    spec: str | None = None

    def tokens(self) -> torch.Tensor:
        """Token ids [sequences, tokens]."""
        tokenizer = AutoTokenizer.from_pretrained(self.checkpoint)
        return english_text(NUM_SEQUENCES * NUM_TOKENS, tokenizer).view(NUM_SEQUENCES, NUM_TOKENS)


def setup(rank: int, world: int, case: Case) -> Step:
    """One pass over all sequences."""
    model = AutoModelForCausalLM.from_pretrained(case.checkpoint).eval()
    ids = case.tokens()
    if case.spec is None:
        return lambda: model(ids, use_cache=False).logits[:, ::STRIDE]
    # A pipeline is compiled for one sequence, and gets the others as microbatches.
    batch = 1 if "pp" in case.spec else NUM_SEQUENCES
    program = rc.capture(model, (ids[:batch, :24],))
    session = Session(rc.transform(program, case.spec), Rank(rank, world, torch.device("cpu")))
    checked: list[torch.Tensor] = []

    def step() -> torch.Tensor:
        run = session.run((ids,))
        if checked:
            return torch.empty(0)
        whole = session.assemble(run)  # once, to compare; not part of a timed step
        checked.append(torch.empty(0) if whole is None else whole["logits"][:, ::STRIDE])
        return checked[0]

    return step


def measure(num_rounds: int) -> list[dict[str, Any]]:
    """Every spec against one process; one JSON-able row each."""
    checkpoint = str(smollm2_checkpoint(ROOT / "build"))
    with ExitStack() as stack:
        alone, pair = (stack.enter_context(Pool(n, 2 // n)) for n in (1, 2))
        alone.load("alone", setup, Case(checkpoint))
        (expected,) = alone.output("alone")
        differences = {}
        for spec in SPECS:
            pair.load(spec, setup, Case(checkpoint, spec))
            found = pair.output(spec)[0]
            difference = ((found - expected).abs().max() / expected.abs().max()).item()
            assert difference < MAX_DIFFERENCE, f"{spec}: {difference}"
            differences[spec] = difference
        base: list[Timing] = []
        timings: dict[str, list[Timing]] = {spec: [] for spec in SPECS}
        for _ in range(num_rounds):
            time.sleep(PAUSE_SECONDS)
            base.append(alone.time("alone"))
            for spec in SPECS:
                time.sleep(PAUSE_SECONDS)
                timings[spec].append(pair.time(spec))
    return [
        {
            "spec": spec,
            "sequences": NUM_SEQUENCES,
            "num_tokens": NUM_TOKENS,
            "num_rounds": num_rounds,
            "wall_ratio": statistics.median(
                t.seconds / b.seconds for t, b in zip(taken, base, strict=True)
            ),
            "cpu_ratio": statistics.median(
                t.cpu_seconds / b.cpu_seconds for t, b in zip(taken, base, strict=True)
            ),
            "max_difference": differences[spec],
        }
        for spec, taken in timings.items()
    ]


def transform_times(layers: tuple[int, ...]) -> list[dict[str, Any]]:
    """CPU seconds to compile Llama-3 sizes for 16 ranks, without weights, by strategy."""
    rows = []
    for num_layers in layers:
        config = LlamaConfig(
            vocab_size=128256, hidden_size=8192, intermediate_size=28672,
            num_hidden_layers=num_layers, num_attention_heads=64, num_key_value_heads=8,
            use_cache=False,
        )
        start = time.process_time()
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = LlamaForCausalLM(config).half().eval()
            program = rc.capture(model, (torch.zeros(1, 24, dtype=torch.int64),))
        captured = time.process_time() - start
        for spec in TRANSFORMED:
            start = time.process_time()
            parallel = rc.transform(program, spec)
            ranks = parallel.ranks()
            made = time.process_time() - start
            parallel.verify()
            rows.append({
                "layers": num_layers, "spec": spec, "capture_seconds": captured,
                "transform_seconds": made,
                "verify_seconds": time.process_time() - start - made,
                "nodes": max(len(rank.graph.nodes) for rank in ranks),
            })
            click.echo(
                f"{num_layers} layers {spec:18} capture {captured:6.1f} s, transform for 16 ranks "
                f"{made:6.1f} s, verify {rows[-1]['verify_seconds']:5.1f} s"
            )
    return rows


def run(num_rounds: int = 5, layers: tuple[int, ...] = (32, 80)) -> dict[str, Any]:
    """Both benchmarks, printed as they come."""
    click.echo(
        f"SmolLM2-135M, {NUM_SEQUENCES} x {NUM_TOKENS} tokens, 2 ranks x 1 thread; ratios to one "
        "process x 2 threads"
    )
    measured = measure(num_rounds)
    for row in measured:
        click.echo(f"{row['spec']:8} wall {row['wall_ratio']:.3f}  CPU {row['cpu_ratio']:.3f}  "
                   f"difference {row['max_difference']:.1e}")
    click.echo("transforming Llama-3 sizes for 16 ranks, CPU seconds of one thread")
    return {"strategies": measured, "transform": transform_times(layers)}


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Steps of each side.")
@click.option("--layers", multiple=True, type=int, default=(32, 80), show_default=True)
def main(rounds: int, layers: tuple[int, ...]) -> None:
    """Benchmark the strategies."""
    run(rounds, layers)


if __name__ == "__main__":
    main()
