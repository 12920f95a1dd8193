"""The reference transformer computes what its config says."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from ringcompile.models.transformer import Rotary, Transformer, TransformerConfig, rotate

BASE = TransformerConfig(
    vocab_size=50,
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,  # 4 * 12 != 32: heads need not make up the hidden size
    mlp_hidden=64,
    max_positions=64,
    bias=True,
)
COMBINATIONS = list(
    itertools.product(("rotary", "learned"), ("rms", "layer"), ("gated", "plain"), (True, False))
)


def make(**changes: object) -> Transformer:
    return Transformer(dataclasses.replace(BASE, **changes)).eval()


def tokens(batch: int, sequence: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(BASE.vocab_size, (batch, sequence), generator=generator)


@pytest.mark.parametrize(("positions", "norm", "mlp", "causal"), COMBINATIONS)
def test_shapes_and_size_of_outputs(positions: str, norm: str, mlp: str, causal: bool) -> None:
    model = make(positions=positions, norm=norm, mlp=mlp, causal=causal)
    out = model(tokens(3, 10))
    assert out.shape == (3, 10, BASE.vocab_size if causal else BASE.hidden_size)
    assert out.dtype == torch.float32
    assert 0.5 < out.std() < 2.0
    assert out.std(dim=1).min() > 0.05, "some feature is nearly the same at every position"


@pytest.mark.parametrize("causal", [True, False])
def test_hidden_states_in_and_out(causal: bool) -> None:
    model = make(inputs="hidden", vocab_size=0, causal=causal)
    assert model(torch.randn(2, 7, 32)).shape == (2, 7, 32)
    assert not [name for name, _ in model.named_parameters() if "embed" in name or "head" in name]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_hold_the_same_weights(dtype: str) -> None:
    config = dataclasses.replace(BASE, dtype=dtype)
    reference, model = make(), Transformer(config)
    for (name, want), (_, got) in zip(
        reference.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(got, want.to(getattr(torch, config.dtype))), name
    out = model(tokens(1, 9))
    assert out.dtype == getattr(torch, config.dtype)
    tolerance = 16 * max(torch.finfo(out.dtype).eps, torch.finfo(torch.float32).eps)
    assert (out - reference(tokens(1, 9))).abs().max() < tolerance * out.abs().max()
    assert model.rotary.inv_freq.dtype == torch.float32


def test_seed_decides_the_weights_and_not_the_global_one() -> None:
    torch.manual_seed(1)
    first = Transformer(BASE, seed=3).state_dict()
    torch.manual_seed(2)
    again, other = Transformer(BASE, seed=3).state_dict(), Transformer(BASE, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_decoder_is_causal(positions: str) -> None:
    model, ids = make(positions=positions), tokens(1, 12)
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % BASE.vocab_size
    difference = (model(ids) - model(changed)).abs().amax(dim=-1)[0]
    assert torch.equal(difference[:7], torch.zeros(7))
    assert (difference[7:] > 1e-3).all()


def test_encoder_sees_both_ways() -> None:
    model, ids = make(causal=False), tokens(1, 12)
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % BASE.vocab_size
    assert ((model(ids) - model(changed)).abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_padding_mask_equals_the_unpadded_run(positions: str) -> None:
    model, ids = make(causal=False, positions=positions), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 8:] = 0
    padded = model(ids, mask)
    torch.testing.assert_close(padded[0, :8], model(ids[:1, :8])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(padded[1], model(ids)[1], rtol=0, atol=1e-5)
    assert (padded[0, :8] - model(ids)[0, :8]).abs().max() > 1e-2, "the mask had no effect"


def test_padding_mask_refused_by_a_decoder() -> None:
    with pytest.raises(ValueError, match="attention_mask is for encoders") as caught:
        make()(tokens(1, 4), torch.ones(1, 4))
    assert str(caught.value) == "attention_mask is for encoders: this model has causal=True"


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_order_of_tokens_matters(positions: str) -> None:
    """Without positions the last token's output would not see a swap of two earlier ones."""
    model, ids = make(positions=positions), torch.arange(10)[None]
    swapped = ids[:, [1, 0, *range(2, 10)]]
    assert (model(ids)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-2


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    rotary = Rotary(head_dim=16, theta=10000.0)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(at_query: int, at_key: int) -> torch.Tensor:
        placed = [
            rotate(x, *rotary(torch.tensor([position]), torch.float32))
            for x, position in ((query, at_query), (key, at_key))
        ]
        return (placed[0] * placed[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=0, atol=1e-4)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-2


def test_rotary_model_sees_distances_and_learned_positions_do_not() -> None:
    """Padding on the left moves every token by three: only absolute positions notice."""
    ids, mask = tokens(1, 12), torch.ones(1, 12, dtype=torch.int64)
    mask[0, :3] = 0

    def change(positions: str) -> torch.Tensor:
        model = make(causal=False, positions=positions)
        return (model(ids, mask)[:, 3:] - model(ids[:, 3:])).abs().max()

    assert change("rotary") < 1e-5
    assert change("learned") > 1e-2


def test_rotary_angles_by_hand() -> None:
    cos, sin = Rotary(head_dim=4, theta=100.0)(torch.arange(3), torch.float32)
    angles = torch.tensor([[position, position / 10] * 2 for position in range(3)])
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


def test_grouped_heads_share_their_key_and_value() -> None:
    """Repeating each KV head's rows in a model without groups gives the same outputs."""
    grouped, plain = make(), make(num_kv_heads=4)
    weights = grouped.state_dict()
    for name in [name for name in weights if "k_proj" in name or "v_proj" in name]:
        heads = weights[name].unflatten(0, (BASE.num_kv_heads, BASE.head_dim))
        weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(tokens(1, 9)), grouped(tokens(1, 9)), rtol=0, atol=1e-5)


def test_tied_head_is_one_parameter() -> None:
    model = make(tie_embeddings=True)
    assert model.head.weight is model.token_embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    assert "head.weight" in dict(make().named_parameters())


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_bias_flag(norm: str) -> None:
    with_bias = [name for name, _ in make(norm=norm).named_parameters() if "bias" in name]
    without = [name for name, _ in make(norm=norm, bias=False).named_parameters() if "bias" in name]
    num_norm_biases = 0 if norm == "rms" else 2 * BASE.num_layers + 1
    assert len(with_bias) == 7 * BASE.num_layers + num_norm_biases
    assert without == []
