"""Fused groups: which ops share one, what stays where it was, and marks that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.artifact.graph import program_from_json
from ringcompile.artifact.ops import allowed_ops
from ringcompile.ir.calls import target_name
from ringcompile.ir.communication import COMMUNICATION
from ringcompile.ir.fused import MARK, Member, groups_of, moves_on, name_of_group
from ringcompile.ir.nodes import results_of
from ringcompile.ir.program import Program
from ringcompile.ir.serialize import program_to_json
from ringcompile.ir.verifier import verify_program
from ringcompile.models import zoo
from ringcompile.passes.rank import fuse
from ringcompile.passes.rank.fuse import Fuse
from tests.random_plans import captured, plan_of
from tests.support import difference, run, some_fast, zoo_program

WIDTH = 16
Forward = Callable[["Layer", torch.Tensor], torch.Tensor]


class Layer(nn.Module):
    """A model of one function over two matmuls."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.RMSNorm(WIDTH)
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.of_model = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.of_model(self, x)


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    turned = torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], -1)
    return x * angles.cos() + turned * angles.sin()


def late_operand(m: Layer, x: torch.Tensor) -> torch.Tensor:
    """Both products read the same angles, and each is read by a matmul of its own."""
    angles = m.table.sum(0).cos() + x
    return m.b(m.a(x) * angles) + m.a(m.b(x) * angles)


def inner_reader(m: Layer, x: torch.Tensor) -> torch.Tensor:
    """The first sum is read by the matmul and, behind it, once more."""
    h = m.a(x) + x
    return m.b(torch.tanh(h)) + h


GROUPS: dict[str, tuple[Forward, list[str]]] = {
    "bias + activation": (lambda m, x: m.b(F.gelu(m.a(x) + m.table[0])), ["add_gelu"]),
    "gate x up": (lambda m, x: F.silu(m.a(x)) * m.b(x), ["silu_mul"]),
    "residual + norm": (lambda m, x: m.b(m.norm(x + m.a(x))), ["add_rms_norm"]),
    "norm by hand": (
        lambda m, x: m.b(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        ["pow_mean_add_rsqrt_mul"],
    ),
    "rotary": (lambda m, x: m.b(rotated(m.a(x), m.table[0])), ["neg_cat_cos_mul_sin_add"]),
    "casts": (lambda m, x: m.b(m.a(x).double().exp().float()), ["to_exp"]),
    "softmax": (lambda m, x: m.b(torch.softmax(m.a(x) / 3, -1) * 2), ["div_softmax_mul"]),
    "layer norm": (
        lambda m, x: m.b(F.layer_norm(m.a(x) * 2, (WIDTH,))), ["mul_layer_norm"]
    ),
    "soft cap": (lambda m, x: m.b(3 * torch.tanh(m.a(x) / 3)), ["div_tanh_mul"]),
    "copy behind a view": (
        lambda m, x: m.b((m.a(x) * 2).unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-2)),
        ["mul_reshape"],
    ),
    "a gather of what is there": (
        lambda m, x: m.b(m.table[x.argmax(-1)] * 2), ["argmax_index_mul"]
    ),
    "what a gather looks through is written": (
        lambda m, x: m.b((m.a(x) * 2)[:, [1, 0, 2, 3, 4, 5]] + 1), ["index_add"]
    ),
    "a matmul lies between": (inner_reader, ["add_tanh"]),
    "sums over tokens are no rows": (lambda m, x: m.b((m.a(x) * 2).sum(1, keepdim=True) + x), []),
    "a sum of a few": (
        lambda m, x: m.b((m.a(x)[:, :, None] * m.table[:3]).sum(2) + x), ["mul_sum_add"]
    ),
    "a sum of many": (lambda m, x: m.b((m.a(x)[:, :, None] * m.table).sum(2)), []),
    "the largest few": (lambda m, x: m.b(torch.topk(m.a(x) * 2, WIDTH)[0] + 1), []),
    "prefix sums": (lambda m, x: m.b((m.a(x) * 2).cumsum(-1) + 1), []),
    "views alone": (lambda m, x: m.b(m.a(x).unflatten(-1, (4, 4)).flatten(-2)), []),
    "nobody waits for the other's operand": (late_operand, ["cos_add"]),
}


@pytest.mark.parametrize("case", GROUPS)
def test_groups(case: str) -> None:
    forward, expected = GROUPS[case]
    x = torch.randn(1, 6, WIDTH)
    program = rc.transform(rc.capture(Layer(forward), (x,)), "dp=1").rank(0)
    assert [name_of_group(group) for group in groups_of(program.graph.nodes)] == expected


def calls(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def pieces(program: Program) -> list[tuple[str, set[str]]]:
    """What may not be moved, in order, each with the names of the nodes up to the next one."""
    found: list[tuple[str, set[str]]] = [("", set())]
    for node in calls(program):
        if not moves_on(node):
            found.append((node.name, set()))
        found[-1][1].add(node.name)
    return found


def stays(program: Program) -> str:
    """What `fuse` changed of a program that it must not; empty where it changed nothing."""
    made = Fuse().run(program)
    verify_program(made)
    before = {node.name: node for node in program.graph.nodes}
    for node in made.graph.nodes:
        other = before.pop(node.name)
        if [x.name for x in node.all_input_nodes] != [x.name for x in other.all_input_nodes]:
            return f"%{node.name} reads other nodes"
        if node.target != other.target or node.meta.get("type") != other.meta.get("type"):
            return f"%{node.name} is another op"
    if before:
        return f"%{next(iter(before))} is gone"
    if pieces(made) != pieces(program):
        return "nodes were moved past an exchange or an attention"
    return ""


def unfused(seed: int) -> list[Program]:
    plan = plan_of(seed)
    try:
        made = rc.transform(captured(plan.model), plan.parallel, fuse=False, **plan.options)
        return made.ranks()[:4]
    except rc.RingCompileError:
        return []


@pytest.mark.parametrize("seed", some_fast(range(60), fast=lambda seed: seed % 6 == 0))
def test_random_plans_keep_data_and_exchanges(seed: int) -> None:
    for program in unfused(seed):
        assert not stays(program)


def test_a_group_across_a_collective_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule that nothing moves past an exchange is what keeps it in place."""
    program = rc.transform(zoo_program("moe-4l-tiny", sequence=24), "ring=2", fuse=False).rank(0)
    assert not stays(program)
    monkeypatch.setattr(fuse, "moves_on", lambda node: True)
    assert stays(program) == "nodes were moved past an exchange or an attention"


@pytest.mark.parametrize("spec", ["ring=2", "tp=2", "pp=2", "ulysses=2,tp=2", "ring=2,time=2"])
def test_numbers_are_the_same_to_the_bit(spec: str) -> None:
    program = zoo_program("llama-tiny", sequence=24)
    _, inputs = zoo.build("llama-tiny", sequence=29, seed=3)
    outputs = [
        run(rc.transform(program, spec, fuse=on), inputs).outputs
        for on in (False, True)
    ]
    assert difference(*outputs) == 0


def test_what_ranks_send_stays() -> None:
    program = zoo_program("moe-4l-tiny", sequence=24)
    for one, other in zip(*(rc.transform(program, "ring=2,ep=2", fuse=on).ranks()
                            for on in (False, True)), strict=True):
        sent = [[(node.name, results_of(node)) for node in calls(each)
                 if target_name(node.target) in COMMUNICATION] for each in (one, other)]
        assert sent[0] == sent[1]


# -- marks that are wrong ------------------------------------------------------------------------


def marked() -> tuple[Program, list[fx.Node]]:
    """A program of its own, and its first group of three or more nodes."""
    program = rc.transform(zoo_program("llama-tiny", sequence=24), "tp=2").rank(0)
    return program, next(g for g in groups_of(calls(program)) if len(g) > 2)


def lost(program: Program, group: list[fx.Node]) -> None:
    del group[1].meta[MARK]


def longer(program: Program, group: list[fx.Node]) -> None:
    for node in group:
        node.meta[MARK] = Member(node.meta[MARK].index, len(group) + 1)


def headless(program: Program, group: list[fx.Node]) -> None:
    del group[0].meta[MARK]


def matmul(program: Program, group: list[fx.Node]) -> None:
    linear = next(n for n in calls(program) if target_name(n.target) == "aten.linear.default")
    linear.meta[MARK], linear.next.meta[MARK] = Member(0, 2), Member(1, 2)


def collective(program: Program, group: list[fx.Node]) -> None:
    members = next(
        g for g in groups_of(calls(program)) if target_name(g[0].prev.target) in COMMUNICATION
    )
    reduced = members[0].prev
    for i, node in enumerate([reduced, *members]):
        node.meta[MARK] = Member(i, len(members) + 1)


FAULTS: dict[str, tuple[Callable[[Program, list[fx.Node]], Any], str]] = {
    "a member without its mark": (lost, "stands between the members of a fused group of"),
    "a group that is longer": (longer, "stands between the members of a fused group of"),
    "no first member": (headless, "is member 1 of a fused group that does not begin before it"),
    "a matmul": (matmul, "may not be fused"),
    "a collective": (collective, "may not be fused"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_verifier_refuses(fault: str) -> None:
    damage, message = FAULTS[fault]
    program, group = marked()
    damage(program, group)
    with pytest.raises(AssertionError, match=message):
        verify_program(program)


FILES: dict[str, tuple[Any, str]] = {
    "no pair": ([0], "'fused' is not a place in a group and the group's size"),
    "no numbers": (["0", "2"], "a place in a group"),
    "no such member": ([5, 9], "is member 5 of a fused group that does not begin before it"),
    "a size that others do not have": ([0, 99], "stands between the members of a fused group"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file_is_refused(case: str) -> None:
    value, message = FILES[case]
    data = json.loads(json.dumps(program_to_json(marked()[0])))
    assert program_to_json(program_from_json(data, allowed_ops())) == data
    row = next(row for row in data["nodes"] if row.get("fused", [1])[0] == 0)
    row["fused"] = value
    with pytest.raises(rc.RingCompileError, match=message):
        program_from_json(data, allowed_ops())
