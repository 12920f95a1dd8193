"""What kernels for head dims above 256 are held to, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ringcompile.ops.kernels import attend, attend_merge
from tests.ops.contract import (
    BF16,
    FP16,
    FP32,
    LAYOUTS,
    Case,
    accumulator,
    check,
    check_merged,
    reference,
)

Check = Callable[[str, str], None]
SCALE = 512**-0.5


def contract(case: Case, dtype: torch.dtype = FP16, layout: str | None = None) -> Check:
    def run(provider: str, device: str) -> None:
        q, k, v = case.tensors(dtype, device)
        if layout is not None:
            q, k, v = LAYOUTS[layout](q, k, v)
        scale = case.dims[0] ** -0.5
        out, lse = attend(q, k, v, scale=scale, causal=case.causal, provider=provider)
        check(out, lse, reference(q, k, v, scale, case.causal))
        assert out.shape == (*q.shape[:3], v.shape[3])
        assert (out.dtype, lse.dtype) == (dtype, FP32)
        assert lse.is_contiguous()

    return run


def folded(case: Case, dtype: torch.dtype = FP16) -> Check:
    """Blocks folded one by one into some rows of a longer accumulator, whose others stay."""

    def run(provider: str, device: str) -> None:
        q, k, v = case.tensors(dtype, device)
        rows, width = q.shape[2], v.shape[3]
        whole = torch.full((*q.shape[:2], rows + 9, width), 7.0, device=device)
        whole_lse = torch.full((*q.shape[:2], rows + 9), 7.0, device=device)
        out, lse = whole[:, :, 5:-4], whole_lse[:, :, 5:-4]
        start = accumulator(q, v)
        out.copy_(start[0])
        lse.copy_(start[1])
        scale = case.dims[0] ** -0.5
        for pair in zip(k.tensor_split(3, 2), v.tensor_split(3, 2), strict=True):
            attend_merge(out, lse, q, *pair, scale=scale, provider=provider)
        check_merged(out, lse, reference(q, k, v, scale), dtype)
        for x in (whole, whole_lse):
            assert (x[:, :, :5] == 7).all()
            assert (x[:, :, -4:] == 7).all()

    return run


def causal_start(provider: str, device: str) -> None:
    """What a ring step makes: a wide causal block, then a block that all rows see."""
    q, k, v = Case((2, 1), (70, 70), (512, 512), batch=1).tensors(FP16, device)
    _, more_k, more_v = Case((2, 1), (70, 80), (512, 512), batch=1).tensors(FP16, device)
    out, lse = attend(q, k, v, scale=SCALE, causal=True, provider=provider, wide=True)
    assert out.dtype == FP32
    attend_merge(out, lse, q, more_k, more_v, scale=SCALE, provider=provider)
    mask = torch.ones(70, 150, dtype=torch.bool, device=device)
    mask[:, :70] = mask[:, :70].tril()
    both = torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)
    check_merged(out, lse, reference(q, *both, SCALE, mask=mask), FP16)


def large_scores(provider: str, device: str) -> None:
    q, k, v = Case((2, 2), (9, 80), (512, 512), batch=1).tensors(FP16, device)
    _, lse = attend(q, k, v, scale=5.0, provider=provider)
    want = reference(q, k, v, 5.0)
    assert want.lse.max() > 300  # exp(88) overflows fp32
    torch.testing.assert_close(lse.double(), want.lse, atol=160e-4, rtol=0)


def natural_lse(provider: str, device: str) -> None:
    q = torch.ones(1, 1, 1, 512, dtype=FP16, device=device)
    k = torch.ones(1, 1, 16, 512, dtype=FP16, device=device)
    _, lse = attend(q, k, k, scale=0.0078125, provider=provider)
    assert abs(lse.item() - 4 - torch.tensor(16.0).log().item()) < 1e-4


def new_memory(provider: str, device: str) -> None:
    q, k, v = Case((1, 1), (3, 1), (512, 512), batch=1).tensors(FP16, device)
    states = [attend(q, k, v, scale=SCALE, provider=provider) for _ in range(2)]
    memory = [x.untyped_storage().data_ptr() for x in (q, k, v, *states[0], *states[1])]
    assert len(set(memory)) == len(memory)


def one_nan(provider: str, device: str) -> None:
    """A NaN stays in the rows that see it."""
    q, k, v = Case((1, 1), (70, 70), (512, 512), batch=1).tensors(FP16, device)
    q[0, 0, 3] = float("nan")
    out, lse = attend(q, k, v, scale=SCALE, causal=True, provider=provider)
    bad = torch.arange(70, device=device) == 3
    assert out[0, 0].isnan().any(-1).equal(bad)
    assert lse[0, 0].isnan().equal(bad)


def unseen(provider: str, device: str) -> None:
    """Rows that have seen nothing yet, beside rows that have."""
    q, k, v = Case((1, 1), (5, 7), (512, 512), batch=1).tensors(FP16, device)
    out, lse = accumulator(q, v)
    seen = attend(q[:, :, :2], k, v, scale=SCALE, provider=provider, wide=True)
    out[:, :, :2], lse[:, :, :2] = seen
    attend_merge(out, lse, q, k, v, scale=SCALE, provider=provider)
    want = reference(q, k, v, SCALE)
    check_merged(out, lse - (lse.new_tensor([2.0, 2, 1, 1, 1]).log()), want, FP16)


CHECKS: dict[str, Check] = {
    "full": contract(Case((2, 2), (70, 100), (512, 512), batch=1)),
    "full-bfloat16": contract(Case((2, 2), (70, 100), (512, 512), batch=1), BF16),
    "grouped": contract(Case((4, 2), (33, 47), (512, 512))),
    "one-kv-head": contract(Case((3, 1), (9, 129), (512, 512), batch=1)),
    "exact-tiles": contract(Case((1, 1), (64, 128), (512, 512), batch=1)),
    "one-key": contract(Case((2, 1), (5, 1), (512, 512))),
    "one-query": contract(Case((2, 1), (1, 70), (512, 512))),
    "causal": contract(Case((2, 2), (130, 130), (512, 512), causal=True, batch=1)),
    "causal-grouped-bfloat16": contract(Case((4, 2), (65, 65), (512, 512), causal=True), BF16),
    "causal-one": contract(Case((1, 1), (1, 1), (512, 512), causal=True)),
    "head-dim-272": contract(Case((2, 1), (20, 70), (272, 272), batch=1)),
    "head-dim-320-causal": contract(Case((2, 1), (70, 70), (320, 320), causal=True, batch=1)),
    "narrow-value": contract(Case((2, 1), (20, 70), (512, 320), batch=1)),
    "wide-value": contract(Case((2, 1), (20, 70), (320, 512), batch=1)),
    **{
        layout: contract(Case((4, 2), (33, 33), (512, 512), causal=True), FP16, layout)
        for layout in LAYOUTS
    },
    "folded": folded(Case((2, 1), (70, 200), (512, 512), batch=1)),
    "folded-bfloat16-320": folded(Case((2, 2), (33, 20), (320, 320)), BF16),
    "causal-start": causal_start,
    "large-scores": large_scores,
    "natural-lse": natural_lse,
    "new-memory": new_memory,
    "one-nan": one_nan,
    "unseen-rows": unseen,
}
