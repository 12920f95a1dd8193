"""torch's own device mesh as a parallel plan: dims that are named `ring` and `tp`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringcompile.errors import RingCompileError
from ringcompile.mesh import Mesh


def mesh_of(parallel: str | Mesh | DeviceMesh) -> Mesh:
    """A parallel plan from a spec such as `ring=4`, from a mesh, or from torch's device mesh.

    Raises:
        RingCompileError: a malformed spec; a device mesh whose dims have no names, or names that
            are no axes, or that does not hold all ranks of the job in order.
    """
    if isinstance(parallel, Mesh):
        return parallel
    if isinstance(parallel, str):
        return Mesh.parse(parallel)
    names = parallel.mesh_dim_names
    if names is None:
        raise RingCompileError(
            "the dims of the device mesh have no names",
            hint="name them by axes: init_device_mesh(..., mesh_dim_names=('ring', 'tp'))",
        )
    ranks = parallel.mesh.flatten().tolist()
    world_size = dist.get_world_size() if dist.is_initialized() else len(ranks)
    if ranks != list(range(world_size)):
        raise RingCompileError(
            f"the device mesh holds the ranks {ranks}, but the job has the ranks 0 to "
            f"{world_size - 1}",
            hint="pass the mesh of all ranks, in order: a part of a mesh cannot run by itself",
        )
    return Mesh(tuple(zip(names, parallel.mesh.shape, strict=True)))


def devices_of(parallel: str | Mesh | DeviceMesh, device: torch.device) -> DeviceMesh | None:
    """The device mesh itself, if one is given.

    Args:
        parallel: as for `mesh_of`.
        device: where this process' tensors live.

    Raises:
        RingCompileError: it is for devices of another type.
    """
    if not isinstance(parallel, DeviceMesh):
        return None
    if parallel.device_type != device.type:
        raise RingCompileError(
            f"the device mesh is for '{parallel.device_type}', this job exchanges tensors on "
            f"'{device.type}'",
            hint="'cuda' goes with the NCCL backend, 'cpu' with gloo",
        )
    return parallel
