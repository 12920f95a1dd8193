"""Batches are dealt out only where their sequences know nothing of each other."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from ringcompile import artifact
from ringcompile.capture.export import capture
from ringcompile.compiler import load, transform
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.models import zoo
from ringcompile.pass_list import prepare
from ringcompile.passes.stages.deal_batch import deal_out, routing
from tests.support import TOLERANCE, difference, run, zoo_program


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.up(x).unsqueeze(1).squeeze(1)
        heads = x.unsqueeze(1)
        return F.scaled_dot_product_attention(heads, heads, heads).squeeze(1)


class Centred(nn.Module):
    """Every sequence less the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x - x.mean(0, keepdim=True)


class Paired(nn.Module):
    """Each sequence with the next one's mask."""

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        other = keep[torch.arange(x.shape[0]).flip(0)]
        heads = x.unsqueeze(1)
        seen = other[:, None, None].bool()
        return F.scaled_dot_product_attention(heads, heads, heads, seen).squeeze(1)


def centred() -> nn.Module:
    torch.manual_seed(0)
    return Centred().eval()


def test_replicas_of_a_batch_that_is_mixed_are_refused() -> None:
    program = capture(centred(), (torch.randn(2, 12, 8),))
    with pytest.raises(RingCompileError, match="this mixes the sequences of a batch") as caught:
        transform(program, "dp=2,ring=2")
    assert "x.mean(0, keepdim=True)" in str(caught.value)
    assert caught.value.hint == "leave dp out"


def test_any_number_of_sequences() -> None:
    program = zoo_program("dense-4l-tiny", sequence=24, batch=3)
    transform(program, "dp=2,pp=2")


def test_a_pipeline_takes_such_a_batch_as_one_microbatch(tmp_path: Any) -> None:
    module = centred()
    transform(capture(module, (torch.randn(2, 12, 8),)), "pp=2").save(tmp_path / "program")
    parallel = load(tmp_path / "program")
    for batch in (1, 4):
        given = torch.randn(batch, 9, 8)
        with torch.no_grad():
            assert difference(run(parallel, (given,)).outputs, module(given)) <= TOLERANCE
    assert not artifact.load(tmp_path / "program").rank(0).returns
    said = "this mixes the sequences of a batch: a pipeline takes every batch as one microbatch"
    assert any(said in note for note in parallel.program.notes)


@torch.no_grad()
def test_a_small_input_of_other_sequences_is_passed_whole() -> None:
    program = capture(Paired(), (torch.randn(2, 12, 8), torch.ones(2, 12).long()))
    given = torch.randn(5, 9, 8), torch.randint(0, 2, (5, 9)).index_fill(1, torch.tensor([0]), 1)
    found = run(transform(program, "dp=2"), given).outputs
    assert difference(found, Paired()(*given)) <= TOLERANCE


class Swapped(nn.Module):
    """Each sequence with the next one's hidden state."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unsqueeze(1)
        y = F.scaled_dot_product_attention(heads, heads, heads).squeeze(1)
        return y + y[torch.arange(x.shape[0]).flip(0)]


def test_rows_of_another_sequence_are_mixing() -> None:
    program = prepare(capture(Swapped(), (torch.randn(2, 12, 8),)))
    with pytest.raises(RingCompileError, match="looked up here by an index") as caught:
        deal_out(program, routing(program, {}))
    assert "flip(0)" in str(caught.value)


def test_one_sequence_is_enough_to_see_it() -> None:
    program = capture(centred(), (torch.randn(1, 12, 8),))
    with pytest.raises(RingCompileError, match="this mixes the sequences of a batch"):
        transform(program, "dp=2")
    assert not transform(program, "ring=2").program.notes


def test_a_capacity_that_each_part_counts_is_noted() -> None:
    program = zoo_program("moe-4l-tiny", sequence=24, batch=2)
    notes = transform(program, "dp=2,pp=2", capacity="local").program.notes
    said = "with dp=2,pp=2, the capacity of experts is counted for each microbatch alone"
    assert any(said in note for note in notes)


def test_a_capacity_of_the_whole_batch() -> None:
    """Replicas are refused; a pipeline runs the batch at once, and drops what the model drops."""
    module, program = zoo.build("moe-4l-tiny")[0], zoo_program("moe-4l-tiny", sequence=24, batch=2)
    with pytest.raises(RingCompileError, match="a limited number of tokens of the whole") as caught:
        transform(program, "dp=2")
    assert caught.value.hint == (
        "leave dp out; or --capacity local counts the tokens of each part alone, which changes "
        "results"
    )
    parallel = transform(program, "pp=2")
    assert any("takes every batch as one microbatch" in note for note in parallel.program.notes)
    given = torch.randn(3, 27, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert difference(run(parallel, (given,)).outputs, module(given)) <= TOLERANCE


class Counted(nn.Module):
    """Experts that take as many rows as the data says."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unsqueeze(1)
        flat = F.scaled_dot_product_attention(heads, heads, heads).flatten(0, 2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            (chosen,) = torch.where(flat.argmax(-1) % 2 == number)
            out = out.index_add(0, chosen, expert(flat[chosen]))
        return out.view(x.shape)


def test_no_stage_ends_where_sizes_depend_on_the_data() -> None:
    one, three = Counted().eval(), nn.Sequential(Counted(), Counted(), Counted()).eval()
    with pytest.raises(RingCompileError, match="pp=3 asks for more stages than the model has"):
        transform(capture(one, (torch.randn(2, 12, 8),)), "pp=3")
    parallel = transform(capture(three, (torch.randn(2, 12, 8),)), "pp=3")
    given = torch.randn(3, 9, 8)
    with torch.no_grad():
        assert difference(run(parallel, (given,)).outputs, three(given)) <= TOLERANCE


def padded(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(1, 61, (batch, 21), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, 21 - 3 * row :] = 0
    return ids, mask


@cache
def llama() -> tuple[nn.Module, Program]:
    """A decoder, and what it is captured as with a mask."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )
    module, (ids, mask) = transformers.LlamaForCausalLM(config).eval(), padded(2)
    return module, capture(module, (ids,), {"attention_mask": mask})


@torch.no_grad()
@pytest.mark.parametrize("spec", ["dp=2", "dp=2,pp=2"])
def test_padded_sentences_are_dealt_with_their_masks(spec: str) -> None:
    """A mask is looked up by the number of the sequence; that is no mixing."""
    module, program = llama()
    ids, mask = padded(4)
    found = run(transform(program, spec), (ids, mask)).outputs["logits"]
    expected = module(ids, attention_mask=mask).logits
    assert difference(found[mask.bool()], expected[mask.bool()]) <= TOLERANCE


def test_a_mask_of_fewer_sequences_is_refused() -> None:
    _, program = llama()
    mask = padded(2)[1]
    with pytest.raises(RingCompileError, match=r"has shape \[2, 21\], the program takes \[b, s\]"):
        run(transform(program, "dp=2"), (padded(4)[0], mask))
