"""Vision-language models whole: an image tower, a projector, and a decoder of both."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.decoders import ROTARY, sizes
from tests.families.family import Family, Inputs, ids

IMAGE_TOKEN, SIDE, PATCH = 90, 16, 4
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
TEXT = {"vocab_size": 97, "pad_token_id": 0, "use_cache": False}


def with_image(tokens_of_image: int, *, kinds: bool = False) -> Inputs:
    """An image, and text with so many places for it, the first of them behind two tokens.

    Args:
        tokens_of_image: how many tokens an image becomes.
        kinds: whether the model is told which tokens are the image's, 0 for text.
    """

    def inputs(length: int, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        text = ids(length, batch, generator).clamp(max=IMAGE_TOKEN - 1)
        text[:, 2 : 2 + tokens_of_image] = IMAGE_TOKEN
        image = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
        found = {"input_ids": text, "pixel_values": image}
        return {**found, "token_type_ids": (text == IMAGE_TOKEN).long()} if kinds else found

    return inputs


def whole(
    name: str, model: str, config: dict[str, Any], attention: str, inputs: Inputs
) -> Family:
    """A row; padding stands in the tables of decoders."""
    images = {"image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN}
    return Family(name, model, {**images, **config}, attention, ROTARY, inputs, padding=None)


FAMILIES = [
    whole("llava", "LlavaForConditionalGeneration",
          {"vision_config": {"model_type": "clip_vision_model", **TOWER},
           "text_config": {"model_type": "llama", **sizes(**TEXT)}, "vision_feature_layer": -1},
          "grouped-query, causal; full over patches", with_image(16)),
    whole("gemma3-images", "Gemma3ForConditionalGeneration",
          {"vision_config": {"model_type": "siglip_vision_model", **TOWER},
           "text_config": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8,
                           "query_pre_attn_scalar": 16, **sizes(**TEXT, layer_types=[
                               "sliding_attention", "full_attention"])},
           "mm_tokens_per_image": 4},
          "grouped-query, causal + window 8 every other layer, full among an image's tokens; "
          "full over patches", with_image(4, kinds=True)),
    whole("paligemma", "PaliGemmaForConditionalGeneration",
          {"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False,
                             **TOWER},
           "text_config": {"model_type": "gemma", "head_dim": 16, **sizes(**TEXT)},
           "projection_dim": 64},
          "grouped-query, causal, full in the prefix; full over patches",
          with_image(16, kinds=True)),
]
