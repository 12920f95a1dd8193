"""`ringcompile generate`: text from an artifact that was compiled with a cache."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ringcompile.commands.options import (
    BACKEND,
    JSON,
    PROMPT,
    RECORDING,
    Out,
    artifact_argument,
    noted,
)
from ringcompile.later import Later

if TYPE_CHECKING:
    import torch

    from ringcompile import prompts
else:
    prompts = Later("ringcompile.prompts")


@click.command()
@artifact_argument
@PROMPT[0]
@PROMPT[1]
@PROMPT[2]
@click.option("--input-ids", type=click.Path(path_type=Path),
              help="A file with the token ids of the prompt: numbers separated by spaces, or JSON "
              "with one list, or with a list for each sequence.")
@click.option("--chat", is_flag=True, help="Apply the model's chat template to the prompt.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True,
              metavar="N", help="Stop after N new tokens.")
@click.option("--chunk", type=click.IntRange(1), metavar="N",
              help="Process a long prompt N tokens at a time.")
@click.option("--temperature", type=float, metavar="T",
              help="Sample with this temperature. By default the most probable token is taken.")
@click.option("--top-k", type=int, metavar="K",
              help="Sample from the K most probable tokens only.")
@click.option("--top-p", type=float, metavar="P", help="Sample from the smallest set of tokens "
              "with a total probability of at least P.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N",
              help="Seed of the random numbers for sampling.")
@click.option("--eos", type=int, multiple=True, metavar="ID",
              help="Id of a token that ends the text. By default that of the tokenizer.")
@BACKEND
@RECORDING
@JSON
def generate(
    out: Out,
    prompt: str | None,
    prompt_file: Path | None,
    input_ids: Path | None,
    chat: bool,
    tokenizer: str | None,
    eos: tuple[int, ...],
    as_json: bool,
    **how: Any,
) -> None:
    """Generate tokens with the artifact OUT.

    OUT must have been compiled with --cache. Under torchrun the command is one rank of its job.
    """
    given = [x for x in (prompt, prompt_file, input_ids) if x is not None]
    if len(given) != 1:
        raise click.UsageError("give one of --prompt, --prompt-file and --input-ids")
    if chat and input_ids is not None:
        raise click.UsageError("--chat is for a prompt that is text")
    text = prompts.read_text(prompt_file) if prompt_file is not None else prompt
    asked = prompts.Asked(out.load(), text, input_ids, chat, tokenizer, eos)
    with noted(), prompts.answer(asked, how) as answer:
        started = time.perf_counter()
        times: list[float] = []
        columns = _noted(answer.columns, times)
        if not answer.reports:  # another rank of a torchrun job
            _drain(columns)
        elif as_json or answer.decode is None:
            _print_ids(columns, as_json)
        else:
            _stream(columns, answer.decode)
        if answer.reports and times:
            click.echo(_speed(times, started), err=True)


def _noted(columns: Iterable[torch.Tensor], times: list[float]) -> Iterator[torch.Tensor]:
    """The same, with the time at which each came."""
    for column in columns:
        times.append(time.perf_counter())
        yield column


def _drain(columns: Iterable[torch.Tensor]) -> None:
    for _ in columns:
        pass


def _print_ids(columns: Iterable[torch.Tensor], as_json: bool) -> None:
    """The ids of one sequence as they come; of several, or as JSON, at the end."""
    made: list[list[int]] = []
    for column in columns:
        made.append(column.tolist())
        if len(column) == 1 and not as_json:
            click.echo(f"{' ' * (len(made) > 1)}{int(column)}", nl=False)
    rows = [list(row) for row in zip(*made, strict=True)]
    if as_json:
        click.echo(json.dumps({"tokens": rows}))
    elif len(rows) == 1:
        click.echo()
    else:
        click.echo("\n".join(" ".join(map(str, row)) for row in rows))


def _stream(columns: Iterable[torch.Tensor], decode: Callable[[list[int]], str]) -> None:
    """Print what is new of the text with every token; half a character waits for the rest."""
    tokens: list[int] = []
    printed = ""
    for column in columns:
        tokens.append(int(column[0]))
        text = decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            click.echo(text[len(printed):], nl=False)
            printed = text
    click.echo(decode(tokens)[len(printed):])


def _speed(times: list[float], started: float) -> str:
    """`64 tokens: the first after 0.412 s, then 23.1 tokens/s`."""
    count = len(times)
    text = f"{count} tokens: the first after {times[0] - started:.3f} s"
    if count == 1:
        return text
    return f"{text}, then {(count - 1) / max(times[-1] - times[0], 1e-9):.1f} tokens/s"
