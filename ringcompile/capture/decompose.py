"""Ops that no rule knows, taken apart by torch's own decompositions into ops that rules know.

Only such ops are taken apart. Linear layers, attention and all else with a rule stay whole, since a
rule says more of an op than of its parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram, default_decompositions

from ringcompile.capture.composite_ops import decomposed, looked_up_once
from ringcompile.ir.rules import find_rule
from ringcompile.passes.canonicalize.rewrites import REWRITES
from ringcompile.passes.canonicalize.rewrites.common import short_name

aten = torch.ops.aten


def _instance_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
    variance: Tensor | None, use_input_stats: bool, momentum: float, eps: float, cudnn: bool,
) -> Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    if use_input_stats:
        variance, mean = torch.var_mean(x, tuple(range(2, x.dim())), correction=0, keepdim=True)
    else:
        assert mean is not None
        assert variance is not None
        variance, mean = variance.reshape(shape), mean.reshape(shape)
    x = (x - mean) * torch.rsqrt(variance + eps)
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _bilinear(left: Tensor, right: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x = torch.einsum("...i,oij,...j->...o", left, weight, right)
    return x if bias is None else x + bias


def _of_inference(x: Tensor, p: float, train: bool) -> Tensor:
    if train:
        return NotImplemented
    return x.clone()


def _rrelu(
    x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False,
    generator: object = None,
) -> Tensor:
    return NotImplemented if training else torch.nn.functional.leaky_relu(x, (lower + upper) / 2)


# Where torch's own decomposition ends in an op for training, or in one without a rule.
_OURS: dict[Any, Callable[..., Tensor]] = {
    aten.instance_norm.default: _instance_norm,
    aten.bilinear.default: _bilinear,
    aten.alpha_dropout.default: _of_inference,
    aten.feature_dropout.default: _of_inference,
    aten.feature_alpha_dropout.default: _of_inference,
    aten.rrelu.default: _rrelu,
}
# Sizes of tensors; and linear algebra, whose parts check for errors on the host.
_KEPT = ("aten.sym_", "aten.linalg_", "aten._linalg_")
# Parts may hold ops without a rule again; this deep no decomposition of torch goes.
_MAX_DEPTH = 4


def known_ops_only(exported: ExportedProgram) -> ExportedProgram:
    """The same program with every op without a rule taken apart, as far as torch knows how."""
    for _ in range(_MAX_DEPTH):
        unknown = {node.target for node in exported.graph.nodes if _is_unknown(node)}
        if not unknown:
            break
        with looked_up_once():
            table = {**default_decompositions(), **_OURS}
        known = {target: table[target] for target in unknown if target in table}
        if not known:
            break
        with warnings.catch_warnings():  # torch's own use of what it deprecates
            warnings.simplefilter("ignore", FutureWarning)
            exported = decomposed(exported, known)
    return exported


def _is_unknown(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and not str(node.target).startswith(_KEPT)
        and find_rule(node.target) is None
        and short_name(node) not in REWRITES
    )
