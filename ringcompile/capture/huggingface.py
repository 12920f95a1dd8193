"""Capture of Hugging Face models: their hooks, filled in with ours.

transformers asks three registries how to attend, how to build masks and how to run experts. Ours
keep attention one op with un-expanded key/value heads, write the mask out from positions, so that
it can be read from the graph, and put every token through its own experts row by row, without
control flow that depends on data. Attention and mask belong together: attention alone would lose
the mask.

Ours stand in the place of "sdpa", which takes the same arguments: models ask for that name where
they write what they attend to into the mask, such as the keys that an indexer chose, and hand it
on to kernels of other names as they have it.

Masks are made for several sequences from positions that are the same for all. transformers expands
these only where there are several, and so asks how many there are; while a model is captured they
are expanded always, which is the same for one, and one program serves any batch.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from functools import wraps
from typing import Any

from torch import nn

from ringcompile.capture.huggingface_attention import attention, mask
from ringcompile.capture.huggingface_experts import experts
from ringcompile.capture.huggingface_loops import experts_by_row
from ringcompile.capture.huggingface_states import states_by_scan

_ATTENTION, _EXPERTS = "sdpa", "ringcompile"
# What a config says of it, and what we have it say while a model is captured.
_SETTINGS = {
    "_attn_implementation": _ATTENTION,
    "_experts_implementation": _EXPERTS,
    "use_cache": False,
}


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """While inside, Hugging Face modules use our hooks and no cache; restored behind."""
    transformers = sys.modules.get("transformers")
    if transformers is None:  # a Hugging Face model cannot exist without it
        yield
        return
    saved = _saved(model, transformers, _SETTINGS)
    by_hand = _attending_by_hand(model, transformers)
    try:
        for config, name, value in saved:
            kept = name == "_attn_implementation" and id(config) in by_hand
            setattr(config, name, value if kept else _SETTINGS[name])
        with (
            _registered(), _positions_of_all_sequences(), states_by_scan(model),
            experts_by_row(model),
        ):
            yield
    finally:
        for config, name, value in saved:
            setattr(config, name, value)


@contextlib.contextmanager
def _registered() -> Iterator[None]:
    """While inside, transformers finds our functions in its registries."""
    registries = _registries()
    before = [mapping.get(name) for mapping, name, _ in registries]
    for mapping, name, function in registries:
        mapping[name] = function
    try:
        yield
    finally:
        for (mapping, name, _), known in zip(registries, before, strict=True):
            if known is None:
                del mapping[name]
            else:
                mapping[name] = known


@contextlib.contextmanager
def _positions_of_all_sequences() -> Iterator[None]:
    """While inside, masks are made from positions [B,S], also where models give [1,S]."""
    from transformers import masking_utils

    original: Any = masking_utils._preprocess_mask_arguments
    masking_utils._preprocess_mask_arguments = _with_all_positions(original)
    try:
        yield
    finally:
        masking_utils._preprocess_mask_arguments = original


def _with_all_positions(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        positions = bound.arguments.get("position_ids")
        if positions is not None and isinstance(positions.shape[0], int) and positions.dim() == 2:
            batch = bound.arguments["inputs_embeds"].shape[0]
            bound.arguments["position_ids"] = positions.expand(batch, -1)
        return function(*bound.args, **bound.kwargs)

    return called


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """While inside, Hugging Face modules run as they are, but return no cache."""
    transformers = sys.modules.get("transformers")
    saved = [] if transformers is None else _saved(model, transformers, ("use_cache",))
    try:
        for config, name, _ in saved:
            setattr(config, name, False)
        yield
    finally:
        for config, name, value in saved:
            setattr(config, name, value)


def _saved(
    model: nn.Module, transformers: Any, names: Collection[str]
) -> list[tuple[Any, str, Any]]:
    """What the configs of a model say of these settings."""
    return [
        (config, name, getattr(config, name))
        for config in _configs(model, transformers)
        for name in names
        if hasattr(config, name)
    ]


def caveats(model: nn.Module, arguments: Collection[str]) -> tuple[str, ...]:
    """Where a model that is called as usual may differ from what is captured.

    Args:
        model: any module.
        arguments: the names of what it is called with.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or "position_ids" not in arguments:
        return ()
    if not any(getattr(config, "use_cache", False) for config in _configs(model, transformers)):
        return ()
    caveat = (
        "captured as with use_cache=False: where position_ids restart, transformers then keeps "
        "documents apart; with its cache it does not"
    )
    return (caveat,)


def is_model(model: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def tp_plan(model: nn.Module) -> dict[str, str]:
    """How the model's own layers split under tensor parallelism, by pattern of layer names."""
    if not is_model(model):
        return {}
    return dict(getattr(model, "_tp_plan", None) or {})


def _attending_by_hand(model: nn.Module, transformers: Any) -> set[int]:
    """Configs of models that do not ask the registry how to attend.

    Their code would read our name as one of the implementations that it knows, and our masks, where
    True is visible, as numbers to add.
    """
    return {
        id(module.config)
        for module in model.modules()
        if isinstance(module, transformers.PreTrainedModel)
        and not type(module)._can_set_attn_implementation()
    }


def _registries() -> tuple[tuple[dict[str, Any], str, Callable[..., Any]], ...]:
    """Where transformers looks functions up, under which name it finds ours, and ours."""
    from transformers import masking_utils
    from transformers.integrations import moe
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def by_name(registry: Any) -> dict[str, Any]:
        return type(registry)._global_mapping

    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    return (
        (by_name(ALL_ATTENTION_FUNCTIONS), _ATTENTION, attention),
        (by_name(masks), _ATTENTION, mask),
        (by_name(moe.ALL_EXPERTS_FUNCTIONS), _EXPERTS, experts),
    )


def _configs(model: nn.Module, transformers: Any) -> list[Any]:
    """The configs that modules ask, each before those inside it, which it sets as well."""
    found = (getattr(module, "config", None) for module in model.modules())
    outer = (config for config in found if isinstance(config, transformers.PreTrainedConfig))
    return list({id(config): config for each in outer for config in _nested(each)}.values())


def _nested(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _nested(getattr(config, name))
