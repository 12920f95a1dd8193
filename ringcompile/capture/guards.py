"""What torch.export assumed of the sizes of inputs, beyond the ranges it reports.

Code may turn a length into a constant without a word (`one_hot(slot, capacity)` does): what it was
then remains as a guard, a line of Python over the sizes of inputs. An exported program is right for
the sizes that pass its guards, and for no others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from types import CodeType

from torch.export import ExportedProgram

from ringcompile.capture.dims import BATCH

_INPUT_SIZE = re.compile(r"L(?:\[[^\]]*\]|\.\w+)+\.size\(\)\[\d+\]")
_NAMES = {"max": max, "min": min, "math": math}
# Every small size, where rounding shows, and a few large ones.
_SAMPLES = (*range(1, 400), 511, 512, 1000, 4096, 4097, 65536, 100003)
_FEW_SAMPLES = (1, 2, 3, 5, 8, 17, 64)
# A range of fewer sizes than this is no range: the code means one size.
_FEWEST = 8

Range = tuple[int, int | None]


class Guards:
    """The guards of an exported program, as conditions on the sizes that vary.

    Args:
        exported: as torch.export made it, before anything rewrote it.
        names: an input's dim, as guards write it -> the name of the size that it is.
        example: the sizes of the example by these names, for which all guards hold.
    """

    def __init__(
        self, exported: ExportedProgram, names: Mapping[str, str], example: Mapping[str, int]
    ) -> None:
        written = [g for g in getattr(exported, "_guards_code", None) or () if ".size()" in g]
        default = next(iter(example), "")
        self.example = dict(example)
        texts = {
            _INPUT_SIZE.sub(lambda found: names.get(found[0], default), guard) for guard in written
        }
        self.conditions = [
            compile(text, "<guard>", "eval") for text in sorted(texts)
        ]

    def allowed(self, name: str, low: int, high: int | None) -> Range | None:
        """The values around that of the example for which all guards hold; None where few are.

        Args:
            name: which size varies; the others are as in the example.
            low: the smallest value that torch allows.
            high: the largest one, if there is one.
        """
        known = self.example[name]
        ends = () if high is None else (high - 1, high)
        samples = sorted(
            s for s in {*_SAMPLES, *ends} if s >= low and (high is None or s <= high)
        )
        violated = [s for s in samples if not self._hold({**self.example, name: s})]
        low = max([low, *(s + 1 for s in violated if s < known)])
        above = [s - 1 for s in violated if s > known]
        if above:
            high = min(above)
        few = known in violated or (high is not None and high - low + 1 < _FEWEST)
        return None if few and violated else (low, high)

    def dependent(self, ranges: Mapping[str, Range]) -> str | None:
        """A size that is not free of the others: some combination within these ranges fails.

        As far as samples tell. The batch goes before lengths, and later lengths before earlier.
        """
        def within(name: str) -> Sequence[int]:
            low, high = ranges[name]
            ends = (low, low + 1, *(() if high is None else (high - 1, high)))
            samples = dict.fromkeys((*_FEW_SAMPLES, *ends))
            return [s for s in samples if s >= low and (high is None or s <= high)]

        for first, second in combinations(ranges, 2):
            together = (
                {first: a, second: b} for a in within(first) for b in within(second)
            )
            if not all(self._hold({**self.example, **sizes}) for sizes in together):
                return first if first == BATCH else second
        return None

    def _hold(self, sizes: Mapping[str, int]) -> bool:
        return all(_holds(condition, sizes) for condition in self.conditions)


def _holds(guard: CodeType, sizes: Mapping[str, int]) -> bool:
    """Whether a guard of torch's own making holds; one that cannot be read does not."""
    try:
        return bool(eval(guard, {"__builtins__": {}}, {**_NAMES, **sizes}))
    except Exception:
        return False
