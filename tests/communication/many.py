"""What the busiest rank of a long ring sends, and of as many ranks in tiles: emitted programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ringcompile.capture.export import capture
from ringcompile.capture.loaders import load_model
from ringcompile.compiler import transform
from ringcompile.ir.communication import bytes_sent
from ringcompile.ir.expr import BATCH, FIRST, PART, bind
from ringcompile.ir.program import Program

TOKENS: Final = 1024  # of each rank


@dataclass(frozen=True)
class Many:
    """A model on many ranks.

    Attributes:
        model: its name.
        ring, tiles: two specs of as many ranks.
        sent: the bytes of the rank that sends most, by spec.
    """

    model: str
    ring: str
    tiles: str
    sent: tuple[int, int]


MANY: Final = (
    Many("bert-tiny", "ring=64", "ring=8,tile=8", (66_060_288, 14_909_440)),
    Many("bert-tiny", "ring=256", "ring=16,tile=16", (267_386_880, 31_948_800)),
    Many("dense-4l", "ring=64", "ring=8,tile=8", (8_455_716_864, 2_350_645_248)),
    Many("dense-4l", "ring=256", "ring=16,tile=16", (34_225_520_640, 5_037_096_960)),
    Many("llama-tiny", "ring=64", "ring=8,tile=8", (33_030_144, 15_024_128)),
    Many("llama-tiny", "ring=256", "ring=16,tile=16", (133_693_440, 32_194_560)),
)


def prepared(model: str) -> Program:
    """A model's program, from shapes alone."""
    loaded = load_model(model, weights=False)
    return capture(loaded.module, loaded.args, name=model)


def most_sent(program: Program, spec: str) -> int:
    """The bytes of the rank that sends most, which is the last one; where all see all, any."""
    ranks = transform(program, spec, check=False).world_size
    made = transform(program, spec, length=TOKENS * ranks, check=False)
    assert made.program.sequence is not None
    lengths = made.program.sequence.bindings({"s": TOKENS * ranks})
    known = {**made.rank(ranks - 1).lengths, BATCH: 1, PART: 1, FIRST: 0, **lengths}
    return int(bind(bytes_sent(made.rank(ranks - 1)), known))


def found(row: Many) -> tuple[int, int]:
    """What a row should say."""
    program = prepared(row.model)
    return most_sent(program, row.ring), most_sent(program, row.tiles)
