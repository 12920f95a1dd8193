"""Any batch on every axis; what belongs to it is known from layouts, not from sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from benchmarks import emitted
from benchmarks.baselines.problem import Case
from ringcompile.capture.export import capture
from ringcompile.cli import cli
from ringcompile.compiler import load, transform
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram
from tests.silent.small import CAPTURED, EXACT, VOCABULARY, WIDTH, Attention, ids, normal, with_gain
from tests.support import difference, run, some_fast

Between = Callable[["Small", torch.Tensor, torch.Tensor], Any]


class Small(nn.Module):
    """Embedding, attention, something added to it, something in place of the head."""

    def __init__(self, between: Between | None = None, after: Between | None = None) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Embedding(VOCABULARY, WIDTH), Attention()
        self.linear, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.table = nn.Parameter(torch.zeros(2, WIDTH))
        self.between, self.after = between, after

    def forward(self, tokens: torch.Tensor, *more: torch.Tensor) -> Any:
        x = self.embedding(tokens)
        x = x + self.attention(x)
        if self.between is not None:
            x = x + self.between(self, x, *more) if more else x + self.between(self, x, tokens)
        x = F.layer_norm(x, x.shape[-1:])
        return self.head(x) if self.after is None else self.after(self, x, tokens)


def small(between: Between | None = None, after: Between | None = None) -> nn.Module:
    return with_gain(Small(between, after))


def numbers(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[0])


def last_rows(m: Small, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return m.head(x[numbers(x), (t != 0).sum(-1) - 1])


def put_by_number(m: Small, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x.index_put((numbers(x), t.argmax(-1)), x.new_tensor(0.5))


def filled(m: Small, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[t > 20] = 0.5
    return y


RIGHT = {
    "divided by the batch": (lambda m, x, t: m.linear(x) / x.shape[0], None),
    "times the batch": (lambda m, x, t: m.linear(x) * (x.shape[0] - 1), None),
    "numbers of rows": (lambda m, x, t: numbers(x)[:, None, None] * torch.linspace(-1, 1, WIDTH),
                        None),
    "numbers from the end": (lambda m, x, t: (x.shape[0] - numbers(x))[:, None, None] * 0.1 * x,
                             None),
    "numbers of tokens": (
        lambda m, x, t: torch.arange(t.numel()).reshape(t.shape)[..., None] * 0.01 * x, None),
    "even rows": (lambda m, x, t: torch.where((numbers(x) % 2 == 0)[:, None, None], x, -x), None),
    "ones of the batch": (lambda m, x, t: x * torch.ones(x.shape[0], 1, 1, dtype=x.dtype), None),
    "a table": (None, lambda m, x, t: (m.head(x), m.table + 1)),
    "the numbers alone": (None, lambda m, x, t: (m.head(x), numbers(x) * 2)),
    "tokens first": (None, lambda m, x, t: m.head(x).transpose(0, 1)),
    "tokens in one dim": (None, lambda m, x, t: m.head(x).flatten(0, 1)),
    "tokens first in one dim": (None, lambda m, x, t: m.head(x).transpose(0, 1).flatten(0, 1)),
    "features first": (None, lambda m, x, t: m.head(x).permute(2, 0, 1)),
    "last tokens": (None, last_rows),
    "tokens of the largest id": (None, lambda m, x, t: x[numbers(x), t.argmax(-1)]),
    "two tokens of each": (None, lambda m, x, t: x[numbers(x)[:, None], t[:, :2] % t.shape[1]]),
    "gathered by row": (None, lambda m, x, t: x.gather(
        1, t.argmax(-1)[:, None, None].expand(-1, 1, x.shape[-1]))),
    "put by number": (None, put_by_number),
    "filled by a mask": (None, filled),
}


def inputs(batch: int, length: int = 27) -> tuple[torch.Tensor, ...]:
    return (ids(length, batch),)


def hold(parallel: ParallelProgram, module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
    with torch.no_grad():
        expected = module(*given)
    found = run(parallel, given).outputs
    assert difference(found, expected) <= EXACT


@pytest.mark.parametrize("name", RIGHT)
def test_results_do_not_depend_on_how_a_batch_is_dealt(name: str) -> None:
    """Captured with one sequence; run with as many as there are replicas, and with odd numbers."""
    module = small(*RIGHT[name])
    program = capture(module, inputs(1, CAPTURED))
    for spec, batches in (("dp=2", (2, 5)), ("pp=2", (1, 3))):
        parallel = transform(program, spec)
        assert parallel.program.returns, parallel.program.notes
        for batch in batches:
            hold(parallel, module, inputs(batch))


MIXED: dict[str, Between] = {
    "the mean": lambda m, x, t: x - x.mean(0, keepdim=True),
    "softmax over the batch": lambda m, x, t: m.linear(x).softmax(0),
    "the next sequence": lambda m, x, t: m.linear(x).roll(1, 0),
    "a prefix sum": lambda m, x, t: m.linear(x).cumsum(0),
    "the first sequence": lambda m, x, t: x + m.linear(x)[:1],
    "in another order": lambda m, x, t: m.linear(x).flip(0),
    "all tokens": lambda m, x, t: m.linear(x) / m.linear(x).abs().max(),
}


@pytest.mark.parametrize(
    ("captured", "name"),
    some_fast(
        [1, 2], MIXED, fast=lambda captured, name: captured == 1 + list(MIXED).index(name) % 2
    ),
)
def test_mixed_sequences_are_seen(name: str, captured: int) -> None:
    """Replicas are refused, at the line; a pipeline runs the whole batch at once."""
    module = small(MIXED[name])
    program = capture(module, inputs(captured, CAPTURED))
    with pytest.raises(rc.RingCompileError, match="this mixes the sequences of a batch") as caught:
        transform(program, "dp=2")
    assert "test_batch.py" in str(caught.value)
    if captured == 2:
        hold(transform(program, "pp=2"), module, inputs(3))


@pytest.mark.parametrize("captured", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_any_batch_on_every_axis(captured: int) -> None:
    module = small()
    program = capture(module, inputs(captured, CAPTURED))
    assert str(program.inputs[0].type) == "i64[b, s]"
    for spec in ("ring=2", "ulysses=2", "tp=2", "pp=2,time=2"):
        parallel = transform(program, spec)
        for batch in (1, 5):
            hold(parallel, module, inputs(batch))


class Kept(nn.Module):
    """What is passed beside the tokens: masks, positions of three kinds, lengths."""

    def __init__(self, use: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Embedding(VOCABULARY, WIDTH), Attention()
        self.use = use

    def forward(self, tokens: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        if self.use is None:
            x = x + self.attention(x, other)
        else:
            x = self.use(x + self.attention(x), other)
        return F.layer_norm(x, x.shape[-1:])


def by_length(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return x * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return x * (positions.double() * 0.1).cos().sum(0)[..., None]


OTHERS: dict[str, tuple[Any, Callable[[int, int], torch.Tensor], str]] = {
    "lengths": (by_length, lambda b, s: torch.arange(b) % s + 1, "i64[b]"),
    "three kinds of positions": (
        rotated, lambda b, s: torch.arange(3 * b * s).reshape(3, b, s) % s, "i64[3, b, s]"),
    "a shared mask": (None, lambda b, s: normal(1, 1, s, s), "f64[1, 1, s, s]"),
    "a mask for each": (None, lambda b, s: normal(b, 1, s, s), "f64[b, 1, s, s]"),
    "a table": (lambda x, t: x + t.mean(0), lambda b, s: normal(2, WIDTH), "f64[2, 32]"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_inputs_are_dealt_where_the_batch_is(name: str) -> None:
    use, make, type_ = OTHERS[name]
    module = with_gain(Kept(use))
    program = capture(module, (ids(CAPTURED, 2), make(2, CAPTURED)))
    assert str(program.inputs[1].type) == type_
    for spec, batch in (("dp=2", 3), ("pp=2", 3), ("ring=2", 1)):
        hold(transform(program, spec), module, (ids(27, batch), make(batch, 27)))


def test_three_sequences_and_three_kinds() -> None:
    """All dims of the example are of one size; the code says which is the batch."""
    program = capture(with_gain(Kept(rotated)), (ids(CAPTURED, 3), torch.zeros(3, 3, CAPTURED)))
    assert str(program.inputs[1].type) == "f32[3, b, s]"


# -- code that fixes the batch ---------------------------------------------------------------------


class Code(nn.Module):
    def __init__(self, use: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.use = use

    def forward(self, x: torch.Tensor) -> Any:
        return self.use(x)


def one_is_special(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.shape[0] == 1 else x * 2


def pairs(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(2, -1) * 2


def at_most_eight(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] > 8:
        raise ValueError
    return x * 2


FIXED: dict[str, tuple[Callable[[torch.Tensor], Any], int, str, tuple[int, int | None]]] = {
    "squeezed": (lambda x: x[:, None].squeeze() * 2, 1, "f64[1, s]", (1, None)),
    "squeezed, of two": (lambda x: x[:, None].squeeze() * 2, 2, "f64[b, s]", (2, None)),
    "one is special": (one_is_special, 1, "f64[1, s]", (1, None)),
    "one is special, of three": (one_is_special, 3, "f64[b, s]", (2, None)),
    "two rows": (pairs, 2, "f64[2, s]", (1, None)),
    "one hot": (lambda x: F.one_hot(x.long() % 3, x.shape[0] + 2), 3, "f64[3, s]", (1, None)),
    "at most eight": (at_most_eight, 1, "f64[b, s]", (1, 8)),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_the_code_fixes(name: str) -> None:
    use, batch, type_, limits = FIXED[name]
    program = capture(Code(use), (normal(batch, CAPTURED),))
    assert (str(program.inputs[0].type), program.batch_range) == (type_, limits)
    fixed = [note for note in program.notes if "fixes the batch to that of the example" in note]
    assert len(fixed) == (not type_.startswith("f64[b"))
    if fixed:
        assert fixed[0].endswith(f", {batch}")
        with pytest.raises(rc.RingCompileError, match=f"the batch is fixed at {batch}") as caught:
            transform(program, "dp=2")
        assert "fixes the batch" in str(caught.value.hint)


def test_a_fixed_batch_is_the_first_dim_of_most_inputs() -> None:
    class Placed(nn.Module):
        def forward(
            self, x: torch.Tensor, step: torch.Tensor, places: torch.Tensor
        ) -> torch.Tensor:
            return pairs(x) + step.sum() + places.sum()

    given = (normal(2, CAPTURED), normal(2, 4), normal(20, 3))
    assert capture(Placed(), given, dims={"places": {}}).batch == 2


def test_the_line_that_fixes_the_batch() -> None:
    (note,) = capture(Code(one_is_special), (normal(1, CAPTURED),)).notes
    assert note.startswith("test_batch.py:")
    source = Path(__file__).read_text().splitlines()
    assert "x.shape[0] == 1" in source[int(note.split(":")[1]) - 1]


def test_batches_that_are_refused() -> None:
    program = capture(Code(lambda x: x[:, None].squeeze() * 2), (normal(2, CAPTURED),))
    with pytest.raises(rc.RingCompileError, match=r"a batch of 1 is outside 2\.\."):
        run(transform(program, "ring=1"), (normal(1, CAPTURED),))
    with pytest.raises(rc.RingCompileError, match="a batch of 1 is too small for dp=2"):
        run(transform(capture(small(), inputs(1, CAPTURED)), "dp=2"), inputs(1))


# -- what is said of dims --------------------------------------------------------------------------


class HeadsLast(nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def heads(batch: int, length: int) -> tuple[torch.Tensor, ...]:
    return tuple(normal(batch, length, 4, 16, seed=i) for i in range(3))


def test_dims_of_four() -> None:
    dims = {"query": {0: "batch", 1: "sequence"}}
    program = capture(HeadsLast(), heads(1, CAPTURED), dims=dims)
    assert {str(spec.type) for spec in program.inputs} == {"f64[b, s, 4, 16]"}
    for spec in ("ring=2", "ulysses=2", "dp=2"):
        hold(transform(program, spec), HeadsLast(), heads(2, 27))


def test_four_dims_are_taken_for_images_and_it_is_said() -> None:
    program = capture(HeadsLast(), heads(2, CAPTURED))
    assert str(program.inputs[0].type) == "f64[b, 24, 4, 16]"
    (note,) = program.notes
    assert "'query' of 4 dims is taken for images" in note
    assert "dims={'query': {0: 'batch', 1: 'sequence'}}" in note


def test_a_length_that_is_a_feature_size_too() -> None:
    given = (normal(2, WIDTH, WIDTH),)
    with pytest.raises(rc.RingCompileError, match="is also the size of another dim") as caught:
        capture(Code(torch.sin), given)
    assert "dims=" in str(caught.value.hint)
    program = capture(Code(torch.sin), given, dims={"x": {0: "batch", 1: "sequence"}})
    assert str(program.inputs[0].type) == "f64[b, s, 32]"
    assert str(capture(nn.Linear(WIDTH, WIDTH).double(), given).inputs[0].type) == "f64[b, s, 32]"


def test_the_sequence_first() -> None:
    program = capture(
        Code(lambda x: x * 2), (normal(CAPTURED, 2, 8),), dims={"x": {0: "sequence", 1: "batch"}}
    )
    assert str(program.inputs[0].type) == "f64[s, b, 8]"
    hold(transform(program, "dp=2"), Code(lambda x: x * 2), (normal(27, 5, 8),))


def test_a_square_input_does_not_fix_the_length() -> None:
    module = with_gain(Kept(None))
    program = capture(module, (ids(CAPTURED, 2), normal(CAPTURED, CAPTURED)))
    assert str(program.inputs[1].type) == "f64[s, s]"
    hold(transform(program, "ring=2"), module, (ids(27, 2), normal(27, 27)))


DIMS: dict[str, tuple[Any, str]] = {
    "no such input": ({"y": {0: "batch"}}, "dims: 'y' is not a tensor among the example inputs"),
    "no such role": ({"x": {0: "rows"}}, "dims: dim 0 of 'x' has the unknown role 'rows'"),
    "no such dim": ({"x": {3: "batch"}}, "dims: 'x' has shape [2, 24, 8], and no dim 3"),
}


@pytest.mark.parametrize("name", DIMS)
def test_what_cannot_be_said(name: str) -> None:
    dims, message = DIMS[name]
    with pytest.raises(rc.RingCompileError) as caught:
        capture(Code(torch.sin), (normal(2, CAPTURED, 8),), dims=dims)
    assert caught.value.message == message


def test_a_length_that_is_fixed_is_said() -> None:
    program = capture(Code(torch.sin), (normal(2, CAPTURED, 8),), dims={"x": {0: "batch"}})
    assert program.notes == (
        "the sequence length is fixed to that of the example, because dims names no sequence",
    )


@pytest.mark.parametrize("command", ["check", "transform"])
def test_dims_on_the_command_line(command: str, tmp_path: Path) -> None:
    out = ["-o", str(tmp_path / "out")] if command == "transform" else []
    args = [command, "tests.test_batch:heads_last", "--parallel", "ring=2", *out]
    found = CliRunner().invoke(cli, [*args, "--dims", "query=batch,sequence,_,_"])
    assert found.exit_code == 0, found.output
    if out:
        hold(load(out[1]), HeadsLast(), heads(3, 27))
    else:
        assert "input query: f64[b, s, 4, 16]" in found.output
    assert "write INPUT=DIM,DIM" in CliRunner().invoke(cli, [*args, "--dims", "query"]).output


def heads_last() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return HeadsLast(), heads(1, CAPTURED)


def test_the_attention_benchmark_takes_any_length() -> None:
    step = emitted.setup(0, 1, Case(2, 8, 40))
    assert step().shape[1] == 40 or step().shape[2] == 40


def types(program: Program) -> list[str]:
    return [str(spec.type) for spec in program.inputs]


def test_microbatches() -> None:
    module = small()
    program = capture(module, inputs(1, CAPTURED))
    for asked, expected in ((None, 5), (2, 2), (9, 5)):
        parallel = transform(program, "pp=2", microbatches=asked)
        done = run(parallel, inputs(5))
        assert len(done.microbatches[0]) == expected
        hold(parallel, module, inputs(5))
    with pytest.raises(rc.RingCompileError, match="0 microbatches: it must be at least 1"):
        transform(program, "pp=2", microbatches=0)
    assert types(parallel.program) == ["i64[b/part, s]"]
