"""Ops that no rule knows: taken apart by torch's own decompositions, their line and layer kept."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ringcompile as rc
from ringcompile.ir.nodes import location_of


class Model(nn.Module):
    """Attention, and an op behind it."""

    def __init__(self, after: Callable[["Model", Tensor], Tensor]) -> None:
        super().__init__()
        self.after, self.qkv = after, nn.Linear(16, 48)
        self.weight, self.scale = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.rand(16))
        self.cube = nn.Parameter(torch.randn(16, 16, 16))
        packed = torch.randint(0, 256, (16, 8), dtype=torch.uint8)
        self.packed = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.after(self, x + y.transpose(1, 2).flatten(2))


def unpacked(m: Model, x: Tensor) -> Tensor:
    return F.linear(x, torch.hstack([m.packed & 15, m.packed >> 4]).to(x.dtype) / 8 - 1)


AFTER: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "std of features": lambda m, x: x / x.std(-1, keepdim=True),
    "instance_norm": lambda m, x: F.instance_norm(x.transpose(1, 2)).transpose(1, 2),
    "nibbles, hstack": unpacked,
    "kthvalue": lambda m, x: torch.where(x >= x.kthvalue(8, -1, keepdim=True).values, x, 0.0),
    "bilinear": lambda m, x: F.bilinear(x, x, m.cube),
    "cosine_similarity": lambda m, x: F.cosine_similarity(x, m.scale, dim=-1),
    "prelu": lambda m, x: F.prelu(x.transpose(1, 2), m.scale).transpose(1, 2),
    "rot90": lambda m, x: x.rot90(2, (1, 2)),
    "tensordot": lambda m, x: torch.tensordot(x, m.weight, 1),
    "kron": lambda m, x: x @ torch.kron(m.weight[:4, :4], m.weight[:4, :4]),
    "diag": lambda m, x: F.linear(x, torch.diag(m.scale)) * m.weight.diagonal(),
    "quantile": lambda m, x: x - x.quantile(0.5, dim=-1, keepdim=True),
    "std_mean": lambda m, x: x / torch.std_mean(x, -1, keepdim=True)[0],
    "mse_loss": lambda m, x: x * F.mse_loss(x, x.tanh()),
    "dropouts": lambda m, x: F.alpha_dropout(F.feature_alpha_dropout(x, 0.1, False), 0.1, False),
    "dstack": lambda m, x: torch.dstack([x, x]),
    "aminmax": lambda m, x: x - torch.aminmax(x, dim=-1, keepdim=True).min,
    "ldexp": lambda m, x: torch.ldexp(x, torch.ones(16, dtype=torch.int32)),
}
FAST = ("instance_norm", "nibbles, hstack", "quantile", "diag", "mse_loss")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in AFTER]
)
def test_it_is_right_on_every_axis(name: str) -> None:
    torch.manual_seed(0)
    model = Model(AFTER[name]).eval().double()
    program = rc.capture(model, (torch.randn(2, 24, 16, dtype=torch.float64),))
    for spec in ("ring=4", "tp=2", "ring=2,ulysses=2"):
        parallel = rc.transform(program, spec)
        for length in (27, 24, 5):
            x = torch.randn(2, length, 16, dtype=torch.float64)
            got = rc.run(parallel, (x,))
            torch.testing.assert_close(got, model(x), rtol=1e-9, atol=1e-9)


def test_parts_keep_their_line_and_layer() -> None:
    model = nn.Sequential(Model(unpacked)).eval()
    program = rc.capture(model, (torch.randn(2, 24, 16),))
    (shift,) = (n for n in program.graph.nodes if "rshift" in str(n.target))
    (joined,) = (n for n in program.graph.nodes if "cat" in str(n.target))
    for node in (shift, joined):
        place = location_of(node)
        assert place.file == __file__
        assert place.line == unpacked.__code__.co_firstlineno + 1
        assert place.layer == "0"


def test_linear_algebra_on_what_is_split_is_refused_by_name() -> None:
    model = Model(lambda m, x: torch.linalg.inv(x.unflatten(-1, (4, 4)))).eval()
    program = rc.capture(model, (torch.randn(2, 24, 16),))
    with pytest.raises(rc.RingCompileError, match=r"linalg_inv\.default has no sharding rule"):
        rc.transform(program, "ring=2")


def test_linear_algebra_on_a_weight_is_computed_by_every_rank() -> None:
    model = Model(lambda m, x: x @ torch.linalg.inv(m.weight)).eval()
    x = torch.randn(2, 24, 16)
    got = rc.run(rc.transform(rc.capture(model, (x,)), "ring=2"), (x,))
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
