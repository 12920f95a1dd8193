"""How a model is compiled: one dataclass whose fields are the options, wherever they are given.

A field makes the option of the command line, the keyword of `transform`, the entry in an
artifact's manifest, and what the list of passes is built from. A test holds `Given` to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, TypedDict

from ringcompile.errors import RingCompileError

ORDERS = ("contiguous", "zigzag")
# How the ranks that share a cache compute new tokens.
DECODES = ("simple", "helix")
# What a model's weights may be cast to.
DTYPES = ("float16", "bfloat16", "float32", "float64")
# How compiled programs run: all ranks in this process, or a process for each.
BACKENDS = ("lockstep", "gloo", "nccl")
# How the step of one new token runs: on GPUs as a CUDA graph; op by op; or, on CPUs, recorded and
# replayed as a CUDA graph is, for tests.
CUDA_GRAPHS = ("auto", "off", "rehearse")
# Random inputs at each length that `verify` compares numbers at.
TRIES = 2
# How far transfers may overlap with compute.
NONE, SCHEDULE, HALVES = OVERLAPS = ("none", "schedule", "halves")
# What people and other tools read of a program.
FORMATS = ("text", "json", "python", "dot", "graphml")


def _option(
    default: Any, help_: str, *, choices: tuple[str, ...] = (), flag: str = "", metavar: str = "",
    off: str = "",
) -> Any:
    """A field, with what the command line says of it.

    Args:
        default: the value where nothing is given.
        help_: one sentence or two.
        choices: the values that it takes, if they are few.
        flag: what the command line calls it, where that is not its name.
        metavar: what stands for the value in the help.
        off: the flag that turns off what is on by default.
    """
    about = {"help": help_, "choices": choices, "flag": flag, "metavar": metavar, "off": off}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Options:
    """How a model is compiled for a mesh.

    Attributes:
        order: which positions a rank holds: "contiguous", "zigzag", or "auto" (zigzag where all
            attention is causal, so that every rank has the same work).
        capacity: where experts take a limited number of tokens: "exact" drops the tokens that a
            single device drops, "local" lets each rank count its own tokens only, or with a cache
            the new tokens of each call.
        ring: with "rotate", each rank sends its keys and values to one other rank at a time, while
            it computes; "gather" brings all of them to every rank at once, which is faster for
            short sequences.
        tp_sequence: between the layers that `tp` splits, divide the sequence over it: a
            reduce-scatter and an all-gather in place of each all-reduce.
        stages: the layer that each pipeline stage but the first begins with; cut by cost if empty.
        microbatches: in how many parts a pipeline runs each replica's share of a batch; by default
            one for each sequence, up to four for each stage.
        length: fix the sequence length in tokens; blocks out of a window's reach are then dropped
            from the graphs, and other lengths refused. By default one program serves all lengths.
        gather_unknown: compute what has no rule whole on every rank instead of refusing it.
        cache: also compile for generating tokens, with a cache for sequences of up to so many
            tokens, prompt included.
        decode: where the ranks of `ring` and `ulysses` share a cache, what they do with new tokens:
            "simple" computes all of a layer on each of them, "helix" shares out what is behind
            attention as well; "auto" is the faster one by the cost model.
        fuse: mark groups of thin ops (pointwise ops, casts, copies, norms) that one kernel
            computes; on GPUs they run so.

    Raises:
        RingCompileError: a value that an option does not take.
    """

    order: str = _option(
        "auto", "Which positions of the sequence each rank holds. auto: zigzag if all attention is "
        "causal, otherwise contiguous.",
        choices=("auto", *ORDERS),
    )
    capacity: str = _option(
        "exact", "How experts with a limited capacity count tokens. exact: over all ranks, so that "
        "the same tokens are dropped as on one device. local: each rank counts its own tokens; "
        "with a cache, the new tokens of each call.",
        choices=("exact", "local"),
    )
    ring: str = _option(
        "rotate", "How keys and values move along the axis ring. rotate: to one other rank at a "
        "time, while attention runs. gather: in one all-gather, which is faster for short "
        "sequences.",
        choices=("rotate", "gather"),
    )
    tp_sequence: bool = _option(
        False, "Also split the sequence over tp between tensor-parallel layers: reduce-scatter "
        "and all-gather instead of all-reduce."
    )
    stages: tuple[str, ...] = _option(
        (), "The layers with which the second and later pipeline stages begin, for example "
        "model.layers.16. By default stages are balanced by cost.",
        metavar="LAYERS",
    )
    microbatches: int | None = _option(
        None, "Number of microbatches of a pipeline. By default one for each sequence of a "
        "replica's batch, at most four for each stage.", metavar="N",
    )
    length: int | None = _option(
        None, "Compile for sequences of N tokens only. By default the programs take any length.",
        flag="seq", metavar="N",
    )
    gather_unknown: bool = _option(
        False, "Run ops that have no sharding rule whole on every rank instead of refusing them."
    )
    cache: int | None = _option(
        None, "Also compile the programs that generate tokens, with a KV cache for sequences of "
        "up to N tokens, prompt included.", metavar="N",
    )
    decode: str = _option(
        "auto", "What the ranks of ring and ulysses do with a new token (with --cache). simple: "
        "each computes the whole layer. helix: they divide everything after attention. auto: the "
        "faster one by the cost model.",
        choices=("auto", *DECODES),
    )

    fuse: bool = _option(
        True, "Compute thin ops between matmuls, attention and communication (pointwise ops, "
        "casts, copies, norms) in fused groups, one kernel each.", off="no-fuse",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            choices, value = option.metadata["choices"], getattr(self, option.name)
            if choices and value not in choices:
                raise RingCompileError(
                    f"unknown {option.name} '{value}'", hint=f"one of: {', '.join(choices)}"
                )
        if self.microbatches is not None and self.microbatches < 1:
            raise RingCompileError(f"{self.microbatches} microbatches: it must be at least 1")
        if self.length is not None and self.length < 1:
            raise RingCompileError(f"sequence length {self.length}: it must be at least 1")
        if self.cache is None and self.decode != "auto":
            raise RingCompileError(
                f"decode={self.decode} needs a cache", hint="pass cache=N (--cache N) as well"
            )
        if self.cache is not None and self.cache < 1:
            raise RingCompileError(f"a cache for {self.cache} tokens: it must be at least 1")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Options by name, as a caller gives them.

        Raises:
            RingCompileError: an option that there is not, or a value that it does not take.
        """
        known = [option.name for option in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise RingCompileError(
                f"unknown option '{unknown[0]}'", hint=f"options are: {', '.join(known)}"
            )
        return cls(**{**given, "stages": tuple(given.get("stages", ()))})

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Options:
        """The options in an artifact's record, which may hold other things beside them."""
        known = {option.name for option in fields(cls)}
        return cls.of({name: value for name, value in record.items() if name in known})

    def given(self) -> Given:
        """The keywords that give these options."""
        return Given(**{option.name: getattr(self, option.name) for option in fields(self)})  # type: ignore[typeddict-item]

    def record(self) -> dict[str, Any]:
        """What a manifest keeps: every option by its name."""
        return {**asdict(self), "stages": list(self.stages)}


DEFAULT = Options()


class Given(TypedDict, total=False):
    """The fields of `Options` once more, so that type checkers know the keywords of `transform`."""

    order: str
    capacity: str
    ring: str
    tp_sequence: bool
    stages: tuple[str, ...] | list[str]
    microbatches: int | None
    length: int | None
    gather_unknown: bool
    cache: int | None
    decode: str
    fuse: bool


def option_fields() -> tuple[Field[Any], ...]:
    """The fields of `Options`, in order; for what `metadata` has of each, see `_option`."""
    return fields(Options)
