"""Of blocks that are alike, few go through the passes of a rank: programs are the same to the byte.

Each rank's program is made both ways and written as JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from ringcompile.artifact.files import json_text
from ringcompile.capture.export import capture
from ringcompile.commands.transform import transform as transform_command
from ringcompile.compiler import transform
from ringcompile.dump.python_view import python_view
from ringcompile.errors import RingCompileError
from ringcompile.ir import stretched
from ringcompile.ir.communication import bytes_of, bytes_sent
from ringcompile.ir.program import Program
from ringcompile.ir.repeats import FEWEST
from ringcompile.ir.serialize import program_to_json, program_to_text
from ringcompile.ir.stretched import num_nodes
from ringcompile.models.config import TransformerConfig
from ringcompile.models.transformer import Transformer
from ringcompile.parallel_program import ParallelProgram
from tests.random_cases import case_of
from tests.random_transformer import RandomModel, inputs_of
from tests.support import TOLERANCE, difference, run

LAYERS, LENGTH = 2 * FEWEST + 3, 24
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4,
    "mlp_hidden": 24, "max_positions": 64,
}
IDS = torch.arange(2 * LENGTH).reshape(2, LENGTH) % 64


def model(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**{**SIZES, "num_layers": LAYERS, **changes})).eval()


class Plain(nn.Module):
    """Layers, each made from its index; returns what `ends` makes of all that they give."""

    def __init__(
        self, layer: Callable[[int], nn.Module], ends: Callable[..., Any] = lambda *all_: all_[-1],
        count: int = LAYERS,
    ) -> None:
        super().__init__()
        self.layers, self.ends = nn.ModuleList(map(layer, range(count))), ends

    def forward(self, x: Tensor) -> Any:
        found = [torch.nn.functional.one_hot(x, 16).float()]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return self.ends(*found)


class Mixer(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2, window: int = 0) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.up, self.down = nn.Linear(16, width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], x.shape[1], self.heads, 16 // self.heads)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in self.qkv)
        mask = None
        if self.window:
            at = torch.arange(x.shape[1])
            mask = (at[:, None] >= at) & (at[:, None] - at < self.window)
        out = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        x = x + out.transpose(1, 2).flatten(2)
        return x + self.down(self.up(x).relu())


SPECS = ["ring=4", "ring=2,ulysses=2", "tp=2,pp=2", "pp=2,ring=2", "dp=2,tp=2", "pp=2,tp=2,dp=2"]
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "decoder": (model, [*SPECS, "ring=8", "pp=2,time=2"]),
    "encoder, biases": (
        lambda: model(causal=False, positions="learned", norm="layer", mlp="plain", bias=True),
        ["ring=4", "tp=2,pp=2"],
    ),
    "experts": (
        lambda: model(num_experts=4, capacity_factor=Fraction(5, 4)),
        ["ring=2", "ep=2", "ep=2,pp=2"],
    ),
    "windows, two and one": (
        lambda: Plain(lambda i: Mixer(window=0 if i % 3 == 2 else 7), count=24), ["ring=4"],
    ),
}


def same(parallel: ParallelProgram) -> None:
    parallel.verify()
    saved = list(map(files, parallel.ranks()))
    sent = list(map(bytes_sent, parallel.ranks()))
    counts = [num_nodes(program.graph) for program in parallel.ranks()]
    for rank, found in enumerate(parallel.ranks()):
        expected = parallel._passed(rank, parallel.program)
        assert saved[rank] == files(expected), f"rank {rank}"
        assert counts[rank] == len(expected.graph.nodes), f"rank {rank}"
        assert sent[rank] == sum(bytes_of(expected, node) for node in expected.graph.nodes)
        texts = [json.dumps(program_to_json(program)) for program in (found, expected)]
        assert texts[0] == texts[1], f"rank {rank}"
        assert list(map(repr, vars(found))) == list(map(repr, vars(expected)))
    others = filter(None, (parallel.carried, parallel.prefill))
    for other in others:
        same(other)


def files(program: Program) -> tuple[str, str]:
    """A program as an artifact holds it."""
    return json_text(program_to_text(program)), python_view(program)


def test_a_decoder() -> None:
    """Graphs are written when they are looked at; the check across ranks and saving do not look."""
    program = capture(model(), (IDS,), compare_with_eager=False)
    for spec in ("ring=2", "pp=2,tp=2"):
        parallel = transform(program, spec)
        parallel.verify()
        graphs = [program.graph for program in parallel.ranks()]
        _ = list(map(files, parallel.ranks())), list(map(bytes_sent, parallel.ranks()))
        assert not any("_root" in vars(graph) for graph in graphs)
        same(parallel)
        assert all("_root" in vars(graph) for graph in graphs)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_same_to_the_byte(name: str) -> None:
    make, specs = MODELS[name]
    program = capture(make(), (IDS,), compare_with_eager=False)
    for spec in specs:
        parallel = transform(program, spec)
        same(parallel)
        assert len(parallel._short) == ("time" not in spec) * parallel.world_size, spec


@pytest.mark.slow
def test_other_options() -> None:
    program = capture(model(), (IDS,), compare_with_eager=False)
    for spec, options in (
        ("ring=4", {"order": "contiguous"}), ("ring=4", {"ring": "gather"}),
        ("ring=4", {"length": 1024}), ("tp=2,pp=2", {"tp_sequence": True}),
        ("ring=2,tp=2", {"cache": 64}),
    ):
        parallel = transform(program, spec, **options)  # type: ignore[arg-type]
        same(parallel)
        assert len(parallel._short) == parallel.world_size, options


def other_width(index: int) -> nn.Module:
    return Mixer(width=24 if index == LAYERS // 2 else 16)


SHARED, ONE = nn.Linear(16, 16), Mixer()


def tied(index: int) -> nn.Module:
    layer = Mixer()
    if index % 2:
        layer.up = SHARED
    return layer


UNEVEN: dict[str, Callable[[], nn.Module]] = {
    "one layer is wider": lambda: Plain(other_width),
    "one layer has more heads": lambda: Plain(lambda i: Mixer(heads=4 if i == 9 else 2)),
    "one layer has a window": lambda: Plain(lambda i: Mixer(window=5 * (i == 7))),
    "all are returned": lambda: Plain(lambda i: Mixer(), lambda *found: found),
    "the sum of all": lambda: Plain(lambda i: Mixer(), lambda *found: sum(found)),
    "one in the middle": lambda: Plain(lambda i: Mixer(), lambda *f: f[-1] + f[len(f) // 2]),
    "every second shares weights": lambda: Plain(tied),
    "all are one": lambda: Plain(lambda i: ONE),
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name == "one layer has a window" else pytest.mark.slow)
    for name in UNEVEN
])
def test_what_is_not_alike(name: str) -> None:
    program = capture(UNEVEN[name](), (IDS,), compare_with_eager=False)
    for spec in ("ring=2", "pp=2"):
        same(transform(program, spec))


def of_many_layers(seed: int) -> None:
    """A random model with more layers; what is refused is refused either way."""
    case = dataclasses.replace(case_of(seed), layers=LAYERS)
    example = inputs_of(case, case.capture_length)
    first = example.pop("inputs")
    try:
        program = capture(RandomModel(case), (first,), example, compare_with_eager=False)
        parallel = transform(program, f"ring={case.ranks}", gather_unknown=case.gather_unknown)
    except RingCompileError:
        return
    same(parallel)


@pytest.mark.slow
def test_random_models() -> None:
    for seed in range(60):
        of_many_layers(seed)


@pytest.mark.slow
def test_numbers() -> None:
    given = model()
    parallel = transform(capture(given, (IDS,)), "ring=4")
    with torch.no_grad():
        assert difference(run(parallel, (IDS,)).outputs, given(IDS)) < TOLERANCE
    assert parallel._short


# -- few layers on a long ring: their attentions are written out once ------------------------------


class Unlike(Mixer):
    """Keys are values: one operand where others have two."""

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], x.shape[1], 2, 8)
        q, k = (self.qkv[i](x).view(shape).transpose(1, 2) for i in range(2))
        out = nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)
        return x + out.transpose(1, 2).flatten(2)


FEW: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "a decoder": (lambda: model(num_layers=3), 1),
    "an encoder": (lambda: model(num_layers=3, causal=False), 1),
    "windows in turn": (lambda: Plain(lambda i: Mixer(window=3 * (i % 2)), count=5), 2),
    "two and one": (lambda: Plain(lambda i: Mixer(window=3 * (i == 2)), count=4), 2),
    "one has more heads": (lambda: Plain(lambda i: Mixer(heads=4 if i == 1 else 2), count=3), 2),
    "one has keys for values": (
        lambda: Plain(lambda i: (Unlike if i == 0 else Mixer)(), count=3), 2,
    ),
}


def attentions(program: Program) -> int:
    names = [str(node.target) for node in program.graph.nodes]
    return names.count("ringcompile.finish.default")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name == "two and one" else pytest.mark.slow) for name in FEW
])
def test_attentions_that_are_alike(name: str) -> None:
    make, kinds = FEW[name]
    program = capture(make(), (IDS,), compare_with_eager=False)
    parallel = transform(program, "ring=8")
    parallel.verify()
    _ = list(map(files, parallel.ranks()))
    assert not any("_root" in vars(rank.graph) for rank in parallel.ranks())
    assert [attentions(short) for short in parallel._short.values()] == 8 * [kinds]
    same(parallel)


@pytest.mark.slow
def test_attentions_that_are_alike_beside_other_axes_and_options() -> None:
    program = capture(model(num_layers=3), (IDS,), compare_with_eager=False)
    for spec, options, outlined in (
        ("ring=8,tp=2", {}, True), ("ring=8,tile=2", {}, True), ("ring=8,ulysses=2", {}, True),
        ("ring=8,dp=2", {}, True), ("ring=8", {"order": "contiguous"}, True),
        ("ring=8", {"length": 1024}, True), ("ring=8", {"cache": 64}, True),
        # Stages have transfers of their own, which take part in the numbers of names.
        ("pp=2,ring=8", {}, False), ("ring=8,time=2", {}, False), ("ring=4", {}, False),
    ):
        parallel = transform(program, spec, **options)  # type: ignore[arg-type]
        same(parallel)
        assert bool(parallel._short) == outlined, spec


@pytest.mark.slow
def test_numbers_of_attentions_that_are_alike() -> None:
    given = model(num_layers=3)
    parallel = transform(capture(given, (IDS,)), "ring=8")
    with torch.no_grad():
        assert difference(run(parallel, (IDS,)).outputs, given(IDS)) < TOLERANCE
    assert parallel._short


def test_the_command_writes_no_graph_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints how many nodes programs have, and observes passes only when it is asked to."""
    monkeypatch.setattr(stretched, "_write", pytest.fail)
    monkeypatch.setattr(ParallelProgram, "_passed", pytest.fail)  # with all that is alike
    given = ["dense-4l-tiny", "--parallel", "ring=8", "--no-weights", "-o"]
    result = CliRunner().invoke(transform_command, [*given, str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "8 programs of 283 nodes" in result.output
