"""Kernels that are not torch's, or not the default: on a GPU, and as far as one can without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ringcompile.errors import RingCompileError
from ringcompile.ops.kernels import attend, contract, custom
from tests.ops.contract import FP16, FP64, Case
from tests.ops.own_kernels import CHECKS, fault

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
INTERPRETED = ("triton", "decode", "grouped")
# What shapes, layouts and masks of ours differ in; the others are these with other numbers.
SOME = {
    "triton": {"full", "grouped", "causal", "narrow-value", "head-dim-320-causal", "transposed-qkv",
               "rows-of-longer", "folded", "causal-start", "large-scores", "one-nan",
               "unseen-rows", "natural-lse", "new-memory"},
    "decode": {"one-query", "heads", "one-key", "head-dim-8", "two-head-dims", "causal",
               "rows-of-longer", "mask-of-all", "additive", "one-query-mask-of-keys", "many-parts",
               "blind", "capped", "one-nan", "wide"},
    "grouped": {"float16", "transposed", "experts-without-rows", "rows-without-an-expert",
                "no-expert-has-rows", "whole-tiles", "one-row"},
}
PAIRS = [(provider, name) for provider, checks in CHECKS.items() for name in checks]
NO_BFLOAT16 = "Triton's interpreter multiplies bfloat16 as if it were integers"


def run_triton(*command: str, **environment: str) -> str:
    """Output of a Python process that imports Triton, with its settings of today."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=250,
        env={**os.environ, "TRITON_DEFAULT_FP_FUSION": "1", **environment}, check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@cache
def interpreted(some: bool) -> dict[tuple[str, str], str]:
    """The fault of each check, run by Triton's interpreter in a process of its own."""
    checks = [
        f"{provider}/{name}" for provider, name in PAIRS
        if provider in INTERPRETED and "bfloat16" not in name and (name in SOME[provider]) == some
    ]
    output = run_triton("-m", "tests.ops.own_kernels", "cpu", *checks, TRITON_INTERPRET="1")
    lines = (line.split("\t", 2) for line in output.splitlines())
    return {(provider, name): what for provider, name, what in lines}


@needs_triton
@pytest.mark.parametrize(("provider", "name"), [
    pytest.param(provider, name, marks=() if name in SOME[provider] else pytest.mark.slow)
    for provider, name in PAIRS if provider in INTERPRETED
])
def test_ours_on_the_cpu(provider: str, name: str) -> None:
    if "bfloat16" in name:
        pytest.skip(NO_BFLOAT16)
    assert interpreted(name in SOME[provider])[provider, name] == ""


@pytest.mark.gpu
@pytest.mark.parametrize(("provider", "name"), PAIRS)
def test_ours_on_a_gpu(provider: str, name: str) -> None:
    assert fault(provider, name, "cuda") == ""


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("ffpa_attn") is None, reason="needs ffpa-attn")
@pytest.mark.parametrize(
    "name", ["full", "full-bfloat16", "grouped", "causal", "one-kv-head", "causal-start"]
)
def test_ffpa_on_a_gpu(name: str) -> None:
    CHECKS["triton"][name]("ffpa", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("wide", [False, True])
def test_our_kernel_is_the_choice_for_wide_heads(
    wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    monkeypatch.setattr(custom, "_launch", lambda module, *_, **__: launched.append(module))
    q, k, v = Case((2, 2), (8, 8), (512, 512)).tensors(FP16, "cuda")
    attend(q, k, v, scale=1.0, wide=wide)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert launched == ["hopper_kernel" if hopper else "triton_kernel"]


COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from ringcompile.ops.kernels import hopper_kernel as hopper

def described(rows, columns):
    return f"tensordesc<fp16[1, 1, {rows}, {columns}],{hopper.layout(rows, columns)!r}>"

fixed = hopper.constants(512, causal=True, fold=True)
names = hopper.attend.arg_names
types = dict.fromkeys(names, "i32") | dict.fromkeys(fixed, "constexpr") | {
    "q": described(fixed["BLOCK_M"], fixed["K_COLUMNS"]),
    "k": described(fixed["BLOCK_N"], fixed["K_COLUMNS"]),
    "v": described(fixed["V_ROWS"], fixed["V_COLUMNS"]),
    "out": "*fp32", "lse": "*fp32", "scale": "fp32",
}
source = GluonASTSource(
    hopper.attend, types, {(names.index(name),): value for name, value in fixed.items()}
)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
print(json.dumps([made.metadata.shared, made.asm["ptx"].count("wgmma.mma_async")]))
"""


@needs_triton
def test_hopper_kernel_compiles_and_fits_without_a_gpu() -> None:
    shared, products = json.loads(run_triton("-c", COMPILE))
    assert shared <= 227 * 1024  # what a program can have
    # 32 for scores, twice (with and without a mask), and 4 for each half of the values.
    assert products == 72


COMPILE_DECODE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ringcompile.ops.kernels import decode_kernel as decode

def shared(kernel, fixed, pointers, **others):
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(fixed, "constexpr")
    source = ASTSource(kernel, types | pointers | others, fixed)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    return made.metadata.shared

blocks = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_D": 512, "BLOCK_E": 512}
flags = {"MASKED": True, "BOOLEAN": True, "CAPPED": True, "CAUSAL": True}
halves = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "mask": "*i8", "out": "*fp32", "lse": "*fp32"}
parts = {"parts": "*fp32", "part_lse": "*fp32", "out": "*bf16", "lse": "*fp32"}
print(json.dumps([
    shared(decode._attend, blocks | flags, halves, scale="fp32", cap="fp32"),
    shared(decode._merge_parts, {"BLOCK_E": 512}, parts),
]))
"""


@needs_triton
def test_the_kernel_for_decoding_compiles_and_fits_without_a_gpu() -> None:
    assert max(json.loads(run_triton("-c", COMPILE_DECODE))) <= 227 * 1024


REFUSED = {
    "head-dim": (Case((1, 1), (4, 4), (256, 256)), {}, "head_dim of q and k is 256, of v 256, it"),
    "value-dim": (Case((1, 1), (4, 4), (512, 64)), {}, "head_dim of q and k is 512, of v 64, it"),
    "scale": (Case((1, 1), (4, 4), (512, 512)), {"scale": -1.0}, "the scale is -1.0, it takes"),
    "unaligned": (Case((1, 1), (4, 4), (260, 260)), {}, "rows are not aligned to 16 bytes"),
    "mask": (
        Case((1, 1), (4, 4), (512, 512)), {"mask": torch.ones(4, 4, dtype=torch.bool)},
        "it takes no mask",
    ),
    "dtype": (Case((1, 1), (4, 4), (512, 512)), {"dtype": FP64}, "dtype is torch.float64"),
}


@pytest.mark.parametrize(("case", "change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_our_kernels_refuse(case: Case, change: dict[str, object], reason: str) -> None:
    q, k, v = case.tensors(change.get("dtype", FP16), "cpu")  # type: ignore[arg-type]
    scale, mask = change.get("scale", 1.0), change.get("mask")
    call = contract.BlockCall(q, k, v, scale, False, mask, None)  # type: ignore[arg-type]
    for provider in (custom.HOPPER, custom.TRITON):
        assert str(provider.refuses(call)).startswith(reason)


def test_what_the_kernel_for_decoding_refuses() -> None:
    for case, dtype, reason in (
        (Case((2, 2), (9, 40), (64, 64)), FP16, "there are 9 queries, it takes up to 8"),
        (Case((2, 2), (1, 40), (520, 520)), FP16, "a head_dim is above 512"),
        (Case((2, 2), (1, 40), (64, 64)), FP64, "dtype is torch.float64, it takes float16"),
    ):
        call = contract.BlockCall(*case.tensors(dtype, "cpu"), 1.0, False, None, None)
        assert str(custom.DECODE.refuses(call)).startswith(reason)


def test_expanded_tensors_are_refused() -> None:
    q, k, v = Case((2, 2), (4, 4), (512, 512)).tensors(FP16, "cpu")
    call = contract.BlockCall(q, k[:, :1].expand(-1, 2, -1, -1), v, 1.0, False, None, None)
    assert custom.TRITON.refuses(call) == "a dim is expanded"


def test_without_triton_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "ringcompile.ops.kernels.triton_kernel", raising=False)
    assert "no fitting Triton" in str(custom.load.__wrapped__("triton_kernel"))


def test_providers_for_gpus_say_so_on_the_cpu() -> None:
    q, k, v = Case((1, 1), (4, 4), (512, 512)).tensors(FP16, "cpu")
    for provider in ("hopper", "triton", "decode", "ffpa"):
        with pytest.raises(RingCompileError, match="tensors are on cpu, it runs on cuda"):
            attend(q, k, v, scale=1.0, provider=provider)
