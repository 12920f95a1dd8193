"""Causal zigzag ring attention written by hand: what an emitted program is measured against.

Each choice was measured on two ranks with a core each, where whatever the transfer costs is taken
from the attention:

* the buffers live as long as the program. A fresh buffer of 16 MB or more comes from mmap, and the
  page faults of its first touch cost as much as sending it (3 to 7 % of a step);
* the merge writes into the first block's result with one `lerp_`, a tenth of the time of the
  formula written out with temporaries;
* the local block is one causal call: its two chunks are in sequence order, so the kernel's
  top-left mask is exact.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.baselines.problem import Case
from benchmarks.pool import Step

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def setup(rank: int, world: int, case: Case) -> Step:
    query, key, value = case.local_tensors(rank, world)
    buffers = [torch.empty(2, *key.shape) for _ in range(2)]
    return lambda: ring_attention(rank, world, query, key, value, buffers)


def ring_attention(
    rank: int,
    world: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    buffers: list[torch.Tensor],
) -> torch.Tensor:
    """Attend from the local query to all ranks' keys; `buffers` are two of [2, *key.shape]."""
    half = query.shape[2] // 2
    late = slice(half, None)
    kv, spare = buffers
    torch.stack((key, value), out=kv)
    transfer = _start_shift(rank, world, kv, spare)
    out, lse = _flash(query, key, value, 0.0, True)
    for step in range(1, world):
        for work in transfer:
            work.wait()
        kv, spare = spare, kv
        transfer = _start_shift(rank, world, kv, spare) if step + 1 < world else []
        if (rank - step) % world < rank:
            # From an earlier rank: its first chunk is past for all our rows, its last for none.
            early_key, early_value = kv[:, :, :, :half]
            _merge(out, lse, *_flash(query, early_key, early_value, 0.0, False))
        else:
            # From a later rank: both its chunks lie between our two, past for our last rows only.
            block = _flash(query[:, :, late], *kv, 0.0, False)
            _merge(out[:, :, late], lse[:, :, late], *block)
    return out


def _start_shift(
    rank: int, world: int, kv: torch.Tensor, received: torch.Tensor
) -> list[dist.Work]:
    """Start sending `kv` to the next rank and receiving the previous rank's."""
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, kv, (rank + 1) % world),
            dist.P2POp(dist.irecv, received, (rank - 1) % world),
        ]
    )


def _merge(
    out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor
) -> None:
    """Fold a block's result into `out` and `lse`, float32, in place.

    The softmax over both key sets weighs the block by exp(block_lse) / (exp(lse) + exp(block_lse)).
    """
    weight = torch.sigmoid(block_lse - lse)
    out.lerp_(block_out, weight.unsqueeze(-1))
    lse.sub_(F.logsigmoid(lse - block_lse))
