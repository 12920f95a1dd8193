"""What each strategy sends: formulas, written down from what the strategy is, not from the code.

A formula is a list of terms, each with the ranks that it is for; the first that fits holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

LEGEND: Final = {
    "B": "rows of the batch",
    "s": "tokens of the sequence",
    "n": "tokens of a rank at a time: s over what divides the sequence, `time` too, rounded up to "
         "whole chunks; with a cache, the new tokens",
    "L": "layers",
    "D": "hidden size",
    "H": "query heads",
    "G": "key heads",
    "d": "size of a head",
    "b": "bytes of a number",
    "E": "experts",
    "k": "experts that a token goes to",
    "f": "capacity factor",
    "c": "chunks of a rank: 2 in zigzag order, else 1",
    "w": "tokens that a convolution sees",
    "z": "states that a state space keeps of each feature",
    "h": "ranks before it that a window reaches into: (w - 1) / n, rounded up",
    "R": "ranks on `ring`",
    "U": "ranks on `ulysses`",
    "T": "ranks on `tp`",
    "P": "ranks on `pp`",
    "N": "ranks on `ep`",
    "M": "pieces on `time`",
    "W": "ranks on `tile`",
    "r": "place on `ring`, from 0",
    "p": "place on `pp`, from 0",
    "q": "place on `ulysses`, from 0",
    "K": "2 L B n G d b: keys and values of a rank's tokens in all layers",
    "X": "B n D b: hidden states of a rank's tokens",
}
Terms = tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class Row:
    """One strategy on one model.

    Attributes:
        terms: pairs of a formula for a rank's bytes and a condition; an empty one always fits.
        why: where the formula comes from.
    """

    name: str
    model: str
    parallel: str
    terms: Terms
    why: str
    options: dict[str, Any] = field(default_factory=dict)


def always(formula: str) -> Terms:
    return ((formula, ""),)


def pair(more: str = "", over: str = "") -> Terms:
    """Two ranks in zigzag order, and something more.

    The early chunk of each goes to the other; the late chunk of rank 1 goes to rank 0, that of
    rank 0 is the end of the sequence and stays.

    Args:
        more: what is sent besides.
        over: ranks that divide keys and values, such as `P*T`.
    """
    half, whole = (f"K/(2*{over})", f"K/({over})") if over else ("K/2", "K")
    rest = f" + {more}" if more else ""
    return ((half + rest, "r < 1"), (whole + rest, ""))


EXACT: Final = "2*L*E*Min(n, ceiling(f*k*s/E))*D*b*(N - 1)/N + 8*c*L*E*(N - 1)"
LOCAL: Final = "2*L*E*ceiling(f*k*n/E)*D*b*(N - 1)/N"
EARLIER: Final = "M*(M - 1)/2*K*(R - 1)"
TILED: Final = "L*B*n*H*(d*b + 4*(d + 1))*(W - 1)"
REDUCED: Final = "4*L*X*(T - 1)/T"
STATES: Final = "4*L*B*n*H*(d + 1)*(R - 1)"  # outputs and log-sum-exps of all heads, in float32

ROWS: Final = (
    Row("ring, causal, contiguous", "dense-4l-tiny", "ring=4",
        always("K*(R - 1 - r)"), "a rank sends its own keys to all behind it",
        {"order": "contiguous"}),
    Row("ring, causal, zigzag", "dense-4l-tiny", "ring=4",
        always("K*(R - 1 + r)/2"),
        "a rank sends its early chunk to all others, its late chunk to those before it",
        {"order": "zigzag"}),
    Row("ring of 2, causal, zigzag", "llama-tiny", "ring=2", pair(),
        "the early chunks are swapped; one late chunk is seen by the other rank",
        {"order": "zigzag"}),
    Row("ring, all tokens see all", "bert-tiny", "ring=4", always("K*(R - 1)"),
        "every rank's keys to every other"),
    Row("ring, a window of one rank", "window of 8", "ring=4",
        always("K*Min(h, R - 1 - r)"),
        "keys go as far as the window reaches, not round the end",
        {"order": "contiguous", "length": 48}),
    Row("ring, a window of two ranks", "window of 20", "ring=4",
        always("K*Min(h, R - 1 - r)"), "likewise",
        {"order": "contiguous", "length": 48}),
    Row("ring, a convolution", "convolution of 4", "ring=4",
        (("B*(w - 1)*D*b", "r < R - 1"), ("0", "")),
        "the last w - 1 tokens of a rank go to the next one", {"order": "contiguous"}),
    Row("ring, a convolution, zigzag", "convolution of 4", "ring=4",
        (("2*B*(w - 1)*D*b", "(r > 0) & (r < R - 1)"), ("B*(w - 1)*D*b", "")),
        "those of the early chunk to the rank behind, those of the late chunk to the one before; "
        "the first and the last rank have one neighbour",
        {"order": "zigzag"}),
    Row("ring x ulysses, a convolution", "convolution of 4", "ring=2,ulysses=2",
        (("B*(w - 1)*D*b", "r + q < R + U - 2"), ("0", "")),
        "all ranks that divide the sequence are one row of neighbours", {"order": "contiguous"}),
    Row("time x ring, a convolution", "convolution of 3", "ring=4,time=2",
        (("M*B*(w - 1)*D*b", "r < R - 1"), ("(M - 1)*B*(w - 1)*D*b", "")),
        "likewise in every piece; the last rank's go to the first, for the next piece",
        {"order": "contiguous"}),
    Row("ring, a linear recurrence", "recurrence of 12", "ring=8", always("2*c*B*D*b*(R - 1)"),
        "the product of each chunk's decays, and its sum, go to all other ranks; its tokens do not",
        {"order": "contiguous"}),
    Row("ring, a linear recurrence, zigzag", "recurrence of 12", "ring=4",
        always("2*c*B*D*b*(R - 1)"), "likewise, of two chunks", {"order": "zigzag"}),
    Row("ring, a state space such as Mamba's", "state-space with states of 4", "ring=8",
        always("2*c*B*D*z*b*(R - 1)"),
        "likewise, for each state: the products of its factors, and the state itself",
        {"order": "contiguous"}),
    Row("ring as a gather", "dense-4l-tiny", "ring=4", always("K*(R - 1)"),
        "every rank's keys to every other", {"ring": "gather"}),
    Row("tiles, all tokens see all", "bert-tiny", "ring=2,tile=2",
        always(f"K*(R - 1) + {TILED}"),
        "keys go along the ring; queries along the tile, results in float32 with log-sum-exps"),
    Row("tiles, causal, zigzag", "dense-4l-tiny", "ring=4,tile=4",
        always(f"K*(R - 1 + r)/2 + {TILED}"), "likewise; keys as in a ring",
        {"order": "zigzag"}),
    Row("tiles, causal, contiguous, grouped queries", "llama-tiny", "ring=3,tile=2",
        always(f"K*(R - 1 - r) + {TILED}"), "likewise", {"order": "contiguous"}),
    Row("tiles without a ring", "moe-4l-tiny", "tile=4", always(f"{TILED} + 8*c*L*E*(W - 1)"),
        "queries go to all keys, which stay; counts of each chunk's experts"),
    Row("ulysses", "dense-4l-tiny", "ulysses=4", always("2*L*B*n*(H + G)*d*b*(U - 1)/U"),
        "queries, keys and values to heads, outputs back; a rank's own part stays"),
    Row("ulysses, grouped queries", "llama-tiny", "ulysses=2",
        always("2*L*B*n*(H + G)*d*b*(U - 1)/U"), "likewise, key heads un-expanded"),
    Row("ring x ulysses", "dense-4l-tiny", "ring=2,ulysses=2",
        pair("2*L*B*n*(H + G)*d*b*(U - 1)/U"),
        "1/U of the heads, U times the tokens: the ring sends as much as alone"),
    Row("tp", "dense-4l-tiny", "tp=4", always(REDUCED),
        "two all-reduces a layer, behind attention and MLP"),
    Row("tp, embedding and head by vocabulary", "llama-tiny", "tp=2",
        always("2*(2*L + 1)*X*(T - 1)/T"), "one more all-reduce, behind the embedding"),
    Row("tp, mixture of experts", "moe-4l-tiny", "tp=4", always(REDUCED),
        "experts by features, as an MLP"),
    Row("tp with tp_sequence", "dense-4l-tiny", "tp=4", always("(4*L - 1)*X*(T - 1)"),
        "an all-reduce is a reduce-scatter and a gather; the first layer's input is whole",
        {"tp_sequence": True}),
    Row("tp with tp_sequence, by vocabulary", "llama-tiny", "tp=2",
        always("2*(2*L + 1)*X*(T - 1)"), "likewise, with embedding and head",
        {"tp_sequence": True}),
    Row("pp", "dense-4l-tiny", "pp=4", (("X", "p < P - 1"), ("0", "")),
        "each stage but the last hands on the hidden states"),
    Row("pp in time", "dense-4l-tiny", "pp=2,time=3", (("M*X", "p < P - 1"), ("0", "")),
        "likewise, piece by piece: the tokens of a rank are a piece's"),
    Row("dp", "dense-4l-tiny", "dp=4", always("0"), "replicas have nothing to say to each other"),
    Row("ep, exact capacity", "moe-4l-tiny", "ep=4", always(f"K*(N - 1) + {EXACT}"),
        "keys are gathered; slots of every expert there and back; counts of each chunk's experts"),
    Row("ep, local capacity", "moe-4l-tiny", "ep=4", always(f"K*(N - 1) + {LOCAL}"),
        "likewise, without counts", {"capacity": "local"}),
    Row("ring, exact capacity", "moe-4l-tiny", "ring=2", pair("8*c*L*E*(R - 1)"),
        "the ring, and counts of each chunk's experts", {"order": "zigzag"}),
    Row("ring x tp", "dense-4l-tiny", "ring=2,tp=2", pair(REDUCED, "T"),
        "the ring with 1/T of the key heads"),
    Row("tp x pp", "dense-4l-tiny", "tp=2,pp=2",
        ((f"{REDUCED}/P + X", "p < P - 1"), (f"{REDUCED}/P", "")), "a stage has 1/P of the layers"),
    Row("pp x ring x tp", "dense-4l-tiny", "pp=2,ring=2,tp=2",
        tuple((text, f"({when or 'r > 0'}) & ({stage})")
              for more, stage in ((f"{REDUCED}/P + X", "p < P - 1"), (f"{REDUCED}/P", "p > P - 2"))
              for text, when in pair(more, "P*T")),
        "the sum of the three"),
    Row("ring x ep, contiguous", "moe-4l-tiny", "ring=2,ep=2",
        always(f"K*(N - 1) + N*K*(R - 1 - r) + {LOCAL}"),
        "keys are gathered along ep and sent along the ring",
        {"order": "contiguous", "capacity": "local"}),
    Row("time x ring, contiguous", "dense-4l-tiny", "ring=4,time=2",
        always(f"M*K*(R - 1 - r) + {EARLIER}"),
        "each piece as a sequence by itself; keys of earlier pieces to all for each later one",
        {"order": "contiguous"}),
    Row("time x ring, zigzag", "dense-4l-tiny", "ring=4,time=3",
        always(f"M*K*(R - 1 + r)/2 + {EARLIER}"), "likewise, each piece in zigzag order",
        {"order": "zigzag"}),
    Row("time x ring, all tokens see all", "bert-tiny", "ring=4,time=2",
        always("M**2*K*(R - 1)"), "keys of every piece to every other rank for every piece"),
    Row("time x ring, a window of one rank", "window of 4", "ring=4,time=2",
        (("M*K*Min(h, R - 1 - r)", "r < R - 1"), ("K*(M - 1)", "")),
        "keys go as far as the window reaches, from the end of a piece to the start of the next",
        {"order": "contiguous", "length": 48}),
    Row("time x ulysses", "dense-4l-tiny", "ulysses=4,time=2",
        always("M*2*L*B*n*(H + G)*d*b*(U - 1)/U"),
        "as without pieces: keys of earlier pieces are there, by heads"),
    Row("time x ep, exact capacity", "moe-4l-tiny", "ep=4,time=2",
        always(f"M*(K*(N - 1) + {EXACT})"),
        "keys of each piece are gathered once; slots and counts are those of each piece"),
    Row("pp x ring in time", "llama-tiny", "pp=2,ring=2,time=2",
        tuple((text, f"({when or 'r > 0'}) & ({stage})")
              for more, stage in (("M*X", "p < P - 1"), ("0", "p > P - 2"))
              for text, when in (
                  (f"M*K/(2*P) + ({EARLIER})/P + {more}", "r < 1"),
                  (f"M*K/P + ({EARLIER})/P + {more}", ""))),
        "a stage has 1/P of the layers, and hands on hidden states piece by piece",
        {"order": "zigzag"}),
    Row("decode over ring, simple", "dense-4l-tiny", "ring=4", always(STATES),
        "an all-gather a layer: of all heads the attention over a rank's keys, and its log-sum-exp",
        {"cache": 96, "decode": "simple"}),
    Row("decode over ring, Helix", "dense-4l-tiny", "ring=4",
        always(f"{STATES}/R + 4*L*X*(R - 1)/R"),
        "an all-to-all of the same, by heads; an all-reduce behind the output projection and one "
        "behind the MLP", {"cache": 96, "decode": "helix"}),
    Row("decode over ring x tp, simple", "dense-4l-tiny", "ring=2,tp=2",
        always(f"{STATES}/T + {REDUCED}"), "1/T of the heads; all-reduces over tp",
        {"cache": 96, "decode": "simple"}),
    Row("decode over ring x tp, Helix", "dense-4l-tiny", "ring=2,tp=2",
        always(f"{STATES}/(R*T) + 4*L*X*(R*T - 1)/(R*T)"), "all-reduces over ring x tp",
        {"cache": 96, "decode": "helix"}),
    Row("decode over pp x ring, Helix", "dense-4l-tiny", "pp=2,ring=2",
        ((f"({STATES}/R + 4*L*X*(R - 1)/R)/P + X", "p < P - 1"),
         (f"({STATES}/R + 4*L*X*(R - 1)/R)/P", "")), "a stage has 1/P of the layers",
        {"cache": 96, "decode": "helix"}),
    Row("decode over ep", "experts of 4", "ep=4",
        always("4*L*B*n*H*(d + 1)*(N - 1) + 2*L*X*(N - 1)/N"),
        "an all-gather as over a ring; an all-reduce of what each rank's experts add to a token",
        {"cache": 96}),
    Row("decode over ring x ep", "experts of 4", "ring=2,ep=2",
        always("4*L*B*n*H*(d + 1)*(R*N - 1) + 2*L*X*(N - 1)/N"),
        "a cache over ring x ep; all-reduces over ep", {"cache": 96}),
    Row("decode over ep x tp", "experts of 4", "ep=2,tp=3",
        always("4*L*B*n*H*(d + 1)*(N - 1)/T + 2*L*X*(T - 1)/T + 2*L*X*(N*T - 1)/(N*T)"),
        "1/T of the heads; all-reduces behind attention over tp, behind experts over ep x tp",
        {"cache": 96}),
)  # fmt: skip
