"""What became of a model, layer by layer: the answer of `ringcompile check`."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx

from ringcompile.axes import TIME
from ringcompile.ir.calls import Call
from ringcompile.ir.nodes import location_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ops.blocks import Band

_IN_TILES = "tiles: keys and values rotate, queries are gathered"
_FORMS = {
    "ringcompile.ring_attention.default": "ring: keys and values rotate",
    "ringcompile.block_attention.default": "local: queries are split, keys are replicated",
    "ringcompile.attention.default": "whole on every rank",
}


@dataclass(frozen=True)
class AttentionReport:
    """One attention of the model."""

    layer: str
    line: str
    form: str
    mask: str


@dataclass(frozen=True)
class Report:
    """Whether a model can be compiled for a mesh, and how.

    Attributes:
        supported: no op was refused.
        inputs: every input with the dims that vary: `b` is the batch, `s` the sequence.
        attention: every attention: its layer, line, what it becomes, and the kind of its mask.
        gathers: tensors that are gathered whole on every rank, and where.
        refusals: what has no rule, as full error texts.
        notes: what else the user should know: a fixed length, how experts are run.
        bytes_sent: bytes each rank sends in one run, as an expression in the sequence length `s`
            and a rank's share `n`, by rank.
    """

    model: str
    mesh: str
    order: str
    supported: bool
    inputs: tuple[str, ...] = ()
    attention: tuple[AttentionReport, ...] = ()
    gathers: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bytes_sent: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.model} with {self.mesh}, order {self.order}"]
        lines += [f"input {text}" for text in self.inputs]
        lines += [f"{row.layer} ({row.line}): {row.form}; {row.mask}" for row in self.attention]
        lines += [f"note: {text}" for text in self.notes]
        lines += [f"gathered whole on every rank: {text}" for text in self.gathers]
        lines += [f"refused: {text}" for text in self.refusals]
        return "\n".join([*lines, "supported" if self.supported else "not supported"])

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def inputs_of(program: Program) -> tuple[str, ...]:
    """What the dims of each input were taken for."""
    return tuple(f"{spec.name}: {spec.type}" for spec in program.inputs)


def attention_of(program: Program) -> tuple[AttentionReport, ...]:
    """Every attention of a partitioned program."""
    return tuple(
        AttentionReport(
            location_of(node).layer,
            location_of(node).short,
            _form(node),
            describe_mask(node),
        )
        for node in program.graph.nodes
        if str(node.target) in _FORMS
    )


def _form(node: fx.Node) -> str:
    if node.kwargs.get("axis") == TIME:
        return "in time: keys and values of other pieces are already on the rank"
    return _IN_TILES if node.kwargs.get("tile") else _FORMS[str(node.target)]


def gathers_of(program: Program) -> tuple[str, ...]:
    """Every tensor that is gathered whole, with its type and line."""
    return tuple(
        f"{location_of(node).short}: {location_of(node).layer or 'the model'}: {type_of(node)}"
        for node in program.graph.nodes
        if str(node.target) == "ringcompile.gather.default" and node.kwargs["axis"] != TIME
    )


def describe_mask(node: fx.Node) -> str:
    """`causal`, `causal window 9 + key mask`, `full + bias f32[1, 8, s/ring, s] + sink`."""
    call, kind = Call(node), node.meta.get("mask_kind", "mask")
    parts = [str(_own_band(call["lower"], call["upper"], kind))]
    if call["key_mask"] is not None:
        parts.append("key mask")
    if call["mask"] is not None:
        names = sorted(kind.split(" + "), key=lambda name: not _SAYS_ALL.fullmatch(name))
        typed = "" if _SAYS_ALL.fullmatch(names[-1]) else f" {type_of(call['mask'])}"
        parts.append(" + ".join(names) + typed)
    if call["softcap"] is not None:
        parts.append(f"soft cap {call['softcap']:g}")
    if _has_sink(node):
        parts.append("sink")
    return " + ".join(parts)


# What needs no type beside it: nothing but positions or documents decides.
_SAYS_ALL = re.compile(r"documents|prefix|chunks of \d+")


def _own_band(lower: int | None, upper: int | None, kind: str) -> Band:
    """The band without the bounds that follow from chunks anyway."""
    found = re.search(r"chunks of (\d+)", kind)
    reach = int(found[1]) - 1 if found else None
    return Band(
        None if lower is not None and reach == -lower and lower < 0 else lower,
        None if upper is not None and reach == upper else upper,
    )


def _has_sink(node: fx.Node) -> bool:
    """Over whole keys, the op that finishes the state takes the sink."""
    holder = node if "sink" in Call(node).arguments else next(iter(node.users))
    return Call(holder)["sink"] is not None
