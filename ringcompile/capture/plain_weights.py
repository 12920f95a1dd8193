"""Weights that are tensor subclasses, such as torchao's, as the plain tensors they are made of.

`quantize_` of torchao puts a subclass in the place of a weight, which holds codes and scales and
answers for `linear`. A program holds plain tensors: the subclass is put together from them inside
the forward, so that what it answers with is captured as ordinary ops on codes and scales.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain

import torch
from torch import nn
from torch._functorch._aot_autograd import subclass_parametrization
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def with_plain_weights(model: nn.Module) -> nn.Module:
    """The model itself, or where weights are subclasses a copy whose weights are plain.

    The copy shares all data with the model, which stays as it is. A `DTensor` is one rank's share
    of a weight, and is left alone.
    """
    if not any(map(_is_made_of_others, _tensors(model))):
        return model
    own = copy.deepcopy(model, {id(tensor): tensor for tensor in _tensors(model)})
    return subclass_parametrization.unwrap_tensor_subclass_parameters(own)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    return chain(model.parameters(), model.buffers())


def _is_made_of_others(tensor: torch.Tensor) -> bool:
    return is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor)
