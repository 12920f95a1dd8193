"""Diffusion transformers of diffusers, small: configs, inputs, and how text comes in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

SEED = 20240229
TEXT, HIDDEN, POOLED = 6, 2, 24
Dims = Mapping[str, Mapping[int, str]]
Inputs = Callable[["Draw"], dict[str, Any]]
_HEADS = {"num_attention_heads": 4, "attention_head_dim": 16}
_JOINT, _CROSS = "one attention over text and image", "self-attention, then attention over text"


@dataclass(frozen=True)
class Draw:
    """Makes the inputs of one call.

    Attributes:
        batch: how many sequences.
        rows: rows of tokens of an image, for families whose tokens come as a sequence.
    """

    batch: int = 2
    rows: int = 4
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(SEED))

    def normal(self, *shape: int) -> torch.Tensor:
        """Numbers for each sequence."""
        shape = (self.batch, *shape)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def text(self, **others: Any) -> dict[str, Any]:
        """Other inputs, the image first, with embedded text and the time step."""
        return {
            **others,
            "encoder_hidden_states": self.normal(TEXT, 32),
            "timestep": torch.linspace(200, 700, self.batch, dtype=torch.float64),
            "return_dict": False,
        }

    def mask(self) -> torch.Tensor:
        """Which text tokens are real: the last sequence has padding."""
        mask = torch.ones(self.batch, TEXT, dtype=torch.int64)
        mask[-1, TEXT - HIDDEN :] = 0
        return mask

    def tokens(self, width: int) -> torch.Tensor:
        """The tokens of an image, five to a row."""
        return self.normal(5 * self.rows, width)

    def places(self, axes: int) -> torch.Tensor:
        """The row and the column of each of them, among `axes` numbers."""
        at = torch.arange(5 * self.rows)
        ids = torch.zeros(5 * self.rows, axes, dtype=torch.float64)
        ids[:, 1], ids[:, 2] = at // 5, at % 5
        return ids


@dataclass(frozen=True)
class Denoiser:
    """One row.

    Attributes:
        name: as diffusers names its file, without what all have in common.
        model: class of diffusers.
        config: its arguments.
        inputs: makes a call's inputs.
        attention: how image tokens see one another and the text.
        positions: how positions enter, in words.
        masks: the input that hides text tokens; empty where the family takes none.
        dims: what a user says of the inputs; tokens vary where the sequence is named.
        tolerance: the largest difference that counts as none, of the largest value; more where
            the model's code computes in float32.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    inputs: Inputs
    attention: str = _JOINT
    positions: str = "3-D rotary"
    masks: str = ""
    dims: Dims | None = None
    tolerance: float = 1e-11

    @torch.no_grad()
    def build(self) -> nn.Module:
        """The model in float64, with weights that make masks, positions and the step matter."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = getattr(diffusers, self.model)(**self.config).double().eval()
        generator = torch.Generator().manual_seed(SEED)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() < 2:
                parameter.add_(0.15 * noise)
            else:
                sharpen = 1.5 if "to_q" in name or "to_k" in name else 1.0
                parameter.copy_(sharpen * noise / math.sqrt(parameter[0].numel()))
        return model


def _by_token(*names: str, **others: Mapping[int, str]) -> Dims:
    """Of families that take the image's tokens as a sequence of any length."""
    batch = ("encoder_hidden_states", "timestep", *names)
    return {
        "hidden_states": {0: "batch", 1: "sequence"}, "img_ids": {0: "sequence"}, "txt_ids": {},
        **{name: {0: "batch"} for name in batch}, **others,
    }


def _flux(draw: Draw) -> dict[str, Any]:
    return draw.text(
        hidden_states=draw.tokens(4), pooled_projections=draw.normal(POOLED),
        img_ids=draw.places(3), txt_ids=torch.zeros(TEXT, 3, dtype=torch.float64),
    )


def _flux2(draw: Draw) -> dict[str, Any]:
    text = torch.zeros(TEXT, 4, dtype=torch.float64)
    text[:, 3] = torch.arange(TEXT)
    return draw.text(
        hidden_states=draw.tokens(8), img_ids=draw.places(4), txt_ids=text,
        guidance=torch.full((draw.batch,), 3.5, dtype=torch.float64),
    )


def _chroma(draw: Draw) -> dict[str, Any]:
    inputs = _flux(draw)
    del inputs["pooled_projections"]
    shown = torch.ones(draw.batch, 5 * draw.rows, dtype=torch.int64)
    return {**inputs, "attention_mask": torch.cat([draw.mask(), shown], 1).bool()}


def _image(draw: Draw) -> dict[str, Any]:
    return draw.text(hidden_states=draw.normal(4, 8, 10))


def _sd3(draw: Draw) -> dict[str, Any]:
    return {**_image(draw), "pooled_projections": draw.normal(POOLED)}


def _pixart(draw: Draw) -> dict[str, Any]:
    return draw.text(
        hidden_states=draw.normal(4, 8, 8), encoder_attention_mask=draw.mask(),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


def _dit(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(4, 8, 8), "timestep": torch.arange(draw.batch) + 5,
        "class_labels": torch.arange(draw.batch), "return_dict": False,
    }


def _square(draw: Draw) -> dict[str, Any]:
    return draw.text(hidden_states=draw.normal(4, 8, 8))


def _cogview4(draw: Draw) -> dict[str, Any]:
    sizes = torch.full((draw.batch, 2), 64.0, dtype=torch.float64)
    return {**_square(draw), "original_size": sizes, "target_size": sizes + 8,
            "crop_coords": sizes - 60}


def _masked_image(draw: Draw) -> dict[str, Any]:
    return draw.text(hidden_states=draw.normal(4, 6, 6), encoder_attention_mask=draw.mask())


def _lumina2(draw: Draw) -> dict[str, Any]:
    return draw.text(
        hidden_states=draw.normal(4, 8, 8), encoder_attention_mask=draw.mask().bool()
    )


def _video(draw: Draw) -> dict[str, Any]:
    return draw.text(hidden_states=draw.normal(4, 3, 8, 6))


def _masked_video(draw: Draw) -> dict[str, Any]:
    return {**_video(draw), "encoder_attention_mask": draw.mask()}


def _hunyuan(draw: Draw) -> dict[str, Any]:
    return {**_masked_video(draw), "pooled_projections": draw.normal(POOLED),
            "guidance": torch.full((draw.batch,), 3.5, dtype=torch.float64)}


def _cogvideox(draw: Draw) -> dict[str, Any]:
    angles = torch.randn(36, 16, generator=draw.generator, dtype=torch.float64)
    return draw.text(
        hidden_states=draw.normal(3, 4, 8, 6), image_rotary_emb=(angles.cos(), angles.sin())
    )


def _allegro(draw: Draw) -> dict[str, Any]:
    shown = torch.ones(draw.batch, 3, 8, 6, dtype=torch.float64)
    return {**_masked_video(draw), "attention_mask": shown, "image_rotary_emb": None}


def _latte(draw: Draw) -> dict[str, Any]:
    return draw.text(hidden_states=draw.normal(4, 3, 8, 8))


def _ltx(draw: Draw) -> dict[str, Any]:
    return draw.text(
        hidden_states=draw.normal(24, 8), encoder_attention_mask=draw.mask(),
        num_frames=2, height=3, width=4,
    )


def _qwen(draw: Draw) -> dict[str, Any]:
    return draw.text(
        hidden_states=draw.tokens(16), encoder_hidden_states_mask=draw.mask(),
        img_shapes=[(1, draw.rows, 5)] * draw.batch,
    )


def _audio(draw: Draw) -> dict[str, Any]:
    return draw.text(hidden_states=draw.normal(8, 24), global_hidden_states=draw.normal(1, POOLED))


_AXES = (4, 4, 8)
_TEXT = {"joint_attention_dim": 32}
_FOUR = {"in_channels": 4, "out_channels": 4}
_SINGLE = {"num_layers": 2, "num_single_layers": 2}
DENOISERS = (
    Denoiser("flux", "FluxTransformer2DModel",
             {**_HEADS, **_TEXT, **_SINGLE, "in_channels": 4, "pooled_projection_dim": POOLED,
              "axes_dims_rope": _AXES},
             _flux, dims=_by_token("pooled_projections")),
    Denoiser("flux2", "Flux2Transformer2DModel",
             {**_HEADS, **_TEXT, **_SINGLE, "in_channels": 8, "timestep_guidance_channels": 16,
              "axes_dims_rope": (4, 4, 4, 4)},
             _flux2, positions="4-D rotary", dims=_by_token("guidance")),
    Denoiser("chroma", "ChromaTransformer2DModel",
             {**_HEADS, **_TEXT, **_SINGLE, "in_channels": 4, "axes_dims_rope": _AXES,
              "approximator_num_channels": 16, "approximator_hidden_dim": 32,
              "approximator_layers": 1},
             _chroma, masks="attention_mask", dims=_by_token(attention_mask={0: "batch"})),
    Denoiser("sd3", "SD3Transformer2DModel",
             {**_HEADS, **_TEXT, **_FOUR, "sample_size": 8, "num_layers": 2,
              "caption_projection_dim": 64, "pooled_projection_dim": POOLED,
              "pos_embed_max_size": 8, "qk_norm": "rms_norm"},
             _sd3, positions="table, cut to the image"),
    Denoiser("auraflow", "AuraFlowTransformer2DModel",
             {**_HEADS, **_TEXT, **_FOUR, "sample_size": 8, "num_mmdit_layers": 2,
              "num_single_dit_layers": 1, "caption_projection_dim": 64, "pos_embed_max_size": 64},
             _square, positions="table, cut to the image"),
    Denoiser("qwenimage", "QwenImageTransformer2DModel",
             {**_HEADS, **_TEXT, "in_channels": 16, "out_channels": 4, "num_layers": 2,
              "axes_dims_rope": _AXES},
             _qwen, masks="encoder_hidden_states_mask"),
    Denoiser("cogview4", "CogView4Transformer2DModel",
             {**_HEADS, **_FOUR, "num_layers": 2, "text_embed_dim": 32, "time_embed_dim": 16,
              "condition_dim": 16, "pos_embed_max_size": 8, "sample_size": 8,
              "rope_axes_dim": (8, 8)},
             _cogview4, positions="2-D rotary"),
    Denoiser("hunyuan_image", "HunyuanImageTransformer2DModel",
             {**_HEADS, **_FOUR, **_SINGLE, "num_refiner_layers": 1, "patch_size": (1, 1),
              "text_embed_dim": 32, "rope_axes_dim": (8, 8)},
             _masked_image, positions="2-D rotary", masks="encoder_attention_mask"),
    Denoiser("lumina2", "Lumina2Transformer2DModel",
             {"sample_size": 8, "in_channels": 4, "hidden_size": 64, "num_layers": 2,
              "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2,
              "multiple_of": 16, "axes_dim_rope": _AXES, "axes_lens": (32, 16, 16),
              "cap_feat_dim": 32},
             _lumina2, masks="encoder_attention_mask"),
    Denoiser("pixart", "PixArtTransformer2DModel",
             {**_HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2,
              "cross_attention_dim": 64, "sample_size": 8, "patch_size": 2,
              "caption_channels": 32, "use_additional_conditions": False, "norm_num_groups": 4},
             _pixart, _CROSS, "sinusoids", "encoder_attention_mask"),
    Denoiser("dit", "DiTTransformer2DModel",
             {**_HEADS, "in_channels": 4, "num_layers": 2, "sample_size": 8,
              "num_embeds_ada_norm": 10, "norm_num_groups": 4},
             _dit, "self-attention; a class instead of text", "sinusoids"),
    Denoiser("sana", "SanaTransformer2DModel",
             {**_HEADS, **_FOUR, "num_layers": 2, "num_cross_attention_heads": 4,
              "cross_attention_head_dim": 16, "cross_attention_dim": 64, "caption_channels": 32,
              "sample_size": 8},
             _masked_image, "linear attention, then attention over text", "none",
             "encoder_attention_mask", tolerance=2e-5),
    Denoiser("hunyuan_video", "HunyuanVideoTransformer3DModel",
             {**_HEADS, **_FOUR, **_SINGLE, "num_refiner_layers": 1, "text_embed_dim": 32,
              "pooled_projection_dim": POOLED, "rope_axes_dim": _AXES},
             _hunyuan, masks="encoder_attention_mask"),
    Denoiser("cogvideox", "CogVideoXTransformer3DModel",
             {**_HEADS, **_FOUR, "time_embed_dim": 16, "text_embed_dim": 32, "num_layers": 2,
              "sample_width": 8, "sample_height": 8, "sample_frames": 9,
              "max_text_seq_length": TEXT, "use_rotary_positional_embeddings": True},
             _cogvideox, positions="3-D rotary, from the caller"),
    Denoiser("mochi", "MochiTransformer3DModel",
             {**_HEADS, "in_channels": 4, "num_layers": 2, "pooled_projection_dim": POOLED,
              "text_embed_dim": 32, "time_embed_dim": 16, "max_sequence_length": TEXT},
             _masked_video, positions="3-D rotary, learned", masks="encoder_attention_mask"),
    Denoiser("wan", "WanTransformer3DModel",
             {**_HEADS, **_FOUR, "text_dim": 32, "freq_dim": 16, "ffn_dim": 96, "num_layers": 2,
              "rope_max_seq_len": 32},
             _video, _CROSS),
    Denoiser("ltx", "LTXVideoTransformer3DModel",
             {**_HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 64,
              "num_layers": 2, "caption_channels": 32},
             _ltx, _CROSS, masks="encoder_attention_mask"),
    Denoiser("allegro", "AllegroTransformer3DModel",
             {**_FOUR, "num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 2,
              "cross_attention_dim": 96, "sample_height": 8, "sample_width": 8,
              "sample_frames": 3, "caption_channels": 32},
             _allegro, _CROSS, "3-D rotary, left out", "encoder_attention_mask"),
    Denoiser("latte", "LatteTransformer3DModel",
             {**_HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2,
              "cross_attention_dim": 64, "sample_size": 8, "patch_size": 2,
              "caption_channels": 32, "video_length": 3, "norm_type": "ada_norm_single",
              "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False,
              "activation_fn": "gelu-approximate", "attention_bias": True},
             _latte, "within a frame, over text, and across frames", "sinusoids"),
    Denoiser("stable_audio", "StableAudioDiTModel",
             {"sample_size": 24, "in_channels": 8, "out_channels": 8, "num_layers": 2,
              "attention_head_dim": 16, "num_attention_heads": 4,
              "num_key_value_attention_heads": 2, "cross_attention_dim": 32,
              "time_proj_dim": 16, "global_states_input_dim": POOLED,
              "cross_attention_input_dim": 32},
             _audio, _CROSS, "none"),
)
BY_NAME = {denoiser.name: denoiser for denoiser in DENOISERS}
