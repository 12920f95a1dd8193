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
# A range of fewer lengths than this is no range: the code means one length.
_FEWEST = 8


def allowed_lengths(
    exported: ExportedProgram, example: int, low: int, high: int | None
) -> tuple[int, int | None] | None:
    """The lengths around that of the example for which all guards hold; None where they are few.

    Args:
        exported: as torch.export made it, before anything rewrote it.
        example: the length of the example, for which they hold.
        low: the smallest length that torch allows.
        high: the largest one, if there is one.
    """
    guards = [
        _INPUT_SIZE.sub("s", guard)
        for guard in getattr(exported, "_guards_code", None) or ()
        if ".size()" in guard
    ]
    ends = () if high is None else (high - 1, high)
    samples = sorted(s for s in {*_SAMPLES, *ends} if s >= low and (high is None or s <= high))
    violated = [s for s in samples if not all(_holds(guard, s) for guard in guards)]
    low = max([low, *(s + 1 for s in violated if s < example)])
    above = [s - 1 for s in violated if s > example]
    if above:
        high = min(above)
    few = example in violated or (high is not None and high - low + 1 < _FEWEST)
    return None if few and violated else (low, high)


def _holds(guard: str, length: int) -> bool:
    """Whether a guard of torch's own making holds; one that cannot be read does not."""
    try:
        return bool(eval(guard, {"__builtins__": {}}, {**_NAMES, "s": length}))
    except Exception:
        return False
