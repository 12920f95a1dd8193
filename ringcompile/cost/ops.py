"""What each op of a rank's graph costs: a table from op to the kernels that run it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from math import prod

import torch
from torch import fx

from ringcompile.cost import scans
from ringcompile.cost.attention import KernelCall, blocks
from ringcompile.cost.kernels import Kernel
from ringcompile.cost.values import Values
from ringcompile.cost.work import Work, kernel, product, tensors
from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import target_name
from ringcompile.ir.communication import (
    ALL_REDUCE,
    ALL_TO_ALL,
    COMBINE,
    COMMUNICATION,
    DISPATCH,
    GATHER,
    REDUCE_SCATTER,
    SHIFT,
    WAIT,
)
from ringcompile.ir.kinds import kind_of
from ringcompile.ir.rules import FactorRule, find_rule
from ringcompile.ir.rules.base import Names
from ringcompile.ir.rules.contraction import TERMS
from ringcompile.ops.blocks import Band


def kernels_of(values: Values, node: fx.Node) -> list[Kernel]:
    """The kernels that run a node on its rank; transfers themselves are not among them.

    Raises:
        RingCompileError: the op has no rule, so that nothing is known of it.
    """
    if node.op != "call_function" or node.target is operator.getitem:
        return []
    if target_name(node.target) in COMMUNICATION and target_name(node.target) != WAIT:
        return _around_communication(Work(values, node))
    return ROWS[kind_of(node.target)](Work(values, node))


# What runs at the rate of another kind of work.
_RATES = {"scatter": "stream", "search": "stream", "passes": "reduction"}


def _by_bytes(work: Work) -> list[Kernel]:
    """Every operand read once, every result written once.

    Kernels go over dense operands of one shape in long loads, over others element by element.
    """
    kind = kind_of(work.node.target)
    kind = _RATES.get(kind, kind)
    shape = work.results[0].shape
    if kind == "stream" and any(
        x.numel() > 1 and (not x.is_contiguous() or x.shape != shape) for x in work.operands
    ):
        kind = "strided"
    return [kernel(kind, work.operands, list(work.results))]


def _copied(work: Work) -> list[Kernel]:
    """Nothing where it is a view."""
    source, (result,) = work.operands[0], work.results
    if source.untyped_storage()._cdata == result.untyped_storage()._cdata:
        return []
    return [kernel("strided", [source], [result])]


def _contiguous(tensor: torch.Tensor) -> list[Kernel]:
    """The copy that makes a tensor contiguous, if it is not."""
    if tensor.is_contiguous():
        return []
    made = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return [kernel("strided", [tensor], [made])]


def _around_communication(work: Work) -> list[Kernel]:
    """What is sent is contiguous, parts of peers side by side; what arrives is put in order.

    Along dim 0 both are so already.
    """
    target, arrived = target_name(work.node.target), list(work.results)
    if target == SHIFT:
        return _contiguous(work.operands[0]) if work.call["to"] is not None else []
    sent = work.operands[0]
    parts, joined = [kernel("strided", [sent], [sent])], [kernel("strided", arrived, arrived)]
    if target in (DISPATCH, COMBINE):
        return parts if target == DISPATCH else joined
    cut, to = (work.call.get(name, 0) for name in _CUT_AND_JOINED[target])
    in_order = to == 0 and work.call.get("limit") is None
    return [*(parts if cut else _contiguous(sent)), *([] if in_order else joined)]


# By which arguments a collective says along which dim it cuts what it sends, and joins what comes.
_CUT_AND_JOINED = {
    ALL_REDUCE: ("", ""), GATHER: ("", "dim"), REDUCE_SCATTER: ("dim", ""),
    ALL_TO_ALL: ("split", "concat"),
}


def _matmul(work: Work) -> list[Kernel]:
    """From left to right, as torch does: each pair as one batched matmul; a bias costs nothing."""
    factors = TERMS[target_name(work.node.target)](work.call)
    rule = find_rule(work.node.target)
    assert isinstance(rule, FactorRule)
    given = rule.given_bias(work.call)
    bias = work.call[given] if given else None
    terms, size = list[Names](), dict[object, int]()
    for names, node in zip(factors.operands, work.call.operands, strict=True):
        if node is bias:
            continue
        terms.append(names)
        shape = tensors(work.values.of[node])[0].shape
        size |= {f: max(n, size.get(f, 1)) for f, n in zip(names, shape, strict=True)}
    left, made = set(terms[0]), list[Kernel]()
    for i, term in enumerate(terms[1:], 1):
        right = set(term)
        out = (left | right) & set(factors.output).union(*terms[i + 1 :])
        groups = left & right & out, left & out - right, left & right - out, right & out - left
        batch, rows, inner, columns = (prod(size[f] for f in group) for group in groups)
        made.append(product(batch, rows, inner, columns, work.results[0].dtype))
        left = out
    return made or [kernel("reduction", work.operands, list(work.results))]


def _grouped(work: Work) -> list[Kernel]:
    """Rows in groups, each with a matrix of its own; a matrix without rows is not read."""
    rows, weight = work.operands[:2]
    if rows.dim() != 2 or weight.dim() != 3:
        return _batched(work)
    used = max(min(weight.shape[0], rows.shape[0]), 1)
    each = -(-rows.shape[0] // used)
    return [product(used, each, rows.shape[1], weight.shape[2], rows.dtype)]


def _batched(work: Work) -> list[Kernel]:
    """Groups of as many rows each."""
    (rows, weight), out = work.operands[:2], work.results[0]
    return [product(weight.shape[0], out.shape[-2], rows.shape[-1], out.shape[-1], rows.dtype)]


def _expert_linear(work: Work) -> list[Kernel]:
    """Rows sorted by expert; an expert with rows has one product; then back in order."""
    x, weight, out = work["x"], work["weight"], work.results[0]
    rows, num_experts = x.numel() // x.shape[-1], weight.shape[0]
    used = max(min(num_experts, rows), 1)
    moved = [kernel("stream", [x], [x]), kernel("stream", [out], [out])]
    return [*moved, product(used, -(-rows // used), x.shape[-1], out.shape[-1], x.dtype)]


def _sorted_matmul(work: Work) -> list[Kernel]:
    """Rows that are sorted by expert: one launch that multiplies each expert's with its matrix.

    2 N I O flops for N rows, as in the grouped matmuls of MegaBlocks (arXiv 2211.15841), where no
    expert has empty slots. A group has N / E rows on average: it is taken at the rate of a matmul
    of so many, and reads a matrix of its own. Rows that a capacity drops are not multiplied; how
    many these are only the data tells, so that all are counted here.
    """
    x, weight, out = work["x"], work["weight"], work.results[0]
    rows, num_experts = x.numel() // x.shape[-1], weight.shape[0]
    used = max(min(num_experts, rows), 1)
    return [product(used, -(-rows // used), x.shape[-1], out.shape[-1], x.dtype)]


def _sort_rows(work: Work) -> list[Kernel]:
    """A radix sort, the place of each row, counts, and their prefix sum."""
    order, place, ends = work.results
    return [
        *[kernel("reduction", [order, *work.operands], [order])] * 4,
        kernel("strided", [order], [place]),
        kernel("strided", [order], [ends]),
        kernel("reduction", [ends], [ends]),
    ]


def _convolution(work: Work) -> list[Kernel]:
    """Each output element: the inputs under one filter."""
    weight, out = work["weight"], work.results[0]
    inner, columns = weight[0].numel(), weight.shape[0]
    return [product(1, out.numel() // max(columns, 1), inner, columns, out.dtype)]


def _transposed_convolution(work: Work) -> list[Kernel]:
    weight, x = work["weight"], work.operands[0]
    inner, columns = weight.shape[0], weight[0].numel()
    return [product(1, x.numel() // max(inner, 1), inner, columns, x.dtype)]


def _attention(work: Work) -> list[Kernel]:
    """Whole queries over whole keys."""
    q, k, v = work["q"], work["k"], work["v"]
    found = blocks(
        None, None, q.shape[2], k.shape[2], chunk=0, limit=2**62, band=_band(work),
        masked=_is_masked(work),
    )
    return [_attend(q, block, q.shape[3], v.shape[3]) for block in found]


def _block_attention(work: Work) -> list[Kernel]:
    """A kernel for each part of the block; a wide state is written as one, or widened."""
    out = work.results[0]
    made = _block_kernels(work, out.shape[3])
    if out.dtype != work["q"].dtype:
        made.append(_brought_in(work, out, passes=1))
    return made


def _attend_merge(work: Work) -> list[Kernel]:
    """The same, and the rows of the accumulator that it is brought into, read and written."""
    out, num_rows = work.results[0], work["q"].shape[2]
    made = _block_kernels(work, out.shape[3])
    part = out.narrow(2, 0, num_rows)
    if _is_masked(work) or any(k.kind == "attention_masked" for k in made):
        return [*made, *_merged(work["q"].dtype, part)]
    return [*made, _brought_in(work, part, passes=2)]


def _cached_attention(work: Work) -> list[Kernel]:
    """New queries over the keys in slots that are in use.

    The first tokens of a sequence see each other alone, as in any causal attention. Of later ones
    nearly all keys are visible. A single query reads every key and value once for all query heads
    that share it.
    """
    q, k, v, columns = work["q"], work["k"], work["v"], work["places"].shape[0]
    rows = q.shape[2]
    if rows == 1:
        block = KernelCall("attention_cached", 1, columns, columns)
        made = _attend(q, block, q.shape[3], v.shape[3])
        size = (q.shape[3] + v.shape[3]) * q.dtype.itemsize
        heads = q.shape[0] * (q.shape[1] + k.shape[1] * columns)
        return [replace(made, num_bytes=heads * size)]
    first = rows == columns and not _is_masked(work)
    kind = "attention_causal" if first else "attention_masked"
    visible = rows * (rows + 1) // 2 if first else rows * columns
    return [_attend(q, KernelCall(kind, rows, columns, visible), q.shape[3], v.shape[3])]


def _block_kernels(work: Work, value_dim: int) -> list[Kernel]:
    q, kv = work["q"], work["kv"]
    found = blocks(
        work["queries"], work["keys"], q.shape[2], kv[0].shape[2 if len(kv) == 2 else 0],
        chunk=work["chunk"],
        limit=work["limit"], band=_band(work), masked=_is_masked(work),
    )
    return [_attend(q, block, work["head_dim"], value_dim) for block in found]


def _band(work: Work) -> Band:
    return Band(work.call["lower"], work.call["upper"])


def _is_masked(work: Work) -> bool:
    return work.call["key_mask"] is not None or work.call["mask"] is not None


def _attend(q: torch.Tensor, block: KernelCall, head_dim: int, value_dim: int) -> Kernel:
    """2 D flops for a score of a visible pair, 2 E for its value."""
    num_heads = q.shape[0] * q.shape[1]
    size = head_dim + value_dim
    moved = num_heads * q.dtype.itemsize * (block.rows + block.columns) * size
    flops = 2 * num_heads * block.visible * size
    return Kernel(block.kind, q.dtype, moved, flops, block.rows, head_dim, block.columns, num_heads)


def _brought_in(work: Work, part: torch.Tensor, passes: int) -> Kernel:
    """The block in the model's dtype read, the accumulator written, and read before in merges."""
    dtype = work["q"].dtype
    moved = part.numel() * (dtype.itemsize + passes * part.dtype.itemsize)
    return Kernel("merge", dtype, moved, inner=work["head_dim"])


def _merged(dtype: torch.dtype, part: torch.Tensor) -> list[Kernel]:
    """A block is widened and folded in; see `kernels.merge`."""
    block = torch.empty(part.shape, dtype=dtype, device="meta")
    rows = part[..., 0]
    widened = [kernel("stream", [block], [part])] if dtype != part.dtype else []
    return [
        *widened, kernel("stream", [part, part], [part]), kernel("special", [rows] * 4, [rows])
    ]


def _merge(work: Work) -> list[Kernel]:
    """The first widens the state; each widens the block and folds it in."""
    out, _ = work.results
    state, block = work["state"], work["block"]
    first = [kernel("stream", [state[0]], [out])] if state[0].dtype != out.dtype else []
    return [*first, *_merged(block[0].dtype, out.narrow(2, 0, block[1].shape[2]))]


def _finish(work: Work) -> list[Kernel]:
    out, result = work["state"][0], work.results[0]
    same = out.dtype == result.dtype and work.call["sink"] is None
    return [] if same else [kernel("stream", [out], [result])]


def _streamed(work: Work) -> list[Kernel]:
    return [kernel("stream", work.operands, list(work.results))]


def _index_put(work: Work) -> list[Kernel]:
    """A copy of the whole, then the rows that are written."""
    source, values = work["self"], work["values"]
    return [kernel("stream", [source], [source]), kernel("strided", [values] * 2, [values])]


def _joined(work: Work) -> list[Kernel]:
    """Pieces side by side: a copy of each."""
    return [kernel("strided", work.operands, list(work.results))]


def _rows_taken(work: Work) -> list[Kernel]:
    """What is taken is read and written, in half as long loads as of strided copies."""
    result = work.results[0]
    return [kernel("strided", [result] * 3, [result])]


def _sorted(work: Work) -> list[Kernel]:
    """Radix sort: about four passes over keys and indices."""
    source = work.operands[0]
    return [kernel("reduction", [source, *work.results], list(work.results))] * 4


def has_cost(target: object) -> bool:
    """Whether it is known what an op costs; by name or as an operator."""
    if target_name(target) in COMMUNICATION:
        return True
    try:
        return kind_of(target) in ROWS
    except RingCompileError:
        return False


# The kernels of each kind of work, see `kinds.kind_of`.
ROWS: dict[str, Callable[[Work], list[Kernel]]] = {
    "same": lambda work: [],
    "view": _copied,
    "stream": _by_bytes,
    "special": _by_bytes,
    "reduction": _by_bytes,
    **dict.fromkeys(_RATES, _by_bytes),
    "outer": _streamed,
    "pick_rows": _rows_taken,
    "index_put": _index_put,
    "join": _joined,
    **scans.ROWS,
    "sort": _sorted,
    "matmul": _matmul,
    "grouped_matmul": _grouped,
    "expert_matmul": _expert_linear,
    "sorted_matmul": _sorted_matmul,
    "sort_rows": _sort_rows,
    "convolution": _convolution,
    "transposed_convolution": _transposed_convolution,
    "attention": _attention,
    "block_attention": _block_attention,
    "cached_attention": _cached_attention,
    "attend_merge": _attend_merge,
    "merge": _merge,
    "finish": _finish,
}
