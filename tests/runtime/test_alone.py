"""A rank's step without its peers: it asks for the same, does the same, and needs no host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from ringcompile.ir.communication import bytes_sent
from ringcompile.ir.expr import bind
from ringcompile.models import zoo
from ringcompile.runtime.alone import Alone
from ringcompile.runtime.cuda_graph import GraphedStep
from ringcompile.runtime.drive import drive
from ringcompile.runtime.executor import Executor
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.needs_host import HostWatch, NeedsHost
from tests.runtime.one_rank import one_rank, run_alone
from tests.support import difference

CPU = torch.device("cpu")
CASES = {
    "dense": ("dense-4l-tiny", "ring=4"),
    "moe": ("moe-4l-tiny", "ring=4"),
    "grouped-query": ("llama-tiny", "ring=4"),
    "tensor-parallel": ("dense-4l-tiny", "tp=4"),
    "ulysses": ("dense-4l-tiny", "ring=2,ulysses=2"),
}


@pytest.mark.parametrize(("name", "parallel"), CASES.values(), ids=CASES)
def test_outputs_have_their_types_and_bytes_are_counted(name: str, parallel: str) -> None:
    made = one_rank(name, parallel)
    alone = Alone(made.parallel.mesh, CPU)
    executor = Executor(made.program, made.lengths, check_types=True)
    outputs = drive(executor.run(made.values), alone.answer)
    assert all(output.isfinite().all() for output in outputs)
    assert alone.bytes_sent == bind(bytes_sent(made.program), made.lengths)


@pytest.mark.parametrize(("name", "parallel"), CASES.values(), ids=CASES)
def test_a_step_never_needs_the_host(name: str, parallel: str) -> None:
    made = one_rank(name, parallel)
    watch = HostWatch()
    run_alone(made, Executor(made.program, made.lengths, watch=watch))
    assert watch.found is None


def test_needing_the_host_is_seen() -> None:
    x = torch.arange(4)
    with NeedsHost().everywhere() as mode:
        x[x > 1]
        x[x]
        x.max().item()
        bool(x.equal(x))
        x.clone()[x > 1] = x[:2]
        x.tolist()
        torch.bincount(x)
        torch.tensor([1])
        x.clone().masked_fill_(x > 1, 0)
        x.to(torch.float32).to(x.device).copy_(x)
        x.to("meta")
    assert mode.found == [
        "aten.index.Tensor", "aten._local_scalar_dense.default", "aten.equal.default",
        "aten.index_put_.default", "Tensor.tolist", "aten.bincount.default",
        "aten.lift_fresh.default", "aten._to_copy.default",
    ]


def test_arrivals_of_a_shape_take_turns_in_two_buffers() -> None:
    made = one_rank("dense-4l-tiny", "ring=8", rank=7, order="contiguous")
    alone = Alone(made.parallel.mesh, CPU)
    drive(Executor(made.program, made.lengths).run(made.values), alone.answer)
    shapes = [(dtype, shape) for dtype, shape, _ in alone.arrivals if shape != (0,)]
    assert len(shapes) == 2
    assert len(set(shapes)) == 1


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        pytest.param(*case, id=name, marks=() if name in ("dense", "ulysses") else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_compiled_groups_compute_the_same(name: str, parallel: str) -> None:
    made = one_rank(name, parallel)
    plain = run_alone(made, Executor(made.program, made.lengths, check_types=True))
    executor = Executor(made.program, made.lengths, check_types=True, compiler="eager")
    assert len(executor.steps) < 0.8 * len(Executor(made.program, made.lengths).steps)
    for _ in range(2):
        found = run_alone(made, executor)
    assert difference(found, plain) < 1e-6


def test_values_are_let_go_as_soon_as_without_compiling() -> None:
    made = one_rank("dense-4l-tiny")
    for compiler in (None, "eager"):
        executor = Executor(made.program, made.lengths, compiler=compiler)
        freed = {slot for step in executor.steps for slot in step.frees}
        outs = {step.out for step in executor.steps}
        returned = {executor.slots[node] for node in made.program.outputs}
        assert outs - freed == returned


def test_every_op_can_be_watched() -> None:
    made = one_rank("dense-4l-tiny")
    seen = []

    def watch(node: fx.Node, args: list[Any], kwargs: dict[str, Any], function: Any) -> Any:
        seen.append(node.name)
        return function(*args, **kwargs)

    run_alone(made, Executor(made.program, made.lengths, watch=watch))
    calls = [node for node in made.program.graph.nodes if node.op == "call_function"]
    assert seen == [n.name for n in calls if "shift_start" not in str(n) and "wait" not in str(n)]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize(("name", "parallel"), CASES.values(), ids=CASES)
def test_a_step_on_a_gpu_never_waits_for_it(name: str, parallel: str) -> None:
    made = one_rank(name, parallel, device="cuda", dtype="float16")
    device = torch.device("cuda", 0)
    executor = Executor(made.program, made.lengths, device)
    alone = Alone(made.parallel.mesh, device)
    with torch.no_grad():
        drive(executor.run(made.values), alone.answer)  # arrivals are made, kernels compiled
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            drive(executor.run(made.values), alone.answer)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "parallel"), CASES.values(), ids=CASES)
def test_a_recorded_step_computes_the_same(name: str, parallel: str) -> None:
    made = one_rank(name, parallel, device="cuda", dtype="float16")
    device = torch.device("cuda", 0)
    executor = Executor(made.program, made.lengths, device)
    alone = Alone(made.parallel.mesh, device)
    step = GraphedStep(executor, made.weights, made.share, alone.answer)
    other = {name: torch.randn_like(x) if x.is_floating_point() else x.flip(-1)
             for name, x in made.share.items()}
    for share in (made.share, other):
        with torch.no_grad():
            plain = drive(executor.run({**made.weights, **share}), alone.answer)
        assert difference(step.run(share), plain) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense-4l-tiny", "llama-tiny"])
def test_lock_step_on_a_gpu_matches_float64(name: str) -> None:
    outputs = []
    for dtype, device in (("float64", "cpu"), ("float16", "cuda")):
        made = one_rank(name, dtype=dtype).parallel
        _, inputs = zoo.build(name, sequence=64, seed=3, dtype=dtype)
        run = run_lockstep(made.ranks(), made.mesh, made.source, inputs, device=device)
        outputs.append(run.outputs.cpu().double())
    assert difference(outputs[1], outputs[0]) < 5e-3
