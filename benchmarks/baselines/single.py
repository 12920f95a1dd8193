"""The yardstick: PyTorch's own attention in one process with a thread per core."""

import torch.nn.functional as F

from benchmarks.baselines.problem import Case
from benchmarks.pool import Step


def setup(rank: int, world: int, case: Case) -> Step:
    query, key, value = case.local_tensors(rank, world)
    return lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True)
