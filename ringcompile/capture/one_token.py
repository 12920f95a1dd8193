"""Whether a captured program holds for sequences of one token, or of very few.

torch.export traces the model with several tokens. Code may ask whether there is only one (to leave
out a mask, say), a size of one is broadcast (that of `x[:, :-1]`, where there are two tokens), and
torch reads `min(2, s)` as 2 for all lengths that it knows of. So where the weights are at hand, the
first tokens of the example go through both the model and the captured graph. Results must be the
same, and every value must have the shape that the graph's types say of it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ringcompile.capture.dims import SEQUENCE, Example
from ringcompile.capture.flat_call import FlatCall
from ringcompile.capture.same_as_eager import NOT_COMPARED, compare, run_captured
from ringcompile.capture.sizes import Sizes
from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import BATCH, bind, from_torch
from ringcompile.ir.expr import SEQUENCE as LENGTH

# Lengths from here on are left to what torch says of them.
FEW = 4


def why_not(
    length: int, call: FlatCall, exported: ExportedProgram, example: Example, sizes: Sizes
) -> str:
    """Run the first tokens of the example through the model and through the captured graph.

    Args:
        length: how many tokens.
        call: the model and its example, which have been compared.
        exported: what was captured of it.
        example: which dims of the inputs are the sequence.
        sizes: what torch's symbols mean.

    Returns:
        why the program is not for so few tokens, as a note; empty where it is.
    """
    refused = "one token alone is refused" if length == 1 else f"{length} tokens alone are refused"
    one = copy.copy(call)
    one.example = {leaf.name: _first_tokens(leaf.tensor, leaf.dims_of(SEQUENCE), length)
                   for leaf in example.leaves}
    try:
        reason = next((n for n in compare(one, exported) if n.startswith(NOT_COMPARED)), "")
        if reason:
            return f"{refused}: {reason}"
        kept: list[tuple[fx.Node, torch.Tensor]] = []
        with torch.no_grad():
            run_captured(one, exported, keep=kept)
    except RingCompileError as error:
        return f"{refused}: {error.message}"
    except Exception as error:  # whatever torch's ops say of sizes that do not fit
        said = (str(error).strip().splitlines() or [""])[0][:200]
        return f"{refused}: the captured program raises {type(error).__name__}: {said}"
    known = {LENGTH: length, BATCH: example.batch or 1}
    wrong = next((node for node, value in kept if not _fits(node, value, sizes, known)), None)
    return "" if wrong is None else (
        f"{refused}: the shape of '{wrong.name}' is known for {length + 1} and more"
    )


def _first_tokens(tensor: torch.Tensor, dims: list[int], length: int) -> torch.Tensor:
    for dim in dims:
        tensor = tensor.narrow(dim, 0, length)
    return tensor.contiguous()


def _fits(node: fx.Node, value: torch.Tensor, sizes: Sizes, known: dict[str, int]) -> bool:
    """Whether a value has the shape that its node declares; of several results, no check."""
    declared: Any = node.meta.get("val")
    if not torch.is_tensor(declared):
        return True
    if declared.dim() != value.dim():
        return False
    for size, found in zip(declared.shape, value.shape, strict=True):
        if isinstance(size, torch.SymInt):
            size = bind(from_torch(size.node.expr, sizes.symbols), known)
        if isinstance(size, int) and size != found:
            return False
    return True
