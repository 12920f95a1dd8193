"""What several commands have in common: options, tables, texts for sizes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.table import Table

from ringcompile import progress
from ringcompile.axes import AXES
from ringcompile.cost.hardware import cluster_names
from ringcompile.errors import RingCompileWarning
from ringcompile.later import Later
from ringcompile.models import table
from ringcompile.options import BACKENDS, CUDA_GRAPHS, DTYPES, Options, option_fields

if TYPE_CHECKING:
    from rich import progress as progress_bars

    from ringcompile import compiler
    from ringcompile.capture import loaders
    from ringcompile.parallel_program import ParallelProgram
else:
    progress_bars = Later("rich.progress")
    compiler = Later("ringcompile.compiler")
    loaders = Later("ringcompile.capture.loaders")

CONSOLE = Console(stderr=True)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
BACKEND = click.option(
    "--backend", type=click.Choice(["auto", *BACKENDS]), default="auto", show_default=True,
    help="lockstep: all ranks in this process, in turn. gloo, nccl: one process for each rank. "
    "auto: nccl if there are as many GPUs as ranks, otherwise gloo.",
)
RECORDING = click.option(
    "--cuda-graphs", type=click.Choice(CUDA_GRAPHS), default="auto", show_default=True,
    help="auto: on GPUs the step of one new token is recorded as a CUDA graph. off: it runs op by "
    "op. rehearse: on CPUs it is recorded and replayed as a CUDA graph is, for tests.",
)
PROMPT = (
    click.option("--prompt", metavar="TEXT",
                 help="The prompt as text. It is encoded with the checkpoint's tokenizer."),
    click.option("--prompt-file", type=click.Path(path_type=Path),
                 help="A text file with the prompt."),
    click.option("--tokenizer", metavar="FOLDER", help="A checkpoint folder with the tokenizer, if "
                 "the one that the artifact was made from has moved."),
)


@contextmanager
def noted() -> Iterator[None]:
    """What a user should know of how a program runs is said in a line: `note: ...`."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", RingCompileWarning)
        yield
    for one in found:
        if issubclass(one.category, RingCompileWarning):
            click.echo(f"note: {one.message}", err=True)
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


@contextmanager
def working(words: str) -> Iterator[None]:
    """A line on a terminal that says what goes on and, where that is known, how far it is."""
    if not CONSOLE.is_terminal:
        yield
        return
    spinner, text = progress_bars.SpinnerColumn(), progress_bars.TextColumn("{task.description}")
    columns = (spinner, text, progress_bars.BarColumn(), progress_bars.TimeElapsedColumn())
    with progress_bars.Progress(*columns, console=CONSOLE, transient=True) as bar:
        task = bar.add_task(words, total=None)

        def show(what: str, done: int, total: int) -> None:
            text = f"{words}: {what}, {done} of {total}"
            bar.update(task, description=text, completed=done, total=total)

        with progress.heard_by(show):
            yield


def _complete_axes(_context: click.Context, _option: click.Parameter, text: str) -> list[str]:
    """The axes that may come next in a parallel spec."""
    before, comma, last = text.rpartition(",")
    used = [part.partition("=")[0] for part in before.split(",")]
    return [f"{before}{comma}{axis}=" for axis in AXES if axis.startswith(last)
            and axis not in used]


def complete_clusters(_context: click.Context, _option: click.Parameter, text: str) -> list[str]:
    """The clusters whose names begin with `text`."""
    return [name for name in cluster_names() if name.startswith(text)]


def _complete_models(
    _context: click.Context, _argument: click.Parameter, text: str
) -> list[CompletionItem]:
    """The models whose names begin with `text`, and the shell's folders and files."""
    known = [CompletionItem(name, help=table.describe(name)) for name in table.names()]
    return [*(item for item in known if item.value.startswith(text)),
            CompletionItem(text, type="file")]


MODEL = click.argument("model", shell_complete=_complete_models)
PARALLEL = click.option(
    "--parallel", required=True, metavar="SPEC", shell_complete=_complete_axes,
    help="Mesh axes and their sizes, outermost first, such as ring=4 or pp=2,ring=4,tp=2."
)
DTYPE = click.option("--dtype", type=click.Choice(DTYPES), help="Cast the model to this dtype.")
FUSE = click.option("--fuse/--no-fuse", default=True, help="Whether thin ops, such as norms, run "
                    "in fused groups, as `transform` makes them by default.")
_BATCH = click.option("--batch", type=click.IntRange(1), default=1, show_default=True, metavar="N",
                      help="Number of sequences in the example inputs.")
_EXTRA_INPUTS = click.option(
    "--extra-inputs", metavar="NAMES", default="", callback=lambda _context, _option, text: tuple(
        filter(None, (name.strip() for name in text.split(",")))
    ), help="Inputs of a Hugging Face model besides token ids, separated by commas: "
    "attention_mask, position_ids, token_type_ids, decoder_input_ids.",
)
_DIMS = click.option(
    "--dims", multiple=True, metavar="INPUT=DIM,..", callback=lambda _context, _option, texts:
    dict(map(_read_dims, texts)),
    help="Which dims of an input are the batch and the sequence, for example "
    "query=batch,sequence,_,_ where _ is any other dim. Give the option once for each input. By "
    "default the dims are derived from the example inputs and the model's code.",
)
NEW_TOKENS = click.option(
    "--new-tokens", type=click.IntRange(1), metavar="N",
    help="Consider the generation of N tokens. Reported are TTFT (time to first token) and TPOT "
    "(time per output token after the first).",
)
CONTEXT = click.option(
    "--context", type=click.IntRange(1), metavar="C",
    help="With --new-tokens: number of tokens in the prompt.",
)
CLUSTER = click.option(
    "--cluster", required=True, metavar="NAME|FILE", shell_complete=complete_clusters,
    help=f"The hardware: {', '.join(cluster_names())}, or a file from `ringcompile calibrate`.",
)
EAGER = click.option(
    "--eager", is_flag=True,
    help="Add the time that the host takes to launch each op. By default it is left out, as with "
    "CUDA graphs.",
)


@dataclass(frozen=True)
class Out:
    """The artifact that a command is about.

    Attributes:
        path: its folder.
        verify_key: the public key of who has to have signed it, if anybody has to.
    """

    path: Path
    verify_key: Path | None = None

    def load(self) -> ParallelProgram:
        """Read it; every command reads artifacts this way.

        Raises:
            RingCompileError: as `compiler.load`.
        """
        return compiler.load(self.path, verify_key=self.verify_key)

    def __str__(self) -> str:
        return str(self.path)


def artifact_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """The argument OUT and the option --verify-key; the command takes both as `out`, an `Out`."""

    @functools.wraps(command)
    def call(out: Path, verify_key: Path | None, **given: Any) -> Any:
        return command(out=Out(out, verify_key), **given)

    path = click.Path(path_type=Path)
    argument = click.argument("out", type=path)
    return argument(click.option(
        "--verify-key", type=path, metavar="KEY",
        help="Refuse the artifact unless its signature fits the ed25519 public key in this PEM "
        "file.",
    )(call))


@dataclass(frozen=True)
class ModelArgument:
    """The model that a command captures, and its example inputs.

    Attributes:
        name: of the zoo, a checkpoint's folder, or FILE:FUNCTION.
        dtype: the one it is cast to, if any.
        batch: sequences of the example.
        extra_inputs: what a Hugging Face model takes besides token ids.
        dims: what the dims of inputs are, where the user says so.
    """

    name: str
    dtype: str | None
    batch: int
    extra_inputs: tuple[str, ...]
    dims: dict[str, dict[int, str]]

    def load(self, length: int | None, *, weights: bool) -> loaders.LoadedModel:
        """The module and its example inputs.

        Raises:
            RingCompileError: as `loaders.load_model`.
        """
        return loaders.load_model(
            self.name, batch=self.batch, length=length, dtype=self.dtype, weights=weights,
            extra=self.extra_inputs,
        )


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of MODEL's example; the command takes them and the argument as `model`."""

    @functools.wraps(command)
    def call(
        model: str,
        dtype: str | None,
        batch: int,
        extra_inputs: tuple[str, ...],
        dims: dict[str, dict[int, str]],
        **given: Any,
    ) -> Any:
        return command(model=ModelArgument(model, dtype, batch, extra_inputs, dims), **given)

    return DTYPE(_BATCH(_EXTRA_INPUTS(_DIMS(call))))


def _read_dims(text: str) -> tuple[str, dict[int, str]]:
    """`query=batch,sequence,_,_` as a name and what its dims are."""
    name, equals, roles = text.partition("=")
    if not (name.strip() and equals and roles):
        raise click.BadParameter(f"'{text}': write INPUT=DIM,DIM,.., DIM one of batch, sequence, "
                                 "sequence2, _")
    listed = enumerate(role.strip() for role in roles.split(","))
    return name.strip(), {dim: role for dim, role in listed if role != "_"}


def compile_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option of the command line for each field of `Options`; the command takes `options`."""
    flags = {option.metadata["flag"] or option.name: option for option in option_fields()}
    texts = {flag: f"--{flag.replace('_', '-')}" for flag in flags}

    @functools.wraps(command)
    def call(**given: Any) -> Any:
        chosen = {option.name: given.pop(flag) for flag, option in flags.items()}
        return command(**given, options=Options.of(chosen))

    for flag, option in reversed(flags.items()):
        off = f"/--{option.metadata['off']}" if option.metadata["off"] else ""
        call = click.option(texts[flag] + off, flag, **_settings(option))(call)
    return call


def _settings(option: Field[Any]) -> dict[str, Any]:
    """What click is told of a field: from its default, what kind of value it takes."""
    about = {"help": option.metadata["help"], "metavar": option.metadata["metavar"] or None}
    if option.metadata["choices"]:
        kind = click.Choice(option.metadata["choices"])
        return {**about, "type": kind, "default": option.default, "show_default": True}
    if isinstance(option.default, bool):
        return {**about, "is_flag": True, "default": option.default}
    if isinstance(option.default, tuple):
        return {**about, "callback": _names}
    return {**about, "type": click.IntRange(1)}


def _names(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[str, ...]:
    """`a,b` as two names."""
    return tuple(filter(None, (name.strip() for name in (text or "").split(","))))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on standard output; what does not fit into the terminal is not cut."""
    click.echo(title)  # a table's own title is wrapped to the width of its columns
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 160).print(table)


def milliseconds(seconds: float) -> str:
    """`12.34 ms`."""
    return f"{seconds * 1e3:.4g} ms"


def size_text(num_bytes: float) -> str:
    """`6.44 GB`, `453 kB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def shares(parts: dict[str, float]) -> str:
    """`matmul 58 %, communication 31 %`: of their sum, small ones left out."""
    total = sum(parts.values()) or 1.0
    return ", ".join(f"{name} {part / total:.0%}" for name, part in parts.items()
                     if part / total >= 0.005)
