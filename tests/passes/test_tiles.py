"""Attention in tiles: queries are gathered along `tile`, keys stay, results are reduced."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ringcompile import artifact
from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.cost.rank import cost_of
from ringcompile.cost.specs import Variant, variants
from ringcompile.errors import RingCompileError
from ringcompile.ir.types import SequenceSplit
from ringcompile.mesh import Mesh
from ringcompile.models import zoo
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.launcher import LocalRanks
from ringcompile.runtime.queued import Queued
from ringcompile.session import Session
from tests.communication.many import MANY, Many, found
from tests.random_plans import captured
from tests.support import TOLERANCE, difference, furthest

LENGTH = 29
slow = partial(pytest.param, marks=pytest.mark.slow)


class Attention(nn.Module):
    """One attention of 3 heads x 4 whose mask depends on positions, or comes with the inputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        heads = x.view(*x.shape[:2], 3, 4).transpose(1, 2)
        at = torch.arange(x.shape[1])
        back = at[:, None] - at
        masks = {
            "window": lambda: (back >= 0) & (back < 8),
            "both sides": lambda: back.abs() < 5,
            "bias": lambda: torch.where(back >= 0, -(back.float() / 7), float("-inf")),
            "segments": lambda: (segments[:, :, None] == segments[:, None, :])[:, None],
        }
        out = F.scaled_dot_product_attention(
            heads, heads + 1, heads * 2, attn_mask=masks[self.kind]()
        )
        return out.transpose(1, 2).reshape(x.shape)


def example(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(length)
    return torch.randn(1, length, 12), (torch.arange(length) // 7)[None]


@pytest.mark.parametrize(
    ("model", "parallel", "options"),
    [
        ("llama-tiny", "ring=2,tile=2", {}),
        ("bert-tiny", "tile=4", {}),
        ("llama-tiny", "time=2,ring=2,tile=2", {}),
        slow("llama-tiny", "ring=2,tile=2", {"order": "contiguous"}),
        slow("llama-tiny", "ring=3,tile=3", {}),
        slow("dense-4l-tiny", "ring=4,tile=4", {}),
        slow("moe-4l-tiny", "ring=2,tile=2,ep=2", {}),
        slow("mixtral-tiny", "ring=2,tile=2,ulysses=2", {}),
        slow("llama-tiny", "pp=2,dp=2,tile=2,ring=2", {}),
        slow("gpt-tiny", "tile=3,tp=2", {"tp_sequence": True}),
    ],
)
@torch.no_grad()
def test_a_model_in_tiles_gives_the_models_numbers(
    model: str, parallel: str, options: dict[str, Any]
) -> None:
    made = transform(captured(model), parallel, **options)
    made.verify()
    module, one = zoo.build(model, sequence=LENGTH)
    # Capacities are counted over the batch: several sequences would be another result.
    count = 2 * made.mesh.size("dp") if made.mesh.size("pp") > 1 else 1
    inputs = tuple(x.repeat(count, *[1] * (x.dim() - 1)) for x in one)
    found = run_lockstep(
        made.ranks(), made.mesh, made.source, inputs, check_types=True,
        engine=partial(Queued, seed=1),
    ).outputs
    assert furthest(difference(part, module(*one)) for part in found.chunk(count)) < TOLERANCE


@pytest.mark.parametrize("parallel", ["ring=2,tile=2", slow("ring=3,tile=4"), "tile=5"])
@pytest.mark.parametrize("kind", ["window", "both sides", "bias", "segments"])
@torch.no_grad()
def test_masks_in_tiles(kind: str, parallel: str) -> None:
    module = Attention(kind)
    made = transform(capture(module, example(24)), parallel)
    made.verify()
    inputs = example(45)
    found = run_lockstep(made.ranks(), made.mesh, made.source, inputs, check_types=True).outputs
    assert difference(found, module(*inputs)) < TOLERANCE


@torch.no_grad()
def test_a_cache_lies_along_tiles_as_along_the_ring() -> None:
    made = transform(captured("llama-tiny"), "ring=2,tile=2", cache=32)
    made.verify()
    module, (ids,) = zoo.build("llama-tiny", sequence=12)
    with Session(made) as session:
        found = [session.extend(part) for part in ids.split([7, 1, 4], 1)]
    assert difference(torch.cat(found, 1), module(ids)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ring=2,tile=2", "ring=4,tile=2", "ring=4,tile=4"])
@torch.no_grad()
def test_tiles_over_gloo(parallel: str, tmp_path: Any) -> None:
    made = transform(captured("llama-tiny"), parallel)
    made.save(tmp_path / "out")
    module, inputs = zoo.build("llama-tiny", sequence=LENGTH)
    with LocalRanks(artifact.load, (tmp_path / "out",), threads=1) as ranks:
        assert difference(ranks.run(inputs).outputs, module(*inputs)) < TOLERANCE


def test_zigzag_order_gives_all_tiles_the_same_work() -> None:
    """A share is an early chunk and its mirror in the whole sequence, not in the ring's part."""
    split = SequenceSplit((("ring", 2), ("tile", 2)), "zigzag")
    assert [split.chunks(rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    with_experts = SequenceSplit((("ring", 2), ("tile", 2), ("ep", 2)), "zigzag")
    assert with_experts.chunks(0) == (0, 1)
    assert with_experts.chunks(1) == (14, 15)


def test_keys_cannot_be_gathered_where_queries_are() -> None:
    with pytest.raises(RingCompileError) as caught:
        transform(captured("llama-tiny"), "ring=2,tile=2", ring="gather")
    said = "--ring gather cannot be combined with an axis along which queries are gathered: tile"
    assert caught.value.message == said
    assert caught.value.hint == "leave --ring out"


@pytest.mark.parametrize(("order", "copied"), [
    ("zigzag", {"reshape": 1, "pack_state": 1, "merge_states": 1}),
    ("contiguous", {"pack_state": 1, "merge_states": 1}),
])
def test_queries_and_results_are_copied_once(order: str, copied: dict[str, int]) -> None:
    """Into the order of chunks, and into one tensor with their log-sum-exps."""
    module = Attention("window")
    made = transform(capture(module, example(24)), "tile=4", order=order, length=32)
    steps = [step for step in cost_of(made.rank(3), 32, 1).steps if step.op not in ("add", "mul")]
    found = {step.op: len(step.kernels) for step in steps if {
        kernel.kind for kernel in step.kernels} == {"strided"}}
    assert found == copied
    assert [step.op for step in steps if step.communicates] == ["gather", "all_to_all"]
    assert not any(step.kernels for step in steps if step.communicates)


@pytest.mark.parametrize("parallel", ["tile=4", "ring=2,tile=4", "ring=4,tile=2"])
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_no_kernel_of_causal_attention_in_tiles_needs_a_mask(parallel: str, order: str) -> None:
    """Rows that see their own positions and others are a causal call and one without a mask."""
    made = transform(captured("dense-4l-tiny"), parallel, order=order, length=64)
    for program in made.ranks():
        kinds = {kernel.kind for step in cost_of(program, 64).steps for kernel in step.kernels}
        assert "attention_causal" in kinds
        assert "attention_masked" not in kinds


@pytest.mark.parametrize("row", [
    MANY[0], *(slow(row) for row in MANY[1:])
], ids=lambda row: f"{row.model}-{row.ring}")
def test_what_many_ranks_send(row: Many) -> None:
    """docs/communication.md has these numbers."""
    assert found(row) == row.sent


def test_many_ranks_send_a_quarter_of_what_a_ring_does() -> None:
    """At 256 in every model; at 64 where keys have four bytes a number and their own queries."""
    shares = {(row.model, row.ring): row.sent[1] / row.sent[0] for row in MANY}
    assert max(share for (_, ring), share in shares.items() if ring == "ring=256") < 0.25
    assert shares["bert-tiny", "ring=64"] < 0.25


def test_the_planner_tries_a_long_ring_in_tiles() -> None:
    def tiled(parallel: str) -> set[str]:
        found = {str(variant.mesh) for variant in variants(Mesh.parse(parallel), 1)}
        return {text for text in found if "tile" in text}

    assert tiled("ring=16") == {"ring=4,tile=4"}
    assert tiled("pp=2,ring=8,tp=2") == {"pp=2,ring=4,tile=2,tp=2"}
    assert tiled("ring=12") == {"ring=4,tile=3"}
    assert tiled("ring=4") == tiled("ring=11") == set()
    found = Variant(Mesh.parse("ring=4,tile=4"), order="zigzag")
    assert str(found) == "ring=4,tile=4 --order zigzag"
