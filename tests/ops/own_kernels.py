"""The checks of each of our own kernels, on a GPU or in Triton's interpreter.

Run as `python -m tests.ops.own_kernels DEVICE PROVIDER/CHECK ...`: a line for each check, with
the fault behind it. The interpreter needs a process of its own: TRITON_INTERPRET=1 counts when
triton is imported.
"""

from __future__ import annotations

import sys
import traceback

import torch

from tests.ops import few_queries, sorted_rows, wide_heads

CHECKS = {
    "hopper": wide_heads.CHECKS,
    "triton": wide_heads.CHECKS,
    "decode": few_queries.CHECKS,
    "grouped": sorted_rows.CHECKS,
}


def fault(provider: str, name: str, device: str) -> str:
    """What is wrong, in one line; nothing if all is well."""
    torch.manual_seed(0)
    try:
        CHECKS[provider][name](provider, device)
    except Exception:
        return " | ".join(traceback.format_exc().splitlines()[-3:])
    return ""


def main(device: str, *checks: str) -> None:
    for check in checks:
        provider, name = check.split("/")
        print(provider, name, fault(provider, name, device), sep="\t", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
