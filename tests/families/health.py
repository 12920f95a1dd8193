"""Whether a row of the catalogue can show a fault: what should matter to its outputs does."""

from __future__ import annotations

import torch
from torch import nn

from tests.families.family import VOCABULARY, Family
from tests.families.trial import LENGTH, reference, scaled_difference
from tests.support import furthest

# Well above what rounding does (1e-6) and the tolerance (2e-5).
MATTERS = 1e-3
LEAST_SPREAD, MOST_SPREAD = 1e-3, 1e3


def problems(family: Family) -> list[str]:
    """What is wrong with the row; empty if nothing is."""
    model, inputs = family.build(), family.example(LENGTH)
    expected = reference(model, inputs)
    found = [f"'{name}' is not finite" for name, v in expected.items() if not v.isfinite().all()]
    spread = float(next(iter(expected.values())).std())
    if not LEAST_SPREAD < spread < MOST_SPREAD:
        found.append(f"the first output has a spread of {spread}")
    if _last(model, inputs, expected) != family.first_seen:
        found.append(f"the last position sees the first: {not family.first_seen}")
    for field, value in family.matters.items():
        other = reference(family.build(**{field: value}), inputs)
        if _change(expected, other) < MATTERS:
            found.append(f"{field}={value} changes nothing")
    return found


def _last(
    model: nn.Module, inputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> bool:
    """Whether another start of the first input changes the end of the first output."""
    first, rest = next(iter(inputs)), dict(list(inputs.items())[1:])
    other = reference(model, {first: _other_start(inputs[first]), **rest})
    name = next(iter(expected))
    return _change({name: _end(expected[name])}, {name: _end(other[name])}) >= MATTERS


def _other_start(value: torch.Tensor) -> torch.Tensor:
    changed = value.clone()
    if not value.is_floating_point():
        changed[:, 0] = 3 + (changed[:, 0] - 2) % (VOCABULARY - 3)
    elif value.dim() == 2:
        changed[:, :64] += torch.linspace(-2, 2, 64)
    else:
        changed[..., :8, :8] += torch.linspace(-2, 2, 8)
    return changed


def _end(value: torch.Tensor) -> torch.Tensor:
    return value.flatten(1)[:, -8:]


def _change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    return furthest(scaled_difference(after[name], value) for name, value in before.items())
