"""`verify --numerics` passes what is right; a difference is named, and can be replayed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.cli import cli
from ringcompile.numerics.check import Comparison, Request
from ringcompile.numerics.files import read_input_file


class Last(nn.Module):
    """Attention under a padding mask, a capacity of 40 slots, and whole numbers as an output."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv = nn.Embedding(30, 16), nn.Linear(16, 48)
        self.router, self.out = nn.Linear(16, 2), nn.Linear(16, 30)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(ids)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        seen = mask.bool()[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        one = F.one_hot(self.router(y).argmax(-1), 2)
        kept = ((one.cumsum(1) * one).sum(-1) <= 40).unsqueeze(-1)
        logits = self.out(torch.where(kept, y, 0.0))
        return {"logits": logits, "best": logits.argmax(-1)}


def small(spec: str = "ring=2") -> rc.ParallelProgram:
    torch.manual_seed(0)
    ids = torch.zeros(1, 24, dtype=torch.int64)
    return rc.transform(rc.capture(Last().eval(), (ids, ids + 1)), spec)


def test_a_program_is_right_by_what_was_kept_of_its_model(tmp_path: Path) -> None:
    small().save(tmp_path / "out")
    found = rc.verify(rc.load(tmp_path / "out"), numerics=True)
    assert found.passed
    assert found.notes == ()  # the capacity was reached: longer sequences were tried for it
    assert max(row.length for row in found.numerics) > 40
    words = {row.inputs for row in found.numerics}
    assert {text.partition(",")[0] for text in words} >= {
        "no padding", "padding on the right", "holes", "padding on the left"}
    assert {row.allowed for row in found.numerics} == {2e-5, 1e-10}


def test_weights_that_ranks_hold_in_pieces_of_their_own() -> None:
    parallel = small("tp=2")
    held = {weight.name for weight in parallel.rank(0).weights.values()}
    assert any(name.startswith("qkv.weight[") for name in held)
    assert rc.verify(parallel, seq=19, tries=3).wrong == ""


def test_a_threshold_that_is_not_reached_is_a_note() -> None:
    found = rc.verify(small(), seq=24, tries=1)
    assert len(found.numerics) == 1
    assert len(found.notes) == 1
    assert "always gave the same result when it compared" in found.notes[0]
    assert "test_check.py:" in found.notes[0]


class Small(nn.Module):
    """Not a number where weights are larger than its own, which are small."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv = nn.Embedding(30, 16), nn.Linear(16, 48, bias=False)
        nn.init.normal_(self.qkv.weight, std=0.01)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return (0.5 - y.abs()).sqrt()


@pytest.mark.parametrize("given", [False, True])
def test_what_float64_cannot_run_is_left_out_and_said(given: bool) -> None:
    """It was left out without a word where inputs are drawn, and an error where they are given."""
    ids = torch.arange(24)[None] % 30
    parallel = rc.transform(rc.capture(Small().eval(), (ids,)), "ring=2")
    inputs = {parallel.program.inputs[0].name: ids} if given else None
    found = rc.verify(parallel, seq=None if given else 24, tries=3, inputs=inputs)
    assert found.wrong == ""
    assert {row.allowed for row in found.numerics} == {2e-5}
    (note,) = found.notes
    count, where = (1, "the inputs given") if given else (2, "length 24, seed 1")
    begin = f"{count} comparison{'s' * (count > 1)} in float64 with larger weights "
    assert note.startswith(begin)
    assert f"because the model itself fails in them; the first is {where}: " in note


def test_a_model_that_has_other_weights_is_told_so() -> None:
    """A function that makes a module anew gives it other random weights each time."""
    ids = torch.zeros(1, 24, dtype=torch.int64)
    parallel = rc.transform(rc.capture(Last().eval(), (ids, ids + 1)), "ring=2")
    assert rc.verify(small(), small_module(), seq=19, tries=1).wrong == ""
    with pytest.raises(rc.RingCompileError) as caught:
        rc.verify(parallel, Last().eval(), seq=19, tries=1)
    assert caught.value.message == (
        "the weight 'table.weight' of the model is not the one that was compiled, so the numbers "
        "cannot agree"
    )
    assert caught.value.hint is not None
    assert "torch.manual_seed" in caught.value.hint


def small_module() -> nn.Module:
    """The module of `small`."""
    torch.manual_seed(0)
    return Last().eval()


def damaged(parallel: rc.ParallelProgram) -> rc.ParallelProgram:
    """The same with another scale of attention, on all ranks alike."""
    parallel = rc.ParallelProgram(parallel.program, parallel.mesh, parallel.options)
    node = next(n for n in parallel.program.graph.nodes if "scale" in n.kwargs)
    node.kwargs = {**node.kwargs, "scale": 0.4}
    return parallel


def test_a_difference_is_named_and_replayed() -> None:
    parallel = damaged(small())
    found = rc.verify(parallel, numerics=True)
    assert not found.passed
    assert found.wrong == found.numerics[-1].wrong
    assert found.wrong.startswith("output 'logits' at [")
    row = found.numerics[-1]
    assert f"to repeat: --seq {row.length} --seed {row.seed} --tries 1" in found.wrong
    again = rc.verify(parallel, seq=row.length, seed=row.seed, tries=1)
    assert again.wrong == found.wrong


def test_a_model_is_compared_with_instead() -> None:
    parallel, torch_seed = small(), 1
    torch.manual_seed(torch_seed)
    other = Last().eval()  # of other weights
    with pytest.raises(rc.RingCompileError, match=r"'table\.weight' of the model is not the one"):
        rc.verify(parallel, other)
    torch.manual_seed(0)
    assert rc.verify(parallel, Last().eval(), tries=1).passed


def test_nan_of_the_ranks_fails() -> None:
    parallel = small()
    node = next(n for n in parallel.rank(0).graph.nodes if "scale" in n.kwargs)
    node.kwargs = {**node.kwargs, "scale": float("nan")}
    assert "the ranks give nan" in rc.verify(parallel, numerics=True).wrong


def test_inputs_of_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(1, 29, 16)
    parallel = rc.transform(rc.capture(layer.eval(), (torch.randn(1, 24, 16),)), "ring=2")
    np.save(tmp_path / "in.npy", x.numpy())
    torch.save((x,), tmp_path / "in.pt")
    save_file({"src": x}, tmp_path / "in.safetensors")
    for name in ("in.npy", "in.pt", "in.safetensors"):
        found = rc.verify(parallel, layer, inputs=tmp_path / name)
        assert found.passed
        assert {row.inputs for row in found.numerics} == {f"the inputs of '{tmp_path / name}'"}
    broken = rc.verify(damaged(parallel), inputs=tmp_path / "in.npy")
    assert f"(the inputs of '{tmp_path / 'in.npy'}')" in broken.wrong


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "a.pt")
    (tmp_path / "a.npy").write_bytes(b"no")
    for name, text in {
        "a.pt": "holds other things than tensors", "a.npy": "cannot read inputs from",
        "a.txt": "it is no .safetensors, .pt, .npy file", "b.pt": "cannot read inputs from",
    }.items():
        with pytest.raises(rc.RingCompileError, match=text):
            read_input_file(tmp_path / name)


def test_nothing_to_compare_with_is_refused() -> None:
    parallel = small()
    parallel.program.captured = None
    with pytest.raises(rc.RingCompileError, match="there is nothing to compare numbers with"):
        Comparison(parallel, None)


def test_time_is_kept_and_what_was_left_out_is_said() -> None:
    comparison = Comparison(small(), None)
    rows = list(comparison.run(Request(tries=1, seconds=0.0)))
    assert len(rows) == 1
    assert "were not tried" in comparison.notes[0]


def test_the_command_line(tmp_path: Path) -> None:
    small().save(tmp_path / "out")
    done = CliRunner().invoke(cli, ["verify", str(tmp_path / "out"), "--seq", "19"])
    assert done.exit_code == 0, done.output
    assert "length 19, seed 0, no padding: largest difference" in done.output
    agree = "the outputs agree with those of the single-device model"
    assert agree in done.output.splitlines()
    damaged(small()).save(tmp_path / "bad")
    failed = CliRunner().invoke(cli, ["verify", str(tmp_path / "bad"), "--seq", "19"])
    assert isinstance(failed.exception, rc.RingCompileError)
    assert agree not in failed.output
    assert "the numbers differ from the single-device model: output 'logits'" in str(
        failed.exception)
