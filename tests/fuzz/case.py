"""One case: a spoilt artifact is used in every way, and what became of it is judged."""

from __future__ import annotations

import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ringcompile import compiler, dump, execution
from ringcompile.capture.export import capture
from ringcompile.errors import RingCompileError
from ringcompile.models import zoo
from tests.fuzz.changes import spoil
from tests.support import tensors

SECONDS, BYTES = 5.0, 1 << 30
_STUCK = 30  # seconds after which a case that hangs is broken off
MODELS = {"small": "ring=2", "small in stages": "pp=2", "llama-tiny": "ring=2"}


class Small(nn.Module):
    """One attention and two matrices: quick to spoil, load and run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = layer(x).view(*x.shape[:2], 2, 4).transpose(1, 2)
            y = F.scaled_dot_product_attention(y, y, y, is_causal=True)
            x = x + y.transpose(1, 2).reshape(x.shape) * torch.arange(x.shape[1])[:, None]
        return x


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        seed: the case.
        changes: what was done to the artifact.
        signed: whether its digests were made to fit again.
        outcome: "refused", "same", "other numbers", or what must never be.
        seconds: of computing that using it took.
    """

    seed: int
    changes: list[str]
    signed: bool
    outcome: str
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether this must not happen."""
        fine = {"refused", "same"} | ({"other numbers"} if self.signed else set())
        return self.outcome not in fine


@dataclass(frozen=True)
class Pristine:
    """An artifact before it is spoilt, inputs for it, and its outputs."""

    folder: Path
    inputs: tuple[torch.Tensor, ...]
    outputs: list[torch.Tensor]


@cache
def pristine(model: str) -> Pristine:
    torch.manual_seed(0)
    if model.startswith("small"):
        module, args = Small().eval(), (torch.randn(1, 12, 8),)
    else:
        module, args = zoo.build(model, sequence=12)
    made = compiler.transform(capture(module, args), MODELS[model])
    folder = Path(tempfile.mkdtemp(prefix="fuzz-")) / "out"
    made.save(folder)
    return Pristine(folder, args, tensors(execution.run(made, args)))


def use(folder: Path, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Everything that one does with an artifact."""
    made = compiler.load(folder)
    for program in (made.program, *made.ranks()):
        for form in dump.formats():
            dump.render(program, form)
    made.plan()
    execution.verify(made)
    return tensors(execution.run(made, inputs))


def judge(seed: int) -> Verdict:
    """Run the case of a seed."""
    model = list(MODELS)[seed % len(MODELS) if seed % 5 == 0 else seed % 2]
    clean = pristine(model)
    with tempfile.TemporaryDirectory(prefix="fuzz-case-") as place:
        folder = Path(place) / "out"
        changes, signed = spoil(clean.folder, folder, seed)
        before, start = _peak(), time.process_time()
        with _watched(Path(place)) as outside:
            outcome = _outcome(folder, clean)
        seconds = time.process_time() - start
        if outside:
            outcome = f"opened {outside[0]}"
        elif seconds > SECONDS:
            outcome = f"took {seconds:.1f} s"
        elif _peak() - before > BYTES:
            outcome = f"took {(_peak() - before) >> 20} MiB"
    return Verdict(seed, changes, signed, outcome, seconds)


def _outcome(folder: Path, clean: Pristine) -> str:
    try:
        found = use(folder, clean.inputs)
    except RingCompileError as error:
        return "refused" if str(error) else "refused without a word"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:120]} ({last.filename}:{last.lineno})"
    if len(found) == len(clean.outputs) and all(map(torch.equal, found, clean.outputs)):
        return "same"
    return "other numbers"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- files that are opened -------------------------------------------------------------------------

_ALLOWED = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), "/proc/self/", "/sys/")
_watching: list[tuple[Path, list[str]]] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watching or event not in ("open", "os.open", "os.system", "subprocess.Popen", "exec"):
        return
    inside, found = _watching[-1]
    if event in ("os.system", "subprocess.Popen"):
        found.append(f"{event} {args[0]!r}")
        return
    path = str(args[0])
    if event == "open" and path.startswith("/") and not path.startswith((str(inside), *_ALLOWED)):
        found.append(path)


@contextmanager
def _watched(inside: Path) -> Iterator[list[str]]:
    """The files outside a folder that are opened meanwhile; ends what hangs or takes all memory."""
    if not getattr(_hook, "added", False):
        sys.addaudithook(_hook)
        _hook.added = True  # type: ignore[attr-defined]
    found: list[str] = []

    def stop(*_: object) -> None:
        raise TimeoutError(f"hung for {_STUCK} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_STUCK)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * BYTES, hard))
    _watching.append((inside, found))
    try:
        yield found
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        _watching.pop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
