"""Random modules come out right or are refused; the suite itself sees a fault put in on purpose."""

from __future__ import annotations

import dataclasses
from itertools import count, islice

import pytest
import torch

from ringcompile.ops.kernels import select
from tests import random_modules
from tests.random_module_grammar import HEADS, PIECES, Entry
from tests.random_modules import CRASHED, REFUSED, RIGHT, WRONG, Case, case_of, trial

# Of one or two pieces, which take least time to capture.
FEW = list(islice((seed for seed in count() if len(case_of(seed).pieces) < 3), 9))
# Found wrong once: NaN that a module computes for padding.
FEW.append(500267)
MANY = [seed for seed in range(2040) if seed not in FEW]


@pytest.mark.parametrize(
    "seed", [*FEW, *(pytest.param(seed, marks=pytest.mark.slow) for seed in MANY)])
def test_random_module(seed: int) -> None:
    found = trial(case_of(seed))
    assert found.kind not in (WRONG, CRASHED), f"{found.detail}\n{case_of(seed).words()}"


def ring_case() -> Case:
    """Attention over three ranks, and nothing to refuse."""
    return dataclasses.replace(
        case_of(1), pieces=("attention_causal", "running_sum"), head="logits", spec="ring=3",
        dtype=torch.float64, captured=13, batch=2, runs=((24, 2), (31, 2)))


def test_a_fault_on_purpose_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial(ring_case()).kind == RIGHT

    def average(out: torch.Tensor, lse: torch.Tensor, out_b: torch.Tensor, lse_b: object) -> None:
        out.lerp_(out_b.to(out.dtype), 0.5)

    monkeypatch.setattr(select, "merge", average)
    assert trial(ring_case()).kind == WRONG


def test_float32_is_excused_by_its_own_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 too, a fault is wrong; what the module itself is off by, in float64, is not."""
    case = dataclasses.replace(ring_case(), dtype=torch.float32)
    monkeypatch.setitem(random_modules.TOLERANCE, torch.float32, 1e-12)
    assert trial(case).kind == RIGHT

    def biased(out: torch.Tensor, lse: torch.Tensor, out_b: torch.Tensor, lse_b: object) -> None:
        merge(out, lse, out_b, lse_b)
        out.mul_(1 + 1e-5)

    merge = select.merge
    monkeypatch.setattr(select, "merge", biased)
    assert trial(case).kind == WRONG


def test_nan_and_other_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = random_modules.run_lockstep
    for value in (float("nan"), 1e-6):
        def off(*args: object, value: float = value, **options: object) -> object:
            result = right(*args, **options)  # type: ignore[arg-type]
            result.outputs[0, -1, -1] += value
            return result

        monkeypatch.setattr(random_modules, "run_lockstep", off)
        assert trial(ring_case()).kind == WRONG


def test_what_fails_with_another_error_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> object:
        raise IndexError("out of range")

    monkeypatch.setattr(random_modules, "run_lockstep", fails)
    assert trial(ring_case()).kind == CRASHED


def test_a_refusal_is_counted_by_its_reason() -> None:
    case = dataclasses.replace(ring_case(), pieces=("other_rows",), spec="dp=2")
    found = trial(case)
    assert found.kind == REFUSED
    assert found.reason == dataclasses.replace(found, detail=found.detail.replace("2", "3")).reason


def test_a_seed_is_replayed() -> None:
    case = case_of(11)
    assert case == case_of(11) != case_of(12)
    states = [random_modules.RandomModule(case).state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    inputs = [random_modules.inputs_of(case, 13, 2)["inputs"] for _ in range(2)]
    assert torch.equal(*inputs)


def test_a_piece_that_changes_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Entry(lambda p, x, c: torch.zeros_like(x), {}, (), "mixing")
    monkeypatch.setitem(PIECES, "nothing", nothing)
    case = dataclasses.replace(ring_case(), pieces=("attention_causal", "nothing"))
    assert random_modules._mattering(case) == (0,)
    assert trial(dataclasses.replace(case, pieces=("nothing",))).kind == random_modules.IDLE


def test_every_choice_is_drawn() -> None:
    """No branch of the generator is dead: each choice is drawn within the slow seeds."""
    cases = [case_of(seed) for seed in MANY]
    assert {name for case in cases for name in case.pieces} == set(PIECES)
    assert {case.head for case in cases} == set(HEADS)
    axes = {part.partition("=")[0] for case in cases for part in case.spec.split(",")}
    assert axes == set(random_modules.AXES)
    assert any(length < 4 for case in cases for length, _ in case.runs)
