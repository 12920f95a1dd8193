"""Packed weights: the numbers of one device, and a share of whole bytes and whole groups."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import pytest
import torch
from torch import nn

from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import local_shape
from ringcompile.parallel_program import ParallelProgram
from tests.packed.block import LAYERS, VOCABULARY, Llama
from tests.packed.layouts import LAYOUTS
from tests.support import compiled, difference, run, some_fast

SPECS = ("tp=2", "ring=2,tp=2", "pp=2", "ring=4")
EXACT = 1e-12
# Of each layout what every rank holds: where tp cuts the outputs (q, k, v, gate, up), and the
# inputs (o, down). All else is cut in as many parts as there are ranks.
TABLES = {
    "AWQ": {"lifted"}, "AWQ, order in the shifts": {"lifted"}, "signs": {"lifted"},
    "NF4": {"code"}, "NF4, absmax packed": {"code", "code_of_absmax", "offset"},
    "MXFP4": {"lut"}, "MXFP4, written in place": {"lut"}, "ternary in planes": {"scale"},
    "GPTQ": {"wf"}, "GPTQ, groups in any order": {"wf"}, "GPTQ, groups by view": {"wf"},
}
WHOLE_OVER_OUTPUTS = {
    "GPTQ": {"g_idx"}, "GPTQ, groups in any order": {"g_idx"},
    "ternary in planes": {"packed"},
}
WHOLE_OVER_INPUTS = {
    "int8": {"scale"}, "int8, scaled behind": {"scale"}, "int8 with zero points": {"scale", "zero"},
    "int4 in halves of rows": {"packed"},
    "GPTQ": {"scales", "qzeros"}, "GPTQ, groups in any order": {"scales", "qzeros"},
}


def in_double(model: nn.Module) -> nn.Module:
    """Parameters in float64, so that all arithmetic is; buffers stay as they are packed."""
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model.eval().requires_grad_(False)


def llama(*names: str, layers: int = 1) -> nn.Module:
    """A Llama whose linear layers take turns with these layouts."""
    torch.manual_seed(0)
    kinds = cycle(map(LAYOUTS.__getitem__, names))
    return in_double(Llama(lambda i, o: next(kinds)(i, o), layers))


def ids(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCABULARY, (2, length), generator=generator)


def check_numbers(model: nn.Module, spec: str) -> ParallelProgram:
    """All ranks give what the model does on the same packed weights, whether lengths divide."""
    parallel = compiled(model, (ids(12),), spec)
    for length in (16, 13):
        found = run(parallel, (ids(length),)).outputs
        assert difference(found, model(ids(length))) < EXACT
    return parallel


def bytes_of(parallel: ParallelProgram, rank: int) -> dict[str, int]:
    """The bytes of each weight that a rank holds."""
    program, found = parallel.rank(rank), {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.weights:
            weight, type_ = program.weights[node.name], type_of(node)
            shape = local_shape(type_, parallel.mesh, program.sequence)
            found[weight.name] = weight.dtype.itemsize * torch.Size(map(int, shape)).numel()
    return found


def is_row_parallel(name: str) -> bool:
    return ".o_proj." in name or ".down_proj." in name


def check_shares(parallel: ParallelProgram, kinds: Callable[[str], str], ways: int) -> None:
    """Of every packed layer a rank has 1 / ways of each buffer, but for the tables' exceptions."""
    sizes = {w.name: w.num_bytes for w in parallel.program.weights.values()}
    for rank in range(parallel.world_size):
        held = bytes_of(parallel, rank)
        assert held.keys() == sizes.keys()
        for name, count in held.items():
            if "_proj." not in name:
                continue
            layer, _, buffer = name.rpartition(".")
            kind = kinds(layer)
            table = WHOLE_OVER_INPUTS if is_row_parallel(name) else WHOLE_OVER_OUTPUTS
            whole = TABLES.get(kind, set()) | table.get(kind, set())
            is_whole = buffer in whole or (buffer.startswith("lifted") and "lifted" in whole)
            assert count == (sizes[name] if is_whole else sizes[name] // ways), (kind, name)


MIXED = 3 * LAYERS // 2  # layers enough for each layout to occur once


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    """All layouts in one model, each in a linear layer of its own."""
    return llama(*LAYOUTS, layers=MIXED)


@pytest.mark.parametrize("spec", SPECS)
def test_all_layouts_in_one_model(mixed: nn.Module, spec: str) -> None:
    parallel = check_numbers(mixed, spec)
    kinds = {name: type(layer) for name, layer in mixed.named_modules()}
    names = {kind: name for name, kind in LAYOUTS.items()}
    if spec == "tp=2":
        check_shares(parallel, lambda layer: names[kinds[layer]], 2)


@pytest.mark.parametrize(
    ("name", "spec"), some_fast(LAYOUTS, SPECS, fast=lambda name, spec: False)
)
def test_each_layout_in_all_layers(name: str, spec: str) -> None:
    parallel = check_numbers(llama(name, layers=LAYERS), spec)
    if "tp" in spec:
        check_shares(parallel, lambda layer: name, 2)
