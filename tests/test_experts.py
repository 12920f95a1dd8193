"""Experts under a split sequence: ways of writing them, exact and local capacity, faults."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from torch import nn

import ringcompile as rc
from ringcompile.capture.export import capture
from ringcompile.capture.loaders import load_model
from ringcompile.compiler import transform
from ringcompile.ir.expr import bind
from ringcompile.ir.program import Program
from ringcompile.ir.types import SequenceSplit
from ringcompile.models.config import TransformerConfig
from ringcompile.models.moe import MoE
from ringcompile.ops.schemas import op
from ringcompile.passes.experts import regions, token_wise
from tests.moe_table import STYLES, Style
from tests.support import TOLERANCE, compiled, counts, difference, run, some_fast

SIZE, CAPTURED = 16, 12
# What runs on each rank's own tokens, and what it then still sends for each mixture.
ON_OWN_TOKENS = {
    "one-hot products, slots by batch": {"gather": 3},
    "loop, nonzero and index_add_": {},
    "loop, boolean indexing": {},
    "scatter_add": {"gather": 1},
    "sort, grouped product": {},
    "sort, grouped product, index_add": {},
}
BY_RULE = ("dense, one-hot weights", "loop, dense", "loop, dense in place", "gathered weights",
           "scattered gates", "shared expert", "sigmoid, groups of experts")
ORDERS = ("contiguous", "zigzag")
ANY_LENGTH = [name for name, style in STYLES.items() if style.captured and style.any_length]


def made(name: str) -> tuple[Style, nn.Module]:
    torch.manual_seed(3)
    style = STYLES[name]
    return style, style.factory().eval().to(style.dtype)


@cache
def captured(name: str) -> Program:
    style, module = made(name)
    return capture(module, (tokens(style, CAPTURED),))


def tokens(style: Style, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return alike(torch.randn(2, length, SIZE, generator=generator)).to(style.dtype)


def alike(x: torch.Tensor) -> torch.Tensor:
    """Tokens that have much in common, so that some experts are chosen too often."""
    return x + torch.linspace(-2, 2, x.shape[-1])


@pytest.mark.parametrize(
    ("name", "order"),
    some_fast(ANY_LENGTH, ORDERS, fast=lambda name, order: order == ORDERS[len(name) % 2]),
)
def test_every_style(name: str, order: str) -> None:
    """The single device's numbers, whatever ops the mixture is written in, at several lengths."""
    style, module = made(name)
    parallel = transform(captured(name), "ring=4", order=order)
    tolerance = TOLERANCE if style.dtype == torch.float32 else 2e-2
    for length in (27, 4, 3):
        x = tokens(style, length, seed=length)
        with torch.no_grad():
            expected = module(x)
        assert difference(run(parallel, (x,)).outputs, expected) <= tolerance, length


@pytest.mark.parametrize("name", ON_OWN_TOKENS)
def test_tokens_stay_where_they_are(name: str) -> None:
    """No features are gathered; where capacity is exact, counts of slots are."""
    parallel = transform(captured(name), "ring=4")
    found = counts(parallel, 1)
    assert {k: v for k, v in found.items() if k == "gather"} == ON_OWN_TOKENS[name]
    gathered = [n for n in parallel.rank(1).graph.nodes
                if str(n.target) == "ringcompile.gather.default"]
    assert not any(n.meta["type"].dtype.is_floating_point for n in gathered)
    assert any("own tokens" in note for note in parallel.program.notes)


@pytest.mark.parametrize("name", ["loop, nonzero and index_add_", "loop, boolean indexing"])
def test_tokens_of_a_part_of_the_batch_stay_where_they_are(name: str) -> None:
    """A batch that is dealt out has `k` sequences: the same regions, and nothing is gathered."""
    style, module = made(name)
    parallel = transform(captured(name), "dp=2,ring=2")
    assert counts(parallel, 1) == {}
    assert any("own tokens" in note for note in parallel.program.notes)
    x = torch.cat([tokens(style, 27, seed) for seed in range(2)])
    with torch.no_grad():
        assert difference(run(parallel, (x,)).outputs, module(x)) <= TOLERANCE


@pytest.mark.parametrize("name", BY_RULE)
def test_what_needs_nothing(name: str) -> None:
    """Every expert over every token, or weights by token: rules alone keep it split."""
    parallel = transform(captured(name), "ring=4")
    assert counts(parallel, 1) == {}
    assert parallel.program.notes == ()


@pytest.mark.parametrize("name", [n for n, style in STYLES.items() if not style.captured])
def test_looking_at_the_data_is_refused_with_the_line(name: str) -> None:
    style, module = made(name)
    with pytest.raises(rc.RingCompileError, match="depends on the values of a tensor") as error:
        compiled(module, (tokens(style, CAPTURED),), "ring=4")
    assert "moe_styles.py" in str(error.value)


_moe = cache(partial(load_model, "moe-4l-tiny", batch=2))


@pytest.mark.parametrize(
    ("ring", "order"),
    some_fast(
        [2, 8, 16], ORDERS, fast=lambda ring, order: (ring, order) == (8, "zigzag")
    ),
)
def test_exact_capacity_drops_what_one_device_drops(ring: int, order: str) -> None:
    """moe-4l-tiny at several lengths, some shorter than the ring."""
    loaded = _moe()
    parallel = compiled(loaded.module, loaded.args, f"ring={ring}", order=order)
    for length in (37, 16, 5):
        x = alike(torch.randn(2, length, loaded.args[0].shape[2]))
        with torch.no_grad():
            expected = loaded.module(x)
        assert difference(run(parallel, (x,)).outputs, expected) <= TOLERANCE


def mixture() -> MoE:
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=0, inputs="hidden", num_layers=1, hidden_size=SIZE, num_heads=2, num_kv_heads=2,
        head_dim=8, mlp_hidden=32, mlp="plain", num_experts=8, top_k=2,
        capacity_factor=load_model("moe-4l-tiny").module.config.capacity_factor,
    )
    module = MoE(config).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("length", [64, 27, 3])
def test_local_capacity_is_the_model_on_each_ranks_tokens(length: int, order: str) -> None:
    module, ranks = mixture(), 4
    x = alike(torch.randn(2, length, SIZE))
    parallel = compiled(module, (torch.randn(2, 12, SIZE),), f"ring={ranks}", order=order,
                        capacity="local")
    found = run(parallel, (x,)).outputs
    sequence = SequenceSplit((("ring", ranks),), order)
    chunk = sequence.local_length(length) // sequence.chunks_per_rank
    for rank in range(ranks):
        held = [p for c in sequence.chunks(rank) for p in range(c * chunk, (c + 1) * chunk)
                if p < length]
        if held:
            with torch.no_grad():
                expected = module(x[:, held])
            assert difference(found[:, held], expected) <= TOLERANCE
    assert counts(parallel, 0) == {}, "nothing is sent"
    with torch.no_grad():
        whole = module(x)
    assert length == 3 or difference(found, whole) > 1e-2, "it drops other tokens than one device"


def test_exact_capacity_drops_some() -> None:
    """The test above would pass for a mixture in which all tokens find a slot."""
    module = mixture()
    x = alike(torch.randn(2, 64, SIZE))
    with torch.no_grad():
        module.capacity_factor *= 8
        all_kept = module(x)
        module.capacity_factor /= 8
        assert difference(module(x), all_kept) > 1e-2


# -- what is declared ------------------------------------------------------------------------------


class Owned(nn.Module):
    """Routing in ops that nothing recognises; `mean` makes it look at the other tokens."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mean, self.router = mean, nn.Linear(SIZE, 4)
        self.experts = nn.Parameter(torch.randn(4, SIZE, SIZE) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, SIZE)
        chosen = self.router(flat).argmax(-1)
        order = chosen.argsort(stable=True)
        back = order.argsort()
        sorted_ = flat[order]
        made_ = torch.stack([sorted_ @ w for w in self.experts], 1)
        out = made_.gather(1, chosen[order, None, None].expand(-1, 1, SIZE))[:, 0][back]
        return (out - flat.mean(0) if self.mean else out).view(x.shape)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.linear = inner, nn.Linear(SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.inner(self.linear(x)))


def test_declared_token_wise() -> None:
    module = Around(rc.tokenwise(Owned(mean=False))).eval()
    x = torch.randn(2, 27, SIZE)
    parallel = compiled(module, (x[:, :12],), "ring=4")
    with torch.no_grad():
        assert difference(run(parallel, (x,)).outputs, module(x)) <= TOLERANCE
    assert counts(parallel, 0) == {}
    assert "declared token-wise" in parallel.program.notes[0]


def test_declared_and_not_token_wise_is_refused() -> None:
    module = Around(rc.tokenwise(Owned(mean=True))).eval()
    with pytest.raises(rc.RingCompileError, match="is not token-wise: run on a part"):
        compiled(module, (torch.randn(2, 12, SIZE),), "ring=4")


def test_a_rounded_size_is_no_way_around_the_check() -> None:
    """Experts that choose a share of the tokens: a size that is rounded, and no capacity."""

    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.router, self.expert = nn.Linear(SIZE, 1), nn.Linear(SIZE, SIZE)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, SIZE)
            chosen = self.router(flat)[:, 0].topk(flat.shape[0] // 4 + 1).indices
            return flat.index_add(0, chosen, self.expert(flat[chosen])).view(x.shape)

    x = torch.randn(2, 27, SIZE)
    with pytest.raises(rc.RingCompileError, match="is not token-wise: run on a part"):
        compiled(Around(rc.tokenwise(Choosing())).eval(), (x[:, :12],), "ring=4")
    module = Around(Choosing()).eval()
    parallel = compiled(module, (x[:, :12],), "ring=4")
    with torch.no_grad():
        assert difference(run(parallel, (x,)).outputs, module(x)) <= TOLERANCE


def test_not_declared_and_not_token_wise_is_computed_whole() -> None:
    module = Around(Owned(mean=True)).eval()
    x = torch.randn(2, 27, SIZE)
    parallel = compiled(module, (x[:, :12],), "ring=4")
    with torch.no_grad():
        assert difference(run(parallel, (x,)).outputs, module(x)) <= TOLERANCE
    assert counts(parallel, 0)["gather"]


def test_a_declaration_changes_nothing_outside_of_capture() -> None:
    module, x = Owned(mean=False), torch.randn(1, 5, SIZE)
    expected = module(x)
    assert torch.equal(rc.tokenwise(module)(x), expected)


def test_declared_without_tokens_is_refused() -> None:
    class Pooled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + rc.tokenwise(lambda y: y.mean(1))(x)[:, None]

    with pytest.raises(rc.RingCompileError, match="declared token-wise"):
        compiled(Pooled(), (torch.randn(2, 12, SIZE),), "ring=4")


# -- faults: the check must see what is not token-wise ---------------------------------------------


def test_without_the_check_the_numbers_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that choose tokens look token-wise to the finder; only running them tells."""
    style, module = made("experts choose")
    x = tokens(style, 27)
    with torch.no_grad():
        expected = module(x)
    monkeypatch.setattr(token_wise.TokenWise, "holds", lambda self, region: True)
    parallel = transform(captured("experts choose"), "ring=4")
    wrong = any("own tokens" in note for note in parallel.program.notes)
    assert not wrong or difference(run(parallel, (x,)).outputs, expected) > 1e-2


def test_slots_counted_by_each_rank_alone_are_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the comparison with the capacity were not taken from all ranks, the check would see it."""
    style, module = made("scatter_add")
    x = tokens(style, 64)
    with torch.no_grad():
        expected = module(x)
    monkeypatch.setattr(regions.Finder, "_exact", lambda self, region: region)
    parallel = transform(captured("scatter_add"), "ring=4")
    assert parallel.program.notes == ()
    assert difference(run(parallel, (x,)).outputs, expected) <= TOLERANCE
    monkeypatch.setattr(token_wise.TokenWise, "holds", lambda self, region: True)
    parallel = transform(captured("scatter_add"), "ring=4")
    assert difference(run(parallel, (x,)).outputs, expected) > 1e-2


class Prefixed(nn.Module):
    """Three tokens of its own in front: the sequence is s + 3 long."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.prefix, self.mixture = nn.Parameter(torch.randn(1, 3, SIZE)), mixture

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1)
        h = x.unsqueeze(1)
        x = x + nn.functional.scaled_dot_product_attention(h, h, h, is_causal=True)[:, 0]
        return x + self.mixture(x)


@pytest.mark.parametrize(
    "name", [pytest.param("scatter_add", marks=pytest.mark.slow), "loop, nonzero and index_add_"]
)
def test_behind_prefix_tokens(name: str) -> None:
    style, mixture_ = made(name)
    module = Prefixed(mixture_).eval()
    parallel = compiled(module, (tokens(style, CAPTURED),), "ring=4")
    assert any("own tokens" in note for note in parallel.program.notes)
    for length in (27, 3):
        x = tokens(style, length)
        with torch.no_grad():
            assert difference(run(parallel, (x,)).outputs, module(x)) <= TOLERANCE


def test_declared_with_an_exact_capacity() -> None:
    style, mixture_ = made("scatter_add")
    module, x = Around(rc.tokenwise(mixture_)).eval(), tokens(style, 64)
    parallel = compiled(module, (tokens(style, CAPTURED),), "ring=4")
    assert "declared token-wise" in parallel.program.notes[0]
    assert "over all ranks" in parallel.program.notes[0]
    with torch.no_grad():
        assert difference(run(parallel, (x,)).outputs, module(x)) <= TOLERANCE


def test_unknown_capacity() -> None:
    with pytest.raises(rc.RingCompileError, match="unknown capacity 'most'"):
        transform(captured("scatter_add"), "ring=4", capacity="most")


def test_experts_compute_the_rows_of_one_ranks_tokens_only() -> None:
    """Two choices a token, though each expert may need as many slots as the rank has tokens."""
    loaded = _moe()
    parallel = compiled(loaded.module, loaded.args, "ring=16", length=256)
    lengths = {**parallel.program.sequence.bindings({"s": 256}), "m": 16, "b": 1}
    graph = parallel.rank(3).graph
    products = [n for n in graph.nodes if n.target is op("grouped_linear")]
    assert len(products) == 2 * 4
    assert {bind(n.meta["type"].shape[0], lengths) for n in products} == {2 * 16}
    slots = [n.meta["type"].shape for n in graph.nodes
             if n.target is torch.ops.aten.index_put.default and len(n.meta["type"].shape) == 2]
    assert slots
    for _, of_expert in slots:
        assert bind(of_expert, lengths) == 16 + 1
        few = {"s": 32, "n": 2, "m": 16, "b": 1}
        assert bind(of_expert, few) == 10 + 1, "never more than the model's own"
