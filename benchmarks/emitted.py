"""The program that ringcompile emits for attention alone, as a contestant of `attention`."""

import torch
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from benchmarks.baselines.problem import Case
from benchmarks.pool import Step
from ringcompile.ir.expr import BATCH, SEQUENCE
from ringcompile.runtime.distributed import Peer
from ringcompile.runtime.join import Rank

EXAMPLE_LENGTH = 24


class Attention(nn.Module):
    """Causal self-attention on query, key and value [1, num_tokens, num_heads, head_dim]."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        heads = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*heads, is_causal=True)


def setup(rank: int, world: int, case: Case) -> Step:
    """Compile, and run on this rank's shard: entry and exit are not part of a step."""
    shape = (3, 1, EXAMPLE_LENGTH, case.num_heads, case.head_dim)
    dims = {"query": {0: "batch", 1: "sequence"}}
    program = rc.capture(Attention(), tuple(torch.zeros(shape)), dims=dims)
    parallel = rc.transform(program, f"ring={world}", order="zigzag")
    peer = Peer(parallel, Rank(rank, world, torch.device("cpu")))
    sequence = peer.program().sequence
    assert sequence is not None
    lengths = {**sequence.bindings({SEQUENCE: case.num_tokens}), BATCH: 1}
    assert lengths[SEQUENCE] % sequence.num_chunks == 0
    tensors = (tensor.transpose(1, 2) for tensor in case.local_tensors(rank, world))
    share = dict(zip(peer.program().placeholders, tensors, strict=True))
    return lambda: peer.run_share(share, lengths).outputs[0]
