"""The arithmetic of the reference workload, from our own graphs: exact where it is exact.

Dense: 4 layers of 16 heads x 512 and an MLP of 32,768; the mixture has 8 experts of that size, of
which a token goes through 2. 16 H100s. What the numbers say is in docs/paper.md.
"""

from __future__ import annotations

from functools import lru_cache

import pytest

from ringcompile.capture.loaders import load_model
from ringcompile.compiler import transform
from ringcompile.cost.hardware import load_cluster
from ringcompile.cost.limits import kernel_limit
from ringcompile.cost.rank import RankCost, TimedCollective, TimedShift, cost_of
from ringcompile.ir.program import Program
from ringcompile.pass_list import prepare
from tests.support import captured_once

HIDDEN, MLP, LAYERS, EXPERTS, TOP = 8192, 32768, 4, 8, 2
LENGTH = 16384
ATTENTION = 4 * HIDDEN**2  # weights of the four projections of a layer
EXPERT = 2 * HIDDEN * MLP
NORMS = (2 * LAYERS + 1) * HIDDEN


def captured(name: str) -> Program:
    loaded = load_model(name, weights=False)
    return captured_once(loaded.module, loaded.args, loaded.kwargs, name=name)


@lru_cache
def rank_of(name: str, spec: str, rank: int = 0, length: int = LENGTH, **how: str) -> RankCost:
    return cost_of(transform(captured(name), spec, length=length, **how).rank(rank), length)


def test_weights() -> None:
    """Halves: 6.44 GB and 36.5 GB; beside the matrices only norms, angles and routers."""
    held = {name: sum(w.num_bytes for w in captured(name).weights.values())
            for name in ("dense-4l", "moe-4l")}
    angles = 4 * 512 // 2
    dense = 2 * (LAYERS * (ATTENTION + EXPERT) + NORMS)
    assert held["dense-4l"] == dense + angles
    assert dense == pytest.approx(6.44e9, rel=1e-3)
    routers = LAYERS * EXPERTS * HIDDEN
    mixture = 2 * (LAYERS * (ATTENTION + EXPERTS * EXPERT) + NORMS + routers)
    assert held["moe-4l"] == mixture + angles
    assert mixture == pytest.approx(36.5e9, rel=1e-3)


def test_linear_work_per_token() -> None:
    """Dense 6.44 GFLOP; with attention, exactly what is visible."""
    tokens = LENGTH // 16
    cost = rank_of("dense-4l", "ulysses=16")
    pairs = LENGTH * (LENGTH + 1) // 2
    linear = 2 * LAYERS * (ATTENTION + EXPERT)
    assert linear == pytest.approx(6.44e9, rel=1e-3)
    assert cost.flops == tokens * linear + LAYERS * 4 * 512 * pairs  # one head a rank


def test_linear_work_per_token_of_the_mixture() -> None:
    """10.74 GFLOP for two experts each; the empty slots of a capacity are not multiplied."""
    tokens = LENGTH // 16
    linear = 2 * LAYERS * (ATTENTION + TOP * EXPERT)
    assert linear == pytest.approx(10.74e9, rel=1e-3)
    router = 2 * LAYERS * HIDDEN * EXPERTS * tokens
    attention = LAYERS * 4 * 512 * (LENGTH * (LENGTH + 1) // 2)
    cost = rank_of("moe-4l", "ulysses=16", capacity="local")
    assert cost.flops == tokens * linear + attention + router


def test_exact_capacity_multiplies_the_same_rows() -> None:
    """Which tokens drop, all ranks know together: a rank may need more slots, but no more rows."""
    local, exact = (rank_of("moe-4l", "ulysses=16", capacity=c).flops for c in ("local", "exact"))
    assert exact == local


def ring_bytes(order: str) -> int:
    """What one hop of the ring carries, largest over ranks: a layer's keys and values."""
    cost = rank_of("dense-4l", "ring=16", 1, order=order)
    return max(s.communicates.sent for s in cost.steps if isinstance(s.communicates, TimedShift))


def test_bytes_of_a_ring() -> None:
    """Keys and values of 1,024 tokens a hop; around the ring 15 of them, 1.4 ms at 360 GB/s."""
    block = 2 * (LENGTH // 16) * HIDDEN * 2
    assert ring_bytes("contiguous") == ring_bytes("zigzag") == block
    link = load_cluster("h100x16").links["node"]
    assert 15 * link.seconds(block) == pytest.approx(1.4e-3, rel=0.01)


def test_zigzag_sends_three_quarters() -> None:
    """Over all ranks; of whole blocks passed around, 15 a rank."""
    block = 2 * (LENGTH // 16) * HIDDEN * 2
    total = sum(rank_of("dense-4l", "ring=16", r, order="zigzag").bytes_sent for r in range(16))
    assert total / (16 * 15 * block * LAYERS) == pytest.approx(0.75, abs=0.02)


def test_ulysses_inside_a_ring_sends_a_third() -> None:
    """3.3 x less than a ring of 16 (15 blocks) at 4 x 4: 3 blocks, and four exchanges of 3/4."""
    block = 2 * (LENGTH // 16) * HIDDEN * 2
    alone = 15 * block * LAYERS
    ranks = [4 * place for place in range(4)]
    most = max(rank_of("dense-4l", "ring=4,ulysses=4", r, order="contiguous").bytes_sent
               for r in ranks)
    assert most == LAYERS * (3 * block + 4 * block // 2 * 3 // 4)
    assert alone / most == pytest.approx(3.4, rel=0.03)


def test_reading_the_weights_bounds_small_batches() -> None:
    """64 tokens a rank: 1.92 ms for 6.44 GB at the datasheet's 3.35 TB/s, 2.15 ms at 3 measured."""
    weights = sum(w.num_bytes for w in captured("dense-4l").weights.values())
    assert weights / 3.35e12 == pytest.approx(1.92e-3, rel=0.01)
    measured = load_cluster("h100x16").device.value("bandwidth")
    assert weights / measured > 0.70e-3  # what the paper claims for the step


def test_causal_attention_of_a_layer() -> None:
    """0.69 ms at 400 TFLOP/s for 16k tokens on 16 ranks: not the 0.5 ms of a faster kernel."""
    flops = 4 * HIDDEN * (LENGTH * (LENGTH + 1) // 2) / 16
    assert flops / 400e12 == pytest.approx(0.69e-3, rel=0.01)
    assert flops / 0.5e-3 == pytest.approx(550e12, rel=0.01)


def test_all_reduces_of_the_baseline() -> None:
    """TP=8 x PP=2: two a layer, each of the tokens' hidden states, within a group of 8."""
    cost = rank_of("dense-4l", "pp=2,tp=8", 8, 1024)
    reduced = [s.communicates for s in cost.steps if isinstance(s.communicates, TimedCollective)]
    assert len(reduced) == 2 * LAYERS // 2
    assert {(c.brought, len(c.group)) for c in reduced} == {(1024 * HIDDEN * 2, 8)}
    sent = 2 * 7 / 8 * 1024 * HIDDEN * 2
    assert cost.bytes_sent == len(reduced) * sent
    assert cost.weight_bytes == pytest.approx(6.44e9 / 16, rel=0.01)


LIMITS = [
    ("dense-4l", 4096, 1.81), ("dense-4l", 16384, 1.48), ("dense-4l", 32768, 1.18),
    ("moe-4l", 4096, 1.12), ("moe-4l", 16384, 0.98), ("moe-4l", 32768, 0.84),
]


@pytest.mark.parametrize(("model", "length", "millions"), LIMITS)
def test_the_kernels_limit(model: str, length: int, millions: float) -> None:
    """790 TFLOP/s in products, 400 in attention, nothing exposed: M tokens/s of 16 GPUs."""
    program = prepare(captured(model))
    limit = kernel_limit(program, length, 16, matmul=790e12, attention=400e12, top=TOP)
    assert limit / 1e6 == pytest.approx(millions, abs=0.006)


def test_what_the_claim_for_the_mixture_needs() -> None:
    """1.18 M tokens/s at 16k tokens: 988 TFLOP/s in products, with attention at 400; not 955.

    Of all work together, causal attention included, it is 872 TFLOP/s a GPU.
    """
    a_token = 16 / 1.18e6
    linear = 2 * LAYERS * (ATTENTION + TOP * EXPERT)
    attention = LAYERS * 4 * HIDDEN * (LENGTH + 1) / 2
    assert linear / (a_token - attention / 400e12) == pytest.approx(988e12, rel=0.002)
    assert (linear + attention) / a_token == pytest.approx(872e12, rel=0.002)
