"""What the kernel for decoding is held to, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import torch

from ringcompile.ops.blocks import Band
from ringcompile.ops.kernels import attend
from tests.ops.contract import BF16, FP16, FP32, INF, Case, check, reference
from tests.ops.wide_heads import Check, contract


def masked(case: Case, sizes: tuple[int, int, int], dtype: torch.dtype | None = None) -> Check:
    """A mask [*sizes, keys]; of booleans, or numbers of `dtype`, -inf among them."""

    def run(provider: str, device: str) -> None:
        q, k, v = case.tensors(FP16, device)
        seen = torch.rand(*sizes, k.shape[2], device=device) < 0.4
        mask = seen
        if dtype is not None:
            mask = torch.randn(seen.shape, device=device).to(dtype).masked_fill(~seen, -INF)
        out, lse = attend(q, k, v, scale=0.2, mask=mask, provider=provider)
        check(out, lse, reference(q, k, v, 0.2, mask=mask))

    return run


def blind(provider: str, device: str) -> None:
    """Queries that see no key at all, and parts of the keys that are hidden whole."""
    q, k, v = Case((4, 2), (3, 1100), (64, 64)).tensors(FP16, device)
    mask = torch.zeros(1, 1, 3, 1100, dtype=torch.bool, device=device)
    mask[..., 1, 700:703] = True
    out, lse = attend(q, k, v, scale=0.1, mask=mask, provider=provider)
    check(out[:, :, 1:2], lse[:, :, 1:2], reference(q[:, :, 1:2], k, v, 0.1, mask=mask[:, :, 1:2]))
    assert (out[:, :, ::2] == 0).all()
    assert (lse[:, :, ::2] == -INF).all()


def capped(provider: str, device: str) -> None:
    q, k, v = Case((4, 2), (2, 600), (32, 32)).tensors(FP32, device)
    out, lse = attend(q, k, v, scale=1.5, softcap=3.0, provider=provider)
    pairs = torch.einsum("bhid,bhjd->bhij", q.double(), k.double().repeat_interleave(2, 1))
    scores = 3 * (pairs * 1.5 / 3).tanh()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)
    want = scores.softmax(-1) @ v.double().repeat_interleave(2, 1)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)


def large_scores(provider: str, device: str) -> None:
    q, k, v = Case((2, 2), (1, 700), (64, 64), batch=1).tensors(FP32, device)
    out, lse = attend(q, k, v, scale=40.0, provider=provider)
    want = reference(q, k, v, 40.0)
    assert want.lse.max() > 300  # exp(88) overflows fp32
    torch.testing.assert_close(lse.double(), want.lse, atol=1e-2, rtol=0)
    torch.testing.assert_close(out.double(), want.out, atol=1e-2, rtol=0)


def one_nan(provider: str, device: str) -> None:
    """A NaN stays in the rows that see it."""
    q, k, v = Case((2, 1), (4, 600), (64, 64), batch=1).tensors(FP16, device)
    q[0, 1, 2] = float("nan")
    out, lse = attend(q, k, v, scale=0.1, provider=provider)
    bad = torch.zeros(2, 4, dtype=torch.bool, device=device)
    bad[1, 2] = True
    assert out[0].isnan().any(-1).equal(bad)
    assert lse[0].isnan().equal(bad)


def wide(provider: str, device: str) -> None:
    q, k, v = Case((4, 2), (1, 900), (64, 64)).tensors(FP16, device)
    out, lse = attend(q, k, v, scale=0.1, provider=provider, wide=True)
    assert out.dtype == FP32
    check(out.half(), lse, reference(q, k, v, 0.1))


def bucket(provider: str, device: str) -> None:
    """Slots of a cache, of which those that are not in use have a position behind the query."""
    q, k, v = Case((4, 2), (1, 512), (64, 64)).tensors(FP16, device)
    for used in (0, 1, 300, 512):
        places = torch.arange(512, device=device)
        places[used:] = 1000
        mask = Band(0).mask(places.new_tensor([600]), places)
        out, lse = attend(q, k, v, scale=0.1, mask=mask, provider=provider)
        if used:
            check(out, lse, reference(q, k[:, :, :used], v[:, :, :used], 0.1))
        else:
            assert (out == 0).all()
            assert (lse == -INF).all()


CHECKS: dict[str, Check] = {
    "one-query": contract(Case((4, 2), (1, 900), (64, 64))),
    "one-query-float32": contract(Case((6, 2), (1, 901), (64, 64)), FP32),
    "one-query-bfloat16": contract(Case((6, 2), (1, 901), (64, 64)), BF16),
    "one-key": contract(Case((2, 1), (5, 1), (64, 64))),
    "heads": contract(Case((4, 4), (8, 47), (64, 64))),
    "one-kv-head": contract(Case((12, 1), (8, 300), (64, 64), batch=1)),
    "many-parts": contract(Case((2, 1), (1, 5000), (16, 16), batch=1), FP32),
    "head-dim-8": contract(Case((4, 2), (3, 31), (8, 8))),
    "head-dim-80": contract(Case((4, 2), (3, 300), (80, 80))),
    "head-dim-512": contract(Case((4, 2), (1, 300), (512, 512), batch=1)),
    "two-head-dims": contract(Case((4, 1), (2, 300), (192, 128), batch=1)),
    "causal": contract(Case((4, 2), (7, 7), (64, 64), causal=True)),
    "packed-kv": contract(Case((4, 2), (2, 300), (64, 64)), FP16, "packed-kv"),
    "transposed-qkv": contract(Case((4, 2), (2, 300), (64, 64)), FP16, "transposed-qkv"),
    "rows-of-longer": contract(Case((4, 2), (2, 300), (64, 64)), FP16, "rows-of-longer"),
    "mask-of-keys": masked(Case((4, 2), (2, 700), (64, 64)), (2, 1, 1)),
    "mask-of-all": masked(Case((4, 2), (3, 700), (64, 64)), (2, 4, 3)),
    "additive": masked(Case((4, 2), (3, 700), (64, 64)), (1, 4, 3), FP32),
    "additive-of-half": masked(Case((4, 2), (3, 700), (64, 64)), (1, 1, 3), FP16),
    "one-query-mask-of-keys": masked(Case((6, 2), (1, 700), (64, 64)), (2, 1, 1)),
    "one-query-mask-of-all": masked(Case((6, 2), (1, 700), (64, 64)), (2, 6, 1)),
    "one-query-additive": masked(Case((6, 2), (1, 700), (64, 64)), (1, 6, 1), FP32),
    "one-query-one-key": contract(Case((6, 2), (1, 1), (64, 64), causal=True)),
    "blind": blind,
    "bucket": bucket,
    "capped": capped,
    "large-scores": large_scores,
    "one-nan": one_nan,
    "wide": wide,
}
