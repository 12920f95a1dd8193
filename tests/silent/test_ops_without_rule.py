"""An op without a rule needs none where nothing that it reads is split, and can be saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.artifact.ops import AllowedOps
from ringcompile.errors import RingCompileError
from tests.silent.small import CAPTURED, WIDTH, Model, ids, matches
from tests.support import compiled, difference, run, some_fast

Tensor = torch.Tensor
Between = Callable[[Any, Tensor, Tensor], Tensor]


def packed_weight(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    low, high = m.bytes & 15, m.bytes >> 4
    return F.linear(x, torch.hstack([low, high]).to(x.dtype) / 8 - 1)


def shifted(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    bits = torch.vstack([(m.bytes >> 6) ^ 1, (m.bytes << 2) | 3])
    return F.linear(x, bits.reshape(WIDTH, WIDTH).to(x.dtype) / 99 - 1)


def trimmed(m: Any, x: Tensor, tokens: Tensor) -> Tensor:
    bound = torch.quantile(m.down.weight.abs(), 0.5)
    return F.linear(m.up(x), torch.where(m.down.weight.abs() < bound, 0.0, m.down.weight))


# What they are computed from is a weight, the same on every rank.
OF_WEIGHTS: dict[str, Between] = {
    "packed weight": packed_weight,
    "shifted": shifted,
    "trimmed": trimmed,
    "kronecker": lambda m, x, t: F.linear(x, torch.kron(m.small, m.small.T.contiguous())),
    "distances": lambda m, x, t: F.linear(x, torch.cdist(m.small, m.small).repeat(8, 8)),
    "power of a matrix": lambda m, x, t: x @ torch.linalg.matrix_exp(m.attention.out.weight / 9),
    "block diagonal": lambda m, x, t: F.linear(x, torch.block_diag(*[m.small] * 8)),
}
# Of tokens: right where no axis splits them.
OF_TOKENS: dict[str, Between] = {
    "kthvalue": lambda m, x, t: x * (x.kthvalue(3, -1, keepdim=True).values > 0),
    "quantile": lambda m, x, t: x - torch.quantile(x, 0.3, dim=-1, keepdim=True),
    "pseudo-inverse": lambda m, x, t: x @ torch.linalg.pinv(x) @ x / 9,
    "renorm": lambda m, x, t: torch.renorm(x, 2.0, 2, 1.5),
    "cross": lambda m, x, t: F.pad(torch.linalg.cross(x[..., :3], x[..., 3:6]), (0, WIDTH - 3)),
    "cosine": lambda m, x, t: x * F.cosine_similarity(x, x.roll(1, -1), dim=-1)[..., None],
}


@cache
def model(between: Between) -> nn.Module:
    """One module for all specs, which is captured once."""
    data = torch.randint(0, 256, (WIDTH, WIDTH // 2), dtype=torch.uint8)
    return Model(
        between, bytes=nn.Parameter(data, requires_grad=False),
        small=nn.Parameter(torch.zeros(4, 4 + (4 if between is OF_WEIGHTS["kronecker"] else 0))),
    )


@pytest.mark.parametrize(
    ("kind", "spec"),
    some_fast(list(OF_WEIGHTS), ["ring=3", "tp=2", "pp=2", "ulysses=2"],
              fast=lambda kind, spec: (kind, spec) in
              {("packed weight", "ring=3"), ("trimmed", "tp=2")}),
)
def test_of_weights(kind: str, spec: str) -> None:
    matches(model(OF_WEIGHTS[kind]), spec, lengths=(27,))


@pytest.mark.parametrize(
    ("kind", "spec"),
    some_fast(OF_TOKENS, ["pp=2", "tp=2"], fast=lambda *case: case == ("pseudo-inverse", "pp=2")),
)
def test_of_tokens_that_nothing_splits(kind: str, spec: str) -> None:
    matches(model(OF_TOKENS[kind]), spec, lengths=(27,))


@pytest.mark.parametrize("kind", ["pseudo-inverse"])
def test_of_tokens_that_are_split(kind: str) -> None:
    """Refused, with a hint that does not send the user into the package."""
    said = "has no sharding rule, and its inputs are split"
    with pytest.raises(RingCompileError, match=said) as caught:
        compiled(model(OF_TOKENS[kind]), (ids(CAPTURED),), "ring=3")
    assert caught.value.hint is not None
    assert "rc.register_op" in caught.value.hint
    assert ".py" not in caught.value.hint


def test_it_can_be_saved_and_loaded(tmp_path: Path) -> None:
    built = model(packed_weight)
    compiled(built, (ids(CAPTURED),), "ring=2").save(tmp_path / "program")
    loaded = rc.load(tmp_path / "program")
    with torch.no_grad():
        assert difference(run(loaded, (ids(9),)).outputs, built(ids(9))) < 1e-10


def test_random_numbers_are_refused_everywhere() -> None:
    for spec in ("pp=2", "ring=2", "dp=2"):
        with pytest.raises(RingCompileError, match="every rank would draw different") as caught:
            compiled(model(lambda m, x, t: x * torch.rand_like(x)), (ids(CAPTURED),), spec)
        assert caught.value.location is not None
        assert "rand_like" in caught.value.location.text
        assert caught.value.hint == (
            "draw them where the model is called and pass them in as an input, so that all ranks "
            "have the same; if they are meant for training only, call model.eval()"
        )


@pytest.mark.parametrize("name", [
    "aten.from_file.default", "aten.empty.memory_format", "aten.as_strided.default",
    "aten.resize_.default", "aten.add_.Tensor", "aten.rand.default", "aten.set_data.default",
    "aten._local_scalar_dense.default", "aten.item.default", "aten.hstack", "os.system.default",
    "prim.Print.default", "aten.fbgemm_linear_fp16_weight.default", "aten.hstack.default\n",
    "aten.sparse_coo_tensor.size", "aten.bernoulli.default", "aten.__class__.default",
])
def test_what_a_file_may_not_name(name: str) -> None:
    assert name not in AllowedOps()


def test_what_a_file_may_name() -> None:
    assert "aten.hstack.default" in AllowedOps()
    assert "aten.linear.default" in AllowedOps()
    assert "ringcompile.merge.default" in AllowedOps()
