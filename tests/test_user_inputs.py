"""What users pass in: positions, padding, packed documents, masks, lengths; right, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ringcompile as rc
from ringcompile.capture.export import capture
from tests.support import TOLERANCE, compiled, difference, run, some_fast, tensors

transformers = pytest.importorskip("transformers")

CAPTURED, LENGTH, VOCABULARY = 13, 27, 60
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": VOCABULARY,
}


def sharp(model: nn.Module) -> nn.Module:
    """Weights so large that it matters which keys a query sees."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return sharp(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, use_cache=False)))


def ids(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCABULARY, (2, length), generator=generator)


def positions(kind: str, length: int) -> torch.Tensor:
    ordered = torch.arange(length)
    documents = torch.cat([torch.arange(length // 3), torch.arange(length - length // 3)])
    shuffled = torch.randperm(length, generator=torch.Generator().manual_seed(1))
    row = {"in order": ordered, "from ten on": ordered + 10, "documents": documents,
           "out of order": shuffled, "backwards": ordered.flip(0)}[kind]
    return torch.stack([row, ordered])


def masks(kind: str, length: int) -> torch.Tensor:
    keep = torch.ones(2, length, dtype=torch.long)
    if kind == "right":
        keep[0, length - 4:] = 0
    elif kind == "left":
        keep[0, :4] = 0
    elif kind == "holes":
        keep[0, 2::3] = 0
    elif kind == "four dims":
        return torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, -1, -1).contiguous()
    return keep


def matches(model: nn.Module, example: dict[str, Any], given: dict[str, Any], spec: str) -> None:
    parallel = compiled(model, (), spec, example)
    with torch.no_grad():
        expected = model(**given)
    found = run(parallel, given).outputs
    seen = given.get("attention_mask")
    if seen is not None and seen.dim() == 2:  # what padding holds, nobody asked for
        found, expected = found["logits"][seen.bool()], expected["logits"][seen.bool()]
    assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "spec"),
    some_fast(
        ["in order", "from ten on", "documents", "out of order", "backwards"],
        ["ring=4", "ring=3"],
        fast=lambda kind, spec: spec == "ring=3" and kind in ("documents", "out of order"),
    ),
)
def test_positions_that_the_user_passes(llama: nn.Module, kind: str, spec: str) -> None:
    """Positions are data: each rank's rotary angles, and which documents it is in, follow them."""
    example, given = (
        {"input_ids": ids(n), "position_ids": positions(kind, n)} for n in (CAPTURED, LENGTH)
    )
    matches(llama, example, given, spec)


def test_positions_matter(llama: nn.Module) -> None:
    """Else the test above would pass with positions that are ignored."""
    with torch.no_grad():
        outputs = [
            llama(input_ids=ids(LENGTH), position_ids=positions(kind, LENGTH)).logits[0]
            for kind in ("in order", "documents", "out of order")
        ]
    assert difference(outputs[1], outputs[0]) > 1e-2
    assert difference(outputs[2], outputs[0]) > 1e-2


def test_a_cache_would_change_what_positions_mean() -> None:
    """Transformers keeps documents apart by positions only where it has no cache."""
    model = sharp(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)))
    given = {"input_ids": ids(CAPTURED), "position_ids": positions("documents", CAPTURED)}
    assert "use_cache=False" in capture(model, (), given).notes[0]
    assert capture(model, (), {"input_ids": ids(CAPTURED)}).notes == ()


@pytest.mark.parametrize("kind", some_fast(
    ["all", "right", "left", "holes", "four dims"],
    fast=lambda kind: kind in ("holes", "four dims"),
))
def test_ragged_batches(llama: nn.Module, kind: str) -> None:
    example, given = (
        {"input_ids": ids(n), "attention_mask": masks(kind, n)} for n in (CAPTURED, LENGTH)
    )
    matches(llama, example, given, "ring=4")


def test_hidden_states_instead_of_ids(llama: nn.Module) -> None:
    example, given = ({"inputs_embeds": torch.randn(2, n, 32)} for n in (CAPTURED, LENGTH))
    matches(llama, example, given, "ring=4")


def test_logits_of_the_last_token_only(llama: nn.Module) -> None:
    """Only the last hidden state is gathered: the head sees one token."""
    parallel = compiled(llama, (ids(CAPTURED),), "ring=4", {"logits_to_keep": 1})
    with torch.no_grad():
        expected = llama(ids(LENGTH), logits_to_keep=1)
    found = run(parallel, (ids(LENGTH),)).outputs
    assert difference(found, expected) <= TOLERANCE
    head = next(n for n in reversed(parallel.rank(0).graph.nodes) if "linear" in str(n.target))
    assert head.meta["type"].shape[1] == 1


@pytest.mark.parametrize("length", [2, 3, 5, 16, 61])
def test_one_program_for_all_lengths(llama: nn.Module, length: int) -> None:
    parallel = compiled(llama, (ids(CAPTURED),), "ring=4")
    with torch.no_grad():
        expected = llama(ids(length))
    assert difference(run(parallel, (ids(length),)).outputs, expected) <= TOLERANCE


@pytest.mark.parametrize("window", [9, pytest.param(4, marks=pytest.mark.slow)])
def test_a_window_on_sixteen_ranks_sends_what_is_in_reach(window: int) -> None:
    """A whole model at a known length: chunks of 8 tokens, keys and values of each layer."""
    ranks, chunk, layers = 16, 8, 2
    config = transformers.MistralConfig(**SIZES, sliding_window=window, use_cache=False)
    model = sharp(transformers.MistralForCausalLM(config))
    tokens = ids(ranks * chunk)
    parallel = compiled(model, (ids(CAPTURED),), f"ring={ranks}", length=ranks * chunk,
                        order="contiguous")
    result = run(parallel, (tokens,))
    with torch.no_grad():
        assert difference(result.outputs, model(tokens)) <= TOLERANCE
    # The window reaches into the block before a rank's own: each block is sent one rank on.
    token_bytes = 2 * SIZES["num_key_value_heads"] * 8 * 4 * tokens.shape[0]
    assert result.bytes_sent == [layers * chunk * token_bytes] * (ranks - 1) + [0]


# -- what cannot be had ----------------------------------------------------------------------------


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


class HalfOf(nn.Module):
    """A mask of the caller's own making for a length that its code fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(CAPTURED, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = (x + self.table).unsqueeze(1)
        return torch.nn.functional.scaled_dot_product_attention(h, h, h)[:, 0]


def test_a_branch_on_data_is_refused_with_its_line() -> None:
    with pytest.raises(rc.RingCompileError, match="depends on the values of a tensor") as caught:
        capture(Branch(), (torch.randn(1, CAPTURED, 8),))
    assert caught.value.location is not None
    assert caught.value.location.text == "if x.sum() > 0:"


def test_a_length_that_the_code_fixes() -> None:
    """It is captured for that length, says so, and refuses every other."""
    model, x = HalfOf().eval(), torch.randn(2, CAPTURED, 8)
    parallel = compiled(model, (x,), "ring=4")
    assert "fixes the sequence length" in parallel.program.notes[0]
    assert difference(run(parallel, (x,)).outputs, model(x)) <= TOLERANCE
    with pytest.raises(rc.RingCompileError, match="has shape"):
        run(parallel, (torch.randn(2, CAPTURED + 1, 8),))


def test_no_sequence_to_split() -> None:
    """A recurrence over a fixed number of steps."""
    model = nn.GRU(8, 8, batch_first=True).eval()
    with pytest.raises(rc.RingCompileError, match="there is no sequence to split"):
        compiled(model, (torch.randn(2, 3, 8),), "ring=4")


def test_a_cache_is_refused(llama: nn.Module) -> None:
    with pytest.raises(rc.RingCompileError, match="returns a cache") as caught:
        capture(llama, (ids(CAPTURED),), {"use_cache": True})
    assert "use_cache=False" in str(caught.value)


def test_capture_leaves_the_model_as_it_was(llama: nn.Module) -> None:
    """Modules that keep what they computed must not be left with traced values."""

    class Keeps(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = x * 2
            return self.seen + 1

    model = Keeps()
    capture(model, (torch.randn(1, CAPTURED, 8),))
    assert "seen" not in vars(model)
    assert len(tensors(model(torch.randn(1, 3, 8)))) == 1


def test_strided_examples_are_as_good() -> None:
    parallel = compiled(nn.Identity(), (torch.randn(2, 20, 8)[:, :CAPTURED],), "ring=4")
    assert parallel.program.notes == ()


def test_check_says_that_a_length_is_fixed() -> None:
    found = rc.check(HalfOf().eval(), "ring=4", (torch.randn(2, CAPTURED, 8),))
    assert found.supported
    assert any("fixes the sequence length" in note for note in found.notes)
