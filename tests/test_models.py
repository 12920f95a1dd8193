"""Whole models, all ranks in lock-step, against the single device; faults on purpose are seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from ringcompile.capture.export import capture
from ringcompile.compiler import ParallelProgram, transform
from ringcompile.ir.program import Program
from ringcompile.models import zoo
from ringcompile.ops import bodies, kernels
from tests.support import TOLERANCE, difference, run, tensors

transformers = pytest.importorskip("transformers")
ORDERS = ("contiguous", "zigzag")
ZOO = ("dense-4l-tiny", "dense-4l-small", "gpt-tiny", "llama-tiny", "bert-tiny")
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
def zoo_program(name: str) -> tuple[nn.Module, Program]:
    module, example = zoo.build(name, sequence=24)
    return module, capture(module, example)


@lru_cache
def hf_model(name: str) -> nn.Module:
    torch.manual_seed(1)
    module = HF[name]().eval()
    for parameter in module.parameters():  # larger weights: positions and masks must matter
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return module


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str, ranks: int, order: str) -> None:
    module, program = zoo_program(name)
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


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "padding mask"])
@pytest.mark.parametrize("name", HF)
def test_hugging_face(name: str, masked: bool) -> None:
    module = hf_model(name)
    example, _ = hf_inputs(24, masked)
    program = capture(module, example[:1], {"attention_mask": example[1]} if masked else None)
    for ranks, order in ((2, "zigzag"), (4, "contiguous"), (8, "zigzag"), (16, "contiguous")):
        parallel = transform(program, f"ring={ranks}", order=order)
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


# -- faults on purpose ---------------------------------------------------------------------------


def decoder(order: str = "zigzag") -> tuple[nn.Module, ParallelProgram, tuple[torch.Tensor, ...]]:
    module, program = zoo_program("llama-tiny")
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
    merge = [n for n in graph.nodes if str(n.target) == "ringcompile.merge.default"][-1]
    merge.replace_all_uses_with(merge.args[0])
    graph.erase_node(merge)
    assert error_of(module, parallel, inputs) > 10 * TOLERANCE


def test_positions_shifted_by_one_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module, parallel, inputs = decoder()
    right = bodies.BODIES["positions"]
    parallel.ranks()
    bert, program = zoo_program("bert-tiny")
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

    monkeypatch.setattr(kernels, "merge", average)
    assert error_of(module, parallel, inputs) > 10 * TOLERANCE


def test_a_ring_that_never_rotates_is_seen() -> None:
    module, parallel, inputs = decoder("contiguous")
    for rank in range(4):
        own = None
        for node in parallel.rank(rank).graph.nodes:
            if str(node.target) == "ringcompile.block_attention.default":
                own = own or node.args[1]
                node.args = (node.args[0], own, *node.args[2:])
            elif str(node.target) == "ringcompile.finish.default":
                own = None  # the next layer has keys and values of its own
    assert error_of(module, parallel, inputs) > 10 * TOLERANCE


def test_compared_values_are_not_empty() -> None:
    _, parallel, inputs = decoder()
    assert tensors(run(parallel, inputs).outputs)[0].numel() == 61 * 512
