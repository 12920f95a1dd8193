"""One case: a spoilt artifact is used in every way, and what became of it is judged."""

from __future__ import annotations

import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ringcompile import compiler, dump, execution
from ringcompile.errors import RingCompileError
from tests.fuzz.changes import spoil
from tests.fuzz.pristine import RECIPES, Pristine, memory, pristine

SECONDS, BYTES = 5.0, 1 << 30
_STUCK = 30  # seconds after which a case that hangs is broken off
FORMATS = dump.formats()
NUMERICS = 0.02  # of the cases compare numbers with the model that the artifact keeps


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        seed: the case.
        model: the artifact, as in `RECIPES`.
        changes: what was done to the artifact.
        signed: whether its digests were made to fit again, and nobody asks for a signature.
        outcome: "refused", "same", "other numbers", or what must never be.
        seconds: of computing that using it took.
    """

    seed: int
    model: str
    changes: list[str]
    signed: bool
    outcome: str
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether this must not happen."""
        fine = {"refused", "same"} | ({"other numbers"} if self.signed else set())
        return self.outcome not in fine


def use(folder: Path, clean: Pristine, rng: random.Random) -> list[torch.Tensor]:
    """Everything that one does with an artifact; a part of it that takes long is drawn."""
    made = compiler.load(folder, verify_key=clean.key)
    sets = [made, *filter(None, (made.carried, made.prefill))]
    for program in (program for one in sets for program in (one.program, *one.ranks())):
        dump.render(program, rng.choice(FORMATS))
    made.plan()
    if rng.random() < NUMERICS:
        execution.verify(made, seq=rng.choice((5, 8)), tries=1)
    else:
        execution.verify(made)
    return clean.use(made)


def artifact_of(seed: int) -> str:
    """The artifact that a case spoils, as in `RECIPES`."""
    names, weights = zip(*((n, recipe.weight) for n, recipe in RECIPES.items()), strict=True)
    return str(random.Random(f"artifact {seed}").choices(names, weights)[0])


def judge(seed: int) -> Verdict:
    """Run the case of a seed."""
    model, rng = artifact_of(seed), random.Random(f"use {seed}")
    clean = pristine(model)
    with tempfile.TemporaryDirectory(prefix="fuzz-case-", dir=memory()) as place:
        folder = Path(place) / "out"
        changes, signed = spoil(clean.folder, folder, seed)
        before, start = _peak(), time.process_time()
        with _watched(Path(place), clean.key) as outside:
            outcome = _outcome(folder, clean, rng)
        seconds = time.process_time() - start
        if outside:
            outcome = f"opened {outside[0]}"
        elif seconds > SECONDS:
            outcome = f"took {seconds:.1f} s"
        elif _peak() - before > BYTES:
            outcome = f"took {(_peak() - before) >> 20} MiB"
    # Whoever makes digests fit has not the key.
    return Verdict(seed, model, changes, signed and clean.key is None, outcome, seconds)


def _outcome(folder: Path, clean: Pristine, rng: random.Random) -> str:
    try:
        found = use(folder, clean, rng)
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
_watching: list[tuple[tuple[str, ...], list[str]]] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watching or event not in ("open", "os.open", "os.system", "subprocess.Popen", "exec"):
        return
    allowed, found = _watching[-1]
    if event in ("os.system", "subprocess.Popen"):
        found.append(f"{event} {args[0]!r}")
        return
    path = str(args[0])
    if event == "open" and path.startswith("/") and not path.startswith(allowed):
        found.append(path)


@contextmanager
def _watched(inside: Path, key: Path | None) -> Iterator[list[str]]:
    """The files outside a folder that are opened meanwhile, but for a key.

    Ends what hangs or takes all memory.
    """
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
    own = (str(inside), *(() if key is None else (str(key),)))
    _watching.append(((*own, *_ALLOWED), found))
    try:
        yield found
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        _watching.pop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
