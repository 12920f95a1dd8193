"""One ordinary single-device transformer, decoder or encoder, in plain PyTorch.

Letters in shapes: B batch, S sequence, D head_dim, E hidden_size, V vocab_size.
Nothing here knows of meshes or ranks: these models are the compiler's inputs, as a user would
write them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ringcompile.models.config import TransformerConfig
from ringcompile.models.moe import MoE

__all__ = ["Transformer", "TransformerConfig"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x by their position's angles (RoFormer, arXiv 2104.09864).

    Args:
        x: [B, heads, S, D].
        cos: [S, D].
        sin: [S, D].

    Returns:
        [B, heads, S, D].
    """
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class Rotary(nn.Module):
    """Cosines and sines of the rotary angles; float32 whatever the model's dtype."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.register_buffer("inv_freq", theta**-exponent, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each [S, D] in ``dtype``, for int64 positions [S]."""
        angles = positions[:, None] * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module):
    """Multi-head or grouped-query self-attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim, self.causal = config.head_dim, config.causal
        self.grouped = config.num_kv_heads < config.num_heads
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = _linear(config, config.hidden_size, query_size)
        self.k_proj = _linear(config, config.hidden_size, kv_size)
        self.v_proj = _linear(config, config.hidden_size, kv_size)
        self.o_proj = _linear(config, query_size, config.hidden_size)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> Tensor:
        """Attend over x [B, S, E]; rotary is cos and sin [S, D], mask a bool [B, 1, 1, S]."""
        batch, sequence, _ = x.shape
        query = self.q_proj(x).view(batch, sequence, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(x).view(batch, sequence, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(x).view(batch, sequence, -1, self.head_dim).transpose(1, 2)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=self.causal, enable_gqa=self.grouped
        )
        out = out.transpose(1, 2).reshape(batch, sequence, -1)
        projected: Tensor = self.o_proj(out)
        return projected


class PlainMLP(nn.Module):
    """down(gelu(up(x))): two matrices."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up_proj = _linear(config, config.hidden_size, config.mlp_hidden)
        self.down_proj = _linear(config, config.mlp_hidden, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, E] -> [B, S, E]."""
        out: Tensor = self.down_proj(F.gelu(self.up_proj(x)))
        return out


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): three matrices (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config, config.hidden_size, config.mlp_hidden)
        self.up_proj = _linear(config, config.hidden_size, config.mlp_hidden)
        self.down_proj = _linear(config, config.mlp_hidden, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, E] -> [B, S, E]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def _linear(config: TransformerConfig, inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=config.bias, dtype=getattr(torch, config.dtype))


def _norm(config: TransformerConfig) -> nn.Module:
    size, eps, dtype = config.hidden_size, config.norm_eps, getattr(torch, config.dtype)
    if config.norm == "rms":
        return nn.RMSNorm(size, eps=eps, dtype=dtype)
    return nn.LayerNorm(size, eps=eps, bias=config.bias, dtype=dtype)


def _mlp(config: TransformerConfig) -> nn.Module:
    if config.num_experts:
        return MoE(config)
    return GatedMLP(config) if config.mlp == "gated" else PlainMLP(config)


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = _mlp(config)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> Tensor:
        """[B, S, E] -> [B, S, E]."""
        x = x + self.attention(self.attention_norm(x), rotary, mask)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Transformer(nn.Module):
    """A decoder (logits), an encoder (hidden states), or either over hidden states.

    The same seed gives the same weights on every device and, up to rounding, in every dtype. Set
    the dtype in the config: ``.half()`` or ``.bfloat16()`` would round the rotary frequencies too.
    """

    def __init__(self, config: TransformerConfig, *, seed: int = 0) -> None:
        """Build under the active mode and default device; weights are drawn from ``seed``."""
        super().__init__()
        self.config = config
        size, dtype = config.hidden_size, getattr(torch, config.dtype)
        if config.inputs == "tokens":
            self.token_embedding = nn.Embedding(config.vocab_size, size, dtype=dtype)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.max_positions, size, dtype=dtype)
        else:
            self.rotary = Rotary(config.head_dim, config.rope_theta)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = _norm(config)
        if config.has_head:
            self.head = nn.Linear(size, config.vocab_size, bias=False, dtype=dtype)
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int) -> None:
        """Draw every weight from ``seed``, in float32 on the CPU, so that any device gets the same.

        Matrices have standard deviation 1/sqrt(inputs) (dim 1 of a linear layer's [outputs, inputs]
        and of experts' [E, inputs, outputs]), so that queries, keys and logits are O(1)
        and attention is not uniform at any width; projections into the residual stream are divided
        by sqrt(2 * num_layers) as in GPT-2. Biases and norms are not trivial, so that a dropped or
        doubled one shows.
        """
        generator = torch.Generator().manual_seed(seed)
        depth_scale = (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator, device="cpu")
            if parameter.ndim == 1:
                draw = draw.mul(0.1).add(0.0 if name.endswith("bias") else 1.0)
            else:
                into_residual = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
                draw = draw * parameter.shape[1] ** -0.5 * (depth_scale if into_residual else 1.0)
            with torch.no_grad():
                parameter.copy_(draw)

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the model.

        Args:
            inputs: int64 token ids [B, S], or hidden states [B, S, E] with ``inputs='hidden'``.
            attention_mask: [B, S], 1 for a token and 0 for padding that no query may attend to;
                encoders only. Each row needs a token.

        Returns:
            Logits [B, S, V] of a decoder over tokens; hidden states [B, S, E] otherwise.

        Raises:
            ValueError: A decoder got an attention_mask.
        """
        if attention_mask is not None and self.config.causal:
            raise ValueError("attention_mask is for encoders: this model has causal=True")
        x = self.token_embedding(inputs) if self.config.inputs == "tokens" else inputs
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        rotary = None
        if self.config.positions == "learned":
            x = x + self.position_embedding(positions)
        else:
            rotary = self.rotary(positions, x.dtype)
        mask = None if attention_mask is None else attention_mask.to(torch.bool)[:, None, None, :]
        for block in self.blocks:
            x = block(x, rotary, mask)
        out: Tensor = self.norm(x)
        if self.config.has_head:
            out = self.head(out)
        return out
