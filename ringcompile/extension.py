"""Operators of a user's own: one call gives one a body, a rule for its dims, and a cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call
from ringcompile.ir.rules import RULES, FactorRule, Factors
from ringcompile.ir.rules.base import Names, rank_of, shapes
from ringcompile.ir.rules.contraction import letters, spelled

COSTS = ("stream", "special", "reduction")
_CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class _Dims:
    """The dims of an operator's tensors as a user writes them: `"... d, d -> ... d"`.

    Attributes:
        operands: for each tensor operand, the names of its dims.
        output: the names of the result's dims.
        whole: names along which every rank needs all entries.
    """

    operands: tuple[list[str], ...]
    output: list[str]
    whole: frozenset[str]

    @classmethod
    def read(cls, text: str, whole: str) -> _Dims:
        """Read the text; raises RingCompileError where it is not of that form."""
        inputs, arrow, output = text.partition("->")
        parts = [letters(part) for part in (*inputs.split(","), output)]
        strays = "".join(part for part in (*inputs.split(","), output)).split()
        known = {name for names in parts for name in names}
        if not arrow or any(set(word.replace("...", "")) - known for word in strays):
            raise RingCompileError(
                f"cannot read the dims '{text}'",
                hint="name each dim with a letter, as for einsum: '... d, d -> ... d'",
            )
        if missing := set(whole.split()) - known:
            raise RingCompileError(f"'{missing.pop()}' is named in `whole`, but is not a dim of "
                                   f"'{text}'")
        return cls(tuple(parts[:-1]), parts[-1], frozenset(whole.split()))

    def factors(self, call: Call) -> Factors:
        """A factor for each dim; none where it has to be whole, or is 1 and broadcasts."""
        given = shapes(call)
        if len(given) != len(self.operands):
            raise RingCompileError(
                f"{call.target} reads {len(given)} tensors, its dims name {len(self.operands)}"
            )
        names = [spelled(n, len(s)) for n, s in zip(self.operands, given, strict=True)]
        output = spelled(self.output, rank_of(call))
        sizes: dict[object, set[object]] = {}
        for dims, shape in zip(names, given, strict=True):
            if len(dims) != len(shape):
                raise RingCompileError(f"{call.target} has an operand of shape {list(shape)}, "
                                       f"its dims are {' '.join(map(str, dims))}")
            for name, size in zip(dims, shape, strict=True):
                sizes.setdefault(name, set()).add(size)

        def kept(dims: Names, shape: Sequence[object]) -> Names:
            return tuple(
                None if name in self.whole or (size == 1 and sizes[name] != {1}) else name
                for name, size in zip(dims, shape, strict=True)
            )

        made = tuple(None if name in self.whole or name not in sizes else name for name in output)
        return Factors(tuple(map(kept, names, given)), made)


def register_op(
    op: str | torch._ops.OpOverload,
    body: Callable[..., torch.Tensor] | None = None,
    *,
    dims: str,
    example: Sequence[Any],
    whole: str = "",
    cost: str = "stream",
) -> Any:
    """Register an operator of your own: what it computes, how its dims correspond, what it costs.

    A dim that an operand and the result share can then be split over ranks, the operator may be
    saved in artifacts, and `plan` and `simulate` know its cost. `dims` is verified: the operator is
    run on the whole example and on parts of it, and must give the same results.

    Args:
        op: the name of a new operator, such as "mylib::scale", or one that is registered with torch
            already, such as `torch.ops.mylib.scale.default`. It returns one tensor.
        body: for a new operator, a function of annotated arguments that computes it in torch ops.
        dims: a name for each dim of each tensor operand and of the result, as for einsum:
            "... d, d -> ... d". Dims under `...` are counted from the right; size 1 broadcasts.
        example: arguments, tensors among them, with at least two entries along each dim.
        whole: of these names, those along which entries depend on one another, such as "d" of a
            normalisation over the last dim. No rank gets a part of such a dim only.
        cost: what one element costs: "stream" (loading and storing it), "special" (such as an
            exponential), or "reduction" (several passes over the operands).

    Returns:
        the operator, to be called in a model's forward.

    Raises:
        RingCompileError: the name is taken, the dims cannot be read, or they are not true of the
            example.
    """
    if cost not in COSTS:
        raise RingCompileError(f"unknown cost '{cost}'", hint=f"one of: {', '.join(COSTS)}")
    read = _Dims.read(dims, whole)
    target = _defined(op, body)
    if str(target) in RULES:
        raise RingCompileError(f"{target} already has a rule")
    _check(target, read, tuple(example))
    RULES[str(target)] = FactorRule(read.factors, cost=cost)
    return target


def _defined(op: str | torch._ops.OpOverload, body: Callable[..., torch.Tensor] | None) -> Any:
    if not isinstance(op, str):
        return op
    namespace, colons, name = op.partition("::")
    if not colons or body is None:
        raise RingCompileError(
            f"'{op}' needs a namespace and a body",
            hint='write register_op("mylib::scale", scale, ...)',
        )
    if hasattr(getattr(torch.ops, namespace), name):
        raise RingCompileError(f"torch has an operator '{op}' already")
    try:
        custom = torch.library.custom_op(op, body, mutates_args=())
    except (ValueError, RuntimeError) as error:
        raise RingCompileError(
            f"'{op}' cannot be an operator: {str(error).splitlines()[0][:200]}",
            hint="annotate every argument of the body and what it returns",
        ) from None
    custom.register_fake(body)
    return getattr(getattr(torch.ops, namespace), name).default


def _check(target: Any, dims: _Dims, example: tuple[Any, ...]) -> None:
    """Hold the dims to the example: along each name that may be split, halves give halves."""
    tensors = [x for x in example if isinstance(x, torch.Tensor)]
    if len(tensors) != len(dims.operands):
        raise RingCompileError(
            f"the example has {len(tensors)} tensors, the dims name {len(dims.operands)}"
        )
    result = target(*example)
    names = [spelled(n, x.dim()) for n, x in zip(dims.operands, tensors, strict=True)]
    output = spelled(dims.output, result.dim())
    if [len(n) for n in (*names, output)] != [x.dim() for x in (*tensors, result)]:
        raise RingCompileError(f"the dims do not fit the example, whose result is "
                               f"{list(result.shape)}")
    for name in dict.fromkeys(n for n in output if n not in dims.whole):
        size = result.shape[output.index(name)]
        if size < 2:
            raise RingCompileError(
                f"the example has {size} entries along dim '{name}', too few to check the dims",
                hint="pass an example with at least two entries along each dim",
            )
        for start, end in ((0, size // 2), (size // 2, size)):
            part = _part(example, names, name, start, end, size)
            want = _cut(result, output, name, start, end, size)
            if not _same(target(*part), want):
                raise RingCompileError(
                    f"{target}, run on a part of dim '{name}', does not give that part of its "
                    "result",
                    hint=f"name '{name}' in `whole`: its entries depend on one another",
                )


def _part(
    example: tuple[Any, ...], names: list[Names], name: object, start: int, end: int, size: int
) -> tuple[Any, ...]:
    supply = iter(names)
    return tuple(
        _cut(x, next(supply), name, start, end, size) if isinstance(x, torch.Tensor) else x
        for x in example
    )


def _cut(
    x: torch.Tensor, names: Names, name: object, start: int, end: int, size: int
) -> torch.Tensor:
    """The part of a tensor along a name; all of one that lacks it, or broadcasts along it."""
    for dim, own in enumerate(names):
        if own == name and x.shape[dim] == size:
            x = x.narrow(dim, start, end - start)
    return x


def _same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.shape == want.shape and torch.allclose(
        got, want, rtol=_CLOSE.get(want.dtype, 1e-2), atol=_CLOSE.get(want.dtype, 1e-2),
        equal_nan=True,
    )
