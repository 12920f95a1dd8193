"""Modelled times of generating with a large model on hardware that need not be there.

    python -m benchmarks.generation_table [--model MODEL] [--context N ...] [--batch N ...]

By default a Llama-3-70B configuration without weights on 16 H100s, as `plan --new-tokens` models
it. Prints the table of docs/benchmarks.md.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from ringcompile.capture.export import capture
from ringcompile.capture.loaders import load_model
from ringcompile.cost.hardware import load_cluster
from ringcompile.generation_plans import GenerationPlan, GenerationRequest, generation_plans
from ringcompile.ir.program import Program

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1 << 21,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "use_cache": False,
}
NEW_TOKENS = 512
SPECS = ("tp=16", "tp=8,pp=2", "ring=2,tp=8", "ring=4,tp=4")
COLUMNS = ("context", "batch", "spec", "TTFT", "TPOT", "tokens/s", "memory of a rank", "best for",
           "a token's time")


def captured(model: str | None) -> Program:
    """The model by name, or the configuration above, without weights."""
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            Path(folder, "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
        loaded = load_model(model or folder, weights=False)
        return capture(loaded.module, loaded.args, loaded.kwargs, name=loaded.name)


def lines(plans: list[GenerationPlan], request: GenerationRequest) -> Iterator[str]:
    """A line of a Markdown table for each plan."""
    for plan in plans:
        cells = [f"{request.context:,}", str(request.batch), f"`{plan}`"]
        if plan.ttft is None or plan.tpot is None:
            cells += ["", "", "", "", "", plan.why]
        else:
            cells += [
                f"{plan.ttft:.3g} s", f"{plan.tpot * 1e3:.3g} ms",
                f"{request.batch / plan.tpot:,.0f}", f"{(plan.memory_bytes or 0) / 1e9:.3g} GB",
                ", ".join(plan.serves), plan.why,
            ]
        yield f"| {' | '.join(cells)} |"


@click.command()
@click.option("--model", help="A name as on the command line; no weights are read.")
@click.option("--gpus", default=16, show_default=True)
@click.option("--cluster", default="h100x16", show_default=True)
@click.option("--context", "contexts", multiple=True, type=int, default=(8192, 131072, 1 << 20))
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 32))
@click.option("--spec", "specs", multiple=True, default=SPECS, show_default=True)
def main(
    model: str | None, gpus: int, cluster: str, contexts: tuple[int, ...],
    batches: tuple[int, ...], specs: tuple[str, ...],
) -> None:
    """Print times of generating for each context, batch and spec."""
    program, hardware = captured(model), load_cluster(cluster).sized(gpus)
    click.echo(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for context in contexts:
        for batch in batches:
            request = GenerationRequest(context, NEW_TOKENS, batch)
            plans = generation_plans(program, hardware, request, specs=specs, any_fit=False)
            for line in lines(plans, request):
                click.echo(line)


if __name__ == "__main__":
    main()
