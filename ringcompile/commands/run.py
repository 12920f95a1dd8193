"""`ringcompile run`: an artifact on local processes, or in a torchrun job."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ringcompile.commands.options import BACKEND, JSON, PROMPT, Out, artifact_argument
from ringcompile.later import Later

if TYPE_CHECKING:
    import torch

    from ringcompile import execution, prompts
    from ringcompile.commands import job, tensor_files
    from ringcompile.numerics import files
    from ringcompile.parallel_program import ParallelProgram
    from ringcompile.runtime import data
    from ringcompile.runtime import outputs as results
    from ringcompile.traces import events
else:
    execution = Later("ringcompile.execution")
    job = Later("ringcompile.commands.job")
    prompts = Later("ringcompile.prompts")
    tensor_files = Later("ringcompile.commands.tensor_files")
    files = Later("ringcompile.numerics.files")
    data = Later("ringcompile.runtime.data")
    results = Later("ringcompile.runtime.outputs")
    events = Later("ringcompile.traces.events")


@dataclass(frozen=True)
class _Given:
    """What goes in: a file, a prompt, or random numbers of a length."""

    inputs: Path | None
    prompt: str | None
    prompt_file: Path | None
    tokenizer: str | None
    seq: int

    def check(self) -> None:
        given = (self.inputs, self.prompt, self.prompt_file)
        if sum(one is not None for one in given) > 1:
            raise click.UsageError("give only one of --inputs, --prompt and --prompt-file")

    def text(self) -> str | None:
        """The prompt, if there is one."""
        return self.prompt if self.prompt_file is None else prompts.read_text(self.prompt_file)

    def whole(
        self, parallel: ParallelProgram, text: str | None, tokenizer: Any
    ) -> dict[str, torch.Tensor]:
        """Whole inputs by name."""
        if self.inputs is not None:
            return data.name_inputs(parallel.program, files.read_input_file(self.inputs))
        if text is not None:
            return prompts.prompt_inputs(parallel.program, tokenizer, text)
        return execution.random_inputs(parallel, self.seq)


def _input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `_Given`, which the command takes as `given`."""

    @functools.wraps(command)
    def call(
        inputs: Path | None,
        prompt: str | None,
        prompt_file: Path | None,
        tokenizer: str | None,
        seq: int,
        **other: Any,
    ) -> Any:
        return command(given=_Given(inputs, prompt, prompt_file, tokenizer, seq), **other)

    path = click.Path(path_type=Path)
    for option in reversed([
        click.option("--inputs", type=path, help="A file with the model's inputs by name "
                     "(.safetensors or .pt), or a .npy file if there is only one input."),
        *PROMPT,
        click.option("--seq", type=click.IntRange(1), default=128, show_default=True,
                     metavar="N", help="Length of the random inputs that are used if neither "
                     "--inputs nor a prompt is given."),
    ]):
        call = option(call)
    return call


@click.command()
@artifact_argument
@_input_options
@click.option("--outputs", type=click.Path(path_type=Path),
              help="Gather the outputs and write them to this file: .safetensors, .pt, or .npy "
              "if there is only one output.")
@click.option("--last", type=click.IntRange(1), metavar="N",
              help="Compute outputs for the last N positions only; the head is not applied to "
              "other positions.")
@click.option("--nproc", type=click.IntRange(1), metavar="N",
              help="Number of local processes. It must be the number of ranks, which is the "
              "default.")
@BACKEND
@click.option("--timeout", type=float, default=300.0, show_default=True, metavar="SECONDS",
              help="Give up if the run takes longer.")
@click.option("--join-timeout", type=float, default=120.0, show_default=True, metavar="SECONDS",
              help="Give up if not all ranks, on all hosts, have connected by then.")
@click.option("--compile", "compiled", is_flag=True,
              help="Compile fused groups with torch.compile before the first run. By default GPUs "
              "compile them before the second run of a length, and CPUs run their ops one by one.")
@click.option("--check", "check_finite", is_flag=True,
              help="Stop at the first NaN or infinity and name its op, layer, line and rank. "
              "Ranks also compare op, shape and dtype before each exchange.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE",
              help="Run twice, measure the second run on every rank, and write a trace for "
              "ui.perfetto.dev or `ringcompile view --trace`.")
@JSON
def run(
    out: Out,
    given: _Given,
    outputs: Path | None,
    last: int | None,
    nproc: int | None,
    backend: str,
    timeout: float,
    join_timeout: float,
    compiled: bool,
    check_finite: bool,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Run the artifact OUT, locally or under torchrun.

    Without torchrun, one local process is started for each rank.

    Outputs are gathered on rank 0 only with --outputs, --last or a prompt. Otherwise each rank
    keeps its share, and only means and maxima are printed.
    """
    given.check()
    _check_kind(check_finite, trace, compiled, backend)
    parallel = out.load()
    if outputs is not None:
        tensor_files.check_writable(outputs, job.output_dtypes(parallel))
    if trace is not None:
        tensor_files.check_place(trace)
    text = given.text()
    words = _tokenizer(parallel, given) if text is not None else None
    if text is not None and outputs is None:
        last = last or 1
    keep = results.Kept(last, outputs=outputs is not None or last is not None, summary=True)
    found = job.run_job(
        parallel,
        given.whole(parallel, text, words),
        job.Job(keep, nproc, backend, timeout, join_timeout, "inductor" if compiled else None,
                check_finite, trace is not None),
    )
    if found is None:  # another rank of a torchrun job reports
        return
    if outputs is not None:
        tensor_files.write_tensors(outputs, found.tensors)
    if trace is not None:
        _write_trace(trace, parallel, found, out)
    _report(found, prompts.next_tokens(found.tensors, words) if words is not None else "", as_json)


def _check_kind(check_finite: bool, trace: Path | None, compiled: bool, backend: str) -> None:
    if check_finite and compiled:
        raise click.UsageError("--check looks at every op, so it cannot be combined with --compile")
    if trace is not None and (compiled or backend == "lockstep"):
        raise click.UsageError("--trace times every op, on ranks that run at the same time; leave "
                               "out --compile and --backend lockstep")


def _tokenizer(parallel: ParallelProgram, given: _Given) -> Any:
    return prompts.load_tokenizer(given.tokenizer, parallel.options.get("model"), "--inputs")


def _write_trace(
    file: Path, parallel: ParallelProgram, found: job.RunReport, out: Out
) -> None:
    timeline = job.timeline_of(parallel, found, out.path.name)
    events.write_events(file, events.to_events(*timeline))
    click.echo(f"wrote {file}", err=True)


def _report(found: job.RunReport, following: str, as_json: bool) -> None:
    if as_json:
        facts = {"ranks": found.ranks, "backend": found.backend, "seconds": found.seconds,
                 "bytes_sent": found.bytes_sent, "outputs": found.outputs}
        more = {"next": following, "slow": found.slow}
        said = {name: text for name, text in more.items() if text}
        click.echo(json.dumps({**facts, **said}, indent=2))
        return
    click.echo(f"{found.ranks} ranks over {found.backend}, {found.seconds:.3f} s")
    for name, text in found.outputs.items():
        click.echo(f"  {name}: {text}")
    for rank, sent in enumerate(found.bytes_sent):
        click.echo(f"  rank {rank} sent {sent:,} bytes")
    if found.slow:
        click.echo(f"note: {found.slow}")
    if following:
        click.echo(f"next: {following}")
