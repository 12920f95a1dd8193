"""Whole models, all ranks in lock-step, against the single device; faults on purpose are seen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.ir.program import Program
from ringcompile.models import moe, zoo
from ringcompile.ops import bodies
from ringcompile.ops.kernels import select
from ringcompile.parallel_program import ParallelProgram
from tests.moe_table import kept_choices, slow_mixture, turns_of
from tests.support import TOLERANCE, difference, run, some_fast, tensors, zoo_program

transformers = pytest.importorskip("transformers")
ORDERS = ("contiguous", "zigzag")
ZOO = (
    "dense-4l-tiny", "dense-4l-small", "moe-4l-tiny", "gpt-tiny", "llama-tiny", "mixtral-tiny",
    "bert-tiny",
)
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
HF: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: causal(transformers.LlamaConfig(**GROUPED)),
    "qwen2": lambda: causal(transformers.Qwen2Config(**GROUPED)),
    "qwen3": lambda: causal(transformers.Qwen3Config(**GROUPED, head_dim=16)),
    "mistral with a window": lambda: causal(
        transformers.MistralConfig(**GROUPED, sliding_window=9)),
    "gpt2": lambda: causal(transformers.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=128, use_cache=False,
        bos_token_id=None, eos_token_id=None)),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
}


def causal(config: Any) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


@lru_cache
def zoo_model(name: str) -> tuple[nn.Module, Program]:
    return zoo.build(name)[0], zoo_program(name, sequence=24)


@lru_cache
def hf_model(name: str) -> nn.Module:
    torch.manual_seed(1)
    module = HF[name]().eval()
    for parameter in module.parameters():  # larger weights: positions and masks must matter
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return module


def quick(name: str, ranks: int, order: str) -> bool:
    """Each model once: every other one on 2 ranks and on 4; the mixture on 16 ranks as well."""
    if ranks == 16:
        return order == "zigzag" and name == "llama-tiny"
    return (ranks, order) == ((2, "contiguous"), (4, "zigzag"))[ZOO.index(name) % 2]


@pytest.mark.parametrize(
    ("name", "ranks", "order"), some_fast(ZOO, [2, 4, 8, 16], ORDERS, fast=quick)
)
def test_zoo(name: str, ranks: int, order: str) -> None:
    module, program = zoo_model(name)
    double, _ = zoo.build(name, dtype="float64")
    parallel = transform(program, f"ring={ranks}", order=order)
    for length in (64, 45, 7):  # one program: divides, does not divide, fewer than ranks
        _, inputs = zoo.build(name, sequence=length, batch=1, seed=length)
        with torch.no_grad():
            expected = module(*inputs)
            exact = double(*[x.double() if x.is_floating_point() else x for x in inputs])
        found = run(parallel, inputs).outputs
        assert difference(found, expected) <= TOLERANCE
        own = difference(expected.double(), exact)
        assert difference(found.double(), exact) <= 2 * own


def hf_inputs(length: int, masked: bool) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    ids = torch.randint(0, 128, (2, length))
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, length - length // 3 :] = 0
    if not masked:
        return (ids,), torch.ones_like(ids).bool()
    return (ids, mask), mask.bool()


@lru_cache
def hf_program(name: str, masked: bool) -> Program:
    example, _ = hf_inputs(24, masked)
    return capture(
        hf_model(name), example[:1], {"attention_mask": example[1]} if masked else None
    )


@pytest.mark.parametrize(
    ("name", "masked", "ranks", "order"),
    some_fast(
        HF, [False, True], [2, 4, 8, 16], ORDERS,
        fast=lambda name, masked, ranks, order: (
            (ranks, order) == ((4, "contiguous") if masked else (2, "zigzag"))
            and (name, masked) in (
                ("qwen3", False), ("mistral with a window", True), ("bert", True))
        ),
    ),
)
def test_hugging_face(name: str, masked: bool, ranks: int, order: str) -> None:
    module, parallel = hf_model(name), transform(
        hf_program(name, masked), f"ring={ranks}", order=order
    )
    for length in (64, 37):
        inputs, tokens = hf_inputs(length, masked)
        named = dict(zip(("input_ids", "attention_mask"), inputs, strict=False))
        with torch.no_grad():
            expected = module(**named)
        found = run(parallel, inputs).outputs
        assert list(found) == list(expected)
        key = next(iter(found))
        assert difference(found[key][tokens], expected[key][tokens]) <= TOLERANCE


def test_an_attention_mask_is_not_dropped() -> None:
    """Padding changes the outputs of real tokens; a mask that went missing would not."""
    module = hf_model("bert")
    inputs, tokens = hf_inputs(24, masked=True)
    program = capture(module, inputs[:1], {"attention_mask": inputs[1]})
    parallel = transform(program, "ring=4")
    masked = run(parallel, inputs).outputs["last_hidden_state"]
    unmasked = run(parallel, (inputs[0], torch.ones_like(inputs[1]))).outputs["last_hidden_state"]
    assert difference(masked[tokens], unmasked[tokens]) > 1e-3


def test_half_precision() -> None:
    module, example = zoo.build("llama-tiny", sequence=24, dtype="float16")
    double, _ = zoo.build("llama-tiny", dtype="float64")
    parallel = transform(capture(module, example), "ring=8")
    _, inputs = zoo.build("llama-tiny", sequence=61)
    found = run(parallel, inputs).outputs
    assert found.dtype == torch.float16
    with torch.no_grad():
        exact, own = double(*inputs), module(*inputs)
    allowed = 2 * difference(own.double(), exact)
    assert difference(found.double(), exact) <= allowed < 2e-2


# -- the zoo's mixture of experts on one device -------------------------------------------------


def mixture(factor: Fraction | None = Fraction(5, 4), **changes: Any) -> moe.MoE:
    """One mixture of 4 experts for 2 choices, in float64, its router far from undecided."""
    config = dataclasses.replace(
        zoo.entry("moe-4l-tiny").config, hidden_size=16, mlp_hidden=24, num_experts=4, top_k=2,
        capacity_factor=factor, dtype="float64", **changes)
    module = moe.MoE(config).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.requires_grad_(False)


def one_by_one(module: moe.MoE, x: torch.Tensor, order: str = "tokens") -> torch.Tensor:
    """The mixture in plain loops: routed, dropped and computed token by token."""
    tokens, choices, weights = x.flatten(0, 1), [], []
    for row in tokens @ module.router.weight.T:
        best = sorted(range(module.num_experts), key=lambda e: -float(row[e]))[: module.top_k]
        scores = row.exp()[best]
        choices.append(best)
        weights.append(scores / scores.sum())
    slots = None
    if module.capacity_factor is not None:
        share = module.capacity_factor * len(tokens) * module.top_k / module.num_experts
        slots = math.ceil(share)
    experts = module.experts

    def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
        inner = rows @ experts.up_proj[number]
        if experts.gated:
            return (F.silu(rows @ experts.gate_proj[number]) * inner) @ experts.down_proj[number]
        return F.gelu(inner) @ experts.down_proj[number]

    scale = torch.stack(weights)
    kept = kept_choices(choices, module.num_experts, slots, turns_of(order, scale))
    return slow_mixture(tokens, scale, choices, kept, expert).view(x.shape)


@pytest.mark.parametrize("mlp", ["plain", "gated"])
@pytest.mark.parametrize(
    "factor", [None, Fraction(5, 4), Fraction(1), Fraction(1, 3), Fraction(4)], ids=str)
def test_mixture(factor: Fraction | None, mlp: str) -> None:
    """Routing happens in float32 even here: hence the tolerance."""
    module = mixture(factor, mlp=mlp)
    x = torch.randn(2, 29, 16, dtype=torch.float64) + 0.5  # some experts are asked for more often
    assert difference(module(x), one_by_one(module, x)) <= 1e-6
    dropless = mixture(None, mlp=mlp)
    dropless.load_state_dict(module.state_dict())
    dropped = difference(module(x), dropless(x)) > 1e-3
    assert dropped == (factor is not None and factor < 4)


def test_mixture_drops_in_the_order_of_tokens() -> None:
    module, x = mixture(Fraction(3, 4)), torch.randn(2, 29, 16, dtype=torch.float64)
    assert difference(module(x), one_by_one(module, x, "choices")) > 1e-2
    changed = x.clone()
    changed[1, 20:] = -changed[1, 20:]
    before, after = module(x), module(changed)
    assert torch.equal(before.flatten(0, 1)[:49], after.flatten(0, 1)[:49]), "a later token matters"


@pytest.mark.parametrize("factor", [None, Fraction(5, 4)], ids=str)
@pytest.mark.parametrize("shape", [(2, 0, 16), (0, 3, 16), (1, 1, 16)], ids=str)
def test_mixture_of_few_tokens(shape: tuple[int, ...], factor: Fraction | None) -> None:
    module, x = mixture(factor), torch.randn(shape, dtype=torch.float64)
    assert module(x).shape == shape
    if x.numel():
        assert difference(module(x), one_by_one(module, x)) <= 1e-6


def test_capacity() -> None:
    paper = Fraction(5, 4)
    assert moe.capacity(16384, 2, 8, paper) == 5120
    assert [moe.capacity(tokens, 2, 8, paper) for tokens in range(6)] == [0, 1, 1, 1, 2, 2]
    assert moe.capacity(10**15 + 1, 2, 8, Fraction(4)) == 10**15 + 1, "exact beyond float64"


def test_mixture_takes_its_dtype() -> None:
    module, x = mixture().half(), torch.randn(2, 29, 16).half()
    assert module(x).dtype == torch.float16
    assert module.route(x.flatten(0, 1))[0].dtype == torch.float16


@pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")  # torch.export's own, in copyreg
@pytest.mark.parametrize("factor", [None, Fraction(5, 4)], ids=str)
def test_mixture_exports_for_any_length(factor: Fraction | None) -> None:
    module, example = mixture(factor), torch.randn(2, 9, 16, dtype=torch.float64)
    shapes = {"x": {1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
    assert not program._guards_code
    assert len(program.range_constraints) == 1, "a size depends on the data"
    ops = [n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert not [op for op in ops if op._schema.is_mutable]
    for length in (1, 2, 8, 40):
        x = torch.randn(2, length, 16, dtype=torch.float64)
        assert torch.equal(program.module()(x), module(x))


def test_moe_4l_has_the_papers_weights_without_memory() -> None:
    with FakeTensorMode():
        module, inputs = zoo.build("moe-4l")
        out = module(*inputs)
    assert (out.shape, out.dtype) == ((1, 16384, 8192), torch.float16)
    sizes = {name: p.nbytes for name, p in module.named_parameters() if "norm" not in name}
    routers = sum(size for name, size in sizes.items() if "router" in name)
    assert routers == 4 * 8 * 8192 * 2
    assert sum(sizes.values()) - routers == 4 * (4 * 8192**2 + 8 * 2 * 8192 * 32768) * 2
    assert sum(sizes.values()) == pytest.approx(36.51e9, rel=1e-3)


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_experts": -1}, "num_experts is -1: must be 0 or a positive integer"),
    ({"top_k": 0}, "top_k is 0: must be a positive integer"),
    ({"top_k": 9}, "top_k is 9: must be at most num_experts, which is 8"),
    ({"bias": True}, "bias is True: must be False with experts, which have none"),
    ({"capacity_factor": 1.25}, "capacity_factor is 1.25: must be None or a positive Fraction"),
    ({"num_experts": 0},
     "capacity_factor is Fraction(5, 4): must be None without experts (num_experts is 0)"),
])
def test_config_of_experts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="TransformerConfig") as caught:
        dataclasses.replace(zoo.entry("moe-4l-tiny").config, **changes)
    assert str(caught.value) == f"TransformerConfig.{message}"


# -- faults on purpose ---------------------------------------------------------------------------


def decoder(order: str = "zigzag") -> tuple[nn.Module, ParallelProgram, tuple[torch.Tensor, ...]]:
    module, program = zoo_model("llama-tiny")
    _, inputs = zoo.build("llama-tiny", sequence=61)
    return module, transform(program, "ring=4", order=order), inputs


def error_of(
    module: nn.Module, parallel: ParallelProgram, inputs: tuple[torch.Tensor, ...]
) -> float:
    with torch.no_grad():
        return difference(run(parallel, inputs).outputs, module(*inputs))


@pytest.mark.parametrize("order", ORDERS)
def test_a_dropped_ring_step_is_seen(order: str) -> None:
    module, parallel, inputs = decoder(order)
    graph = parallel.rank(2).graph
    merge = [n for n in graph.nodes if str(n.target) == "ringcompile.attend_merge.default"][-1]
    merge.replace_all_uses_with(merge.args[0])
    graph.erase_node(merge)
    assert error_of(module, parallel, inputs) > 10 * TOLERANCE


def test_positions_shifted_by_one_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module, parallel, inputs = decoder()
    right = bodies.BODIES["positions"]
    parallel.ranks()
    bert, program = zoo_model("bert-tiny")
    learned = transform(program, "ring=4")
    monkeypatch.setitem(bodies.BODIES, "positions", lambda *a, **k: (right(*a, **k) + 1))
    # Rotary attention sees only differences of positions, so the learned table is the test here.
    _, tokens = zoo.build("bert-tiny", sequence=61)
    assert error_of(bert, learned, tokens) > 10 * TOLERANCE
    # Positions that restart on each rank do show in rotary attention.
    monkeypatch.setitem(
        bodies.BODIES, "positions",
        lambda chunks, **k: right(range(len(chunks)), **k))
    assert error_of(module, parallel, inputs) > 10 * TOLERANCE


def test_merging_without_the_lse_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module, parallel, inputs = decoder()

    def average(out: torch.Tensor, lse: torch.Tensor, out_b: torch.Tensor, lse_b: object) -> None:
        out.lerp_(out_b.to(out.dtype), 0.5)

    monkeypatch.setattr(select, "merge", average)
    assert error_of(module, parallel, inputs) > 10 * TOLERANCE


def test_a_ring_that_never_rotates_is_seen() -> None:
    module, parallel, inputs = decoder("contiguous")
    for rank in range(4):
        own: object = None
        for node in parallel.rank(rank).graph.nodes:
            if str(node.target) == "ringcompile.block_attention.default":
                own = node.args[1]
            elif str(node.target) == "ringcompile.attend_merge.default":
                node.args = (*node.args[:2], own, *node.args[3:])
    assert error_of(module, parallel, inputs) > 10 * TOLERANCE


def test_compared_values_are_not_empty() -> None:
    _, parallel, inputs = decoder()
    assert tensors(run(parallel, inputs).outputs)[0].numel() == 61 * 512
