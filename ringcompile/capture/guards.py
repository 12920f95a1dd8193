"""What torch.export assumed of the sequence length, beyond the range it reports.

Code may turn a length into a constant without a word (`one_hot(slot, capacity)` does): what it was
then remains as a guard, a line of Python over the sizes of inputs. An exported program is right for
the lengths that pass its guards, and for no others.
"""

from __future__ import annotations

import math
import re

from torch.export import ExportedProgram

_INPUT_SIZE = re.compile(r"L(?:\[[^\]]*\]|\.\w+)+\.size\(\)\[\d+\]")
_NAMES = {"max": max, "min": min, "math": math}
# Every small length, where rounding shows, and a few large ones.
_SAMPLES = (*range(2, 400), 511, 512, 1000, 4096, 4097, 65536, 100003)
# Lengths up to here may be left out of the range; more is not "any length".
_MAX_LOW = 64


def smallest_length(exported: ExportedProgram, low: int, high: int | None) -> int | None:
    """The length from which on all guards hold; None where they hold for a few lengths only.

    Args:
        exported: as torch.export made it, before anything rewrote it.
        low: the smallest length that torch allows.
        high: the largest one, if there is one.
    """
    guards = [
        _INPUT_SIZE.sub("s", guard)
        for guard in getattr(exported, "_guards_code", None) or ()
        if ".size()" in guard
    ]
    allowed = [s for s in _SAMPLES if s >= low and (high is None or s <= high)]
    violated = [s for s in allowed if not all(_holds(guard, s) for guard in guards)]
    if not violated:
        return low
    above = max(violated) + 1
    return above if above <= _MAX_LOW and any(s >= above for s in allowed) else None


def _holds(guard: str, length: int) -> bool:
    """Whether a guard of torch's own making holds; one that cannot be read does not."""
    try:
        return bool(eval(guard, {"__builtins__": {}}, {**_NAMES, "s": length}))
    except Exception:
        return False

