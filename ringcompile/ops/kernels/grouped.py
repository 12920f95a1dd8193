"""Which kernel multiplies rows that are sorted by expert, without asking the device where they end.

torch has one for bfloat16 on GPUs of capability 9 and 10 (elsewhere it reads the ends on the host);
ours, in Triton, takes other dtypes and other GPUs.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ringcompile.ops.kernels.contract import HALVES
from ringcompile.ops.kernels.custom import INTERPRETED, load

_BYTES_PER_LOAD = 16
_OURS = (*HALVES, torch.float32)


def in_one_launch(rows: Tensor, ends: Tensor, matrices: Tensor) -> Tensor | None:
    """Each row [N,I] times the matrix of its expert; None where no kernel does it on the device.

    Args:
        rows: sorted by expert.
        ends: int32 [E], the row behind each expert's last one.
        matrices: [E,O,I].

    Returns:
        [N,O]; of rows behind the last end anything.
    """
    if takes_torch(rows, matrices):
        return torch._grouped_mm(rows, matrices.mT, offs=ends)
    if not takes_ours(rows):
        return None
    kernels = load("grouped_kernel")
    assert isinstance(kernels, ModuleType)
    out = rows.new_empty(len(rows), matrices.shape[1])
    if rows.is_cuda:
        with torch.cuda.device(rows.device):
            kernels.launch(rows, ends, matrices, out)
    else:
        kernels.launch(rows, ends, matrices, out)
    return out


def takes_torch(rows: Tensor, matrices: Tensor) -> bool:
    """Whether torch has the grouped product as one kernel."""
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or not len(rows):
        return False
    if torch.cuda.get_device_capability(rows.device)[0] not in (9, 10):
        return False
    sizes = (rows.shape[1], matrices.shape[1])
    return not any(size * rows.element_size() % _BYTES_PER_LOAD for size in sizes)


def takes_ours(rows: Tensor) -> bool:
    """Whether our kernel takes these rows."""
    if rows.dtype not in _OURS or not len(rows):
        return False
    runs = INTERPRETED or (
        rows.is_cuda and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    )
    return runs and isinstance(load("grouped_kernel"), ModuleType)
