"""Ops on windows of a rank's tokens: pads, shifts and convolutions that keep each entry's place.

Entry j of a window belongs to the same token in front of an op and behind it. So a pad along the
tokens only fills in what the model has around the sequence, a slice does nothing, and a
convolution gets as many entries more in front as it looks back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import Call, operands, replace_operands, target_name, with_argument
from ringcompile.ir.expr import simplify, spelled
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.rules import find_rule
from ringcompile.ir.types import TensorType
from ringcompile.passes.requests import origin_of
from ringcompile.passes.windows.region import TRIM, WindowRegion
from ringcompile.passes.windows.shift_forms import front_of, joined, pads_of

aten = torch.ops.aten


def write(region: WindowRegion) -> fx.Node:
    """The region's last value, laid out as the sequence is."""
    return _trimmed(region, type_of(region.last), name=region.last.name)


def write_part(region: WindowRegion) -> fx.Node:
    """The region's last value, which is of a run of the tokens, on every rank."""
    type_, form = type_of(region.last), region.forms[region.last]
    length = region.windows.sequence.length
    wide = replace(type_, shape=(*type_.shape[: form.dim], length, *type_.shape[form.dim + 1 :]))
    x = region.windows.request(_trimmed(region, wide), Layout.whole(len(type_.shape)))
    first = form.around[0]
    return region.builder.call(
        aten.slice.Tensor, (x, form.dim, first, simplify(first + type_.shape[form.dim])), type_,
        name=region.last.name,
    )


def _trimmed(region: WindowRegion, type_: TensorType, name: str | None = None) -> fx.Node:
    """The windows of the region's last value without what they have of their neighbours."""
    for node in region.nodes:
        if node not in region.made:
            region.builder.at(node)
            region.made[node] = _WRITERS.get(target_name(node.target), _same)(region, node)
    region.builder.at(region.last)
    dim = region.forms[region.last].dim
    layout = Layout.whole(len(type_.shape)).with_dim(dim, region.windows.rows)
    out = region.builder.call(
        TRIM, (region.made[region.last],), type_.with_layout(layout), name=name,
        dim=dim, before=region.before - region.offset, after=region.after + region.offset,
        chunks=region.level.chunks_per_rank,
    )
    out.meta["origin"] = origin_of(region.last)
    return out


def _again(region: WindowRegion, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> fx.Node:
    rule = find_rule(node.target)
    if rule is not None and rule.shape_argument is not None:
        args, kwargs = with_argument(
            node, args, kwargs, rule.shape_argument, spelled(region.type(node).shape)
        )
    new = region.builder.call(
        node.target, args, region.type(node), why=node.meta.get("why"), **kwargs
    )
    new.meta["origin"] = origin_of(node)
    return new


def _same(region: WindowRegion, node: fx.Node) -> fx.Node:
    """The same op on windows; entries that do not belong to one token are moved."""
    given = [
        region.given(n, region.late(node, n) if n in region.forms else 0) for n in operands(node)
    ]
    args, kwargs = replace_operands(node, given)
    return _again(region, node, args, dict(kwargs))


def _slice(region: WindowRegion, node: fx.Node) -> fx.Node:
    """Along the tokens a slice only says which entry is whose."""
    if Call(node)["dim"] % len(type_of(node).shape) != region.forms[node].dim:
        return _same(region, node)
    return region.given(operands(node)[0])


def _pad(region: WindowRegion, node: fx.Node) -> fx.Node:
    """Along the tokens, what is in front of token 0 and behind the last."""
    (source,) = operands(node)
    call, dim = Call(node), region.forms[node].dim
    left, right = pads_of(node, dim)
    x = region.filled(source, left > 0, right > 0, call["value"] or 0)
    pads, place = list(call["pad"]), 2 * (len(type_of(node).shape) - 1 - dim)
    pads[place : place + 2] = [0, 0][: len(pads[place : place + 2])]
    if not any(pads):
        return x
    args, kwargs = with_argument(node, (x, *node.args[1:]), dict(node.kwargs), "pad", pads)
    return _again(region, node, args, kwargs)


def _convolution(region: WindowRegion, node: fx.Node) -> fx.Node:
    call, form, (source, *others) = Call(node), region.forms[node], operands(node)
    spatial = len(type_of(call["weight"]).shape) - 2
    i = form.dim - len(type_of(node).shape) + spatial
    if i < 0:
        return _same(region, node)
    pads = list(call["padding"])
    pads = pads * spatial if len(pads) == 1 else pads
    x = region.filled(source, pads[i] > 0, pads[i] > 0, 0)
    x = region.padded(x, form.dim, form.reach, 0)
    args, kwargs = replace_operands(node, [x, *map(region.given, others)])
    kept = [0 if place == i else pad for place, pad in enumerate(pads)]
    return _again(region, node, *with_argument(node, args, dict(kwargs), "padding", kept))


def _unfold(region: WindowRegion, node: fx.Node) -> fx.Node:
    (source,), form = operands(node), region.forms[node]
    x = region.padded(region.given(source), form.dim, form.reach, 0)
    return _again(region, node, (x, *node.args[1:]), dict(node.kwargs))


def _cat(region: WindowRegion, node: fx.Node) -> fx.Node:
    """Entries in front of token 0, or behind the last, that are a tensor of their own."""
    around = joined(node, region.forms)
    if around is None:
        return _same(region, node)
    source, left, right = around
    parts = list(Call(node)["tensors"])
    at = parts.index(source)
    return _around(region, source, parts[:at], left, parts[at + 1 :], right)


def _around(
    region: WindowRegion, source: fx.Node, front: Sequence[fx.Node], left: int,
    back: Sequence[fx.Node], right: int,
) -> fx.Node:
    """A value's windows with tensors in front of its first entry and behind its last."""
    x, (first, end) = region.given(source), region.ends(source)
    for parts, size, name, bound, start in (
        (front, left, "lt", first, first - left), (back, right, "ge", end, end)
    ):
        if size:
            chosen = _chosen(region, source, parts, size, start)
            x = region.builder.call(
                aten.where.self, (region.outside(source, name, bound), chosen, x), type_of(x)
            )
    return x


def _chosen(
    region: WindowRegion, source: fx.Node, parts: Sequence[fx.Node], size: int, start: Any
) -> fx.Node:
    """For each entry of the windows that of tensors whose first belongs to token `start`."""
    dim, given = region.forms[source].dim, [region.given(part) for part in parts]
    type_, places = type_of(given[0]), region.places()
    shape = (*type_.shape[:dim], size, *type_.shape[dim + 1 :])
    whole = given[0] if len(given) == 1 else region.builder.call(
        aten.cat.default, (given, dim), replace(type_, shape=shape)
    )
    index = region.builder.call(aten.sub.Scalar, (places, start), type_of(places))
    index = region.builder.call(aten.clamp.default, (index, 0, size - 1), type_of(places))
    wide = replace(type_, shape=(*type_.shape[:dim], region.size, *type_.shape[dim + 1 :]))
    return region.builder.call(aten.index_select.default, (whole, dim, index), wide)


def _differences(region: WindowRegion, node: fx.Node) -> fx.Node:
    call, form, source = Call(node), region.forms[node], operands(node)[0]
    front = [] if call["prepend"] is None else [call["prepend"]]
    left = front_of(node, form.dim)
    x = region.padded(_around(region, source, front, left, [], 0), form.dim, 1, 0)
    return _again(region, node, (x, 1, call["dim"]), {})


_WRITERS: dict[str, Callable[[WindowRegion, fx.Node], fx.Node]] = {
    "aten.constant_pad_nd.default": _pad,
    "aten.pad.default": _pad,
    "aten.slice.Tensor": _slice,
    "aten.conv1d.default": _convolution,
    "aten.conv2d.default": _convolution,
    "aten.unfold.default": _unfold,
    "aten.cat.default": _cat,
    "aten.diff.default": _differences,
}
