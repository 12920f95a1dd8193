"""PyTorch's ring attention template, set up as its context parallelism would for a causal mask.

The module is private; its public door refuses CPU tensors, so it gets the CPU flash op by hand.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor.experimental._context_parallel import _attention as template

from benchmarks.baselines.problem import Case
from benchmarks.pool import Step


def setup(rank: int, world: int, case: Case) -> Step:
    template._cp_options.enable_load_balance = True
    template.set_rotate_method("alltoall")
    query, key, value = case.local_tensors(rank, world)

    def step() -> torch.Tensor:
        out, _ = template._templated_ring_attention(
            dist.group.WORLD, 2, _flash, query, key, value, is_causal=True
        )
        return out

    return step


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal
    )
