"""`python -m tests.fuzz SEED N`: N cases from a seed on; exit code 1 if one must not be.

`python -m tests.fuzz SEED 1` replays a single case.
"""

from __future__ import annotations

import sys
from collections import Counter

from tests.fuzz.case import judge


def main() -> int:
    first, count = int(sys.argv[1]), int(sys.argv[2])
    outcomes: Counter[str] = Counter()
    failed, slowest = 0, 0.0
    for seed in range(first, first + count):
        verdict = judge(seed)
        outcomes["failed" if verdict.failed else verdict.outcome] += 1
        slowest = max(slowest, verdict.seconds)
        failed += verdict.failed
        if verdict.failed or count == 1:
            print(verdict, flush=True)
    print(f"{count} cases: {dict(outcomes)}, slowest {slowest:.2f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
