"""Which line of the user's code a node of a captured graph, or an error, comes from.

torch.export keeps of a node's stack only the frames of functions named `forward`, so that what a
helper, a lambda or a comprehension computes would be said to come from the line that calls it.
While a model is captured, `all_frames` has it keep every frame between the model's call and torch.
"""

from __future__ import annotations

import contextlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import fx
from torch.fx import proxy

from ringcompile.capture import flat_call
from ringcompile.errors import SourceLocation

# Frames of code that is not the user's.
NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
_PACKAGES = re.compile(r"[/\\](?:site|dist)-packages[/\\]([^/\\]+)")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_STACKS, _FILTER = "CapturedTraceback", "_filter_traceback_frames"

class Frame(NamedTuple):
    """One entry of a stack."""

    file: str
    line: int
    function: str


@contextlib.contextmanager
def all_frames() -> Iterator[None]:
    """While inside, nodes that torch traces keep all frames of the model's own code."""
    stacks, choose = getattr(proxy, _STACKS, None), getattr(proxy.TracerBase, _FILTER, None)
    if stacks is None or choose is None:  # another torch: the line of the innermost `forward`
        yield
        return

    setattr(proxy, _STACKS, _Stack)
    setattr(proxy.TracerBase, _FILTER, lambda _, summary: summary)
    try:
        yield
    finally:
        setattr(proxy, _STACKS, stacks)
        setattr(proxy.TracerBase, _FILTER, choose)


class _Stack:
    """In place of torch's stacks, of which nearly all frames would be read to be left out."""

    def __init__(self, summary: traceback.StackSummary) -> None:
        self._summary = summary

    @classmethod
    def extract(cls) -> _Stack:
        """The user's frames between the model's call and the caller, outermost first."""
        found, frame = [], sys._getframe(1)
        while frame.f_code.co_filename != flat_call.__file__:
            code, line = frame.f_code, frame.f_lineno
            if not code.co_filename.startswith((*NOT_THE_USERS, "<")):
                found.append(traceback.FrameSummary(code.co_filename, line, code.co_name))
            if frame.f_back is None:
                return cls(traceback.StackSummary())
            frame = frame.f_back
        return cls(traceback.StackSummary.from_list(found[::-1]))

    def summary(self) -> traceback.StackSummary:
        """The frames, as torch asks for them."""
        return self._summary


def _inside_the_model(frames: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """The user's frames behind the call of the model, outermost first."""
    calls = [i for i, frame in enumerate(frames) if frame.filename == flat_call.__file__]
    return [
        frame for frame in frames[calls[-1] + 1 if calls else len(frames) :]
        if not frame.filename.startswith((*NOT_THE_USERS, "<"))
    ]


def location_of(node: fx.Node) -> SourceLocation:
    """The user's line of a traced node, and the path of the innermost module around it."""
    frame = _line_of_trace(node.meta.get("stack_trace")) or Frame("", 0, "")
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    layer = flat_call.own_name(modules[-1][0]) if modules else ""
    return SourceLocation(frame.file, frame.line, layer)


def line_of_stack(frames: Sequence[traceback.FrameSummary]) -> SourceLocation | None:
    """The user's line of a stack, outermost frame first; None where no code of theirs runs."""
    inside = _inside_the_model(frames)
    frame = _user_line(Frame(f.filename, f.lineno or 0, f.name) for f in inside)
    return SourceLocation(frame.file, frame.line) if frame else None


def location_of_error(error: BaseException) -> SourceLocation | None:
    """The user's line at which an exception was raised; None where no code of theirs ran."""
    return line_of_stack(traceback.extract_tb(error.__traceback__))


def _line_of_trace(stack_trace: str | None) -> Frame | None:
    return _user_line(
        Frame(file, int(line), function)
        for file, line, function in _FRAME.findall(stack_trace or "")
    )


def _user_line(frames: Iterable[Frame]) -> Frame | None:
    """The innermost frame of the model's own code.

    A library that the innermost `forward` calls is not its code, unless that `forward` is of the
    same library: a model's line is shown, not the one inside einops that it calls.
    """
    users = [
        frame for frame in frames
        if not frame.file.startswith((*NOT_THE_USERS, "<")) and not _is_standard(frame.file)
    ]
    forwards = [i for i, frame in enumerate(users) if frame.function == "forward"]
    inner = users[forwards[-1] if forwards else 0 :]
    own = [frame for frame in inner if _package(frame.file) in ("", _package(inner[0].file))]
    return own[-1] if own else None


def _is_standard(file: str) -> bool:
    return file.startswith(_STANDARD_LIBRARY) and not _package(file)


def _package(file: str) -> str:
    """The installed package that a file belongs to; empty of code that is not installed."""
    found = _PACKAGES.search(file)
    return found[1] if found else ""
