"""Ops that stay whole while a graph is traced again: as torch does it, made once."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._ops import OperatorBase
from torch.export import ExportedProgram, default_decompositions, export

from ringcompile.capture import composite_ops
from ringcompile.capture.composite_ops import decomposed
from ringcompile.capture.export import capture

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own making


class Net(nn.Module):
    """Writes in place, and holds composite ops: linear, attention, matmul, reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        y += 1
        heads = y.view(*y.shape[:2], 4, 4).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return nn.functional.hardswish(torch.matmul(out.transpose(1, 2).reshape(x.shape), y.mT))


def exported() -> ExportedProgram:
    with torch.no_grad():
        return export(Net().eval(), (torch.randn(2, 12, 16),), strict=False)


def kernels() -> dict[Any, dict[Any, Any]]:
    return {op: dict(op.py_kernels) for op in composite_ops._known}


@pytest.mark.parametrize("taken_apart", [(), (aten.hardswish.default, aten.linear.default)])
def test_the_graph_is_the_one_that_torch_makes(taken_apart: tuple[Any, ...]) -> None:
    table = {op: default_decompositions()[op] for op in taken_apart}
    decomposed(exported(), {})
    before, rules = kernels(), dict(composite_ops._FAKE_RULES)
    for _ in range(2):
        found = decomposed(exported(), table)
        with mock.patch.dict(composite_ops._FAKE_RULES):
            expected = exported().run_decompositions(dict(table))
        assert found.graph_module.code == expected.graph_module.code
        assert kernels() == before
        assert rules == composite_ops._FAKE_RULES


def test_kernels_are_made_once() -> None:
    decomposed(exported(), {})
    with mock.patch.object(OperatorBase, "py_impl", side_effect=AssertionError("made again")):
        decomposed(exported(), {})


def test_kernels_of_an_op_that_got_others_are_made_again() -> None:
    decomposed(exported(), {})
    op, key = aten.linear.default, torch._C.DispatchKey.AutogradCPU
    own = dict(op.py_kernels)
    op.py_impl(key)(lambda *args: op.redispatch(torch._C.DispatchKeySet(key), *args))
    try:
        decomposed(exported(), {})
        assert composite_ops._known[op].before == op.py_kernels
        assert key in op.py_kernels
    finally:
        op.py_kernels.clear()
        op.py_kernels.update(own)
        op._dispatch_cache.clear()


def test_an_op_that_is_registered_later_stays_whole() -> None:
    decomposed(exported(), {})
    library = torch.library.Library("composite_ops_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeImplicitAutograd")

    class Custom(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            y += 1
            return torch.ops.composite_ops_test.twice(y)

    program = export(Custom(), (torch.randn(2, 4),), strict=False)
    assert "composite_ops_test.twice" in decomposed(program, {}).graph_module.code
    library._destroy()


@pytest.mark.parametrize("missing", ["_original", "_PRESERVE"])
def test_another_torch_captures_as_well(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composite_ops, missing, None)
    rules = dict(composite_ops._FAKE_RULES)
    program = capture(Net().eval(), (torch.randn(2, 12, 16),))
    assert rules == composite_ops._FAKE_RULES
    assert any("linear" in str(node.target) for node in program.graph.nodes)


def test_kernels_are_as_before_when_a_trace_fails() -> None:
    decomposed(exported(), {})
    before = kernels()
    program = exported()
    with (
        mock.patch.object(torch.export.exported_program, "_get_updated_range_constraints",
                          side_effect=RuntimeError("on the way")),
        pytest.raises(RuntimeError, match="on the way"),
    ):
        decomposed(program, {})
    with pytest.raises(RuntimeError, match="inside"), composite_ops._kept_whole(
        {aten.linear.default: composite_ops._PRESERVE}
    ):
        raise RuntimeError("inside")
    assert kernels() == before


def test_rules_that_torch_has_of_its_own_stay() -> None:
    """torch takes them away with those that it gave; `nonzero` would then not be traced again."""
    composite_ops._known.clear()
    rule = {aten.nonzero_numpy.default: object()}
    with mock.patch.dict(composite_ops._FAKE_RULES, rule):
        decomposed(exported(), {})
        assert rule.items() <= composite_ops._FAKE_RULES.items()


class Found(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        y += 1  # is traced again
        row, column = torch.where(x > 0)
        return y.index_put((row, column), y[row, column] * 2)


def test_entries_that_data_choose_are_traced_again() -> None:
    with torch.no_grad():
        traced = decomposed(export(Found(), (torch.randn(4, 4),), strict=False), {})
    x = torch.randn(4, 4)
    assert torch.equal(traced.module()(x), Found()(x))
