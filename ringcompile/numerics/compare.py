"""Outputs of all ranks against those of the model: each by its own scale, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

# The largest difference that numbers may show, of the largest one in their row.
ALLOWED = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2,
           torch.complex64: 2e-5}
# Rows smaller than this share of the whole output are compared as if they were as large as that.
_SMALLEST_ROW = 1e-3


@dataclass(frozen=True)
class Mismatch:
    """Where an output is not what the model gives.

    Attributes:
        output: its name, as `outputs_by_name` gives it.
        text: what differs, where, and how far.
        rows: for each row of the output, whether it differs; None where all of it does.
        distance: for each row, how far, in the output's own numbers.
    """

    output: str
    text: str
    rows: torch.Tensor | None = None
    distance: torch.Tensor | None = None


def outputs_by_name(outputs: Any) -> dict[str, torch.Tensor]:
    """The tensors of nested outputs, by their path."""
    if torch.is_tensor(outputs):
        return {"output": outputs}
    plain = dict(outputs) if hasattr(outputs, "keys") else outputs
    paths = pytree.tree_flatten_with_path(plain)[0]
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): leaf
        for path, leaf in paths
        if torch.is_tensor(leaf)
    }


def compare(
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    real: torch.Tensor | None = None,
) -> tuple[float, list[Mismatch]]:
    """The largest difference of the scale that it is held against, and what differs by too much.

    Args:
        found: what the ranks give, by name.
        expected: what the model gives; finite, or infinite where the ranks have to be.
        real: which tokens [B, S] are no padding; outputs [B, S, ...] are compared there only.
    """
    if len(found) != len(expected):
        return float("inf"), [
            Mismatch("", f"the ranks give {len(found)} outputs, the model {len(expected)}")
        ]
    worst, mismatches = 0.0, list[Mismatch]()
    for (name, e), f in zip(expected.items(), found.values(), strict=True):
        if f.shape != e.shape or f.dtype != e.dtype:
            text = f"is {_kind(f)}, the model's is {_kind(e)}"
            worst, mismatches = float("inf"), [*mismatches, Mismatch(name, text)]
            continue
        off, mismatch = _output(name, f, e, real)
        worst = max(worst, off)
        mismatches += [mismatch] if mismatch is not None else []
    return worst, mismatches


def _output(
    name: str, found: torch.Tensor, expected: torch.Tensor, real: torch.Tensor | None
) -> tuple[float, Mismatch | None]:
    if not expected.numel():
        return 0.0, None
    allowed = ALLOWED.get(expected.dtype, 0.0)
    if real is not None and expected.shape[:2] == real.shape:
        kept = real.reshape(*real.shape, *[1] * (expected.dim() - 2))
        found, expected = torch.where(kept, found, 0), torch.where(kept, expected, 0)
    distance, scale = row_distances(found, expected)
    off = distance / scale
    # Written so that NaN is a difference: it compares false with everything.
    wrong = ~(off <= allowed)
    worst = float("inf") if bool(off.isnan().any()) else float(off.max())
    if not bool(wrong.any()):
        return worst, None
    return worst, Mismatch(name, _text(found, expected, off, allowed), wrong, distance)


def row_distances(
    found: torch.Tensor, expected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every row along the last dim how far two outputs are apart, and the scale of the row.

    Equal infinities are no distance, others an infinite one; NaN anywhere gives NaN. Numbers that
    are no floats have scale 1, so that any difference counts.
    """
    f, e = _rows(found), _rows(expected)
    apart = torch.where(f == e, 0.0, (f - e).abs())
    if not (expected.is_floating_point() or expected.is_complex()):
        return apart.amax(-1), torch.ones(apart.shape[:-1], dtype=apart.dtype)
    size = torch.where(e.isfinite(), e.abs(), 0.0)
    scale = size.amax(-1).clamp(min=max(float(size.max()) * _SMALLEST_ROW, 1e-30))
    return apart.amax(-1), scale


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """As float64 with at least one dim; whole numbers beyond 2**53 do not occur in outputs."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).flatten(-2)
    return tensor.to(torch.float64).reshape(tensor.shape or (1,))


def _text(
    found: torch.Tensor, expected: torch.Tensor, off: torch.Tensor, allowed: float
) -> str:
    flat = off.nan_to_num(nan=float("inf")).reshape(-1)
    row = int(flat.argmax())
    f, e = (_rows(x).reshape(len(flat), -1)[row] for x in (found, expected))
    apart = torch.where(f == e, 0.0, (f - e).abs()).nan_to_num(nan=float("inf"))
    column = int(apart.argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(row), off.shape)] if off.dim() else []
    position = [*where, column][: max(found.dim(), 1)]
    numbers = [float(side[column]) for side in (f, e)]
    values = f"at {position} the ranks give {numbers[0]:.6g}, the model {numbers[1]:.6g}"
    if not (expected.is_floating_point() or expected.is_complex()):
        return f"{values}; it has to be the same"
    return f"{values}: {float(flat[row]):.1e} of the row's largest value, allowed {allowed:.0e}"


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
