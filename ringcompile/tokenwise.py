"""A word from the user: this code treats every token on its own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ringcompile.ops.schemas import op

T = TypeVar("T", bound=Callable[..., Any])
_regions = itertools.count()


def tokenwise(what: T) -> T:
    """Declare that a function or a module computes each token's result from that token alone.

    Each rank then runs the code unchanged on its own tokens, whatever ops it contains, for example
    your own routing to experts, or a custom kernel. Each tensor that goes in or comes out must have
    one dim of tokens. Outside of capture nothing changes. The declaration is verified: the compiler
    runs the code on random data, whole and in parts, and refuses it if the results differ.

        mixture = ringcompile.tokenwise(model.layers[0].mlp)    # a module, changed in place

        @ringcompile.tokenwise
        def route(x, router, up, down): ...

    Args:
        what: a function, or a module whose `forward` is declared.

    Returns:
        the declared function, or the module itself.
    """
    if isinstance(what, nn.Module):
        what.forward = tokenwise(what.forward)
        return what

    @functools.wraps(what)
    def declared(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_exporting():
            return what(*args, **kwargs)
        region = next(_regions)

        def marked(value: Any, leaves: bool) -> Any:
            return pytree.tree_map_only(
                Tensor, lambda x: op("tokenwise")(x, region=region, leaves=leaves), value
            )

        args, kwargs = marked((args, kwargs), leaves=False)
        return marked(what(*args, **kwargs), leaves=True)

    return declared  # type: ignore[return-value]
