"""Models whose queries attend to the keys that an indexer ranks highest: equal to one device."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from torch import nn

pytest.importorskip("transformers")

from ringcompile.compiler import transform
from ringcompile.dump.report import attention_of
from tests.families.catalogue import FAMILIES
from tests.families.trial import reference
from tests.support import TOLERANCE, captured, difference, run, some_fast

ONE_LAYER: dict[str, dict[str, Any]] = {
    "deepseek_v32": {"num_hidden_layers": 1, "mlp_layer_types": ["dense"]},
    "hy_v4": {"num_hidden_layers": 1, "mlp_layer_types": ["dense"], "indexer_types": ["full"]},
}
SPECS = ("ring=4", "tp=2", "ring=2,time=2")


@cache
def built(name: str) -> nn.Module:
    return FAMILIES[name].build(**ONE_LAYER[name])


@pytest.mark.parametrize(
    ("name", "spec"),
    some_fast(ONE_LAYER, SPECS, fast=lambda *case: case == ("deepseek_v32", "ring=4")),
)
def test_equal_to_one_device(name: str, spec: str) -> None:
    family = FAMILIES[name]
    model, inputs = built(name), family.example(27)
    program = captured(model, (), family.example(24))
    expected = reference(model, inputs)
    parallel = transform(program, spec)
    (attention,) = attention_of(parallel.program)
    assert attention.mask.startswith("causal + data-dependent mask")
    assert difference(run(parallel, inputs).outputs, expected) < TOLERANCE
