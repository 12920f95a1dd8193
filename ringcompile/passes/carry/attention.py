"""Attention in a program with a cache: new keys are stored, new queries see all that are kept.

    o = attention(q, k, v)     k [s/time]  ->  k, v = store(k), store(v);  o = cached_attention(q)

Keys and values of a sequence lie on the ranks of `ring` and `ulysses`, each position on one of
them: every rank attends with all new queries over the keys that it keeps, and one exchange a
layer brings the results and their log-sum-exp together: an all-gather, or by heads an all-to-all.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import fx

from ringcompile.axes import TIME
from ringcompile.ir.calls import Call
from ringcompile.ir.expr import unbacked
from ringcompile.ir.layout import WHOLE, Layout
from ringcompile.ir.nodes import error_at, layout_of, type_of
from ringcompile.ir.printer import block_of
from ringcompile.ir.types import TensorType, accumulator_type, state_type
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.passes.carry.context import NEW, Carrying
from ringcompile.passes.requests import REDISTRIBUTE


def cache_name(what: str, attention: fx.Node) -> str:
    """The name of a cache: of keys or of values, by the attention that first reads them."""
    return f"cached_{what}_of_{attention.name}"


def reader_of(attention: fx.Node, mesh: Mesh) -> Hashable:
    """Which attentions share what is stored: those of a stage, which no layer is cut by.

    Keys that several layers use may be read in several stages of a pipeline. Each stage has memory
    of its own, so each of these layers stores them.
    """
    if mesh.size("pp") == 1:
        return None
    return block_of(attention) or attention


class AttentionWriter:
    """Writes the attentions of a program with a cache.

    Args:
        into: the program.
    """

    def __init__(self, into: Carrying) -> None:
        self.into, self.builder = into, into.builder
        self.names: dict[fx.Node, str] = {}
        self.stored: dict[tuple[fx.Node, Hashable], tuple[fx.Node, fx.Node]] = {}

    def write(self, node: fx.Node) -> fx.Node:
        """Attention of the new tokens.

        Raises:
            RingCompileError: keys behind their query would be seen.
        """
        into, call = self.into, Call(node)
        if call["lower"] is None or not isinstance(call["lower"], int) or call["lower"] < 0:
            raise error_at(
                node, "with a cache, no query may see later keys: in this attention queries do, "
                      "or its mask cannot be shown to hide them, so that later tokens could "
                      "change the results for earlier ones",
                hint="pass is_causal=True, or a mask that hides later keys",
            )
        q, key_mask, mask, sink = (
            self.builder.mapped(call[name]) for name in ("q", "key_mask", "mask", "sink")
        )
        new = [self._store(node, call[name], what)
               for name, what in (("k", "keys"), ("v", "values"))]
        type_ = into.type(type_of(node))
        parted = self._parted(node)
        make = accumulator_type if into.ranks > 1 else state_type
        state = self.builder.call(
            op("cached_attention"),
            (q, *(x for x, _ in new), *(cache for _, cache in new),
             into.of_call("places", unbacked("u0")), into.positions, key_mask, mask),
            make(type_), wide=into.ranks > 1,
            **{name: call[name] for name in ("scale", "softcap", "lower", "upper")},
        )
        if "mask_kind" in node.meta:
            state.meta["mask_kind"] = node.meta["mask_kind"]
        if parted is not None:
            type_ = parted
            state = self._exchanged(state, accumulator_type(type_))
            sink = self._sink_of(sink, type_)
        elif into.ranks > 1:
            state = self._merged(state, accumulator_type(type_))
        return self.builder.call(
            op("finish"), (state, sink), type_, name=node.name, dtype=type_.dtype
        )

    def _parted(self, node: fx.Node) -> TensorType | None:
        """The type of the result where each rank goes on with a part of the heads; else None."""
        users = list(node.users)
        if not self.into.helix or len(users) != 1 or users[0].target is not REDISTRIBUTE:
            return None
        have, want = self.into.type(type_of(node)), self.into.type(type_of(users[0]))
        before, heads = ([a for atom in x.layout.dims[1] for a in atom.axes] for x in (have, want))
        return want if heads == [*before, *self.into.axes] else None

    def _exchanged(self, state: fx.Node, type_: tuple[TensorType, TensorType]) -> fx.Node:
        """The states of all ranks, of each rank's own heads: an all-to-all over heads."""
        mine = self._packed(state, type_[0], self.into.ranks)
        every = self.builder.call(
            op("all_to_all"), (mine,), type_of(mine), split=0, concat=0,
            axis=",".join(self.into.axes), why="attention over each rank's keys, by heads",
        )
        return self.builder.call(op("merge_states"), (every,), type_)

    def _sink_of(self, sink: fx.Node | None, out: TensorType) -> fx.Node | None:
        """The sinks of a rank's own heads."""
        if sink is None:
            return None
        type_ = type_of(sink).with_layout(Layout((out.layout.dims[1],)))
        return self.builder.call(REDISTRIBUTE, (sink,), type_, layout=str(type_.layout))

    def _store(self, node: fx.Node, x: fx.Node, what: str) -> tuple[fx.Node, fx.Node]:
        """Keys or values of new tokens, written to the cache, and the cache; once for all."""
        name = self.names.setdefault(x, cache_name(what, node))
        key = x, reader_of(node, self.into.mesh)
        if key not in self.stored:
            type_ = self.into.type(type_of(x))
            batch, heads, _, width = type_.shape
            kept = TensorType(
                type_.dtype, (batch, heads, self.into.slots + 1, width), type_.layout
            )
            cache = self.into.keep(name, "cache", kept)
            slots = self.into.of_call("slots", NEW)
            new = self.builder.call(op("store"), (self.builder.env[x], cache, slots), type_)
            self.stored[key] = new, cache
        return self.stored[key]

    def _merged(self, state: fx.Node, type_: tuple[TensorType, TensorType]) -> fx.Node:
        """The states of all ranks that keep some of the sequence, as one."""
        mine = self._packed(state, type_[0], 1)
        packed = type_of(mine)
        every = self.builder.call(
            op("gather"), (mine,),
            TensorType(packed.dtype, (self.into.ranks, *packed.shape[1:]), packed.layout),
            dim=0, axis=",".join(self.into.axes), limit=None,
            why="attention over each rank's keys",
        )
        return self.builder.call(op("merge_states"), (every,), type_)

    def _packed(self, state: fx.Node, out: TensorType, ways: int) -> fx.Node:
        """A state as it is sent: of all heads, or to each of several ranks that of its heads.

        Args:
            state: over this rank's keys.
            out: the type of what a rank goes on with.
            ways: the number of ranks that heads are divided over.
        """
        batch, heads, rows, width = out.shape
        of_batch, of_heads, of_rows, of_width = out.layout.dims
        packed = TensorType(
            out.dtype, (ways, rows, batch, heads, width + 1),
            Layout((WHOLE, of_rows, of_batch, of_heads, of_width)),
        )
        return self.builder.call(op("pack_state"), (state,), packed, dim=1, ways=ways)


def splits_of(node: fx.Node) -> list[bool]:
    """Whether queries, keys and values of an attention are split along time."""
    call = Call(node)
    return [TIME in layout_of(call[name]).axes for name in ("q", "k", "v")]


def check_fixed_keys(node: fx.Node, split: list[bool]) -> None:
    """Check attention over keys that are not of this sequence: of an encoder, of an image.

    Raises:
        RingCompileError: it goes by position, or its queries or keys are not as they seem.
    """
    call = Call(node)
    banded = call["lower"] is not None or call["upper"] is not None
    if split[0] and (banded or split[1] or split[2]):
        raise error_at(
            node, "with a cache, queries of the growing sequence cannot attend by position to "
                  "keys of a sequence of another length",
        )
