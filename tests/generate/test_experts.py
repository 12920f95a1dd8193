"""Experts over `ep` with a cache: a rank runs its own on all new tokens, and results are summed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.ir.calls import Call
from ringcompile.ir.nodes import type_of
from ringcompile.ops import experts
from ringcompile.ops.schemas import op
from ringcompile.pass_list import prepare
from tests.families.catalogue import FAMILIES
from tests.generate.models import CAPACITY, WIDTH, cached, captured, checked_session, given, ids
from tests.generate.test_mixtures import EXACT, EXPERTS, Dense, Mixture, Routed
from tests.generate.test_session import TURNS, worst
from tests.generate.trial import CAPACITY as ROOM
from tests.generate.trial import CAPTURED, IDENTICAL, PROMPT, expected_text, outcome_of
from tests.support import some_fast

EXPERT_LINEAR = op("expert_linear")
SPECS = ("ep=2", "ep=4", "ring=2,ep=2", "ep=2,ring=2", "ep=2,tp=2", "ep=2,tp=3", "pp=2,ep=2",
         "ulysses=2,ep=2", "pp=2,ring=2,ep=2,tp=2")


def expert_linear(*args: torch.Tensor) -> torch.Tensor:
    """Rows through their experts' matrices, which are input by output."""
    run = EXPERT_LINEAR if torch.compiler.is_exporting() else experts.expert_linear
    return run(*args, transposed=True)


class Rows(Mixture):
    """Each choice of a token is a row with the number of its expert, as Hugging Face's have it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_up = torch.nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH))
        self.bias_down = torch.nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def hidden(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        each = x.unsqueeze(2).expand(*index.shape, WIDTH)
        return F.gelu(expert_linear(each, index, self.up))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, index = self.chosen(x)
        out = expert_linear(self.hidden(x, index), index, self.down)
        return (out * weight[..., None]).sum(2)


class Biased(Rows):
    """With a bias for each expert, behind both products."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, index = self.chosen(x)
        each = x.unsqueeze(2).expand(*index.shape, WIDTH)
        hidden = F.gelu(expert_linear(each, index, self.up, self.bias_up))
        out = expert_linear(hidden, index, self.down, self.bias_down)
        return (out * weight[..., None]).sum(2)


class Beside(Rows):
    """With an expert that all tokens share, a norm of each row, and a use of the hidden rows."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, index = self.chosen(x)
        hidden = (self.hidden(x, index) + 0.3).sigmoid()
        out = expert_linear(hidden, index, self.down)
        out = F.layer_norm(out, (WIDTH,)) * weight[..., None] + hidden[..., :WIDTH].cos()
        return out.sum(2) + F.gelu(self.shared(x))


KINDS = {kind.__name__: kind for kind in (Rows, Biased, Beside)}
FAST = {("Rows", "ring=2,ep=2"), ("Biased", "ep=2,tp=2")}


@pytest.mark.parametrize(
    ("kind", "spec"), some_fast(KINDS, SPECS, fast=lambda kind, spec: (kind, spec) in FAST)
)
def test_turns(kind: str, spec: str) -> None:
    module, parallel = cached(given(Routed, KINDS[kind]), spec)
    with checked_session(parallel) as session:
        assert worst(session, module, ids(76), TURNS) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["ep=2", "ring=2,ep=2", "ep=2,tp=2", "pp=2,ep=2"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_families(name: str, spec: str) -> None:
    """Biases, shared experts, fused and transposed matrices among them."""
    family = FAMILIES[name]
    model = family.build()
    program = prepare(rc.capture(model, (), family.example(CAPTURED)))
    parallel = rc.transform(program, spec, cache=ROOM)
    parallel.verify()
    expected = expected_text(model, family.example(PROMPT))
    assert outcome_of(parallel, expected, [0]).kind == IDENTICAL


@pytest.mark.slow
def test_several_sequences_and_replicas() -> None:
    module, program = captured(given(Routed, Rows), 2)
    parallel = rc.transform(program, "dp=2,ep=2", cache=CAPACITY)
    with checked_session(parallel) as session:
        assert worst(session, module, ids(40, 2), (20, 1, 1, 5)) < EXACT


def test_an_artifact_and_processes(tmp_path: Path) -> None:
    module, parallel = cached(given(Routed, Rows), "ring=2,ep=2")
    parallel.save(tmp_path / "out")
    loaded = rc.load(tmp_path / "out")
    loaded.verify()
    with rc.Session(loaded, backend="gloo") as session:
        assert worst(session, module, ids(40), (20, 1, 1, 5)) < EXACT


@pytest.mark.parametrize(
    ("spec", "sent"),
    [pytest.param("ring=2,ep=2", ["gather ring,ep", "all_reduce ep"], marks=pytest.mark.slow),
     ("ep=2,tp=2", ["gather ep", "all_reduce tp", "all_reduce tp", "all_reduce ep,tp"])],
)
def test_one_sum_a_layer(spec: str, sent: list[str]) -> None:
    """Of one row a token, together with the sum over `tp`; a rank reads its experts alone."""
    program = cached(given(Routed, Rows), spec)[1].with_cache().rank(0)
    calls = [node for node in program.graph.nodes if node.kwargs.get("axis")]
    names = [f"{str(node.target).split('.')[1]} {node.kwargs['axis']}" for node in calls]
    first = names.index(sent[0])  # with tp, tokens are looked up over ranks before
    assert names[first : first + len(sent)] == sent
    summed = next(node for node in calls if node.kwargs["axis"].startswith("ep") and
                  node.target is op("all_reduce"))
    assert len(type_of(summed).shape) == 3
    held = [Call(node)["weight"] for node in program.graph.nodes
            if node.target is EXPERT_LINEAR]
    assert all(type_of(weight).layout.dims[0][0].axes == ("ep",) for weight in held)


def test_prompts_and_tokens_share_weights() -> None:
    """What whole sequences read of the experts is what next tokens read: one share."""
    parallel = cached(given(Routed, Rows), "ring=2,ep=2")[1]
    with rc.Session(parallel) as session:
        session.run(ids(20))
        session.extend(ids(5))
        for runner in session.driver.runners:
            whole, tokens = runner.opened["whole"], runner.opened["carried"]
            held = {x.untyped_storage().data_ptr() for x in whole.weights.values()}
            assert all(x.untyped_storage().data_ptr() in held for x in tokens.weights.values())


def test_the_cache_is_divided() -> None:
    """Each position is on one rank of ring x ep, which all compute a prompt."""
    assert cached(given(Routed, Rows), "ring=2,ep=2")[1].prefill is None
    with rc.Session(cached(given(Routed, Rows), "ring=2,ep=2")[1]) as session:
        session.extend(ids(70))
        counts = [runner.memory.ledger.count(runner.memory.rank)
                  for runner in session.driver.runners]
    assert sum(counts) == 70
    assert max(counts) <= 32


@pytest.mark.slow
def test_experts_that_are_not_found_are_whole() -> None:
    module, parallel = cached(given(Routed, Dense), "ep=2")
    assert (
        "no experts that could be split were found: their weights are replicated along ep=2, and "
        "each of its ranks runs all of them on all new tokens"
    ) in parallel.with_cache().program.notes
    with checked_session(parallel) as session:
        assert worst(session, module, ids(40), (20, 1, 1, 5)) < EXACT


@pytest.mark.parametrize(
    ("spec", "options", "text"),
    [
        ("ep=3", {}, "4 experts do not divide over ep=3"),
        ("ep=2,ring=2", {"decode": "helix"},
         ("error: decode=helix: the ranks along ep=2 hold different experts, and features are "
         "divided over ranks that hold the same\n"
         "  hint: leave decode out: each of these ranks then runs its own experts")),
    ],
)
def test_what_is_refused(spec: str, options: dict[str, str], text: str) -> None:
    with pytest.raises(rc.RingCompileError) as refused:
        rc.transform(captured(given(Routed, Rows))[1], spec, cache=CAPACITY, **options)
    assert text in str(refused.value)
