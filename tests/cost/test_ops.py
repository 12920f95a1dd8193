"""What ops cost, against what they do: kernels that are called, flops and bytes by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import fx

from ringcompile.cost.attention import blocks
from ringcompile.cost.kernels import Kernel, time_of
from ringcompile.cost.ops import has_cost, kernels_of
from ringcompile.cost.values import Values, distinct_bytes
from ringcompile.errors import RingCompileError
from ringcompile.ir.kinds import kind_of
from ringcompile.ir.program import Program, Structure
from ringcompile.ir.rules import RULES
from ringcompile.ir.types import TensorType
from ringcompile.ops import attention, kernels
from ringcompile.ops.blocks import Band
from ringcompile.ops.schemas import SCHEMAS, op
from tests.cost.clusters import cluster, device, figure

aten = torch.ops.aten
F32 = torch.float32


def test_every_op_that_a_graph_may_contain_has_a_cost() -> None:
    missing = [name for name in RULES if not has_cost(name)]
    missing += [name for name in SCHEMAS if not has_cost(f"ringcompile.{name}.default")]
    assert missing == []


def test_an_unknown_op_is_refused() -> None:
    assert not has_cost("aten.nothing.default")
    with pytest.raises(RingCompileError, match=r"has no entry for aten\.nothing\.default"):
        kind_of("aten.nothing.default")


def graph_of(
    target: Any, operands: list[tuple[int, ...]], out: tuple[int, ...] | list[tuple[int, ...]],
    *args: Any, dtype: torch.dtype = F32, **kwargs: Any,
) -> tuple[Values, fx.Node]:
    """A program of one call; in `args`, numbers of operands in a tuple ("op", i) are replaced."""
    graph = fx.Graph()
    nodes = []
    for i, shape in enumerate(operands):
        node = graph.placeholder(f"x{i}")
        node.meta["type"] = TensorType.whole(dtype, shape)
        nodes.append(node)
    node = graph.call_function(target, tuple(nodes) + args, kwargs)
    types = [TensorType.whole(dtype, shape) for shape in (out if isinstance(out, list) else [out])]
    node.meta["type"] = tuple(types) if isinstance(out, list) else types[0]
    graph.output((node,))
    program = Program(graph, (), {n.name: n.name for n in nodes}, {}, Structure("tensor"))
    return Values(program, {}), node


def kernels_for(*args: Any, **kwargs: Any) -> list[Kernel]:
    return kernels_of(*graph_of(*args, **kwargs))


@pytest.mark.parametrize(
    ("target", "operands", "out", "sizes"),
    [
        (aten.linear.default, [(2, 3, 8), (5, 8)], (2, 3, 5), (1, 6, 8, 5)),
        (aten.linear.default, [(2, 3, 8), (5, 8), (5,)], (2, 3, 5), (1, 6, 8, 5)),
        (aten.matmul.default, [(4, 3, 8), (8, 5)], (4, 3, 5), (1, 12, 8, 5)),
        (aten.matmul.default, [(4, 3, 8), (4, 8, 5)], (4, 3, 5), (4, 3, 8, 5)),
        (aten.bmm.default, [(4, 3, 8), (4, 8, 5)], (4, 3, 5), (4, 3, 8, 5)),
        (aten.mv.default, [(3, 8), (8,)], (3,), (1, 3, 8, 1)),
        (aten.addmm.default, [(5,), (3, 8), (8, 5)], (3, 5), (1, 3, 8, 5)),
        (aten.baddbmm.default, [(4, 3, 5), (4, 3, 8), (4, 8, 5)], (4, 3, 5), (4, 3, 8, 5)),
        (aten.conv1d.default, [(2, 4, 10), (6, 4, 3)], (2, 6, 8), (1, 16, 12, 6)),
    ],
)
def test_products(
    target: Any, operands: list[tuple[int, ...]], out: tuple[int, ...],
    sizes: tuple[int, int, int, int],
) -> None:
    (kernel,) = kernels_for(target, operands, out)
    batch, rows, inner, columns = sizes
    assert (kernel.kind, kernel.batch, kernel.rows, kernel.inner, kernel.columns) == (
        "matmul", batch, rows, inner, columns)
    assert kernel.flops == 2 * batch * rows * inner * columns
    moved = batch * (rows * inner + inner * columns + rows * columns)
    assert kernel.num_bytes == 4 * moved


@pytest.mark.parametrize(
    ("equation", "operands", "out", "sizes"),
    [
        ("bsd,df->bsf", [(2, 3, 8), (8, 5)], (2, 3, 5), (1, 6, 8, 5)),
        ("ecd,edf->ecf", [(4, 3, 8), (4, 8, 5)], (4, 3, 5), (4, 3, 8, 5)),
        ("bhqd,bhkd->bhqk", [(2, 3, 7, 8), (2, 3, 9, 8)], (2, 3, 7, 9), (6, 7, 8, 9)),
        ("...d,df->...f", [(2, 3, 8), (8, 5)], (2, 3, 5), (1, 6, 8, 5)),
        ("bsd,df", [(2, 3, 8), (8, 5)], (2, 5, 3), (1, 6, 8, 5)),
    ],
)
def test_einsum_is_a_batched_product(
    equation: str, operands: list[tuple[int, ...]], out: tuple[int, ...],
    sizes: tuple[int, int, int, int],
) -> None:
    (kernel,) = einsum_kernels(equation, operands, out)
    assert (kernel.batch, kernel.rows, kernel.inner, kernel.columns) == sizes


def test_einsum_of_three_goes_from_left_to_right() -> None:
    found = einsum_kernels("ab,bc,cd->ad", [(2, 3), (3, 5), (5, 7)], (2, 7))
    assert [(k.rows, k.inner, k.columns) for k in found] == [(2, 3, 5), (2, 5, 7)]


def einsum_kernels(
    equation: str, operands: list[tuple[int, ...]], out: tuple[int, ...]
) -> list[Kernel]:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(operands))]
    for node, shape in zip(nodes, operands, strict=True):
        node.meta["type"] = TensorType.whole(F32, shape)
    call = graph.call_function(aten.einsum.default, (equation, nodes))
    call.meta["type"] = TensorType.whole(F32, out)
    graph.output((call,))
    program = Program(graph, (), {n.name: n.name for n in nodes}, {}, Structure("tensor"))
    return kernels_of(Values(program, {}), call)


def test_products_of_groups_are_those_of_experts_with_rows() -> None:
    (kernel,) = kernels_for(aten._grouped_mm.default, [(12, 8), (4, 8, 5), (4,)], (12, 5))
    assert (kernel.batch, kernel.rows, kernel.inner, kernel.columns) == (4, 3, 8, 5)
    (kernel,) = kernels_for(aten._grouped_mm.default, [(4, 3, 8), (4, 8, 5)], (4, 3, 5))
    assert (kernel.batch, kernel.rows, kernel.inner, kernel.columns) == (4, 3, 8, 5)


def test_attention_at_one_rate_never_goes_beyond_it() -> None:
    on = cluster(device=device(figures={"attention.float32": figure(10.0, "TFLOP/s")})).device
    small = Kernel("attention", F32, 0, 10**12, 64, 64, 64, batch=128)
    assert time_of(small, on).seconds == pytest.approx(0.1)


def test_rows_of_experts_are_sorted_and_each_expert_has_a_product() -> None:
    *moved, product_ = kernels_for(
        op("expert_linear"), [(12, 8), (12,), (4, 5, 8)], (12, 5))
    assert (product_.batch, product_.rows, product_.inner, product_.columns) == (4, 3, 8, 5)
    assert [kernel.kind for kernel in moved] == ["stream", "stream"]


def test_sorted_rows_are_multiplied_where_they_lie() -> None:
    """One product an expert with its share of the rows; nothing is moved."""
    (kernel,) = kernels_for(op("grouped_linear"), [(12, 1, 8), (4,), (4, 5, 8)], (12, 1, 5))
    assert (kernel.batch, kernel.rows, kernel.inner, kernel.columns) == (4, 3, 8, 5)
    assert kernel.flops == 2 * 12 * 8 * 5
    (kernel,) = kernels_for(op("grouped_linear"), [(2, 8), (4,), (4, 5, 8)], (2, 5))
    assert (kernel.batch, kernel.rows) == (2, 1), "no more matrices are read than there are rows"


def test_views_cost_nothing_and_copies_do() -> None:
    assert kernels_for(aten.permute.default, [(2, 3, 4)], (2, 4, 3), [0, 2, 1]) == []
    assert kernels_for(aten.reshape.default, [(2, 3, 4)], (6, 4), [6, 4]) == []
    values, node = graph_of(aten.permute.default, [(2, 3, 4)], (2, 4, 3), [0, 2, 1])
    graph = values.program.graph
    with graph.inserting_after(node):
        flat = graph.call_function(aten.reshape.default, (node, [24]))
    flat.meta["type"] = TensorType.whole(F32, (24,))
    (kernel,) = kernels_of(Values(values.program, {}), flat)
    assert (kernel.kind, kernel.num_bytes) == ("strided", 2 * 24 * 4)


@pytest.mark.parametrize(
    ("target", "kind", "num_bytes"),
    [
        (aten.neg.default, "stream", 2 * 96),
        (aten.gelu.default, "special", 2 * 96),
        (aten.exp.default, "special", 2 * 96),
    ],
)
def test_pointwise_ops_move_bytes(target: Any, kind: str, num_bytes: int) -> None:
    (kernel,) = kernels_for(target, [(2, 3, 4)], (2, 3, 4))
    assert (kernel.kind, kernel.num_bytes) == (kind, num_bytes)


def test_elementwise_over_views_is_as_slow_as_a_strided_copy() -> None:
    values, node = graph_of(aten.permute.default, [(2, 3, 4)], (2, 4, 3), [0, 2, 1])
    with values.program.graph.inserting_after(node):
        negated = values.program.graph.call_function(aten.neg.default, (node,))
    negated.meta["type"] = TensorType.whole(F32, (2, 4, 3))
    (kernel,) = kernels_of(Values(values.program, {}), negated)
    assert kernel.kind == "strided"
    (broadcast,) = kernels_for(aten.mul.Tensor, [(2, 3, 4), (3, 1)], (2, 3, 4))
    assert broadcast.kind == "strided"


def test_what_was_expanded_is_read_once() -> None:
    whole = torch.empty(6, 4, device="meta")
    assert distinct_bytes(whole) == 96
    assert distinct_bytes(torch.empty(1, 4, device="meta").expand(6, 4)) == 16


# -- attention ------------------------------------------------------------------------------------

CHUNKS: list[tuple[list[int], list[int]]] = [
    ([0, 1], [0, 1]), ([1, 6], [1, 6]), ([1, 6], [0]), ([6], [3, 4]), ([2, 5], [2, 4, 5]),
    ([3], [3]), ([0], [1]), ([4], [0]), ([2, 3, 5, 4], [3, 4]), ([0, 1, 2], [1]), ([6, 5], [5, 6]),
]


@pytest.mark.parametrize(("queries", "keys"), CHUNKS, ids=str)
@pytest.mark.parametrize(
    "band", [Band(), Band(0), Band(0, 5), Band(-3, 3), Band(None, 9)], ids=str
)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("limit", [1000, 27])
def test_kernel_calls_are_those_of_the_op(
    queries: list[int], keys: list[int], band: Band, masked: bool, limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The op's body is run, and what it asks the kernels for is held against the cost model."""
    chunk, called = 4, []

    def watched(seen: Callable[..., Any]) -> Callable[..., Any]:
        def call(*operands: torch.Tensor, **how: Any) -> Any:
            (q, k, _), kind = operands[-3:], "attention_causal" if how["causal"] else "attention"
            kind = kind if how["mask"] is None else "attention_masked"
            called.append((kind, q.shape[2], k.shape[2]))
            return seen(*operands, **how)

        return call

    for name in ("attend", "attend_merge"):
        monkeypatch.setattr(attention.kernels, name, watched(getattr(kernels, name)))
    rows, columns = chunk * len(queries), chunk * len(keys)
    q = torch.randn(1, 2, rows, 8)
    kv = [torch.randn(1, 2, columns, 8) for _ in range(2)]
    positions = limit if limit < 1000 else 40
    mask = torch.ones(1, 1, rows, positions, dtype=torch.bool) if masked else None
    attention.block_attention(
        q, kv, None, mask, head_dim=8, queries=queries, keys=keys, chunk=chunk, limit=positions,
        scale=1.0, lower=band.lower, upper=band.upper,
    )
    found = blocks(queries, keys, rows, columns, chunk=chunk, limit=positions, band=band,
                   masked=masked)
    assert [(one.kind, one.rows, one.columns) for one in found] == called


@pytest.mark.parametrize(("queries", "keys"), CHUNKS, ids=str)
@pytest.mark.parametrize(
    "band", [Band(), Band(0), Band(0, 5), Band(-3, 3), Band(None, 9), Band(2)], ids=str
)
def test_visible_pairs_are_counted_exactly(queries: list[int], keys: list[int], band: Band) -> None:
    chunk = 5
    found = blocks(queries, keys, chunk * len(queries), chunk * len(keys), chunk=chunk, limit=10**6,
                   band=band, masked=False)
    positions = [[c * chunk + i for c in held for i in range(chunk)] for held in (queries, keys)]
    lower = -10**9 if band.lower is None else band.lower
    upper = 10**9 if band.upper is None else band.upper
    expected = sum(lower <= i - j <= upper for i, j in product(*positions))
    assert sum(one.visible for one in found) == expected


# -- time -----------------------------------------------------------------------------------------


def test_a_product_takes_its_flops_or_its_bytes_or_a_launch() -> None:
    on = cluster().device
    large = Kernel("matmul", F32, 10**6, 10**9, 100, 100, 100)
    assert (time_of(large, on).seconds, time_of(large, on).bound) == (1e-3, "matmul")
    read = Kernel("matmul", F32, 10**9, 10**6, 1, 100, 100)
    assert (time_of(read, on).seconds, time_of(read, on).bound) == (1e-3, "weights")
    small = Kernel("matmul", F32, 10, 10, 1, 2, 2)
    assert (time_of(small, on).seconds, time_of(small, on).bound) == (1e-6, "launch")


def test_a_mask_makes_the_kernel_go_over_all_pairs() -> None:
    on = cluster(device=device(asynchronous=False)).device
    seen = Kernel("attention", F32, 0, 4 * 8 * 1000, 100, 8, 100)
    masked = Kernel("attention_masked", F32, 0, 4 * 8 * 1000, 10**4, 8, 10**4)
    assert time_of(seen, on).bound == "launch"
    assert time_of(masked, on).seconds == pytest.approx(4 * 8 * 1e8 / 1e12)


def test_efficiency_is_a_function_of_size() -> None:
    curve = figure([[1.0, 2.0], [4.0, 8.0]], "TFLOP/s", rows=[1.0, 100.0], width=[10.0, 1000.0])
    on = cluster(device=device(figures={"matmul.float32": curve})).device

    def seconds(rows: int, inner: int, columns: int) -> float:
        flops = 2 * rows * inner * columns * 10**6  # far from bytes and launches
        return time_of(Kernel("matmul", F32, 0, flops, rows, inner, columns), on).seconds / flops

    assert seconds(100, 1000, 1000) == pytest.approx(1 / 8e12)
    assert seconds(1, 10, 10) == pytest.approx(1 / 1e12)
    assert seconds(100, 1, 10**4) == pytest.approx(1 / (4 * 2**0.5 * 1e12))  # width: sqrt of both


@pytest.mark.parametrize(
    ("heads", "rows", "keys", "seconds"),
    [
        (16, 512, 512, 1.0),  # as measured
        (16, 2048, 2048, 0.25),
        (16, 1024, 1024, 0.5),  # half way between 1 and 4
        (2, 1024, 1024, 0.5 * 4),  # a quarter of the rows that fill a GPU
        (16, 64, 4096, 1.0 * 8),  # as many pairs, an eighth of the rows
        (16, 128, 128, 1.0 * 4),  # below what was measured
    ],
)
def test_fewer_rows_fill_a_gpu_less_well(
    heads: int, rows: int, keys: int, seconds: float
) -> None:
    curve = figure([[1.0, 4.0]], "TFLOP/s", head_dim=[64.0], length=[512.0, 2048.0])
    on = cluster(device=device(figures={"attention.float32": curve})).device
    kernel = Kernel("attention", F32, 0, 10**12, rows, 64, keys, batch=heads)
    assert time_of(kernel, on).seconds == pytest.approx(seconds)


def test_a_running_sum_goes_step_by_step() -> None:
    on = cluster(device=device(figures={"scan": figure(100.0, "ns")})).device
    (down,) = kernels_for(aten.cumsum.default, [(4096, 8)], (4096, 8), 0)
    (along,) = kernels_for(aten.cumsum.default, [(8, 4096)], (8, 4096), 1)
    assert time_of(down, on).bound == "steps"
    assert time_of(down, on).seconds == pytest.approx(409.6e-6)
    assert time_of(along, on).bound == "launch"
    assert time_of(down, cluster().device).bound == "launch"  # a table that has no figure for it


def test_a_running_sum_of_whole_numbers_is_laid_out_along_memory() -> None:
    there, total, back = kernels_for(
        aten.cumsum.default, [(4096, 8)], (4096, 8), 0, dtype=torch.int64)
    assert (there.kind, total.kind, back.kind) == ("strided", "scan", "strided")
    assert total.rows == 0


def test_linear_attention_is_matmuls_in_blocks_of_64() -> None:
    """Of 6 heads: scores and values of 128 tokens, states of 3 x 5, and what is read of them."""
    found = kernels_for(
        op("linear_attention"), [(2, 3, 128, 3)] * 2 + [(2, 3, 128, 5), (2, 3, 128)],
        (2, 3, 128, 5))
    flops = [kernel.flops for kernel in found if kernel.kind == "matmul"]
    within, states = [2 * 6 * 128 * 64 * size for size in (3, 5)], 2 * 6 * 128 * 3 * 5
    assert flops == [*within, states, 2 * 6 * 3 * 3 * 15, states]
    block = kernels_for(
        op("linear_attention"), [(2, 3, 7, 3)] * 2 + [(2, 3, 7, 5), (2, 3, 7)], (2, 3, 7, 5))
    assert [k.flops for k in block if k.kind == "matmul"] == [2 * 6 * 7 * 7 * n for n in (3, 5)]


def test_a_token_behind_others_reads_a_state_and_its_block() -> None:
    found = kernels_for(
        op("running_linear_attention"),
        [(2, 3, 1, 3)] * 2 + [(2, 3, 1, 5), (2, 3, 1), (2, 3, 1), (2, 3, 64, 3), (2, 3, 64, 5),
                              (2, 3, 64), (2, 3, 64), (2, 3, 3, 3, 5), (1,)], (2, 3, 1, 5))
    flops = [kernel.flops for kernel in found if kernel.kind == "matmul"]
    scores, values, state = (2 * 6 * 32 * n for n in (32 * 3, 32 * 5, 3 * 5))
    differences = [scores, 2 * 6 * 32 * 32 * 4]  # by the delta rule: half of a triangle, N + P
    assert flops == [*differences, scores, values, state, state, state, state]


@pytest.mark.parametrize(("dtype", "head_dim", "free"), [
    (torch.float16, 512, True), (torch.bfloat16, 300, True), (torch.float16, 128, False),
    (F32, 512, False),
])
def test_a_merge_is_nothing_where_the_kernel_folds(
    dtype: torch.dtype, head_dim: int, free: bool
) -> None:
    merge = Kernel("merge", dtype, 10**9, inner=head_dim)
    assert (time_of(merge, cluster().device).seconds == 0.0) == free
