"""Causal zigzag ring attention written by hand: what an emitted program is measured against.

Each choice was measured on two ranks with a core each, where whatever the transfer costs is taken
from the attention:

* the buffers live as long as the program. A fresh buffer of 16 MB or more comes from mmap, and the
  page faults of its first touch cost as much as sending it (3 to 7 % of a step);
* a last chunk that no rank to come can see is not sent (1 to 2 %), see `RingAttention`;
* the merge writes into the first block's result with one `lerp_`, a tenth of the time of the
  formula written out with temporaries;
* key and value go as they lie, two messages at once: packing them is one more copy (up to 1 %);
* the local block is one causal call: its two chunks are in sequence order, so the kernel's
  top-left mask is exact.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.baselines.problem import Case
from benchmarks.pool import Step

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
Block = tuple[torch.Tensor, torch.Tensor]


def setup(rank: int, world: int, case: Case) -> Step:
    query, key, value = case.local_tensors(rank, world)
    ring = RingAttention(rank, world, key)
    return lambda: ring(query, key, value)


class RingAttention:
    """Ring attention over zigzag shards [batch, heads, rows, head_dim] like `key`, on one rank.

    Blocks travel from rank r to r - 1, so a block meets the ranks before its owner first: it ends
    inside their last chunk and is seen whole by it. From rank 0 it passes on to the ranks after its
    owner, for all of which its last chunk is in the future: rank 0 sends first chunks only.
    """

    def __init__(self, rank: int, world: int, key: torch.Tensor):
        self._rank, self._world = rank, world
        self._half = key.shape[2] // 2
        # Two buffers take turns: one is sent on while the other is filled.
        buffers = torch.empty(min(2, world - 1), 2, key.numel())
        self._arrivals = [
            self._in_buffer(buffers[step % len(buffers)], key, whole=rank + step < world)
            for step in range(1, world)
        ]
        self._trimmed = self._in_buffer(torch.empty(2, key.numel()), key, whole=False)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        late = slice(self._half, None)
        transfer = self._start_shift((key, value), step=0)
        out, lse = _flash(query, key, value, 0.0, True)
        for step, block in enumerate(self._arrivals, start=1):
            for work in transfer:
                work.wait()
            transfer = self._start_shift(block, step)
            if self._rank + step < self._world:
                # A later rank's: both its chunks lie between our two, past for our last rows only.
                result = _flash(query[:, :, late], *block, 0.0, False)
                _merge(out[:, :, late], lse[:, :, late], *result)
            else:
                _merge(out, lse, *_flash(query, *block, 0.0, False))
        return out

    def _start_shift(self, block: Block, step: int) -> list[dist.Work]:
        """Start sending `block` and receiving the next one; nothing after the last block."""
        if step + 1 == self._world:
            return []
        if self._rank == 0:
            block = self._trim(block)
        to, source = (self._rank - 1) % self._world, (self._rank + 1) % self._world
        sends = [dist.P2POp(dist.isend, tensor, to) for tensor in block]
        receives = [dist.P2POp(dist.irecv, tensor, source) for tensor in self._arrivals[step]]
        return dist.batch_isend_irecv(sends + receives)

    def _trim(self, block: Block) -> Block:
        for trimmed, tensor in zip(self._trimmed, block, strict=True):
            trimmed.copy_(tensor[:, :, : self._half])
        return self._trimmed

    def _in_buffer(self, buffer: torch.Tensor, key: torch.Tensor, whole: bool) -> Block:
        """Lay a key and a value out in `buffer` [2, key.numel()], whole or the first chunk only."""
        like = key if whole else key[:, :, : self._half]
        flat_key, flat_value = buffer[:, : like.numel()]
        return flat_key.view(like.shape), flat_value.view(like.shape)


def _merge(
    out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor
) -> None:
    """Fold a block's result into `out` and `lse`, float32, in place.

    The softmax over both key sets weighs the block by exp(block_lse) / (exp(lse) + exp(block_lse)).
    """
    weight = torch.sigmoid(block_lse - lse)
    out.lerp_(block_out, weight.unsqueeze(-1))
    lse.sub_(F.logsigmoid(lse - block_lse))
