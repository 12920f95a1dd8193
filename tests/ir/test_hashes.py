"""Types and layouts remember their hash, within one process only."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import torch

from ringcompile.ir.expr import symbol
from ringcompile.ir.layout import Layout
from ringcompile.ir.types import TensorType

_LAYOUT = Layout.split(3, 1, symbol("s"), ("ring",), sequence=True)
_TYPE = TensorType(torch.float16, (1, symbol("s"), 64), _LAYOUT)

_READER = """
import pickle, sys
for value in pickle.load(sys.stdin.buffer):
    again = type(value)(*(getattr(value, name) for name in value.__dataclass_fields__))
    assert hash(value) == hash(again), value
"""


def test_a_process_with_other_hashes_of_texts_computes_its_own() -> None:
    values = (_LAYOUT, _TYPE)
    assert all(map(hash, values))
    done = subprocess.run(
        [sys.executable, "-c", _READER], input=pickle.dumps(values), check=False,
        env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
