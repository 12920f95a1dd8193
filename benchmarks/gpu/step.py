"""One rank's step without its peers: measured over roofline, and what launching costs of it.

Of a step with compiled groups, each group is measured beside the bytes that pass its border.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from benchmarks.gpu.programs import compiled
from benchmarks.gpu.report import Report
from benchmarks.gpu.roofline import Roofline, moved_bytes
from benchmarks.gpu.timing import device, event_seconds, kernel_seconds, on_gpu
from benchmarks.gpu.weights import DrawnWeights
from ringcompile.ir.call_text import op_name
from ringcompile.ir.expr import FIRST, PART
from ringcompile.ir.fused import group_of, name_of_group
from ringcompile.runtime.alone import Alone
from ringcompile.runtime.cuda_graph import GraphedStep
from ringcompile.runtime.data import name_inputs, share_inputs
from ringcompile.runtime.drive import drive
from ringcompile.runtime.executor import Executor
from ringcompile.runtime.groups import Body
from ringcompile.runtime.runner import read_weights

_PLANS = (("dense-4l", "ring=16"), ("moe-4l", "ring=16"), ("dense-4l", "tp=8,pp=2"),
          ("moe-4l", "tp=8,pp=2"), ("dense-4l", "ring=4,ulysses=4"))


def ceilings() -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy, measured here."""
    size = 8192 if on_gpu() else 256
    dtype = torch.float16 if on_gpu() else torch.float32
    a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    product = kernel_seconds(torch.matmul, [(a, b)], per_replay=4)
    source = torch.randn(2**30 if on_gpu() else 2**16, device=device())
    copied = torch.empty_like(source)
    copy = event_seconds(lambda: copied.copy_(source))  # in a CUDA graph it is another copy
    return 2 * size**3 / product, 2 * source.nbytes / copy


def run(report: Report, *, dry: bool, seconds: float) -> None:
    """Each plan in turn, as long as there is time; the last rank of each."""
    end = time.monotonic() + seconds
    flops, num_bytes = ceilings()
    report.add(ceiling="matmul", tflops=flops / 1e12, copy_tb_per_second=num_bytes / 1e12)
    small = dry or not on_gpu()
    # torch.compile takes longest, and is left for last.
    todo = [(plan, None) for plan in _PLANS] + [(plan, "inductor") for plan in _PLANS[:2]]
    if small:
        todo = [*todo[: len(_PLANS)], (_PLANS[0], "eager")]
    for (model, parallel), compiler in todo:
        if time.monotonic() > end - (15 if compiler is None else 40):
            return
        tokens = 256 if small else 16384
        name = f"{model}-tiny" if small else model
        plan = parallel.replace("16", "4").replace("8", "4") if small else parallel
        _Step(report, name, plan, tokens, (flops, num_bytes)).measure(compiler)
        if on_gpu():
            torch.cuda.empty_cache()


class _Step:
    def __init__(
        self, report: Report, model: str, parallel: str, tokens: int,
        ceiling: tuple[float, float],
    ) -> None:
        self.report, self.ceiling = report, ceiling
        self.columns = {"model": model, "parallel": parallel, "tokens": tokens}
        made = compiled(model, parallel)
        self.program = made.rank(0)
        source = DrawnWeights(model, device(), cached=False)
        dtype = made.program.inputs[0].type.dtype
        torch.manual_seed(2)
        hidden = torch.randn(1, tokens, source.config.hidden_size, device=device()).to(dtype)
        whole = name_inputs(self.program, (hidden,))
        self.lengths = {PART: 1, FIRST: 0, **self.program.bindings(whole)}
        self.weights = read_weights(self.program, source, device())
        self.share = {
            name: x.to(device())
            for name, x in share_inputs(self.program, whole, self.lengths).items()
        }
        self.alone = Alone(made.mesh, device())

    @torch.no_grad()
    def measure(self, compiler: str | None) -> None:
        """A row for the step, and one for each kind of op where ops run one by one."""
        roof = Roofline(*self.ceiling)
        self._run(self._executor(watch=roof))
        executor = self._executor(compiler=compiler)
        eager = event_seconds(lambda: self._run(executor))
        graphed = self._graphed(executor)
        best = eager if graphed is None else graphed
        self.report.add(
            **self.columns, compiled=compiler is not None, eager_ms=eager * 1e3,
            graph_ms=None if graphed is None else graphed * 1e3, roofline_ms=roof.total * 1e3,
            over_roofline=best / roof.total,
            lost_to_launches=None if graphed is None else 1 - graphed / eager,
            tflops=roof.flops / best / 1e12,
        )
        if on_gpu() and compiler is None:
            self._by_op(roof)
        if compiler is not None:
            self._by_group(compiler)

    def _executor(self, **options: Any) -> Executor:
        return Executor(self.program, self.lengths, device(), **options)

    def _run(self, executor: Executor) -> Any:
        return drive(executor.run({**self.weights, **self.share}), self.alone.answer)

    def _graphed(self, executor: Executor) -> float | None:
        if not on_gpu():
            return None
        step = GraphedStep(executor, self.weights, self.share, self.alone.answer)
        return event_seconds(step.replay)

    def _by_group(self, compiler: str) -> None:
        """Each fused group that is another one: its time beside what its bytes take."""
        measured = set[Body]()

        def watch(
            node: fx.Node, args: list[Any], kwargs: dict[str, Any], function: Callable[..., Any]
        ) -> Any:
            result = function(*args, **kwargs)
            if isinstance(function, Body) and function not in measured:
                measured.add(function)
                seconds = kernel_seconds(function, [tuple(args)])
                least = moved_bytes((args, result)) / self.ceiling[1]
                self.report.add(
                    **self.columns, group=name_of_group(group_of(node)), ms=seconds * 1e3,
                    bytes_ms=least * 1e3, over_bytes=seconds / least,
                )
            return result

        executor = self._executor(compiler=compiler, watch=watch)
        self._run(executor)

    def _by_op(self, roof: Roofline) -> None:
        """What each kind of op takes of an eager step, beside what it has to."""
        marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

        def watch(
            node: fx.Node, args: list[Any], kwargs: dict[str, Any], function: Callable[..., Any]
        ) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(1_000_000)  # half a millisecond, in which the host gets ahead
            start.record()
            result = function(*args, **kwargs)
            end.record()
            marks.append((op_name(node), start, end))
            return result

        executor = self._executor(watch=watch)
        for _ in range(2):
            marks.clear()
            self._run(executor)
        torch.cuda.synchronize()
        taken: dict[str, float] = defaultdict(float)
        for name, start, end in marks:
            taken[name] += start.elapsed_time(end)
        for name, milliseconds in sorted(taken.items(), key=lambda item: -item[1])[:12]:
            self.report.add(**self.columns, op=name, ms=milliseconds,
                            roofline_ms=roof.seconds.get(name, 0.0) * 1e3)
