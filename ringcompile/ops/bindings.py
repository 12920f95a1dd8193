"""Torch's own Python functions for its operators, which are called faster.

An operator of `torch.ops` converts its arguments one by one against a schema; the function that
`torch` has for it parses them in C++. That is 1 to 4 microseconds a call, and as much again where
caches hold weights instead: of a program of a thousand small ops for one token, a tenth of its
time. The rows are those that transformers are full of. A test holds each against its operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "aten.abs.default": torch.abs,
    "aten.add.Tensor": torch.add,
    "aten.cat.default": torch.cat,
    "aten.cos.default": torch.cos,
    "aten.div.Tensor": torch.div,
    "aten.embedding.default": torch.embedding,
    "aten.exp.default": torch.exp,
    "aten.gelu.default": F.gelu,
    "aten.linear.default": F.linear,
    "aten.layer_norm.default": torch.layer_norm,
    "aten.logical_not.default": torch.logical_not,
    "aten.matmul.default": torch.matmul,
    "aten.mean.dim": torch.mean,
    "aten.mul.Tensor": torch.mul,
    "aten.neg.default": torch.neg,
    "aten.permute.default": torch.permute,
    "aten.pow.Tensor_Scalar": torch.pow,
    "aten.reciprocal.default": torch.reciprocal,
    "aten.relu.default": torch.relu,
    "aten.reshape.default": torch.reshape,
    "aten.rsqrt.default": torch.rsqrt,
    "aten.sigmoid.default": torch.sigmoid,
    "aten.silu.default": torch._C._nn.silu,
    "aten.sin.default": torch.sin,
    "aten.sqrt.default": torch.sqrt,
    "aten.sub.Tensor": torch.sub,
    "aten.tanh.default": torch.tanh,
    "aten.where.self": torch.where,
}
