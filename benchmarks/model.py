"""SmolLM2-135M, real weights: the emitted program on 2 ranks x 1 thread against one process x 2.

    python -m benchmarks.model [--rounds N]

Sides take turns, as in `attention`. The single device is the Hugging Face model itself.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

import ringcompile as rc
from benchmarks import attention
from benchmarks.attention import Contestant
from benchmarks.pool import Step
from ringcompile.runtime.data import share_inputs
from ringcompile.runtime.distributed import Peer
from ringcompile.runtime.join import Rank

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from real_models import english_text, smollm2_checkpoint  # noqa: E402  (examples is no package)
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

NUM_TOKENS = 4096
# Logits are compared on every 64th token: all of them would be 800 MB.
STRIDE = 64


@dataclass(frozen=True)
class ModelCase:
    """A checkpoint and a text; the fields name the row of the table."""

    checkpoint: str
    num_tokens: int
    num_heads: int = 9
    head_dim: int = 64

    def tokens(self) -> torch.Tensor:
        """Token ids [1, num_tokens]."""
        return english_text(self.num_tokens, AutoTokenizer.from_pretrained(self.checkpoint))


def single_device(rank: int, world: int, case: ModelCase) -> Step:
    """The model itself."""
    model = AutoModelForCausalLM.from_pretrained(case.checkpoint).eval()
    ids = case.tokens()

    @torch.no_grad()
    def step() -> torch.Tensor:
        return _sampled(model(ids, use_cache=False).logits)

    return step


def emitted(rank: int, world: int, case: ModelCase) -> Step:
    """One rank of the emitted program, on its share of the text."""
    model = AutoModelForCausalLM.from_pretrained(case.checkpoint).eval()
    ids = case.tokens()
    program = rc.capture(model, (ids[:, :24],))
    peer = Peer(
        rc.transform(program, f"ring={world}"), Rank(rank, world, torch.device("cpu"))
    )
    whole = {peer.program().inputs[0].name: ids}
    lengths = peer.program().bindings(whole)
    share = share_inputs(peer.program(), whole, lengths)
    return lambda: _sampled(peer.run_share(share, lengths).outputs[0])


def _sampled(logits: torch.Tensor) -> torch.Tensor:
    return logits[None, :, ::STRIDE].contiguous()


CONTESTANTS = (
    Contestant("one process", 1, single_device),
    Contestant("emitted", 2, emitted),
)


def run(num_rounds: int = 5) -> dict[str, list[dict[str, Any]]]:
    """Measure both sides; one JSON-able row each."""
    case = ModelCase(str(smollm2_checkpoint(ROOT / "build")), NUM_TOKENS)
    rows = attention.run(num_rounds, CONTESTANTS, (case,))["attention"]  # type: ignore[arg-type]
    return {"smollm2": rows}


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Steps of each contestant.")
def main(rounds: int) -> None:
    """Benchmark SmolLM2-135M on two ranks."""
    click.echo(attention.table({"attention": run(rounds)["smollm2"]}))


if __name__ == "__main__":
    main()
