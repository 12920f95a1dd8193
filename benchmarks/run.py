"""All benchmarks: `make bench`. Prints tables and writes benchmarks/results/."""

import datetime
import json
import sys
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere

from benchmarks import attention, decode, model, strategies  # noqa: E402
from benchmarks.machine import RESULTS, environment  # noqa: E402


@click.command()
@click.option("--rounds", default=21, show_default=True, help="Rounds of the attention benchmark.")
@click.option("--model-rounds", default=5, show_default=True, help="Rounds of the model benchmark.")
@click.option("--save/--no-save", default=True, help="Write benchmarks/results/.")
def main(rounds: int, model_rounds: int, save: bool) -> None:
    """Run every benchmark, sides interleaved, and report medians of ratios."""
    found: dict[str, object] = {"environment": environment()}
    click.echo("causal ring attention, 4,096 tokens; ratios to one process x 2 threads")
    found |= attention.run(rounds)
    click.echo(attention.table(found))  # type: ignore[arg-type]
    click.echo("SmolLM2-135M, 4,096 tokens, 2 ranks x 1 thread; ratios to one process x 2 threads")
    found |= model.run(model_rounds)
    click.echo(attention.table({"attention": found["smollm2"]}))  # type: ignore[dict-item]
    found |= strategies.run(model_rounds)
    click.echo("SmolLM2-135M, one token after 1,024 others; time per output token")
    found["decode"] = decode.run(model_rounds)
    click.echo(decode.table(found["decode"]))  # type: ignore[arg-type]
    if save:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"cpu-{datetime.date.today().isoformat()}.json"
        file.write_text(json.dumps(found, indent=2) + "\n")
        click.echo(f"wrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
