"""Encoders of text."""

from __future__ import annotations

import torch

from tests.families.decoders import LEARNED, layers, sizes
from tests.families.family import Family, ids


def boxes(length: int, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Token ids, each with the box it stands in: left, top, right, bottom."""
    corners = torch.randint(0, 32, (batch, length, 2), generator=generator)
    extent = torch.randint(0, 31, (batch, length, 2), generator=generator)
    return {"input_ids": ids(length, batch, generator),
            "bbox": torch.cat([corners, corners + extent], dim=-1)}


def encoder(*args: object, **kwargs: object) -> Family:
    """A row that is padded on the right."""
    return Family(*args, **{"padding": "right", **kwargs})  # type: ignore[arg-type]


FAMILIES = [
    encoder("bert", "BertModel", sizes(), "full", LEARNED),
    encoder("bert-decoder", "BertLMHeadModel", sizes(is_decoder=True), "causal", LEARNED),
    encoder("roberta", "RobertaModel", sizes(), "full", "learned table, counted over real tokens"),
    encoder("xlm_roberta", "XLMRobertaModel", sizes(), "full",
            "learned table, counted over real tokens"),
    encoder("camembert", "CamembertModel", sizes(), "full",
            "learned table, counted over real tokens"),
    encoder("roberta_prelayernorm", "RobertaPreLayerNormModel", sizes(), "full",
            "learned table, counted over real tokens"),
    encoder("distilbert", "DistilBertModel",
            {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96,
             "max_position_embeddings": 64}, "full", LEARNED),
    encoder("albert", "AlbertModel", sizes(embedding_size=32), "full, one layer used twice",
            LEARNED),
    encoder("electra", "ElectraModel", sizes(embedding_size=32), "full", LEARNED),
    encoder("ernie", "ErnieModel", sizes(), "full", LEARNED),
    encoder("deberta", "DebertaModel",
            sizes(relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=64,
                  position_biased_input=False),
            "full, disentangled", "relative, in scores"),
    encoder("deberta_v2", "DebertaV2Model",
            sizes(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=16,
                  max_relative_positions=64, share_att_key=True, norm_rel_ebd="layer_norm",
                  position_biased_input=False),
            "full, disentangled", "relative in buckets, in scores"),
    encoder("mpnet", "MPNetModel", sizes(), "full",
            "learned table and relative bias"),
    encoder("modernbert", "ModernBertModel",
            sizes(**layers("fs"), local_attention=8, cls_token_id=1, sep_token_id=2),
            "full, window of 4 to both sides every other layer", "rotary, of two kinds",
            matters={"local_attention": 128}),
    encoder("eurobert", "EuroBertModel", sizes(head_dim=16), "grouped-query, full", "rotary"),
    encoder("esm", "EsmModel",
            sizes(position_embedding_type="rotary", emb_layer_norm_before=False,
                  token_dropout=False, mask_token_id=2), "full", "rotary"),
    encoder("esm-learned", "EsmModel",
            sizes(position_embedding_type="absolute", token_dropout=True, mask_token_id=2),
            "full", "learned table, counted over real tokens"),
    encoder("nomic_bert", "NomicBertModel", sizes(head_dim=16), "full", "rotary"),
    encoder("gte", "GteModel", sizes(), "full", "rotary"),
    encoder("jina_embeddings_v3", "JinaEmbeddingsV3Model", sizes(), "full", "rotary"),
    encoder("nystromformer", "NystromformerModel",
            sizes(segment_means_seq_len=64, num_landmarks=64, conv_kernel_size=3),
            "full, and a convolution of the values", LEARNED),
    encoder("convbert", "ConvBertModel",
            sizes(embedding_size=32, head_ratio=2, num_groups=1, conv_kernel_size=3),
            "full, and convolutions whose kernel is computed", LEARNED),
    encoder("squeezebert", "SqueezeBertModel",
            sizes(embedding_size=64, q_groups=2, k_groups=2, v_groups=2, post_attention_groups=1,
                  intermediate_groups=2, output_groups=2),
            "full, projections by grouped convolutions of width one", LEARNED),
    encoder("layoutlm", "LayoutLMModel", sizes(max_2d_position_embeddings=64), "full",
            "learned table, and boxes on the page", inputs=boxes),
    encoder("mobilebert", "MobileBertModel",
            sizes(embedding_size=32, intra_bottleneck_size=32, num_feedforward_networks=2),
            "full, in a bottleneck", LEARNED),
    encoder("roformer", "RoFormerModel", sizes(embedding_size=64), "full", "rotary"),
    encoder("rembert", "RemBertModel",
            sizes(input_embedding_size=32, output_embedding_size=48), "full", LEARNED),
    encoder("megatron_bert", "MegatronBertModel", sizes(), "full", LEARNED),
    encoder("ibert", "IBertModel", sizes(), "full", "learned table, counted over real tokens"),
    encoder("data2vec-text", "Data2VecTextModel", sizes(), "full",
            "learned table, counted over real tokens"),
    encoder("xmod", "XmodModel", sizes(languages=["en_XX"], default_language="en_XX"), "full",
            "learned table, counted over real tokens"),
    encoder("flaubert", "FlaubertModel",
            {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64,
             "n_words": 97}, "full", LEARNED),
    encoder("xlm", "XLMModel",
            {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64,
             "n_words": 97}, "full", LEARNED),
    encoder("lilt", "LiltModel",
            sizes(hidden_size=48, channel_shrink_ratio=2, max_2d_position_embeddings=64),
            "full, of text and of layout, scores added", "learned table, and boxes on the page",
            inputs=boxes),
    encoder("longformer", "LongformerModel", sizes(attention_window=8),
            "window of 4 to both sides", LEARNED, first_seen=False),
    encoder("big_bird", "BigBirdModel", sizes(attention_type="original_full"), "full", LEARNED),
    encoder("fnet", "FNetModel", sizes(), "Fourier transform", LEARNED, padding=None),
    encoder("funnel", "FunnelBaseModel",
            {"block_sizes": [1, 1], "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 96},
            "full, pooled between blocks", "relative sinusoids"),
]
