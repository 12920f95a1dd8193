"""Vision-language models whole: an image tower, a projector, and a decoder of both."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.families.decoders import ROTARY, sizes
from tests.families.family import Family, Inputs, ids

IMAGE_TOKEN, SIDE, PATCH = 90, 16, 4
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
QWEN_TOWER = {"depth": 2, "hidden_size": 64, "num_heads": 2, "patch_size": PATCH,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
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


def patches(tokens_of_image: int, grid: tuple[int, int, int], size: int, axes: int) -> Inputs:
    """An image as rows of patches, how many there are, and positions by `axes` counts.

    Args:
        tokens_of_image: how many tokens the image becomes.
        grid: its frames, and its rows and columns of patches.
        size: numbers in a patch.
        axes: counts of a position; those of the image's tokens differ.
    """

    def inputs(length: int, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        text = ids(length, batch, generator).clamp(max=IMAGE_TOKEN - 1)
        text[:, 2 : 2 + tokens_of_image] = IMAGE_TOKEN
        places = torch.arange(length).expand(axes, batch, length).clone()
        places[-1, :, 2 : 2 + tokens_of_image] = 2 + torch.arange(tokens_of_image) // 2
        return {
            "input_ids": text, "position_ids": places,
            "attention_mask": torch.ones_like(text),
            "mm_token_type_ids": (text == IMAGE_TOKEN).long(),
            "pixel_values": torch.randn(
                batch * math.prod(grid), size, generator=generator
            ),
            "image_grid_thw": torch.tensor([grid] * batch),
        }

    return inputs


def two_images(tokens_of_image: int) -> Inputs:
    """Two images of one size in each text, [B, 2, 3, H, W]."""

    def inputs(length: int, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        text = ids(length, batch, generator).clamp(max=IMAGE_TOKEN - 1)
        text[:, 2 : 2 + 2 * tokens_of_image] = IMAGE_TOKEN
        image = torch.randn(batch, 2, 3, SIDE, SIDE, generator=generator)
        return {"input_ids": text, "pixel_values": image}

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
    *(whole(name, model,
            {"vision_config": {**QWEN_TOWER, **tower}, "video_token_id": 91,
             "vision_start_token_id": 92, "vision_end_token_id": 93,
             "text_config": sizes(**TEXT, **text, rope_parameters={
                 "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4})},
            attention, patches(8, (1, 8, 4), 96, 3))
      for name, model, tower, text, attention in (
          ("qwen2_vl", "Qwen2VLForConditionalGeneration", {"embed_dim": 32, "mlp_ratio": 2}, {},
           "grouped-query, causal; full over an image's patches"),
          ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration",
           {"out_hidden_size": 64, "hidden_size": 32, "intermediate_size": 48, "window_size": 16,
            "fullatt_block_indexes": [1]}, {},
           "grouped-query, causal; in windows of 4 by 4 patches, then full over an image's"),
          ("qwen3_vl", "Qwen3VLForConditionalGeneration",
           {"out_hidden_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}, {"head_dim": 16},
           "grouped-query with query/key norm, causal; full over an image's patches"),
      )),
    *(whole(name, model,
            {"vision_config": TOWER, "text_config": {"model_type": "llama", **sizes(**TEXT)},
             "scale_factor": 2},
            "grouped-query, causal; full over patches", two_images(4))
      for name, model in (("idefics3", "Idefics3ForConditionalGeneration"),
                          ("smolvlm", "SmolVLMForConditionalGeneration"))),
    whole("internvl", "InternVLForConditionalGeneration",
          {"vision_config": {"model_type": "internvl_vision", **TOWER, "image_size": [SIDE, SIDE],
                             "patch_size": [PATCH, PATCH]},
           "text_config": {"model_type": "llama", **sizes(**TEXT)}, "downsample_ratio": 0.5,
           "vision_feature_layer": -1},
          "grouped-query, causal; full over patches", with_image(4)),
]
