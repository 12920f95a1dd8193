"""The Helix form of decoding: behind attention the ranks that share a cache share the work."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.cost.hardware import load_cluster
from ringcompile.decode_choice import CLUSTER, DecodeStep, faster_form
from ringcompile.generation_plans import GenerationRequest, generation_plans
from ringcompile.ir.communication import num_bytes
from ringcompile.ir.nodes import layout_of
from ringcompile.ir.program import Program
from ringcompile.pass_list import prepare
from tests.families.catalogue import FAMILIES
from tests.generate.models import ALL, CAPACITY, Rotary, captured, checked_session, given, ids
from tests.generate.test_mixtures import Dense, Routed
from tests.generate.test_session import EXACT, TURNS, worst
from tests.generate.trial import CAPACITY as ROOM
from tests.generate.trial import CAPTURED, IDENTICAL, PROMPT, expected_text, outcome_of
from tests.support import some_fast

SPECS = ("ring=2", "ring=3", "ring=4", "ring=2,tp=3", "ring=3,tp=2", "ring=6", "ulysses=3",
         "ring=3,ulysses=2", "pp=2,ring=2", "ring=2,tp=2")
KINDS: dict[str, Any] = {**ALL, "mixture": given(Routed, Dense)}
FAST = {("grouped", spec) for spec in ("ring=4", "ring=2,tp=3", "pp=2,ring=2")} | {
    ("mixture", "ring=2,tp=2"), ("Alibi", "ring=3"),
}


def helix(kind: Any, spec: str) -> tuple[nn.Module, rc.ParallelProgram]:
    module, program = captured(kind)
    return module, rc.transform(program, spec, cache=CAPACITY, decode="helix")


@pytest.mark.parametrize(
    ("kind", "spec"), some_fast(KINDS, SPECS, fast=lambda kind, spec: (kind, spec) in FAST)
)
def test_turns(kind: str, spec: str) -> None:
    """Prompts, turns, single tokens; on ring=4 six heads are not shared, and the MLP is."""
    module, parallel = helix(KINDS[kind], spec)
    with checked_session(parallel) as session:
        assert worst(session, module, ids(76), TURNS) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ring=4", "ring=2,tp=2"])
@pytest.mark.parametrize(
    "name", ["llama", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "gpt2", "bloom", "gemma2"]
)
def test_families(name: str, spec: str) -> None:
    """Sinks, latent keys, experts, fused weights and soft caps among them."""
    family = FAMILIES[name]
    model = family.build()
    program = prepare(rc.capture(model, (), family.example(CAPTURED)))
    parallel = rc.transform(program, spec, cache=ROOM, decode="helix")
    parallel.verify()
    expected = expected_text(model, family.example(PROMPT))
    assert outcome_of(parallel, expected, [0]).kind == IDENTICAL


def weights(parallel: rc.ParallelProgram) -> dict[str, int]:
    """The bytes that rank 0 reads of each matrix for a token; of tables it reads a row."""
    program = parallel.with_cache().rank(0)
    nodes = {n.name: n for n in program.graph.nodes if n.name in program.weights}
    return {
        weight.name: int(num_bytes(program, nodes[placeholder]))
        for placeholder, weight in program.weights.items()
        if len(weight.shape) == 2 and "embed" not in weight.name
    }


@pytest.mark.parametrize(("spec", "ranks"), [("ring=2", 2), ("ring=2,tp=3", 2), ("ring=3", 3)])
def test_a_part_of_the_weights_is_read(spec: str, ranks: int) -> None:
    """1/R of all that is behind attention; queries and keys are computed on every rank."""
    simple = weights(rc.transform(captured(Rotary)[1], spec, cache=CAPACITY, decode="simple"))
    shared = weights(helix(Rotary, spec)[1])
    behind = {name for name in simple if ".out." in name or ".mlp." in name}
    assert len(behind) >= 6
    assert all(simple[name] == ranks * shared[name] for name in behind)
    assert {name for name in simple if simple[name] != shared[name]} == behind


@pytest.mark.parametrize("spec", ["ring=2", "ring=2,tp=3"])
def test_they_are_parts_of_what_prompts_read(spec: str, tmp_path: Path) -> None:
    """Views of the same memory, rows and columns; prompts need nothing behind the last keys."""
    helix(Rotary, spec)[1].save(tmp_path / "out")
    with rc.Session(rc.load(tmp_path / "out")) as session:
        for runner in session.driver.runners:
            prompts, tokens = runner.opened["prefill"], runner.opened["carried"]
            held = {x.untyped_storage().data_ptr() for x in prompts.weights.values()}
            shared = [
                tokens.weights[n.name] for n in tokens.program.graph.nodes
                if n.name in tokens.weights and "ring" in layout_of(n).axes
                and tokens.program.weights[n.name].name in
                {weight.name for weight in prompts.program.weights.values()}
            ]
            assert len(shared) == 4
            assert all(x.untyped_storage().data_ptr() in held for x in shared)


def test_an_artifact_and_processes(tmp_path: Path) -> None:
    module, parallel = helix(Rotary, "ring=3")
    parallel.save(tmp_path / "out")
    loaded = rc.load(tmp_path / "out")
    loaded.verify()
    assert loaded.options["decode"] == "helix"
    with rc.Session(loaded, backend="gloo") as session:
        assert worst(session, module, ids(40), (20, 1, 1, 5)) < EXACT


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (8, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q + 1, q * 2, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


@cache
def one_layer(width: int) -> Program:
    with torch.device("meta"):
        x = torch.empty(1, 8, width, dtype=torch.bfloat16)
        return rc.capture(Layer(width).to(torch.bfloat16), (x,))


def test_the_cost_model_chooses() -> None:
    """What is small is waited for longer than it is read."""
    small, large = (rc.transform(one_layer(width), "ring=4", cache=256) for width in (64, 8192))
    assert [made.options["decode"] for made in (small, large)] == ["simple", "helix"]
    exchanged = [
        [str(n.target).split(".")[1] for n in made.with_cache().rank(0).graph.nodes
         if n.kwargs.get("axis")] for made in (small, large)
    ]
    assert exchanged == [["gather"], ["all_to_all", "all_reduce", "all_reduce"]]
    step = DecodeStep.of(large.with_cache().program)
    simple = rc.transform(one_layer(8192), "ring=4", cache=256, decode="simple").with_cache()
    assert step.cluster.name == CLUSTER
    assert step.seconds(simple) > 1.3 * step.seconds(large.with_cache())
    assert faster_form(simple, lambda: simple) is simple


def test_plans_choose_for_the_hardware_that_is_asked_for() -> None:
    cluster, asked = load_cluster(CLUSTER).sized(4), GenerationRequest(64, 16)
    for width, found in ((64, "ring=4"), (8192, "ring=4 --decode helix")):
        (plan,) = generation_plans(one_layer(width), cluster, asked, specs=["ring=4"])
        assert str(plan) == found
        assert plan.to_json(1)["decode"] == plan.decode


@pytest.mark.parametrize(
    ("spec", "options", "text"),
    [
        ("tp=2", {"cache": 40, "decode": "helix"},
         ("error: decode=helix: no axis of tp=2 divides the cache by position\n"
          "  hint: split the sequence over ring or tile or ulysses, or leave decode out")),
        ("ring=2", {"decode": "helix"},
         "error: decode=helix needs a cache\n  hint: pass cache=N (--cache N) as well"),
        ("ring=2", {"cache": 40, "decode": "both"},
         "error: unknown decode 'both'\n  hint: one of: auto, simple, helix"),
    ],
)
def test_what_is_refused(spec: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(rc.RingCompileError) as refused:
        rc.transform(captured(Rotary)[1], spec, **options)
    assert str(refused.value) == text
