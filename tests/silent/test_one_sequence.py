"""Captured with one sequence or with several: any batch, or a note that names the line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from tests.families.catalogue import FAMILIES
from tests.families.trial import reference, scaled_difference
from tests.silent.small import CAPTURED, EXACT, Model, ids
from tests.support import TOLERANCE, difference, run, some_fast

Tensor = torch.Tensor
Between = Callable[[Any, Tensor, Tensor], Tensor]


def expanded(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    """As transformers does it."""
    positions = torch.arange(x.shape[1], device=x.device)[None]
    if x.shape[0] != positions.shape[0]:
        positions = positions.expand(x.shape[0], -1)
    return x * positions[..., None].double().cos()


def repeated(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    start = m.up.weight[:1, None].expand(1, 1, -1)
    if x.shape[0] > 1:
        start = start.repeat(x.shape[0], 1, 1)
    return x + start


def one_by_itself(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    if x.shape[0] == 1:
        return m.down(m.up(x[0]))[None]
    return m.down(m.up(x))


def asked_without_need(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return x + x if x.shape[0] < 2 else 2 * x


def no_dim_of_one(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return x * (tokens[:, :1].squeeze() > 3)[..., None, None]


def another_formula(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    return x * 3 if x.shape[0] == 1 else x * 2


def two_at_least(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    if x.shape[0] < 2:
        raise ValueError("I want company")
    return x * 2


ANY: dict[str, Between] = {
    "expanded": expanded, "repeated": repeated, "one by itself": one_by_itself,
    "asked without need": asked_without_need,
}
SPECS = ("dp=2", "pp=2", "ring=4", "tp=2", "ulysses=2", "ring=2,tp=2")


def held(program: Program, module: nn.Module, spec: str, batches: tuple[int, ...]) -> None:
    parallel = transform(program, spec)
    for batch in batches:
        with torch.no_grad():
            expected = module(ids(27, batch))
        assert difference(run(parallel, (ids(27, batch),)).outputs, expected) <= EXACT


@pytest.mark.parametrize(
    ("kind", "captured"),
    some_fast(ANY, [1, 2], fast=lambda kind, captured: (kind, captured) in {
        ("expanded", 1), ("repeated", 2), ("one by itself", 1),
    }),
)
def test_any_batch(kind: str, captured: int) -> None:
    module = Model(ANY[kind])
    program = capture(module, (ids(CAPTURED, captured),))
    assert (program.batch_range, program.notes) == ((1, None), ())
    spec = SPECS[(list(ANY).index(kind) + captured) % len(SPECS)]
    held(program, module, spec, (2, 3) if spec == "dp=2" else (1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("captured", [1, 3])
@pytest.mark.parametrize("kind", ANY)
def test_any_batch_on_every_axis(kind: str, captured: int, spec: str) -> None:
    module = Model(ANY[kind])
    program = capture(module, (ids(CAPTURED, captured),))
    held(program, module, spec, (2, 5) if spec == "dp=2" else (1, 2, 5))


def test_one_sequence_is_computed_otherwise() -> None:
    """Captured with one, the program is for one; captured with two, for two and more."""
    module = Model(another_formula)
    one, two = (capture(module, (ids(CAPTURED, batch),)) for batch in (1, 2))
    assert str(one.inputs[0].type) == "i64[1, s]"
    assert [note.partition(": ")[2] for note in one.notes] == [
        "the model's code fixes the batch to that of the example, 1"
    ]
    assert two.batch_range == (2, None)
    (note,) = two.notes
    assert "one sequence alone is refused: the captured graph does not compute" in note
    lines = Path(__file__).read_text().splitlines()
    for said in (note, one.notes[0]):
        assert "x.shape[0] == 1" in lines[int(said.split(":")[1]) - 1]
    held(one, module, "ring=2", (1,))
    held(two, module, "pp=2", (2, 3))
    with pytest.raises(RingCompileError, match=r"a batch of 1 is outside 2\.\.") as caught:
        run(transform(two, "pp=2"), (ids(27, 1),))
    assert caught.value.hint == note


class Clamped(nn.Module):
    """For one sequence alone, or one token alone, large numbers are cut off."""

    def __init__(self, dim: int, low: float, high: float) -> None:
        super().__init__()
        self.dim, self.low, self.high = dim, low, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.unflatten(-1, (2, -1)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True)
        y = y.transpose(1, 2).flatten(2)
        return y.clamp(self.low, self.high) if x.shape[self.dim] == 1 else y * 1


@pytest.mark.parametrize("ends", [(-1e9, 50), (-200, 1e9)])
@pytest.mark.parametrize("dim", [0, 1])
def test_what_differs_for_large_numbers_alone(dim: int, ends: tuple[float, float]) -> None:
    example = torch.randn(2, CAPTURED, 8, dtype=torch.float64)
    program = capture(Clamped(dim, *ends), (example,))
    found = (program.batch_range, program.length_range)[dim]
    assert found == (2, None)
    assert any("alone is refused" in note for note in program.notes)


def test_a_model_for_two_and_more() -> None:
    program = capture(Model(two_at_least), (ids(CAPTURED, 2),))
    assert program.batch_range == (2, None)
    assert "one sequence alone is refused" in program.notes[0]
    assert "I want company" in program.notes[0]


@pytest.mark.slow
def test_a_dim_that_is_squeezed() -> None:
    module = Model(no_dim_of_one)
    for captured in (1, 2):
        program = capture(module, (ids(CAPTURED, captured),))
        held(program, module, "ring=2", (captured, ))


# -- without weights the graphs decide, since there are no numbers --------------------------------


def captured_on_meta(between: Between, batch: int) -> Program:
    return capture(Model(between).to("meta"), (ids(CAPTURED, batch).to("meta"),))


@pytest.mark.parametrize("captured", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_graph(captured: int) -> None:
    program = captured_on_meta(expanded, captured)
    assert (str(program.inputs[0].type), program.batch_range) == ("i64[b, s]", (1, None))


@pytest.mark.parametrize(
    "between", [another_formula, pytest.param(asked_without_need, marks=pytest.mark.slow)]
)
def test_another_graph(between: Between) -> None:
    one, two = (captured_on_meta(between, batch) for batch in (1, 2))
    assert str(one.inputs[0].type) == "i64[1, s]"
    assert "the model's code fixes the batch to that of the example, 1" in one.notes[0]
    assert two.batch_range == (2, None)
    assert "one sequence alone is refused: the graph for it is different" in two.notes[0]


_FAMILIES = (
    "llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt2", "bert", "phi", "mixtral",
    "deepseek_v3", "gpt_oss", "vit", "opt", "bloom", "t5", "whisper",
)


@pytest.mark.parametrize(
    ("name", "captured"),
    some_fast(_FAMILIES, [1, 2], fast=lambda name, captured: name == "gpt2" and captured == 1),
)
def test_families_take_any_batch(name: str, captured: int) -> None:
    family = FAMILIES[name]
    model = family.build()
    program = capture(model, (), family.example(CAPTURED, captured))
    assert program.batch_range == (1, None)
    parallel = transform(program, "ring=2")
    for batch in (1, 3):
        inputs = family.example(27, batch)
        found, expected = run(parallel, inputs).outputs, reference(model, inputs)
        assert all(
            scaled_difference(found[key], value) <= TOLERANCE for key, value in expected.items()
        )
