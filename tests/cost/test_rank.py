"""The cost of emitted programs: bytes and flops equal the formulas, memory what is really held."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from ringcompile.capture.export import capture
from ringcompile.capture.loaders import load_model
from ringcompile.compiler import transform
from ringcompile.cost.layers import cut, find_stack, repeat
from ringcompile.cost.rank import RankCost, TimedCollective, TimedShift, TimedWait, cost_of
from ringcompile.cost.values import Values, bind_lengths
from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import bytes_sent
from ringcompile.ir.expr import bind
from ringcompile.ir.nodes import location_of
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.executor import Executor, run_alone
from tests.cost.patterns import layers_of
from tests.support import captured_once, compiled

SPECS = ["ring=4", "tp=2", "ulysses=2", "ring=2,ulysses=2", "pp=2", "ring=2,tp=2", "pp=2,tp=2"]


def captured(name: str) -> Program:
    loaded = load_model(name, weights=False)
    return captured_once(loaded.module, loaded.args, loaded.kwargs, name=name)


@lru_cache
def made(name: str, spec: str, capacity: str = "exact") -> ParallelProgram:
    return transform(captured(name), spec, capacity=capacity)


@lru_cache
def costs(name: str, spec: str, length: int, capacity: str = "exact") -> tuple[RankCost, ...]:
    return tuple(cost_of(program, length) for program in made(name, spec, capacity).ranks())


CASES = [
    *(("dense-4l-tiny", spec) for spec in SPECS), ("llama-tiny", "ring=4"),
    pytest.param("llama-tiny", "tp=2", marks=pytest.mark.slow),
    pytest.param("moe-4l-tiny", "ep=2", marks=pytest.mark.slow), ("moe-4l-tiny", "ring=2,ep=2"),
]


@pytest.mark.parametrize(("model", "spec"), CASES)
def test_bytes_sent_are_those_of_the_graph(model: str, spec: str) -> None:
    """As the expression in lengths that `check` prints gives them."""
    for program, cost in zip(made(model, spec).ranks(), costs(model, spec, 101), strict=True):
        expected = bind(bytes_sent(program), bind_lengths(program, 101))
        assert cost.bytes_sent == expected


def linear_flops(hidden: int, mlp: int, tokens: int, layers: int = 4) -> int:
    """Of four projections and a plain MLP."""
    return layers * tokens * (2 * 4 * hidden**2 + 2 * 2 * hidden * mlp)


@pytest.mark.parametrize(
    ("spec", "order"), [*((spec, "zigzag") for spec in SPECS), ("ring=4", "contiguous")]
)
def test_flops_of_all_ranks_are_the_models(spec: str, order: str) -> None:
    """Nothing twice, nothing left out: with lengths that divide, to the last multiplication."""
    length = 64
    parallel = transform(captured("dense-4l-tiny"), spec, order=order)
    total = sum(cost_of(program, length).flops for program in parallel.ranks())
    pairs = length * (length + 1) // 2
    assert total == linear_flops(64, 256, length) + 4 * 4 * 64 * pairs


def test_padding_is_computed_too() -> None:
    whole = sum(cost.flops for cost in costs("dense-4l-tiny", "ring=4", 64))
    padded = sum(cost.flops for cost in costs("dense-4l-tiny", "ring=4", 57))
    linear = linear_flops(64, 256, 64)
    assert padded == whole > linear


@pytest.mark.parametrize("spec", SPECS)
def test_weights_are_divided(spec: str) -> None:
    parallel = made("dense-4l-tiny", spec)
    total = sum(weight.num_bytes for weight in captured("dense-4l-tiny").weights.values())
    held = [cost.weight_bytes for cost in costs("dense-4l-tiny", spec, 64)]
    divided = parallel.mesh.size("tp") * parallel.mesh.size("pp")
    assert max(held) == pytest.approx(total / divided, rel=0.02)  # norms and angles are not


def test_experts_are_divided() -> None:
    whole, halves = (costs("moe-4l-tiny", spec, 64)[0].weight_bytes for spec in ("ring=2", "ep=2"))
    assert halves < 0.6 * whole


def test_exact_capacity_multiplies_no_more_than_local() -> None:
    """An expert may need a slot for each of a rank's tokens, but empty slots are not multiplied."""
    exact, local = (costs("moe-4l-tiny", "ring=4", 256, c)[0].flops for c in ("exact", "local"))
    assert exact == local


def test_a_length_out_of_range_is_refused() -> None:
    with pytest.raises(RingCompileError, match="sequence length 1 is outside 2"):
        cost_of(made("dense-4l-tiny", "ring=4").rank(0), 1)
    fixed = transform(captured("dense-4l-tiny"), "ring=4", length=64)
    assert cost_of(fixed.rank(0)) == cost_of(fixed.rank(0), 64)
    with pytest.raises(RingCompileError, match="the program is for 64 tokens, 65 are asked for"):
        cost_of(fixed.rank(0), 65)


def test_what_is_exchanged() -> None:
    ring = [step.communicates for step in costs("dense-4l-tiny", "ring=4", 64)[1].steps]
    shifts = [one for one in ring if isinstance(one, TimedShift)]
    assert {one.channel for one in shifts} == {"ring"}
    assert {one.to for one in shifts if one.to is not None} == {0, 2, 3}  # chunks go to any rank
    assert sum(isinstance(one, TimedWait) for one in ring) == len(shifts)
    tensor = [step.communicates for step in costs("dense-4l-tiny", "ring=2,tp=2", 64)[3].steps]
    reduced = [one for one in tensor if isinstance(one, TimedCollective)]
    assert {(one.kind, one.group) for one in reduced} == {("all_reduce", (2, 3))}
    assert {one.brought for one in reduced} == {32 * 64 * 4}
    assert len(reduced) == 8  # two a layer


def test_shapes_are_those_of_the_run() -> None:
    """Every value's shape, and whether it is contiguous, against a run of the program."""
    parallel = compiled(load_model("moe-4l-tiny").module, load_model("moe-4l-tiny").args, "ring=1")
    program = parallel.rank(0)
    lengths = bind_lengths(program, 48)
    values = Values(program, lengths)
    executor = Executor(program, lengths)
    seen: dict[str, torch.Tensor] = {}
    for step in executor.steps:
        step.function = _noting(step.function, step.node.name, seen)
    source = parallel.source
    assert source is not None
    given = {name: source(weight.name) for name, weight in program.weights.items()}
    given |= {name: torch.randn(1, 48, 64) for name in program.placeholders}
    run_alone(executor, given)
    compared = 0
    for node, value in values.of.items():
        if node.name in seen and isinstance(value, torch.Tensor):
            assert value.shape == seen[node.name].shape, node.name
            assert value.dtype == seen[node.name].dtype, node.name
            compared += 1
    assert compared > 100


def _noting(function: object, name: str, seen: dict[str, torch.Tensor]) -> object:
    def call(*args: object, **kwargs: object) -> object:
        result = function(*args, **kwargs)  # type: ignore[operator]
        if isinstance(result, torch.Tensor):
            seen[name] = result
        return result

    return call


def test_memory_is_freed_behind_the_last_reader() -> None:
    """Three values of one size, one after the other: two of them, and the weight, are held."""

    class Chain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Linear(16, 16, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            attended = torch.nn.functional.scaled_dot_product_attention(
                *[self.w(x).unsqueeze(1)] * 3, is_causal=True
            )
            return attended.neg().neg().neg()

    parallel = compiled(Chain(), (torch.randn(1, 8, 16),), "ring=1")
    (cost,) = (cost_of(parallel.rank(0), 64),)
    value = 64 * 16 * 4
    assert cost.weight_bytes == 16 * 16 * 4
    assert 2 * value <= cost.peak_bytes - cost.weight_bytes <= 3 * value + 64 * 4


# -- layers that repeat ---------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "spec"), [
    ("dense-4l-tiny", "ring=2,ulysses=2"), ("dense-4l-tiny", "tp=2"), ("moe-4l-tiny", "ring=2"),
    ("llama-tiny", "ring=4"), ("gpt-tiny", "ring=2"),
])
def test_one_layer_repeated_costs_what_all_do(model: str, spec: str) -> None:
    whole = captured(model)
    stack = find_stack(whole)
    assert stack is not None
    one = transform(cut(whole, stack, 1), spec)
    found = repeat(cost_of(one.rank(0), 64), stack, stack.num_layers)
    expected = costs(model, spec, 64)[0]
    assert found.flops == expected.flops
    assert found.bytes_sent == expected.bytes_sent
    assert found.weight_bytes == expected.weight_bytes
    assert found.peak_bytes == pytest.approx(expected.peak_bytes, rel=0.1)


def test_cut_programs_run() -> None:
    """A cut program is a model of its own: the first layers, then what comes behind all."""
    loaded = load_model("llama-tiny")
    whole = capture(loaded.module, loaded.args, loaded.kwargs)
    stack = find_stack(whole)
    assert stack is not None
    assert (stack.name, stack.num_layers, stack.period) == ("blocks", 2, 1)
    part = cut(whole, stack, 1)
    assert all("blocks.1" not in weight.name for weight in part.weights.values())
    assert cut(whole, stack, 2) is whole
    assert len(cost_of(transform(part, "ring=1").rank(0), 64).steps) > 10


@pytest.mark.parametrize(("kinds", "first", "period", "whole", "most_of_two"), [
    ("aaaa", 0, 1, 4, 2), ("abab", 0, 2, 2, 1), ("aabaaba", 0, 3, 2, 4 / 3),
    ("caaa", 1, 1, 3, 2), ("cabab", 1, 2, 2, 1), ("ababa", 0, 2, 2, 1.5),
])
def test_patterns_of_layers(
    kinds: str, first: int, period: int, whole: int, most_of_two: float
) -> None:
    stack = find_stack(layers_of(kinds))
    assert stack is not None
    assert (stack.first, stack.period, stack.num_layers) == (first, period, len(kinds) - first)
    assert stack.whole_blocks == whole
    assert stack.blocks(2) == pytest.approx(most_of_two)


@pytest.mark.parametrize("kinds", ["abab", "aabaab", "caaa", "cabab"])
def test_a_block_repeated_costs_what_all_do(kinds: str) -> None:
    whole = layers_of(kinds)
    stack = find_stack(whole)
    assert stack is not None
    one = transform(cut(whole, stack, 1), "ring=2", order="contiguous")
    found = repeat(cost_of(one.rank(1), 64), stack, stack.whole_blocks)
    expected = cost_of(transform(whole, "ring=2", order="contiguous").rank(1), 64)
    assert (found.flops, found.bytes_sent) == (expected.flops, expected.bytes_sent)
    assert found.weight_bytes == expected.weight_bytes
    assert stack.num_bytes == stack.block_bytes * stack.whole_blocks
    outside = [w.num_bytes for w in whole.weights.values() if stack.index(w.name) is None]
    assert stack.num_bytes + sum(outside) == sum(w.num_bytes for w in whole.weights.values())
    assert outside


@pytest.mark.parametrize("kinds", ["ababa", "aabaaba"])
def test_a_part_of_a_block_is_cut_off(kinds: str) -> None:
    """What comes behind the last layer reads one of another kind then."""
    whole = layers_of(kinds)
    stack = find_stack(whole)
    assert stack is not None
    part = cut(whole, stack, 1)
    layers = {location_of(node).layer.split(".")[1] for node in part.graph.nodes
              if location_of(node).layer.startswith("layers.")}
    assert layers == {str(i) for i in range(stack.period)}
    assert cost_of(transform(part, "ring=1").rank(0), 64).flops > 0


@pytest.mark.parametrize(
    ("kinds", "all_read"), [("aab", False), ("abc", False), ("aaa", True), ("abcaa", False)]
)
def test_what_repeats_nothing_is_no_stack(kinds: str, all_read: bool) -> None:
    assert find_stack(layers_of(kinds, all_read)) is None
