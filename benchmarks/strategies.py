"""Strategies: SmolLM2 on two processes by ring, tp, pp and time; how long transforming takes.

    python -m benchmarks.strategies [--rounds N] [--layers 32 --layers 80] [--save]

Sides take turns; ratios are of 2 ranks x 1 thread to one process x 2 threads, within a round.
"""

import datetime
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import click
import torch

import ringcompile as rc
from benchmarks.machine import RESULTS, environment
from benchmarks.pool import Pool, Step, Timing
from ringcompile.capture.loaders import load_model
from ringcompile.runtime.distributed import Peer
from ringcompile.runtime.join import Rank

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from real_models import english_text, smollm2_checkpoint  # noqa: E402  (examples is no package)
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
)

# Four sequences: a pipeline works on one while its other stage works on the next. One long prompt:
# it does so chunk by chunk.
BATCH, PROMPT = (4, 256), (1, 1024)
CASES = (
    ("ring=2", BATCH), ("tp=2", BATCH), ("pp=2", BATCH),
    ("ring=2", PROMPT), ("tp=2", PROMPT), ("pp=2", PROMPT), ("pp=2,time=4", PROMPT),
)
STRIDE = 64  # logits are compared on every 64th token
MAX_DIFFERENCE = 2e-5
PAUSE_SECONDS = 0.05
TRANSFORMED = ("ring=16", "tp=8,pp=2", "ring=4,ulysses=4", "pp=2,ring=4,tp=2")


@dataclass(frozen=True)
class Case:
    """A checkpoint, what it runs on, and the parallel spec; none for the model itself."""

    checkpoint: str
    shape: tuple[int, int]
    spec: str | None = None

    @property
    def name(self) -> str:
        """`ring=2 4x256`."""
        return f"{self.spec or 'alone'} {self.shape[0]}x{self.shape[1]}"

    def tokens(self) -> torch.Tensor:
        """Token ids [sequences, tokens]."""
        tokenizer = AutoTokenizer.from_pretrained(self.checkpoint)
        return english_text(prod(self.shape), tokenizer).view(self.shape)


def setup(rank: int, world: int, case: Case) -> Step:
    """One pass over all sequences."""
    model = AutoModelForCausalLM.from_pretrained(case.checkpoint).eval()
    ids = case.tokens()
    if case.spec is None:
        return lambda: model(ids, use_cache=False).logits[:, ::STRIDE]
    program = rc.capture(model, (ids[:1, :24],))
    peer = Peer(rc.transform(program, case.spec), Rank(rank, world, torch.device("cpu")))
    checked: list[torch.Tensor] = []

    def step() -> torch.Tensor:
        run = peer.run((ids,))
        if checked:
            return torch.empty(0)
        whole = peer.assemble(run)  # once, to compare; not part of a timed step
        checked.append(torch.empty(0) if whole is None else whole["logits"][:, ::STRIDE])
        return checked[0]

    return step


def measure(num_rounds: int) -> list[dict[str, Any]]:
    """Every case against one process on the same tokens; one JSON-able row each."""
    checkpoint = str(smollm2_checkpoint(ROOT / "build"))
    cases = [Case(checkpoint, shape, spec) for spec, shape in CASES]
    bases = [Case(checkpoint, shape) for shape in dict.fromkeys(case.shape for case in cases)]
    with ExitStack() as stack:
        alone, pair = (stack.enter_context(Pool(n, 2 // n)) for n in (1, 2))
        expected = {}
        for base in bases:
            alone.load(base.name, setup, base)
            (expected[base.shape],) = alone.output(base.name)
        differences = {}
        for case in cases:
            pair.load(case.name, setup, case)
            found, wanted = pair.output(case.name)[0], expected[case.shape]
            difference = ((found - wanted).abs().max() / wanted.abs().max()).item()
            assert difference < MAX_DIFFERENCE, f"{case.name}: {difference}"
            differences[case] = difference
        timings: dict[Case, list[Timing]] = {case: [] for case in (*bases, *cases)}
        for _ in range(num_rounds):
            for case, taken in timings.items():
                time.sleep(PAUSE_SECONDS)
                taken.append((pair if case.spec else alone).time(case.name))
    base_of = {base.shape: timings[base] for base in bases}
    return [
        {
            "spec": case.spec,
            "sequences": case.shape[0],
            "num_tokens": case.shape[1],
            "num_rounds": num_rounds,
            "wall_ratio": _ratio(timings[case], base_of[case.shape], "seconds"),
            "cpu_ratio": _ratio(timings[case], base_of[case.shape], "cpu_seconds"),
            "max_difference": differences[case],
        }
        for case in cases
    ]


def _ratio(taken: list[Timing], base: list[Timing], name: str) -> float:
    """The median over rounds."""
    pairs = zip(taken, base, strict=True)
    return statistics.median(getattr(t, name) / getattr(b, name) for t, b in pairs)


def transform_times(layers: tuple[int, ...]) -> list[dict[str, Any]]:
    """CPU seconds to compile Llama-3 sizes for 16 ranks, without weights, by strategy."""
    rows = []
    for num_layers in layers:
        config = LlamaConfig(
            architectures=["LlamaForCausalLM"], dtype="float16",
            vocab_size=128256, hidden_size=8192, intermediate_size=28672,
            num_hidden_layers=num_layers, num_attention_heads=64, num_key_value_heads=8,
            use_cache=False,
        )
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            start = time.process_time()
            loaded = load_model(folder, weights=False)
        program = rc.capture(loaded.module, loaded.args, loaded.kwargs)
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
    click.echo("SmolLM2-135M, 2 ranks x 1 thread; ratios to one process x 2 threads")
    measured = measure(num_rounds)
    for row in measured:
        click.echo(
            f"{row['spec']:12} {row['sequences']} x {row['num_tokens']:5} tokens  "
            f"wall {row['wall_ratio']:.3f}  CPU {row['cpu_ratio']:.3f}  "
            f"difference {row['max_difference']:.1e}"
        )
    click.echo("transforming Llama-3 sizes for 16 ranks, CPU seconds of one thread")
    return {"strategies": measured, "transform": transform_times(layers)}


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Steps of each side.")
@click.option("--layers", multiple=True, type=int, default=(32, 80), show_default=True)
@click.option("--save/--no-save", default=False, help="Write benchmarks/results/.")
def main(rounds: int, layers: tuple[int, ...], save: bool) -> None:
    """Benchmark the strategies."""
    known = {"environment": environment(), **run(rounds, layers)}
    if save:
        file = RESULTS / f"strategies-{datetime.date.today().isoformat()}.json"
        file.write_text(json.dumps(known, indent=1) + "\n")
        click.echo(f"wrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
