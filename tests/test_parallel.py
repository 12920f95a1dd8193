"""Every strategy, and products of them, against one device; what is refused, in its exact words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ringcompile import artifact
from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh
from ringcompile.models import zoo
from ringcompile.runtime.launcher import LocalRanks
from tests.support import TOLERANCE, difference, run, zoo_program

ROOT = Path(__file__).parents[1]
CAPTURED, LENGTH = 24, 37  # 37 divides over nothing
VOCABULARY = 61
ZOO = ("dense-4l-tiny", "moe-4l-tiny", "gpt-tiny", "llama-tiny", "mixtral-tiny", "bert-tiny")
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "use_cache": False,
}  # fmt: skip
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                 "head_dim": 8, "norm_topk_prob": True},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64},
    "Phi3": {"num_key_value_heads": 4},
}  # fmt: skip
MODELS = (*ZOO, *HUGGING_FACE)
FOUR_LAYERS = ("dense-4l-tiny", "moe-4l-tiny")
# Each strategy, with the models that every run of the tests takes; each model is there once.
# The slow ones take all.
STRATEGIES: dict[str, tuple[str, ...]] = {
    "tp=2": ("GPT2",),
    "tp=3": ("llama-tiny",),
    "tp=4": ("Phi3",),
    "tp=8": ("moe-4l-tiny",),
    "pp=2": ("bert-tiny",),
    "pp=4": ("dense-4l-tiny",),
    "tp=8,pp=2": ("Llama",),
    "ep=2": ("Qwen3Moe",),
    "ep=4": ("mixtral-tiny",),
    "ep=8": ("mixtral-tiny",),
    "ulysses=2": ("gpt-tiny",),
    "ulysses=4": ("llama-tiny",),
    "ring=2,ulysses=2": ("GPT2",),
    "ring=4,tp=2": ("Qwen3Moe",),
    "pp=2,ring=2,tp=2": ("gpt-tiny",),
    "ring=2,ep=2": ("moe-4l-tiny",),
    "pp=2,ring=4,tp=2": ("bert-tiny",),
    "pp=2,time=3": ("Phi3",),
    "time=4,tp=2": ("llama-tiny",),
}
# Others have the same axes with more or fewer ranks.
AGAIN = {"tp=3", "tp=8", "ep=2", "ep=4", "ulysses=4", "pp=2,ring=4,tp=2"}
OPTIONS: dict[str, dict[str, Any]] = {
    "ring=2,tp=2": {"tp_sequence": True},
    "tp=2,pp=2": {"tp_sequence": True, "order": "zigzag"},
    "ring=2,ulysses=2": {"ring": "gather"},
    "ring=4,tp=2": {"order": "contiguous"},
}
# By plan: batches of the captured size that the whole batch has.
DEALT = {"dp=2,ring=2": 2, "dp=2,pp=2": 4, "pp=2": 3, "dp=2,pp=2,tp=2": 6, "dp=3": 3}


def refusal(strategy: str, model: str) -> str | None:
    """Why a model cannot have a strategy."""
    if strategy == "pp=4" and model not in FOUR_LAYERS:
        return "more stages than the model has layers"
    if strategy == "ep=8" and model == "Qwen3Moe":
        return "4 experts do not divide over ep=8"
    return None


def inputs(name: str, length: int, batch: int = 1) -> tuple[torch.Tensor, ...]:
    if name in ZOO:
        return zoo.build(name, sequence=length, batch=batch, seed=3)[1]
    generator = torch.Generator().manual_seed(length)
    return (torch.randint(1, VOCABULARY, (batch, length), generator=generator),)


def build(name: str) -> nn.Module:
    if name in ZOO:
        return zoo.build(name)[0]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **HUGGING_FACE[name]})
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = getattr(transformers, kind)(config).eval()
        for parameter in model.parameters():  # so that scores spread, and tokens go different ways
            nn.init.normal_(parameter, std=0.2)
    return model


@cache
def captured(name: str, batch: int = 1) -> tuple[nn.Module, Program]:
    module = build(name)
    if name in ZOO:
        return module, zoo_program(name, sequence=24, batch=batch)
    return module, capture(module, inputs(name, CAPTURED, batch))


def logits(value: Any) -> torch.Tensor:
    return value if torch.is_tensor(value) else value["logits"]


@torch.no_grad()
def hold(name: str, spec: str, lengths: Sequence[int] = (LENGTH,), **options: Any) -> None:
    module, program = captured(name)
    parallel = transform(program, spec, **options)
    for length in lengths:
        given = inputs(name, length)
        found = run(parallel, given).outputs
        assert difference(logits(found), logits(module(*given))) <= TOLERANCE, length


@pytest.mark.parametrize(
    ("spec", "name"),
    [pytest.param(spec, name, marks=pytest.mark.slow if spec in AGAIN else ())
     for spec, names in STRATEGIES.items() for name in names],
)
def test_a_strategy(spec: str, name: str) -> None:
    hold(name, spec)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", STRATEGIES)
def test_every_strategy_on_every_model(spec: str, name: str) -> None:
    reason = refusal(spec, name)
    if reason is not None:
        with pytest.raises(RingCompileError, match=reason):
            transform(captured(name)[1], spec)
        return
    hold(name, spec, (LENGTH, 48, 5))


@pytest.mark.parametrize("name", ["llama-tiny", "moe-4l-tiny"])
@pytest.mark.parametrize("spec", OPTIONS)
def test_options(spec: str, name: str) -> None:
    hold(name, spec, **OPTIONS[spec])


@torch.no_grad()
@pytest.mark.parametrize(
    ("spec", "name"),
    [*((spec, "bert-tiny") for spec in DEALT), ("dp=2,pp=2", "moe-4l-tiny"), ("pp=2", "gpt-tiny")],
)
def test_batches_are_dealt(spec: str, name: str) -> None:
    """To replicas, and to pipelines in microbatches: a local capacity counts the tokens of one."""
    module, program = captured(name, 2)
    given = inputs(name, LENGTH, 2 * DEALT[spec])
    microbatches = DEALT[spec] // Mesh.parse(spec).size("dp")
    options: dict[str, Any] = {"capacity": "local"} if "moe" in name else {}
    found = run(transform(program, spec, microbatches=microbatches, **options), given).outputs
    expected = torch.cat([
        module(*(x[2 * i : 2 * i + 2] for x in given)) for i in range(DEALT[spec])
    ])
    assert difference(found, expected) <= TOLERANCE


# -- real processes ------------------------------------------------------------------------------


@torch.no_grad()
def hold_processes(name: str, spec: str, folder: Path) -> None:
    """Over gloo: the model's numbers, and the bytes of the lock-step run."""
    module, program = captured(name)
    given = inputs(name, LENGTH)
    parallel = transform(program, spec)
    parallel.save(folder / "program")
    alone = run(parallel, given)
    with LocalRanks(
        artifact.load, (str(folder / "program"),), backend="gloo", threads=1
    ) as ranks:
        found = ranks.run(given)
    assert difference(logits(found.outputs), logits(module(*given))) <= TOLERANCE
    assert [stats.bytes_sent for stats in found.stats] == alone.bytes_sent


@pytest.mark.parametrize(
    ("spec", "name"),
    [pytest.param("tp=2,pp=2", "gpt-tiny", marks=pytest.mark.slow), ("ring=2,ep=2", "moe-4l-tiny")],
)
def test_four_processes(spec: str, name: str, tmp_path: Path) -> None:
    hold_processes(name, spec, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "name"),
    [("ulysses=4", "Phi3"), ("pp=2,ring=2,tp=2", "Llama"), ("ring=4,tp=2", "llama-tiny"),
     ("tp=8", "dense-4l-tiny"), ("ep=8", "moe-4l-tiny"), ("ulysses=2,ring=2", "moe-4l-tiny")],
)
def test_more_processes(spec: str, name: str, tmp_path: Path) -> None:
    hold_processes(name, spec, tmp_path)


# -- real weights --------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_smollm2() -> None:
    """9 heads and 3 key heads: over 3 they divide, over 2 they do not."""
    sys.path.insert(0, str(ROOT / "examples"))
    real_models = pytest.importorskip("real_models")
    folder = real_models.smollm2_checkpoint(ROOT / "build")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.config.use_cache = False
    ids = real_models.english_text(101, transformers.AutoTokenizer.from_pretrained(folder))
    program = capture(model, (ids[:, :CAPTURED],))
    expected = model(ids).logits
    for spec in ("tp=2", "tp=3", "pp=2,ring=2,tp=2"):
        found = run(transform(program, spec), (ids,)).outputs["logits"]
        assert difference(found, expected) <= TOLERANCE, spec


# -- refusals ------------------------------------------------------------------------------------

REFUSALS = {
    "xp=2": "error: unknown mesh axis 'xp'\n"
            "  hint: axes are: pp, dp, halves, time, ring, tile, ep, ulysses, tp",
    "tp=2,tp=2": "error: mesh axis 'tp' is given twice",
    "tp=0": "error: mesh axis 'tp' has size 0; it must be at least 1",
    "tp": "error: cannot read 'tp' in the parallel spec 'tp'\n"
    "  hint: write axis=size pairs separated by commas, for example ring=4",
    "pp=3": "error: pp=3 asks for more stages than the model has layers: 2\n"
    "  hint: use pp=2 or less",
}


@pytest.mark.parametrize("spec", REFUSALS)
def test_a_plan_that_is_refused(spec: str) -> None:
    with pytest.raises(RingCompileError) as caught:
        transform(captured("llama-tiny")[1], spec)
    assert str(caught.value) == REFUSALS[spec]


def test_experts_that_do_not_divide_are_refused() -> None:
    where = "    .*\n  node: %expert_linear\n  layer: model.layers.0.mlp.experts\n"
    message = f"4 experts do not divide over ep=8\n{where}  hint: use an ep that divides 4"
    with pytest.raises(RingCompileError, match=message):
        transform(captured("Qwen3Moe")[1], "ep=8")


STAGES = {
    ("blocks.1", "blocks.1"): "pp=2 needs 1 layers to begin a stage with, 2 are given",
    ("blocks.0",): "no stage can begin with 'blocks.0'\n  hint: layers: blocks.1",
    ("head",): "no stage can begin with 'head'\n  hint: layers: blocks.1",
}


@pytest.mark.parametrize("stages", STAGES)
def test_stages_that_are_refused(stages: tuple[str, ...]) -> None:
    with pytest.raises(RingCompileError) as caught:
        transform(captured("llama-tiny")[1], "pp=2", stages=stages)
    assert str(caught.value) == f"error: {STAGES[stages]}"


BATCHES = {
    ("dp=2", 1): "a batch of 1 is too small for dp=2\n"
    "  hint: pass at least 2 sequences, one for each replica",
    ("dp=3,pp=2", 2): "a batch of 2 is too small for dp=3\n"
    "  hint: pass at least 3 sequences, one for each replica",
}


@pytest.mark.parametrize(("spec", "batch"), BATCHES)
def test_a_batch_that_is_refused(spec: str, batch: int) -> None:
    parallel = transform(captured("dense-4l-tiny")[1], spec)
    with pytest.raises(RingCompileError) as caught:
        run(parallel, inputs("dense-4l-tiny", LENGTH, batch))
    assert str(caught.value) == f"error: {BATCHES[spec, batch]}"


def test_a_residual_stream_is_not_split() -> None:
    """9 heads over 2 ranks: attention is whole, and the pair of each MLP is found all the same."""
    config = transformers.LlamaConfig(**{
        **SIZES, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3})
    module = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, VOCABULARY, (1, CAPTURED))
    rank = transform(capture(module, (ids,)), "tp=2").rank(0)
    sums = [node for node in rank.graph.nodes if "all_reduce" in str(node.target)]
    assert [type_of(node).shape[-1] for node in sums] == [72] * 2  # behind each MLP, nowhere else


@cache
def captured_module(kind: Callable[..., nn.Module], *args: Any) -> tuple[nn.Module, Program]:
    """A module on hidden states of 12 tokens, captured once for all plans."""
    module = kind(*args).eval()
    return module, capture(module, (torch.randn(1, 12, 16),))


class Summing(nn.Module):
    """An MLP whose hidden features are added up one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.softplus(self.up(x)).cumsum(-1))


@torch.no_grad()
@pytest.mark.parametrize("spec", ["tp=2", "ring=2,tp=2", "time=2,tp=2"])
@pytest.mark.parametrize("length", [24, 37])  # 24: a rank's tokens are as many as its features
def test_a_running_sum_of_features_is_not_split(spec: str, length: int) -> None:
    module, program = captured_module(Summing)
    parallel = transform(program, spec)
    given = torch.randn(1, length, 16)
    assert difference(run(parallel, (given,)).outputs, module(given)) <= TOLERANCE


class Fixed(nn.Module):
    """Its code fixes the length; with a head of its own, or without any attention."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.attends = attends
        self.table = nn.Parameter(torch.randn(12, 16))
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.table
        if self.attends:
            heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
            x = nn.functional.scaled_dot_product_attention(heads, heads, heads)
            x = x.transpose(1, 2).flatten(2)
        return self.down(nn.functional.gelu(self.up(x)))


@torch.no_grad()
@pytest.mark.parametrize("spec", ["ring=1", "tp=2", "dp=2"])
@pytest.mark.parametrize("attends", [True, False])
def test_a_length_that_is_fixed_and_not_split(attends: bool, spec: str) -> None:
    module, program = captured_module(Fixed, attends)
    given = torch.randn(1, 12, 16)
    parallel = transform(program, spec)
    batch = given.repeat(parallel.mesh.size("dp"), 1, 1)
    assert difference(run(parallel, (batch,)).outputs, module(batch)) <= TOLERANCE


NOTES = {
    ("llama-tiny", "tp=4"): "6 heads",
    ("llama-tiny", "ulysses=4"): "6 heads do not divide over ulysses=4",
    ("mixtral-tiny", "ep=2"): "no experts that could be split were found",
}


@pytest.mark.parametrize(("name", "spec"), NOTES)
def test_what_does_not_divide_is_noted(name: str, spec: str) -> None:
    notes = transform(captured(name)[1], spec).program.notes
    assert any(NOTES[name, spec] in note for note in notes), notes
