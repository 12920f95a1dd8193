"""A module that runs on all ranks of a job, and is called as the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ringcompile.artifact.blocks import hasher
from ringcompile.capture.dims import Dims
from ringcompile.capture.export import capture
from ringcompile.capture.flat_call import flat, unwrapped
from ringcompile.capture.same_call import SameCall
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program, WeightSource
from ringcompile.mesh import Mesh
from ringcompile.options import Given
from ringcompile.runtime.device_mesh import devices_of, mesh_of
from ringcompile.runtime.distributed import Peer
from ringcompile.runtime.handshake import agree
from ringcompile.runtime.join import EXCHANGE_TIMEOUT, join_torchrun
from ringcompile.runtime.local_outputs import share_of_rank
from ringcompile.session import OUTPUTS, check_choice


def parallelize(
    module: nn.Module,
    example: Any,
    parallel: str | Mesh | DeviceMesh,
    *,
    outputs: str = "whole",
    dims: Dims | None = None,
    backend: str = "auto",
    timeout: float = EXCHANGE_TIMEOUT,
    **options: Unpack[Given],
) -> Parallelized:
    """Compile a module for the ranks of this job. Call the result like the module itself.

    Every process of the job must call this with the same module and example: in a job that torchrun
    started, or in one whose process group is initialized already, which is then used. Each process
    captures the model. The weights must be the same in all processes, which is checked.

    Args:
        module: the model in eval mode, with its weights.
        example: one tensor, a tuple of positional arguments, or a mapping of keyword arguments.
            Later calls may have another sequence length and another batch, as far as the model's
            code allows.
        parallel: a spec such as "ring=4", or a torch `DeviceMesh` of all ranks whose dims are named
            by axes; its process groups are used.
        outputs: "whole" gathers the outputs on every rank; "local" returns a `Share`, which holds
            this rank's part of them.
        dims: as for `capture`.
        backend: "gloo", "nccl" or "auto", where no process group is initialised.
        timeout: seconds that a rank waits for another in one exchange.
        options: the fields of `Options`, but for `cache`.

    Raises:
        RingCompileError: there is no job, or one of another size; a model that cannot be compiled;
            ranks with other weights, programs or versions than rank 0.
    """
    check_choice("form of outputs", outputs, OUTPUTS)
    if options.get("cache") is not None:
        raise RingCompileError(
            "a module that is parallelized has no cache",
            hint="use rc.transform with cache=, and rc.Session or rc.generate",
        )
    mesh = mesh_of(parallel)
    rank = join_torchrun(mesh, backend=backend, timeout=timeout)
    rank.devices = devices_of(parallel, rank.device)
    args, kwargs = _arguments(example)
    model = unwrapped(module)
    program = capture(model, args, kwargs, dims=dims)
    call = SameCall(model, args, kwargs)
    made = transform(program, mesh, **options)
    agree(rank, {"weights": _weights_digest(program)})
    peer = Peer(made, rank, check_inputs=True)
    peer.let_go()
    return Parallelized(peer, call, outputs)


class Parallelized(nn.Module):
    """What `parallelize` returns. All ranks call it, with the same whole inputs.

    A call takes the arguments of the module's own forward. It keeps no gradients, and refuses
    inputs that differ between ranks. The weights are this rank's shares; they are no parameters of
    this module, and the original module may be deleted to free its memory.
    """

    def __init__(self, peer: Peer, call: SameCall, outputs: str) -> None:
        super().__init__()
        self._peer, self._call, self._outputs = peer, call, outputs
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whole outputs as the module returns them; with "local" this rank's `Share`.

        Raises:
            RingCompileError: arguments that the program is not for, or a rank that was lost.
        """
        inputs = self._call.inputs(args, kwargs)
        done = self._peer.run(inputs)
        if self._outputs == "whole":
            whole = self._peer.assemble(done, everywhere=True)
            flat(whole, leaves := list[torch.Tensor]())
            return self._call.result(leaves)
        return share_of_rank(self._peer.program(), done)

    def extra_repr(self) -> str:
        """What printing the module shows: the plan, and this rank."""
        return f"{self._peer.mesh}, rank {self._peer.rank.index}, outputs={self._outputs!r}"


def _arguments(example: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if torch.is_tensor(example):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), example
    if isinstance(example, tuple | list):
        return tuple(example), {}
    raise RingCompileError(
        f"the example is a {type(example).__name__}",
        hint="pass one tensor, a tuple of positional arguments, or a dict of keyword arguments",
    )


def _weights_digest(program: Program) -> str:
    """Of the names and data of all weights."""
    digest = hasher()()
    source: WeightSource | None = program.source
    for weight in sorted(program.weights.values(), key=lambda weight: weight.name):
        assert source is not None
        data = source(weight.name).detach().cpu().contiguous().reshape(-1)
        digest.update(f"{weight.name} {weight.dtype} {weight.shape}".encode())
        digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()
