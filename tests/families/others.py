"""Image encoders, encoder-decoders, speech, and state space models."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.decoders import ROTARY, sizes
from tests.families.family import Family, ids

IMAGE = 32


def image(length: int, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """An image of fixed size; `length` plays no part."""
    return {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)}


def pair(length: int, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """An encoder's tokens, and half as many of a decoder."""
    return {"input_ids": ids(length, batch, generator),
            "decoder_input_ids": ids(length // 2 + 1, batch, generator)}


def video(length: int, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Four images of fixed size."""
    return {"pixel_values": torch.randn(batch, 4, 3, IMAGE, IMAGE, generator=generator)}


def masked_pair(length: int, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """As above, with the mask that some families' code takes for given when it is exported."""
    return {**pair(length, batch, generator),
            "attention_mask": torch.ones(batch, length, dtype=torch.int64)}


def speech(length: int, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Decoder tokens, and the mel spectrum of as many frames as the config fixes."""
    return {"decoder_input_ids": ids(length, batch, generator),
            "input_features": torch.randn(batch, 8, 40, generator=generator)}


def wave(length: int, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Samples, 16 for each position."""
    return {"input_values": torch.randn(batch, 16 * length, generator=generator)}


def picture(*args: Any, **kwargs: Any) -> Family:
    """A row that takes images of one size."""
    return Family(*args, **{"inputs": image, "padding": None, **kwargs})


def translator(*args: Any, **kwargs: Any) -> Family:
    """A row with an encoder and a decoder."""
    return Family(*args, **{"inputs": pair, "padding": "right", "two_sequences": True, **kwargs})


def sight(**changes: Any) -> dict[str, Any]:
    """16 patches of 8 by 8."""
    return {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": IMAGE, "patch_size": 8, **changes}


SEQ2SEQ = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "max_position_embeddings": 64, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}
T5 = {
    "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}
SPEECH = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "conv_dim": (32, 32), "conv_stride": (4, 4), "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
PATCHES = "learned table of patches"

IMAGES = [
    picture("vit", "ViTModel", sight(), "full, with a class token", PATCHES),
    picture("deit", "DeiTModel", sight(), "full, with class and distillation tokens", PATCHES),
    picture("dinov2", "Dinov2Model", sight(mlp_ratio=2), "full, with a class token", PATCHES),
    picture("dinov2_with_registers", "Dinov2WithRegistersModel",
            sight(mlp_ratio=2, num_register_tokens=2),
            "full, with a class token and 2 registers", PATCHES),
    picture("dinov3_vit", "DINOv3ViTModel", sight(num_register_tokens=2),
            "full, with a class token and 2 registers", "rotary over rows and columns"),
    picture("siglip-vision", "SiglipVisionModel", sight(), "full, pooled by attention", PATCHES),
    picture("clip-vision", "CLIPVisionModel", sight(), "full, with a class token", PATCHES),
    picture("beit", "BeitModel", sight(use_relative_position_bias=True),
            "full, with a class token", "relative bias over rows and columns"),
    picture("data2vec-vision", "Data2VecVisionModel",
            sight(use_shared_relative_position_bias=True), "full, with a class token",
            "relative bias over rows and columns"),
    picture("vit_mae", "ViTMAEModel", sight(mask_ratio=0.0), "full, patches in random order",
            "sinusoids over rows and columns"),
    picture("vit_msn", "ViTMSNModel", sight(), "full, with a class token", PATCHES),
    picture("ijepa", "IJepaModel", sight(), "full", PATCHES),
    picture("yolos", "YolosModel", sight(image_size=[32, 32], num_detection_tokens=6),
            "full, with class and detection tokens", PATCHES),
    picture("swin", "SwinModel",
            {"image_size": IMAGE, "patch_size": 4, "embed_dim": 32, "depths": [2, 2],
             "num_heads": [2, 4], "window_size": 4},
            "full in shifted windows, pooled between stages", "relative bias in a window"),
    picture("pvt", "PvtModel",
            {"image_size": IMAGE, "hidden_sizes": [16, 32], "depths": [1, 1],
             "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "patch_sizes": [4, 2],
             "strides": [4, 2], "sequence_reduction_ratios": [2, 1], "num_encoder_blocks": 2},
            "full over reduced keys, pooled between stages", PATCHES),
    picture("segformer", "SegformerModel",
            {"hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [1, 2],
             "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
             "num_encoder_blocks": 2},
            "full over reduced keys, pooled between stages", "convolutions"),
    picture("pixio", "PixioModel", sight(n_cls_tokens=2), "full, with two class tokens", PATCHES),
    picture("mlcd-vision", "MLCDVisionModel", sight(), "full, with a class token",
            "rotary over rows and columns"),
    picture("aimv2-vision", "Aimv2VisionModel", sight(), "full, pooled by attention", PATCHES),
    picture("blip-vision", "BlipVisionModel", sight(), "full, with a class token", PATCHES),
    picture("altclip-vision", "AltCLIPVisionModel", sight(), "full, with a class token", PATCHES),
    picture("owlvit-vision", "OwlViTVisionModel", sight(), "full, with a class token", PATCHES),
    picture("vitdet", "VitDetModel",
            sight(window_size=2, window_block_indices=[0], use_relative_position_embeddings=True),
            "full, in windows of 2 by 2 patches every other layer",
            "learned table of patches, and relative in scores"),
    picture("hiera", "HieraModel",
            {"image_size": [32, 32], "patch_size": [7, 7], "patch_stride": [4, 4],
             "patch_padding": [3, 3], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2],
             "masked_unit_size": [4, 4], "query_stride": [2, 2], "num_query_pool": 1,
             "embed_dim_multiplier": 2.0},
            "full in units, pooled between stages", PATCHES, first_seen=False),
    picture("swinv2", "Swinv2Model",
            {"image_size": IMAGE, "patch_size": 4, "embed_dim": 32, "depths": [2, 2],
             "num_heads": [2, 4], "window_size": 4},
            "cosine, full in shifted windows, pooled between stages",
            "computed relative bias in a window"),
    picture("pvt_v2", "PvtV2Model",
            {"image_size": IMAGE, "hidden_sizes": [16, 32], "depths": [1, 1],
             "num_attention_heads": [1, 2], "sr_ratios": [2, 1], "patch_sizes": [7, 3],
             "strides": [4, 2], "mlp_ratios": [2, 2], "num_encoder_blocks": 2},
            "full over reduced keys, pooled between stages", "convolutions"),
    picture("levit", "LevitModel",
            {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3],
             "depths": [1, 1, 1], "key_dim": [8, 8, 8]},
            "full, pooled between stages", "relative bias over rows and columns",
            inputs=lambda length, batch, g: {"pixel_values": torch.randn(batch, 3, 64, 64,
                                                                         generator=g)}),
    picture("videomae", "VideoMAEModel", sight(num_frames=4, tubelet_size=2), "full",
            "sinusoids of tubes", inputs=video),
    picture("vivit", "VivitModel", sight(num_frames=4, tubelet_size=[2, 8, 8]),
            "full, with a class token", "learned table of tubes", inputs=video),
]
TEXT_TOWERS = [
    Family("clip-text", "CLIPTextModel", sizes(), "causal", "learned table", padding="right"),
    Family("siglip-text", "SiglipTextModel", sizes(projection_size=64), "full", "learned table",
           padding="right"),
    Family("owlvit-text", "OwlViTTextModel", sizes(), "causal", "learned table", padding="right"),
    Family("flava-text", "FlavaTextModel", sizes(), "full", "learned table", padding="right"),
    Family("blip-text", "BlipTextModel", sizes(encoder_hidden_size=64, is_decoder=False), "full",
           "learned table", padding="right"),
]
ENCODER_DECODERS = [
    translator("t5", "T5ForConditionalGeneration", T5, "full, causal and cross, unscaled",
               "relative bias", sharpen=0.7),
    translator("t5-encoder", "T5EncoderModel", T5, "full, unscaled", "relative bias", sharpen=0.7,
               inputs=lambda length, batch, g: {"input_ids": ids(length, batch, g)},
               two_sequences=False),
    translator("mt5", "MT5ForConditionalGeneration", T5, "full, causal and cross, unscaled",
               "relative bias", sharpen=0.7),
    translator("umt5", "UMT5ForConditionalGeneration", T5, "full, causal and cross, unscaled",
               "relative bias in every layer", sharpen=0.7),
    translator("longt5", "LongT5ForConditionalGeneration",
               {**T5, "local_radius": 4, "encoder_attention_type": "local"},
               "windows of 4 to both sides, causal and cross", "relative bias", sharpen=0.7,
               inputs=masked_pair),
    translator("switch_transformers", "SwitchTransformersForConditionalGeneration",
               {**T5, "num_experts": 4, "expert_capacity": 8, "num_sparse_encoder_layers": 1,
                "num_sparse_decoder_layers": 1},
               "full, causal and cross; expert 1 of 4 with a capacity", "relative bias",
               sharpen=0.7, inputs=masked_pair),
    translator("nllb_moe", "NllbMoeForConditionalGeneration",
               {**SEQ2SEQ, "num_experts": 4, "expert_capacity": 8, "encoder_sparse_step": 2,
                "decoder_sparse_step": 2},
               "full, causal and cross; experts 2 of 4 with a capacity", "sinusoids"),
    translator("bart", "BartForConditionalGeneration", SEQ2SEQ, "full, causal and cross",
               "learned table"),
    translator("mbart", "MBartForConditionalGeneration", SEQ2SEQ, "full, causal and cross",
               "learned table"),
    translator("marian", "MarianMTModel", {**SEQ2SEQ, "decoder_vocab_size": 97},
               "full, causal and cross", "sinusoids"),
    translator("pegasus", "PegasusForConditionalGeneration", SEQ2SEQ, "full, causal and cross",
               "sinusoids"),
    translator("m2m_100", "M2M100ForConditionalGeneration", SEQ2SEQ, "full, causal and cross",
               "sinusoids, counted over real tokens"),
    translator("blenderbot", "BlenderbotForConditionalGeneration", SEQ2SEQ,
               "full, causal and cross", "learned table"),
    translator("blenderbot_small", "BlenderbotSmallForConditionalGeneration", SEQ2SEQ,
               "full, causal and cross", "learned table"),
    translator("mvp", "MvpForConditionalGeneration", SEQ2SEQ, "full, causal and cross",
               "learned table"),
    translator("plbart", "PLBartForConditionalGeneration", SEQ2SEQ, "full, causal and cross",
               "learned table"),
    translator("fsmt", "FSMTForConditionalGeneration",
               {**SEQ2SEQ, "src_vocab_size": 97, "tgt_vocab_size": 97}, "full, causal and cross",
               "sinusoids, counted over real tokens"),
    translator("led", "LEDForConditionalGeneration",
               {**SEQ2SEQ, "attention_window": [8, 8], "max_encoder_position_embeddings": 64,
                "max_decoder_position_embeddings": 64},
               "window of 4 to both sides, causal and cross", "learned table"),
    translator("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration",
               {**SEQ2SEQ, "attention_type": "original_full"}, "full, causal and cross",
               "learned table"),
    translator("prophetnet", "ProphetNetForConditionalGeneration",
               {"hidden_size": 64, "num_encoder_layers": 2, "num_decoder_layers": 2,
                "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
                "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
                "ngram": 2, "decoder_start_token_id": 1},
               "full, causal for each of two n-grams, and cross", "relative bias"),
    translator("whisper", "WhisperForConditionalGeneration",
               {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 20,
                "max_target_positions": 64, "suppress_tokens": None,
                "begin_suppress_tokens": None},
               "full, causal and cross", "convolutions and learned tables", inputs=speech,
               padding=None),
]
STATES = [
    Family("mamba", "MambaForCausalLM",
           {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, "none: state space",
           "recurrence", padding=None),
    Family("falcon_mamba", "FalconMambaForCausalLM",
           {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, "none: state space",
           "recurrence", padding=None),
    Family("mamba2", "Mamba2ForCausalLM",
           {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4,
            "head_dim": 16, "n_groups": 2, "chunk_size": 8}, "none: state space", "recurrence",
           padding=None),
    Family("rwkv", "RwkvForCausalLM",
           {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
            "intermediate_size": 64, "context_length": 64}, "none: recurrence", "recurrence",
           padding=None, called=True),
    Family("xlstm", "xLSTMForCausalLM",
           {"hidden_size": 32, "num_blocks": 2, "num_heads": 4, "chunk_size": 16},
           "none: matrix memory", "recurrence", padding=None),
    Family("recurrent_gemma", "RecurrentGemmaForCausalLM",
           sizes(num_hidden_layers=3, attention_window_size=8, lru_width=64),
           "grouped-query, causal + window 8 every third layer, recurrence elsewhere",
           "recurrence and rotary", padding=None),
    Family("jamba", "JambaForCausalLM",
           sizes(num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1,
                 expert_layer_period=2, num_experts=4, mamba_d_state=8, mamba_dt_rank=8,
                 use_mamba_kernels=False),
           "grouped-query, causal every other layer, state space elsewhere; experts 2 of 4",
           "recurrence", padding=None),
    Family("zamba", "ZambaForCausalLM",
           sizes(num_hidden_layers=5, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8,
                 mamba_dt_rank=8, n_mamba_heads=2),
           "causal every other layer, shared; state space", "recurrence", padding=None),
    Family("zamba2", "Zamba2ForCausalLM",
           sizes(num_hidden_layers=6, layers_block_type=["mamba", "hybrid", "mamba"] * 2,
                 mamba_d_state=8, n_mamba_heads=4, chunk_size=8, adapter_rank=8,
                 use_mem_rope=True),
           "causal every other layer, shared; state space", "recurrence and rotary", padding=None),
    Family("falcon_h1", "FalconH1ForCausalLM",
           sizes(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
                 mamba_chunk_size=8),
           "grouped-query, causal, beside a state space", "recurrence and rotary", padding=None),
    Family("bamba", "BambaForCausalLM",
           sizes(attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=32, mamba_d_state=8,
                 mamba_chunk_size=8),
           "grouped-query, causal every other layer, state space elsewhere",
           "recurrence and rotary", padding=None),
    Family("granitemoehybrid", "GraniteMoeHybridForCausalLM",
           sizes(layer_types=["mamba", "attention"], num_local_experts=4, num_experts_per_tok=2,
                 shared_intermediate_size=32, mamba_n_heads=4, mamba_d_head=32, mamba_d_state=8,
                 mamba_chunk_size=8),
           "grouped-query, causal every other layer, state space elsewhere; experts 2 of 4",
           "recurrence", padding=None),
    Family("nemotron_h", "NemotronHForCausalLM",
           sizes(head_dim=16, ssm_state_size=8, n_groups=1, mamba_num_heads=4, mamba_head_dim=32,
                 chunk_size=8, n_routed_experts=4, moe_intermediate_size=32,
                 moe_shared_expert_intermediate_size=32),
           "grouped-query, causal in some layers, state space in others; experts 2 of 4",
           "recurrence", padding=None),
    Family("lfm2", "Lfm2ForCausalLM",
           sizes(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
           "grouped-query with query/key norm, causal every other layer, convolutions elsewhere",
           ROTARY),
    Family("lfm3", "Lfm3ForCausalLM",
           sizes(layer_types=["conv", "full_attention"], head_dim=16),
           "grouped-query with query/key norm, causal every other layer, convolutions elsewhere",
           ROTARY),
    Family("lfm2_moe", "Lfm2MoeForCausalLM",
           sizes(layer_types=["conv", "full_attention"], num_experts=4, num_experts_per_tok=2,
                 moe_intermediate_size=32, num_dense_layers=1),
           "grouped-query with query/key norm, causal every other layer, convolutions elsewhere; "
           "experts 2 of 4", ROTARY),
    Family("qwen3_5-text", "Qwen3_5ForCausalLM",
           sizes(layer_types=["linear_attention", "full_attention"], head_dim=16,
                 linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
                 linear_value_head_dim=16),
           "gated, grouped-query, causal every other layer, gated delta rule elsewhere",
           "rotary on a quarter of each head", padding=None),
    Family("olmo_hybrid", "OlmoHybridForCausalLM",
           sizes(layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
                 linear_num_key_heads=4, linear_key_head_dim=16, linear_value_head_dim=16),
           "grouped-query with query/key norm, causal every other layer, gated delta rule "
           "elsewhere", ROTARY, padding=None),
    Family("kimi_linear", "KimiLinearForCausalLM",
           sizes(layer_types=["linear_attention", "full_attention"], num_key_value_heads=4,
                 kv_lora_rank=16,
                 qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_shared_experts=1,
                 num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                 linear_head_dim=16, linear_num_heads=4),
           "latent (MLA), causal every other layer, delta rule with decays of features "
           "elsewhere; experts 2 of 4", "none in attention", padding=None),
    Family("qwen3_next", "Qwen3NextForCausalLM",
           sizes(layer_types=["linear_attention", "full_attention"], num_experts=4,
                 num_experts_per_tok=2, moe_intermediate_size=32,
                 shared_expert_intermediate_size=32, head_dim=16, linear_num_value_heads=4,
                 linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16),
           "gated, grouped-query, causal every other layer, gated delta rule elsewhere; "
           "experts 2 of 4", "rotary on a quarter of each head", padding=None),
]
SOUNDS = [
    Family("wav2vec2", "Wav2Vec2Model", SPEECH, "full", "convolutions", inputs=wave,
           padding=None),
    Family("hubert", "HubertModel", SPEECH, "full", "convolutions", inputs=wave, padding=None),
    Family("wavlm", "WavLMModel", {**SPEECH, "num_buckets": 16, "max_bucket_distance": 32},
           "full", "gated relative bias", inputs=wave, padding=None),
    Family("data2vec-audio", "Data2VecAudioModel", {**SPEECH, "conv_pos_kernel_size": 3}, "full",
           "convolutions", inputs=wave, padding=None),
    Family("unispeech_sat", "UniSpeechSatModel", SPEECH, "full", "convolutions", inputs=wave,
           padding=None),
    Family("sew", "SEWModel", {**SPEECH, "squeeze_factor": 1}, "full", "convolutions", inputs=wave,
           padding=None),
    Family("wav2vec2_conformer", "Wav2Vec2ConformerModel",
           {**SPEECH, "position_embeddings_type": "rotary", "conv_depthwise_kernel_size": 3},
           "full, and convolutions between", ROTARY, inputs=wave, padding=None),
    Family("audio_spectrogram_transformer", "ASTModel",
           {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 96, "patch_size": 8, "frequency_stride": 8, "time_stride": 8,
            "max_length": 32, "num_mel_bins": 16},
           "full, with class and distillation tokens", PATCHES, padding=None,
           inputs=lambda length, batch, g: {"input_values": torch.randn(batch, 32, 16,
                                                                        generator=g)}),
]
