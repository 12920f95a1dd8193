"""Models whose layers are of several kinds, by a letter each."""

from __future__ import annotations

import torch

from ringcompile.capture.export import capture
from ringcompile.ir.program import Program


class Layer(torch.nn.Module):
    """Attention, with a window or causal, and an MLP of some width."""

    def __init__(self, width: int, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.up, self.down = torch.nn.Linear(8, width), torch.nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1])
        apart = at[:, None] - at
        mask = (apart >= 0) & (apart < self.window) if self.window else apart >= 0
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        seen = torch.nn.functional.scaled_dot_product_attention(*[heads] * 3, attn_mask=mask)
        return x + self.down(self.up(seen.transpose(1, 2).flatten(-2)))


class Layers(torch.nn.Module):
    """Layers of some kinds; with `all_read`, what comes behind them reads every one."""

    def __init__(self, kinds: str, all_read: bool = False) -> None:
        super().__init__()
        made = {"a": (16, None), "b": (32, 4), "c": (24, None)}
        self.layers = torch.nn.ModuleList(Layer(*made[kind]) for kind in kinds)
        self.head, self.all_read = torch.nn.Linear(8, 4), all_read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return self.head(sum(states[1:]) if self.all_read else states[-1])  # type: ignore[arg-type]


def layers_of(kinds: str, all_read: bool = False) -> Program:
    """Captured; "a" and "c" are causal, "b" has a window, and all differ in the MLP's width."""
    return capture(Layers(kinds, all_read).eval(), (torch.randn(1, 6, 8),))
