"""What torch.export raises, as an error of ours: the user's line, a reason and what to do."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import NamedTuple

from ringcompile.capture import regions
from ringcompile.capture.source_lines import location_of_error
from ringcompile.errors import RingCompileError


class _Row(NamedTuple):
    """A kind of failure: how torch's error is told by its class and text, and what is said."""

    told_by: re.Pattern[str]
    message: str
    hint: str


def _pattern(*words: str) -> re.Pattern[str]:
    return re.compile("|".join(words))


_ROWS = (
    _Row(
        _pattern(
            "^GuardOnDataDependentSymNode", "^DataDependentOutputException",
            "^DynamicOutputShapeException", "data-dependent", "unbacked", "_local_scalar_dense",
            r"\.numpy\(\) is not supported", r"\.tolist\(\) is not supported",
            "Attempted to (?:make|get) .* out of a fake tensor",
        ),
        "control flow or a size depends on the values of a tensor, not on shapes",
        "compute both ways and choose with torch.where, or keep the size fixed",
    ),
    _Row(
        _pattern("unhashable type: .*SymInt"),
        "a size that may vary is used as a key of a cache (such as functools.lru_cache), a dict "
        "or a set",
        "compute it in each call, or keep it for the largest length and slice it; compare sizes "
        "without a set",
    ),
    _Row(
        _pattern("is mutated in the forward method"),
        "the model changes one of its own tensors (a buffer, say) while it runs; inference must "
        "not change state",
        "call model.eval(), and turn caches and counters off",
    ),
    _Row(
        _pattern("We found a fake tensor in the exported program constant's list"),
        "the model keeps a tensor from an earlier call, or computes a gradient, while it runs",
        "compute it in each call with ordinary tensor operations",
    ),
)  # fmt: skip


def explained(error: Exception) -> RingCompileError:
    """The user's line and a reason for an export failure."""
    location = location_of_error(error)
    if (region := _region(error)) is not None:
        found = regions.refusal(region)
        return RingCompileError(found.message, hint=found.hint, location=location)
    text = f"{type(error).__name__}: {error}".strip()
    for row in _ROWS:
        if row.told_by.search(text):
            return RingCompileError(row.message, hint=row.hint, location=location)
    return RingCompileError(
        f"torch.export cannot capture the model: {text.splitlines()[0][:300]}", location=location
    )


def _region(error: Exception) -> str | None:
    """The control flow that torch was tracing when it failed, by the file that it is written in."""
    names = {name.removesuffix("_impl"): name for name in regions.REFUSED}
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if file.parent.name == "_higher_order_ops" and file.stem in names:
            return names[file.stem]
    return None
