"""The text form: goldens of a one-layer decoder, and what must hold of every text."""

import operator
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.ir.call_text import band_text, call_text, value_text
from ringcompile.ir.calls import map_values
from ringcompile.ir.communication import bytes_sent
from ringcompile.ir.printer import print_program
from ringcompile.ir.program import Program, Structure
from ringcompile.ir.types import TensorType
from ringcompile.models.transformer import Transformer, TransformerConfig
from ringcompile.ops.blocks import Band
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Pass
from tests.support import zoo_program

ROOT = Path(__file__).parents[2]
CONFIG = TransformerConfig(
    vocab_size=11,
    num_layers=1,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_hidden=16,
)
ORDERS = ("contiguous", "zigzag")
STAGES = ("place", "partition", "rank0", "rank1")


def compiled_stages(order: str) -> dict[str, Program]:
    """The decoder behind each pass, by the pass's name, and for each of two ranks."""
    found: dict[str, Program] = {}
    program = capture(Transformer(CONFIG), (torch.arange(6)[None],), name="decoder")

    def observe(step: Pass, seen: Program, _: float) -> None:
        found[step.name] = seen

    made = transform(program, "ring=2", order=order, observe=observe)
    return {
        "capture": program,
        **found,
        "every": made.program,
        "rank0": made.rank(0),
        "rank1": made.rank(1),
    }


@pytest.fixture(scope="module")
def stages() -> dict[str, dict[str, Program]]:
    return {order: compiled_stages(order) for order in ORDERS}


def calls(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def test_golden_canonicalized(stages: Any, golden: Callable[[str, str], None]) -> None:
    text = print_program(stages["zigzag"]["canonicalize"], weights=True)
    golden("text/decoder-canonicalize.txt", text)
    assert "one device" in text
    assert "ring" not in text
    assert text.count("= weight") == len(stages["zigzag"]["canonicalize"].weights)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stage", STAGES)
def test_golden(stages: Any, golden: Callable[[str, str], None], order: str, stage: str) -> None:
    program = stages[order][stage]
    text = print_program(program)
    golden(f"text/decoder-ring2-{order}-{stage}.txt", text)
    assert f"mesh ring=2   order {order}" in text
    assert text.count("ring.attention(") == (stage == "partition")
    assert ("block_attention(" in text) == stage.startswith("rank")


@pytest.mark.parametrize(
    ("order", "rank", "sends", "receives"),
    [
        pytest.param("contiguous", 0, 1, 0, id="the first half is seen by the second"),
        pytest.param("contiguous", 1, 0, 1, id="and the second by nobody else"),
        pytest.param("zigzag", 0, 1, 1, id="zigzag 0"),
        pytest.param("zigzag", 1, 1, 1, id="zigzag 1"),
    ],
)
def test_transfers_are_counted(
    stages: Any, order: str, rank: int, sends: int, receives: int
) -> None:
    program = stages[order][f"rank{rank}"]
    text = print_program(program)
    other = 1 - rank
    assert text.count("ring.shift_start(%") == 1
    assert text.count(f"to={other} ") == sends
    assert text.count(f"source={other} ") == receives
    summary = re.search(r"sends (\d) messages?, (.*?) bytes, and receives (\d)", text)
    assert summary is not None
    assert summary.group(1, 3) == (str(sends), str(receives))
    assert summary.group(2) == str(bytes_sent(program))


@pytest.mark.parametrize("order", ORDERS)
def test_every_node_is_printed_once_and_before_it_is_read(stages: Any, order: str) -> None:
    for program in stages[order].values():
        text = print_program(program)
        lines = [line for line in text.splitlines() if line.startswith("%")]
        defined = [line.split(":")[0] for line in lines]
        results = [name for name in defined if name[1:].isdigit()]
        assert results == [f"%{i}" for i in range(len(calls(program)))]
        assert sorted(set(defined) - set(results)) == sorted(f"%{n}" for n in program.placeholders)
        known: set[str] = set()
        for line in lines:
            assert set(re.findall(r"%\w+", line.split(" = ", 1)[1])) <= known
            known.add(line.split(":")[0])
        weights = set(re.findall(r"@([\w.]+)", "\n".join(lines)))
        assert weights == {weight.name for weight in program.weights.values()}


@pytest.mark.parametrize("order", ORDERS)
def test_texts_are_the_same_every_time_and_everywhere(stages: Any, order: str) -> None:
    for stage, program in compiled_stages(order).items():
        text = print_program(program)
        assert text == print_program(stages[order][stage])
        assert str(ROOT) not in text
        assert not re.search(r"(?<!/)/\w+/\w", text), "an absolute path"
        assert "0x" not in text
        assert "aten" not in text
        assert "ringcompile" not in text
        assert all(line == line.rstrip() for line in text.splitlines())


def test_layers_are_apart(stages: Any) -> None:
    text = print_program(stages["zigzag"]["rank1"])
    headings = re.findall(r"\n\n// (\S.*)\n[%{]", text)
    assert headings == ["token_embedding", "blocks.0", "norm, head"]


def test_only_used_symbols_are_explained(stages: Any) -> None:
    def terms(stage: str) -> set[str]:
        head = print_program(stages["zigzag"][stage]).split("\n\n")[0]
        return {line[3:].split("  ")[0] for line in head.splitlines() if line[3:4].strip()}

    always = {"model decoder", "passes", "s", "b", "@name", "file:line"}
    assert terms("capture") == always
    assert terms("place") == {*always, "s/ring", "n", "causal"}
    assert terms("every") == {*always, "s/ring", "n", "causal", "ring", "ring.op", "chunks"}
    assert terms("rank1") == {
        *always,
        "s/ring", "{ ... }",
        "n",
        "causal",
        "ring.op",
        "chunks",
        "to, source",
        "state",
    }


def test_a_fixed_length_stands_in_the_types(stages: Any) -> None:
    program = stages["zigzag"]["rank1"]
    assert program.sequence is not None
    text = print_program(replace(program, lengths=program.sequence.bindings({"s": 4094})))
    assert re.search(r"\n// s = 4094 +length of the sequence in tokens, fixed", text)
    assert re.search(r"\n// n = 2048 +tokens that a rank holds", text)
    assert "f32[b, 4094/ring, 8]" in text
    assert "shape=[b, 2048, 2, 4]" in text
    assert f"{2 * 4 * 4 * 2048}*b bytes" in text
    assert not re.search(r"[\[ ]s[/,\]]", text.split("\n\n", 1)[1])


class Odd(nn.Module):
    """Nested outputs, a gather, a window, a long list of pieces."""

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        at = torch.arange(x.shape[1])
        apart = at[:, None] - at[None, :]
        q = x[:, None]
        seen = F.scaled_dot_product_attention(q, q, q, attn_mask=(apart >= 0) & (apart < 3))[:, 0]
        return {"y": seen, "more": (x.mean(1), [x.softmax(-1) * float("inf")])}


def test_nested_outputs_gathers_and_windows() -> None:
    program = capture(Odd(), (torch.randn(1, 6, 4),))
    made = transform(program, "ring=2", gather_unknown=True)
    every, one = print_program(made.program), print_program(made.rank(0))
    assert re.search(r"return \{y: %\d+, more: \(%\d+, \[%\d+\]\)\}", every)
    assert re.search(r"ring\.attention\(%\d+, %\d+, %\d+\) scale=0.5 causal window 3 ", every)
    assert "// window" in every
    for program, text in ((made.program, every), (made.rank(0), one)):
        gathers = [n for n in calls(program) if n.target is op("gather")]
        assert text.count("ring.gather(%") == len(gathers)


@pytest.mark.parametrize("name", ["gpt-tiny", "bert-tiny", "dense-4l-tiny"])
def test_models_of_the_zoo(name: str) -> None:
    made = transform(zoo_program(name, name), "ring=4")
    for program in (made.program, made.rank(1)):
        text = print_program(program, weights=True)
        assert text.startswith(f"// model {name}   mesh ring=4   order ")
        assert len(re.findall(r"^%\d+: ", text, re.MULTILINE)) == len(calls(program))
        assert ("key_mask=%" in text) == (name == "bert-tiny")


# -- single values and calls ----------------------------------------------------------------------


def attention(**options: Any) -> tuple[Program, fx.Node, dict[fx.Node, str]]:
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    node = graph.call_function(op("attention"), (q, k, v), {"scale": 0.5, **options})
    names = {n: f"%{n.name}" for n in graph.nodes}
    return Program(graph, (), {}, {}, Structure("none")), node, names


BANDS = [
    (None, None, "full"),
    (0, None, "causal"),
    (0, 8, "causal window 9"),
    (None, 3, "band ..3"),
    (-2, None, "band -2.."),
    (-2, 2, "band -2..2"),
]


@pytest.mark.parametrize(("lower", "upper", "words"), BANDS)
def test_bands_in_words(lower: int | None, upper: int | None, words: str) -> None:
    program, node, names = attention(lower=lower, upper=upper)
    assert band_text(node) == words
    assert call_text(program, node, names) == f"attention(%q, %k, %v) scale=0.5 {words}"
    if not words.startswith("band"):
        assert str(Band(lower, upper)) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        (torch.float16, "f16"),
        (0.08838834764831845, "0.0883883"),
        (float("-inf"), "-inf"),
        (-1.0, "-1.0"),
        (1e-5, "1e-05"),
        (torch.strided, "strided"),
        ([1, (2, 3)], "[1, [2, 3]]"),
        (list(range(8)), "[0, 1, 2, 3, 4, 5, 6, 7]"),
        (list(range(64)), "[0, 1, 2, ..., 61, 62, 63]"),
    ],
    ids=str,
)
def test_values(value: Any, text: str) -> None:
    program, _, names = attention()
    assert value_text(program, value, names) == text


aten = torch.ops.aten
# The operand x stands for any tensor of the result's type, f32[2, 4].
X = object()
CALLS = [
    (aten.add.Tensor, (X, 2), {}, "add(%x, 2)"),
    (aten.add.Tensor, (X, X), {"alpha": 3}, "add(%x, %x) alpha=3"),
    (aten.sum.dim_IntList, (X, [1]), {"keepdim": True}, "sum(%x) dim=[1] keepdim=True"),
    (aten.div.Tensor_mode, (X, 2), {"rounding_mode": "floor"}, "div(%x, 2) rounding_mode=floor"),
    (aten.layer_norm.default, (X, [4], X, X, 1e-5, False), {}, "layer_norm(%x, %x, %x)"),
    (
        aten.layer_norm.default,
        (X, [2, 4], None, X),
        {},
        "layer_norm(%x, bias=%x) normalized_shape=[2, 4]",
    ),
    (aten.index.Tensor, (X, [None, X]), {}, "index(%x, [None, %x])"),
    (aten.full.default, ([2, 4], 0.5), {"dtype": torch.float32}, "full(0.5) size=[2, 4]"),
    (aten.full.default, ([2, 4], 0.5), {"dtype": torch.int64}, "full(0.5) size=[2, 4] dtype=i64"),
    (aten.to.dtype, (X, torch.float32), {}, "to(%x) dtype=f32"),
    (aten.slice.Tensor, (X, 1, 2, 2**63 - 1), {}, "slice(%x) dim=1 start=2"),
    (aten.gather.default, (X, 1, X), {}, "gather(%x, %x) dim=1"),
    (op("gather"), (X,), {"dim": 1, "axis": "ring", "limit": 8}, "ring.gather(%x) dim=1 limit=8"),
    (
        op("shift_start"),
        (X,),
        {"axis": "ring", "to": 1, "source": None, "sends": [3], "takes": [], "of": "o"},
        "ring.shift_start(%x) to=1 source=None sends=[3] takes=[]",
    ),
    (
        op("attention"),
        (X, X, X, None, X),
        {"scale": 1.0},
        "attention(%x, %x, %x, mask=%x) scale=1.0 full",
    ),
    (
        op("attention"),
        (X, X, X, X),
        {"scale": 1.0},
        "attention(%x, %x, %x, key_mask=%x) scale=1.0 full",
    ),
    (operator.getitem, (X, 1), {}, "operator.getitem(%x, 1)"),
]


@pytest.mark.parametrize(("target", "args", "kwargs", "text"), CALLS, ids=[c[3] for c in CALLS])
def test_calls(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], text: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(target, map_values(args, lambda v: x if v is X else v), kwargs)
    node.meta["type"] = TensorType.whole(torch.float32, (2, 4))
    program = Program(graph, (), {}, {}, Structure("none"))
    assert call_text(program, node, {x: "%x"}) == text
