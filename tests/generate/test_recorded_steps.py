"""Steps of one token that are recorded and replayed, as CUDA graphs are, against whole runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import nn

import ringcompile as rc
from ringcompile.ops import bodies, slots
from ringcompile.ops.cached import cached_attention
from ringcompile.ops.slots import bucket_of
from ringcompile.parallel_program import ParallelProgram
from ringcompile.pass_list import prepare
from ringcompile.runtime import decode_step
from ringcompile.runtime.cuda_graph import NotRecordedError
from ringcompile.runtime.executor import Executor
from ringcompile.runtime.rehearsal import Rehearsed
from tests.families.catalogue import FAMILIES
from tests.generate import trial
from tests.generate.models import (
    ALL,
    CAPACITY,
    WIDTH,
    Rotary,
    Window,
    captured,
    difference,
    given,
    ids,
    padded,
    with_gain,
)
from tests.generate.models import cached as compiled
from tests.generate.test_experts import Rows
from tests.generate.test_mixtures import FirstFew, Gathered, Mixture, Routed
from tests.generate.test_shifts import Convolution, TokenShift
from tests.support import some_fast

EXACT, PROMPT, NEW = 1e-10, 3, 40
SPECS = ("ring=1", "ring=2", "tp=2", "pp=2", "ulysses=2", "ring=2,tp=2")


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8, 16, 24, 32, 40, .. slots."""
    monkeypatch.setattr(slots, "_SMALLEST_BUCKET", 8)


def rehearsed(parallel: ParallelProgram, **options: Any) -> rc.Session:
    assert parallel.carried is not None
    return rc.Session(parallel, check_types=True, cuda_graphs="rehearse", **options)


def recorded(session: rc.Session) -> list[int]:
    """How many buckets each rank has recorded, in lock-step."""
    return [
        sum(step.recording is not None for step in runner._steps._made.values())
        for runner in session.driver.runners
    ]


@torch.no_grad()
def check_tokens(
    session: rc.Session, expected: torch.Tensor, tokens: torch.Tensor, end: int
) -> None:
    """Hold token after token against the whole model, up to a token."""
    for at in range(session.length, end):
        found = session.extend(tokens[:, at : at + 1])
        assert difference(found, expected[:, at : at + 1]) < EXACT, f"token {at}"


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "spec"),
    some_fast(ALL, SPECS, fast=lambda name, spec: (name, spec) in (
        ("Rotary", "ring=2"), ("Rotary", "pp=2"), ("Window", "ulysses=2"), ("Counted", "tp=2"),
    )),
)
def test_replayed_steps_equal_the_whole_model(name: str, spec: str) -> None:
    """Over the ends of buckets, of blocks of 32, and of what a window sees."""
    module, parallel = compiled(ALL[name], spec, batch=2)
    tokens = ids(CAPACITY, batch=2)
    with rehearsed(parallel) as session:
        session.extend(tokens[:, :PROMPT])
        check_tokens(session, module(tokens), tokens, PROMPT + NEW)
        assert min(recorded(session)) > 3
        assert session.notes == []


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "spec"),
    [(given(Routed, Rows), "ring=2,ep=2"), *(
        pytest.param(kind, spec, marks=pytest.mark.slow) for kind, spec in (
            (given(Routed, Rows), "ring=1"), (given(Routed, Rows), "pp=2"),
            (given(Routed, Gathered), "ring=2"), (given(Routed, FirstFew), "tp=2"),
            (Convolution, "ring=2"), (TokenShift, "pp=2"),
        )
    )],
)
def test_experts_and_convolutions_are_recorded(kind: Any, spec: str) -> None:
    module, parallel = compiled(kind, spec)
    tokens = ids(24)
    with rehearsed(parallel) as session:
        check_tokens(session, module(tokens), tokens, 24)
        assert min(recorded(session)) > 0
        assert session.notes == []


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(("spec", "batch", "options"), [
    ("ring=2,tp=2", 2, {"decode": "helix"}), ("ring=4", 1, {"decode": "helix"}), ("dp=2", 3, {}),
    ("pp=2,ring=2", 2, {}),
])
def test_other_forms_of_decoding(spec: str, batch: int, options: dict[str, Any]) -> None:
    module, program = captured(Rotary, batch)
    tokens = ids(24, batch)
    with rehearsed(rc.transform(program, spec, cache=40, **options)) as session:
        session.extend(tokens[:, :PROMPT], last=True)
        check_tokens(session, module(tokens), tokens, 24)
        assert min(recorded(session)) > 1
        assert session.notes == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "spec"), [
    ("deepseek_v3", "ring=2"), ("gpt_oss", "ring=4"), ("gemma2", "pp=2"), ("mamba2", "tp=2"),
    ("qwen3_next", "pp=2"), ("bloom", "ring=4"),
])
def test_families_are_recorded(name: str, spec: str) -> None:
    """Latent attention, sinks and experts, soft caps, states, a bias by distance."""
    pytest.importorskip("transformers")
    family = FAMILIES[name]
    model = family.build()
    program = prepare(rc.capture(model, (), family.example(trial.CAPTURED)))
    expected = trial.expected_text(model, family.example(trial.PROMPT))
    parallel = rc.transform(program, spec, cache=trial.CAPACITY)
    # A note would be a warning, and so an error.
    outcome = trial.outcome_of(parallel, expected, [0], "rehearse")
    assert outcome.kind == trial.IDENTICAL, outcome


@torch.no_grad()
def test_rows_of_unequal_length() -> None:
    """The mask of all tokens so far is an input that the program keeps."""
    module, program = padded()
    tokens, mask = ids(24, batch=2), torch.ones(2, 24, dtype=torch.int64)
    mask[1, :6] = 0
    expected = module(tokens, mask)
    with rehearsed(rc.transform(program, "ring=2", cache=40)) as session:
        for new in (9, *(1,) * 15):
            now = slice(session.length, session.length + new)
            found = session.extend((tokens[:, now], mask[:, now]))
            assert difference(found, expected[:, now]) < EXACT
        assert min(recorded(session)) > 0


@torch.no_grad()
def test_a_replay_runs_nothing_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    module, parallel = compiled(Rotary, "ring=2", batch=2)
    tokens = ids(CAPACITY, batch=2)
    expected = module(tokens)
    with rehearsed(parallel) as session:
        session.extend(tokens[:, :1])
        check_tokens(session, expected, tokens, 5)  # one is watched, one recorded, others replayed
        monkeypatch.setattr(Executor, "run", None)
        check_tokens(session, expected, tokens, 8)
        with pytest.raises(TypeError):  # the first of the next bucket
            session.extend(tokens[:, 8:9])


@torch.no_grad()
def test_going_back_and_longer_turns_between() -> None:
    """Keys that were taken back are NaN here: a weight of 0 would not hide them."""
    module, parallel = compiled(Rotary, "ring=2", batch=2)
    tokens, broken = ids(CAPACITY, batch=2), ids(CAPACITY, batch=2)
    expected = module(tokens)
    with rehearsed(parallel) as session:
        session.extend(tokens[:, :20])
        check_tokens(session, expected, tokens, 30)
        for back, end in ((25, 28), (0, 2)):
            for runner in session.driver.runners:
                for kept in runner.memory.kept.values():
                    kept[:, :, : runner.memory.ledger.count(runner.memory.rank)] = torch.nan
            session.rewind(0)
            session.extend(broken[:, :back or 1])
            session.rewind(back)
            check_tokens(session, expected, tokens, end)
        session.extend(tokens[:, 2:40])
        check_tokens(session, expected, tokens, 44)
        session.reset()
        session.extend(tokens[:, :21], last=True)  # both ranks keep some
        session.rewind(3)
        check_tokens(session, expected, tokens, 24)


@torch.no_grad()
def test_processes_replay_and_count_what_they_send() -> None:
    module, parallel = compiled(Rotary, "ring=2", batch=2)
    tokens = ids(16, batch=2)
    sent = []
    for how in ("off", "rehearse"):
        with rc.Session(parallel, "gloo", cuda_graphs=how, threads=1) as session:
            session.extend(tokens[:, :3])
            check_tokens(session, module(tokens), tokens, 12)
            sent.append(session.driver.bytes_sent)
    assert sent[0] == sent[1]
    assert min(sent[0]) > 0


# -- refused, with the reason ----------------------------------------------------------------------


class Dropless(Mixture):
    """Each expert on the tokens that chose it, found by their numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        weight, index = self.chosen(tokens)
        out = torch.zeros_like(tokens)
        for e in range(len(self.up)):
            rows, choice = torch.where(index == e)
            out = out.index_add(
                0, rows, self.expert(e, tokens[rows]) * weight[rows, choice, None]
            )
        return out.view_as(x)


def _asks(*args: Any, **how: Any) -> Any:
    assert args[0].sum().item() is not None
    return cached_attention(*args, **how, on_device=True)


@torch.no_grad()
def check_note(parallel: ParallelProgram, module: Any, note: str, **options: Any) -> None:
    """Results are right, and it is said once why steps run op by op."""
    tokens = ids(12)
    expected = module(tokens)
    with rehearsed(parallel, **options) as session:
        session.extend(tokens[:, :2])
        with pytest.warns(UserWarning, match="^decode steps run op by op") as said:
            check_tokens(session, expected, tokens, 12)
        assert [str(one.message) for one in said] == session.notes
        assert len(said) == 1
        told, why = session.notes[0].split(" instead of as CUDA graphs: ")
        assert told == "decode steps run op by op"
        assert note in why


def test_sizes_that_depend_on_the_data() -> None:
    module, parallel = compiled(given(Routed, Dropless), "pp=2")
    lines, first = inspect.getsourcelines(Dropless)
    line = next(first + i for i, text in enumerate(lines) if "torch.where" in text)
    check_note(parallel, module, f"{__file__}:{line}: the size of aten.where.default depends on "
               "the data (%where_default, layer mixture)")


def test_an_op_that_needs_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bodies.ON_DEVICE, "cached_attention", _asks)
    module, parallel = compiled(Rotary, "ring=2")
    check_note(parallel, module, "aten._local_scalar_dense.default needs the host (%cached_att")


def test_many_rows_for_experts_need_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringcompile.ops.experts._FEW_ROWS", 1)
    module, parallel = compiled(given(Routed, Rows), "ring=1")
    check_note(parallel, module, "Tensor.tolist needs the host (%expert_linear")


def test_what_a_device_cannot_record(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unwilling(Rehearsed):
        def record(self, run: Any) -> Generator[Any, Any, Any]:
            raise NotRecordedError("operation not permitted when stream is capturing")
            yield

    monkeypatch.setattr(decode_step, "Rehearsed", Unwilling)
    module, parallel = compiled(Rotary, "ring=2")
    check_note(parallel, module, "the step could not be recorded: operation not permitted when")


@pytest.mark.parametrize(("options", "why"), [
    ({"check_finite": True}, "with check_finite the host looks at every value"),
    ({"compiler": "eager"}, "the rehearsal sees no ops of compiled code"),
])
def test_settings_that_look_at_every_op(options: dict[str, Any], why: str) -> None:
    module, parallel = compiled(Rotary, "ring=1")
    check_note(parallel, module, why, **options)


@torch.no_grad()
def test_nothing_is_recorded_on_cpus_unless_asked_for() -> None:
    _, parallel = compiled(Rotary, "ring=1")
    for how in ("auto", "off"):
        with rc.Session(parallel, cuda_graphs=how) as session:
            session.extend(ids(4))
            session.extend(ids(1))
            assert session.driver.runners[0]._steps is None
            assert session.notes == []


def test_an_unknown_way() -> None:
    _, parallel = compiled(Rotary, "ring=1")
    with pytest.raises(rc.RingCompileError) as raised:
        rc.Session(parallel, cuda_graphs="on")
    assert str(raised.value) == (
        "error: unknown use of CUDA graphs 'on'\n  hint: one of: auto, off, rehearse"
    )


def test_kernels_that_a_rehearsal_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringcompile.ops.kernels.select._OF_TORCH", ())
    module, parallel = compiled(Rotary, "ring=1")
    check_note(parallel, module, "the rehearsal sees no ops of the kernel 'cpu-flash'")


def test_a_rehearsal_is_for_cpus() -> None:
    with pytest.raises(rc.RingCompileError, match="'rehearse' is for ranks on CPUs"):
        decode_step.recorder("rehearse", torch.device("cuda"))


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", [Rotary, Window, given(Routed, Rows)])
def test_cuda_graphs_compute_the_same(
    kind: Callable[[], nn.Module], dtype: torch.dtype, tolerance: float
) -> None:
    module, tokens = with_gain(kind()), ids(CAPACITY, batch=2)
    expected = module(tokens)
    program = rc.capture(module.to(dtype), (tokens[:, :12],))
    with rc.Session(rc.transform(program, "ring=1", cache=CAPACITY), "nccl") as session:
        for at in range(CAPACITY):
            found = session.extend(tokens[:, at : at + 1]).double()
            assert difference(found, expected[:, at : at + 1]) < tolerance, f"token {at}"
        assert session.notes == []


# -- buckets, and what stands in for a CUDA graph --------------------------------------------------


def test_buckets_hold_what_is_in_use_and_little_more() -> None:
    found = [bucket_of(used, 10_000) for used in range(1, 10_001)]
    assert all(size >= used for used, size in enumerate(found, 1))
    assert all(size <= max(used + 7, 1.25 * used) for used, size in enumerate(found, 1))
    assert found == sorted(found)
    assert len(set(found)) < 45
    assert bucket_of(9, 9) == 9
    assert bucket_of(1, 3) == 3


def _ended(run: Generator[Any, Any, Any], answers: Any = ()) -> Any:
    """What a generator returns, its requests answered in turn."""
    answer, rest = None, list(answers)
    while True:
        try:
            run.send(answer)
        except StopIteration as ended:
            return ended.value
        answer = rest.pop(0)


def test_a_rehearsal_reads_memory_and_keeps_the_hosts_numbers() -> None:
    x, kept, host = torch.tensor([1.0, 2.0]), torch.zeros(2), [10.0]

    def run() -> Generator[Any, Any, Any]:
        first, second = (x * 2).unbind()
        kept.add_(x)
        told = yield "a request"
        torch.logaddexp(kept, x, out=(out := torch.empty(2)))
        return torch.stack([first, second]) + host[0] + told, kept.view(2, 1), out

    recording = Rehearsed()
    sums, seen, logs = _ended(recording.record(run()), [torch.tensor(100.0)])
    assert sums.tolist() == [112, 114]
    assert seen.flatten().tolist() == [1, 2]
    x.copy_(torch.tensor([3.0, 4.0]))
    host[0] = 20.0
    again = _ended(recording.replay(), [torch.tensor(200.0)])
    assert [id(tensor) for tensor in again] == [id(tensor) for tensor in (sums, seen, logs)]
    assert sums.tolist() == [216, 218]  # still with the host's 10
    assert seen.flatten().tolist() == [4, 6]
    assert torch.equal(logs, torch.logaddexp(kept, x))
