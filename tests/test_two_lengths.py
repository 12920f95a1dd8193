"""Inputs of several lengths, as an encoder's and a decoder's: each is split by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ringcompile as rc
from ringcompile.dump import report
from tests.support import compiled, difference, run, some_fast
from tests.two_lengths import ROWS, inputs_of, model_of

EXAMPLE = (20, 12)
# Longer, shorter, equal; odd ones; fewer tokens than ranks; one token.
LENGTHS = ((20, 12), (7, 19), (13, 13), (9, 2), (3, 33), (1, 5), (5, 1), (1, 1))
FREE = ("plain", "masked", "by hand", "banded", "mixing", "three lengths", "latents")
SPECS = ("ring=4", "ulysses=2", "ring=2,ulysses=2", "tp=2", "ring=2,tp=2", "pp=2", "dp=2,ring=2",
         "ring=2,tile=2", "ep=2,ring=2", "ring=2,time=2", "pp=2,ring=2")


def parallel(name: str, spec: str, **options: object) -> rc.ParallelProgram:
    return compiled(model_of(name), inputs_of(name, *EXAMPLE), spec, **options)


def furthest(made: rc.ParallelProgram, name: str, lengths: tuple[tuple[int, int], ...]) -> float:
    model, worst = model_of(name), 0.0
    for pair in lengths:
        inputs = inputs_of(name, *pair)
        worst = max(worst, difference(run(made, inputs).outputs, model(*inputs)))
    return worst


@pytest.mark.parametrize(("name", "spec"), some_fast(
    FREE, SPECS, fast=lambda name, spec: (name, spec) in (
        *((name, "ring=2,ulysses=2") for name in ("masked", "mixing", "three lengths", "latents")),
        ("plain", "ring=4"), ("by hand", "ring=2,tp=2"), ("plain", "pp=2,ring=2"),
    )
))
def test_any_two_lengths_match(name: str, spec: str) -> None:
    if name == "latents" and "pp" in spec:
        pytest.skip("this model has one layer for each kind of token, too few for stages")
    lengths = LENGTHS if spec == "ring=4" else LENGTHS[1:5]
    assert furthest(parallel(name, spec), name, lengths) < 1e-12


def test_both_lengths_are_split_and_keys_of_the_encoder_rotate() -> None:
    made = parallel("plain", "ring=4")
    assert [str(spec.type) for spec in made.program.inputs] == ["i64[b, s]", "i64[b, s2]"]
    forms = {a.form for a in report.attention_of(made.program)}
    assert forms == {"ring: keys and values rotate"}
    assert not report.gathers_of(made.program)
    shares = [str(n.meta["type"]) for n in made.ranks()[0].graph.nodes if n.op == "placeholder"]
    assert {"i64[b, s/ring]", "i64[b, s2/ring]"} <= {*shares}


def test_a_cross_attention_sends_keys_of_the_encoder_only() -> None:
    program = parallel("plain", "ring=4").ranks()[3]
    started = [n.meta["type"].shape for n in program.graph.nodes
               if str(n.target) == "ringcompile.shift_start.default"]
    sizes = [str(shape[0]) for shape in started if len(shape) > 1]  # tokens lie first
    # Two layers of the encoder and two cross attentions; two of the decoder's own.
    assert sizes.count("n") == 4 * 3
    assert sizes.count("n2") == 2 * 3


def test_what_is_only_attended_to_is_replicated() -> None:
    made = parallel("latents", "ring=2")
    nodes = made.ranks()[0].graph.nodes
    types = {n.name: str(n.meta["type"]) for n in nodes if n.op == "placeholder"}
    assert types["source"] == "i64[b, s]"
    assert types["target"] == "i64[b, s2/ring]"


def test_lengths_that_the_model_joins_are_one_and_a_note_says_so() -> None:
    made = parallel("joined", "ring=4")
    assert [str(spec.type) for spec in made.program.inputs] == ["f64[b, s, 32]", "f64[b, 12, 32]"]
    (note,) = made.program.notes
    assert note == (
        "the length of the input 'context' is fixed to that of the example, 12: the model joins "
        "lengths, or computes one from another"
    )
    assert furthest(made, "joined", ((20, 12), (7, 12), (1, 12))) < 1e-12


def test_lengths_that_the_code_compares_are_not_both_free() -> None:
    made = parallel("shorter", "ring=4")
    assert [str(spec.type) for spec in made.program.inputs] == ["i64[b, s]", "i64[b, 12]"]
    assert "the model's code fixes the length of 'target' to that of the example, 12" in (
        made.program.notes[0]
    )
    assert furthest(made, "shorter", ((20, 12), (12, 12), (33, 12))) < 1e-12
    with pytest.raises(rc.RingCompileError, match=r"sequence length 9 is outside 12\.\."):
        run(made, inputs_of("shorter", 9, 12))


def test_an_example_of_equal_lengths_is_of_one_length() -> None:
    made = compiled(model_of("plain"), inputs_of("plain", 12, 12), "ring=2")
    with pytest.raises(rc.RingCompileError) as refusal:
        run(made, inputs_of("plain", 12, 7))
    assert refusal.value.message == (
        "input 'target' has shape [2, 7], the program takes [b, s] with {'b': 2, 's': 12}"
    )


def test_the_caller_may_name_two_equal_lengths_apart() -> None:
    dims = {"source": {0: "batch", 1: "sequence"}, "target": {0: "batch", 1: "sequence2"}}
    program = rc.capture(model_of("plain"), inputs_of("plain", 12, 12), dims=dims)
    made = rc.transform(program, "ring=2")
    assert furthest(made, "plain", ((12, 7), (5, 12))) < 1e-12


def test_two_sizes_of_one_length_are_refused() -> None:
    dims = {name: {0: "batch", 1: "sequence"} for name in ("source", "target")}
    with pytest.raises(rc.RingCompileError) as refusal:
        rc.capture(model_of("plain"), inputs_of("plain", *EXAMPLE), dims=dims)
    assert refusal.value.message == (
        "dims: the sequence has different sizes: 'source': 20, 'target': 12"
    )
    assert refusal.value.hint == "call a further length 'sequence2'"


def test_each_length_has_its_own_limit() -> None:
    made = parallel("plain", "ring=4")
    run(made, inputs_of("plain", 3, ROWS))
    with pytest.raises(rc.RingCompileError) as refusal:
        run(made, inputs_of("plain", 3, ROWS + 1))
    assert refusal.value.message == "length 65 of the input 'target' is outside 1..64"


def test_saved_and_read_again(tmp_path: Path) -> None:
    made = parallel("masked", "ring=2,tp=2")
    made.save(tmp_path / "out")
    back = rc.load(tmp_path / "out")
    assert back.program.other_ranges == made.program.other_ranges
    assert furthest(back, "masked", ((7, 19), (13, 13))) < 1e-12


def test_last_positions_are_those_of_each_output() -> None:
    made, inputs = parallel("masked", "ring=4"), inputs_of("masked", 7, 19)
    whole = model_of("masked")(*inputs)
    found = rc.run(made, inputs, last=2)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value[:, -2:], rtol=0, atol=1e-12)
