"""Experts with a capacity multiply the rows in their slots, whatever way slots are written in."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringcompile as rc
from ringcompile.ir.calls import aten_name
from ringcompile.ops.schemas import op
from ringcompile.parallel_program import ParallelProgram
from tests.moe_styles import PaddedBuffer
from tests.support import TOLERANCE, compiled, difference, run

SIZE, INNER, EXPERTS, TOP = 16, 24, 5, 2


class Slots(nn.Module):
    """A mixture with slots; what is done with them is a function of it.

    Tokens have much in common, so that some experts drop rows and others have empty slots.
    """

    def __init__(
        self,
        mix: Callable[[Slots, Tensor, Tensor, Tensor, int], Tensor],
        experts: Callable[[Slots, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.experts = mix, experts or plain
        self.router = nn.Linear(SIZE, EXPERTS, bias=False)
        self.gate = nn.Parameter(torch.randn(EXPERTS, SIZE, INNER) / 4)
        self.up = nn.Parameter(torch.randn(EXPERTS, SIZE, INNER) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, SIZE) / 5)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, INNER))
        self.down_bias = nn.Parameter(torch.randn(EXPERTS, 1, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, SIZE)
        weights, chosen = self.router(tokens).softmax(-1).topk(TOP)
        expert = chosen.reshape(-1)
        one_hot = F.one_hot(expert, EXPERTS)
        arrival = (one_hot.cumsum(0) - 1).gather(1, expert[:, None])[:, 0]
        capacity = -(-5 * tokens.shape[0] * TOP // (4 * EXPERTS))
        rows = tokens.repeat_interleave(TOP, 0)
        out = self.mix(self, rows, expert, arrival, capacity)
        return (out.view(-1, TOP, SIZE) * weights[..., None]).sum(1).view(x.shape)


# -- experts --------------------------------------------------------------------------------------


def plain(m: Slots, x: Tensor) -> Tensor:
    return torch.bmm(F.gelu(torch.bmm(x, m.up)), m.down)


def gated(m: Slots, x: Tensor) -> Tensor:
    return (F.silu(x @ m.gate) * (x @ m.up)) @ m.down


def biased(m: Slots, x: Tensor) -> Tensor:
    return torch.bmm(F.relu(torch.bmm(x, m.up) + m.up_bias[:, None]), m.down) + m.down_bias


def by_baddbmm(m: Slots, x: Tensor) -> Tensor:
    inner = torch.baddbmm(m.up_bias.unsqueeze(1), x, m.up)
    return torch.baddbmm(m.down_bias, torch.sigmoid(inner), m.down)


def by_einsum(m: Slots, x: Tensor) -> Tensor:
    inner = torch.einsum("ecd,edf->ecf", x, m.up)
    return torch.einsum("efd,ecf->ecd", m.down, F.silu(inner))


def stored_as_linear(m: Slots, x: Tensor) -> Tensor:
    """Matrices as output by input."""
    return torch.einsum("ecf,edf->ecd", torch.tanh(torch.einsum("ecd,efd->ecf", x, m.down)), m.up)


def halves(m: Slots, x: Tensor) -> Tensor:
    a, b = torch.bmm(x, m.up).chunk(2, -1)
    return torch.bmm(torch.cat([a * F.gelu(b), a], -1), m.down)


EXPERTS_OF = (plain, gated, biased, by_baddbmm, by_einsum, stored_as_linear, halves)


# -- slots ----------------------------------------------------------------------------------------


def past_the_last(m: Slots, rows: Tensor, expert: Tensor, arrival: Tensor, slots: int) -> Tensor:
    """As the zoo: one slot more, which is cut."""
    buffer = rows.new_zeros(EXPERTS, slots + 1, SIZE)
    buffer = buffer.index_put((expert, arrival.clamp(max=slots)), rows)
    out = m.experts(m, buffer[:, :slots])[expert, arrival.clamp(max=slots - 1)]
    return torch.where((arrival < slots)[:, None], out, 0.0)


def flat(m: Slots, rows: Tensor, expert: Tensor, arrival: Tensor, slots: int) -> Tensor:
    """One address, with a row behind the last for what is dropped, which reads as zeros."""
    place = torch.where(arrival < slots, expert * slots + arrival, EXPERTS * slots)
    buffer = rows.new_zeros(EXPERTS * slots + 1, SIZE).index_copy(0, place, rows)
    out = m.experts(m, buffer[:-1].view(EXPERTS, slots, SIZE)).reshape(-1, SIZE)
    return torch.cat([out, out.new_zeros(1, SIZE)]).index_select(0, place)


def scattered(m: Slots, rows: Tensor, expert: Tensor, arrival: Tensor, slots: int) -> Tensor:
    """By scatter and gather, with the address of a row repeated for its features."""
    place = torch.where(arrival < slots, 1 + expert * slots + arrival, 0)[:, None].expand(-1, SIZE)
    buffer = rows.new_zeros(1 + EXPERTS * slots, SIZE).scatter(0, place, rows)
    out = m.experts(m, buffer[1:].reshape(EXPERTS, slots, SIZE)).flatten(0, 1)
    return torch.cat([out.new_zeros(1, SIZE), out]).gather(0, place)


def by_choice(m: Slots, rows: Tensor, expert: Tensor, arrival: Tensor, slots: int) -> Tensor:
    """Indices and rows as [T, K]."""
    at = (expert.view(-1, TOP), arrival.clamp(max=slots).view(-1, TOP))
    buffer = rows.new_zeros(EXPERTS, slots + 1, SIZE)
    buffer[at] = rows.view(-1, TOP, SIZE)
    out = m.experts(m, buffer[:, :slots])
    kept = (arrival < slots).to(rows.dtype).view(-1, TOP, 1)
    return out[at[0], at[1].clamp(max=slots - 1)] * kept


def unmasked(m: Slots, rows: Tensor, expert: Tensor, arrival: Tensor, slots: int) -> Tensor:
    """What is dropped gets the result of another row, in the last slot."""
    buffer = rows.new_zeros(EXPERTS, slots + 1, SIZE)
    buffer = buffer.index_put((expert, arrival.clamp(max=slots)), rows)
    return m.experts(m, buffer[:, :slots])[expert, arrival.clamp(max=slots - 1)]


def next_slot(m: Slots, rows: Tensor, expert: Tensor, arrival: Tensor, slots: int) -> Tensor:
    """The slot behind, which may be empty: what experts make of zeros."""
    buffer = rows.new_zeros(EXPERTS, slots + 1, SIZE)
    buffer = buffer.index_put((expert, arrival.clamp(max=slots)), rows)
    return m.experts(m, buffer[:, :slots])[expert, (arrival + 1).clamp(max=slots - 1)]


def read_twice(m: Slots, rows: Tensor, expert: Tensor, arrival: Tensor, slots: int) -> Tensor:
    return past_the_last(m, rows, expert, arrival, slots) + unmasked(
        m, rows, expert, arrival, slots)


SLOTS = (past_the_last, flat, scattered, by_choice, unmasked, next_slot, read_twice)


# -- what stays a buffer --------------------------------------------------------------------------


def over_slots(m: Slots, x: Tensor) -> Tensor:
    """A softmax over the slots of an expert."""
    return torch.bmm(torch.bmm(x, m.up).softmax(1), m.down)


def added_up(m: Slots, rows: Tensor, expert: Tensor, arrival: Tensor, slots: int) -> Tensor:
    """Several rows in a slot, if that is what addresses say."""
    buffer = rows.new_zeros(EXPERTS, slots, SIZE)
    buffer = buffer.index_put((expert, arrival.clamp(max=slots - 1)), rows, accumulate=True)
    return m.experts(m, buffer)[expert, arrival.clamp(max=slots - 1)]


def not_from_zeros(m: Slots, rows: Tensor, expert: Tensor, arrival: Tensor, slots: int) -> Tensor:
    buffer = rows.new_full((EXPERTS, slots + 1, SIZE), 0.5)
    buffer = buffer.index_put((expert, arrival.clamp(max=slots)), rows)
    return m.experts(m, buffer[:, :slots])[expert, arrival.clamp(max=slots - 1)]


def with_a_mean(m: Slots, rows: Tensor, expert: Tensor, arrival: Tensor, slots: int) -> Tensor:
    """Something reads all slots, the empty ones too."""
    buffer = rows.new_zeros(EXPERTS, slots + 1, SIZE)
    buffer = buffer.index_put((expert, arrival.clamp(max=slots)), rows)
    out = m.experts(m, buffer[:, :slots])
    return out[expert, arrival.clamp(max=slots - 1)] - out.mean((0, 1))


LEFT = {
    "softmax over slots": (past_the_last, over_slots),
    "added up": (added_up, plain),
    "not from zeros": (not_from_zeros, plain),
    "mean over slots": (with_a_mean, plain),
}


def tokens(length: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, SIZE, generator=generator) + torch.linspace(-2, 2, SIZE)


def products(parallel: ParallelProgram) -> tuple[int, int]:
    """Of a rank, the grouped matmuls and those of whole buffers."""
    graph = parallel.rank(0).graph
    grouped = sum(node.target is op("grouped_linear") for node in graph.nodes)
    of_buffers = sum(
        str(node.target) in ("aten.bmm.default", "aten.matmul.default", "aten.einsum.default",
                             "aten.baddbmm.default")
        and len(node.meta["type"].shape) == 3 for node in graph.nodes
    )
    return grouped, of_buffers


def check(module: nn.Module, spec: str, sorted_: bool, **options: object) -> None:
    module = module.eval()
    parallel = compiled(module, (tokens(12),), spec, **options)
    grouped, of_buffers = products(parallel)
    assert (grouped > 0, of_buffers > 0) == (sorted_, not sorted_)
    for length in (12, 25, 3) if "ring" in spec else (12, 25):
        x = tokens(length)
        with torch.no_grad():
            assert difference(run(parallel, (x,)).outputs, module(x)) <= TOLERANCE, length


@pytest.mark.parametrize("mix", SLOTS, ids=lambda f: f.__name__)
def test_ways_to_write_slots(mix: Callable[..., Tensor]) -> None:
    check(Slots(mix), "tp=2", sorted_=True)


@pytest.mark.parametrize("mix", [past_the_last, flat, next_slot], ids=lambda f: f.__name__)
@pytest.mark.parametrize("experts", EXPERTS_OF[1:], ids=lambda f: f.__name__)
def test_ways_to_write_experts(mix: Callable[..., Tensor], experts: Callable[..., Tensor]) -> None:
    """Also of zeros, where a bias makes something of them."""
    check(Slots(mix, experts), "tp=2", sorted_=True)


@pytest.mark.parametrize("name", LEFT)
def test_other_buffers_stay(name: str) -> None:
    check(Slots(*LEFT[name]), "tp=2", sorted_=False)


@pytest.mark.parametrize(
    "spec", ["ring=3", "ulysses=2", "ring=2,tp=2", "time=2"]
)
@pytest.mark.parametrize(
    ("mix", "experts"), [(past_the_last, plain), (past_the_last, biased)],
    ids=lambda f: f.__name__,
)
def test_on_meshes(
    spec: str, mix: Callable[..., Tensor], experts: Callable[..., Tensor]
) -> None:
    """Exactly the tokens that one device drops, some ranks without tokens of their own."""
    check(Slots(mix, experts), spec, sorted_=True)


def test_a_sorted_buffer_of_the_styles() -> None:
    torch.manual_seed(3)
    check(PaddedBuffer(), "tp=2", sorted_=True)


def test_with_ep_buffers_travel() -> None:
    """Slots go to the ranks of their experts: these need buffers of one size."""

    class Padded(Slots):
        pass

    module = Padded(past_the_last).eval()
    parallel = compiled(module, (tokens(12),), "ep=5")
    assert products(parallel)[0] == 0
    x = tokens(20)
    with torch.no_grad():
        assert difference(run(parallel, (x,)).outputs, module(x)) <= TOLERANCE


def test_features_are_read_once_and_put_back_once() -> None:
    """No buffer of features is left: tokens are picked, and results are."""
    parallel = compiled(Slots(past_the_last).eval(), (tokens(12),), "tp=2")
    graph = parallel.rank(0).graph
    wide = [node for node in graph.nodes if node.op == "call_function"
            and not isinstance(node.meta["type"], tuple)
            and node.meta["type"].dtype.is_floating_point]
    moved = [name for node in wide if (name := aten_name(node.target)) in (
        "index", "index_put", "full", "cat", "expand")]
    assert moved == ["index", "index"]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's, about itself
def test_fused_groups_around_sorted_rows() -> None:
    """Padding and sums over choices inside compiled groups; the last ranks have no tokens."""
    module = Slots(past_the_last).eval()
    parallel = compiled(module, (tokens(12),), "ring=4")
    with rc.Session(parallel, backend="lockstep", compiler="inductor") as session:
        for length in (16, 13, 3):
            x = tokens(length)
            with torch.no_grad():
                assert difference(session.run((x,)), module(x)) <= TOLERANCE, length
