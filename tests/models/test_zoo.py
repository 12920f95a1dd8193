"""The zoo: its table, its examples, and that torch.export takes every entry."""

from __future__ import annotations

import resource

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ringcompile.models import zoo
from tests.support import some_fast

SMALL = [name for name in zoo.names() if name not in ("dense-4l", "moe-4l")]
# One of each kind: positions that are learned and rotary, a mixture, an encoder.
EXPORTED = ("gpt-tiny", "llama-tiny", "mixtral-tiny", "bert-tiny")


def test_names() -> None:
    assert zoo.names() == [
        "dense-4l",
        "dense-4l-small",
        "dense-4l-tiny",
        "moe-4l",
        "moe-4l-small",
        "moe-4l-tiny",
        "gpt-tiny",
        "llama-tiny",
        "mixtral-tiny",
        "bert-tiny",
    ]


@pytest.mark.parametrize("name", zoo.names())
def test_description_is_one_line(name: str) -> None:
    assert zoo.describe(name)
    assert "\n" not in zoo.describe(name)


@pytest.mark.parametrize("ask", [zoo.describe, zoo.build, zoo.entry])
def test_unknown_name(ask: object) -> None:
    with pytest.raises(KeyError, match="no model 'gpt-5' in the zoo") as caught:
        ask("gpt-5")  # type: ignore[operator]
    assert caught.value.args[0] == (
        "no model 'gpt-5' in the zoo; there are dense-4l, dense-4l-small, dense-4l-tiny, "
        "moe-4l, moe-4l-small, moe-4l-tiny, gpt-tiny, llama-tiny, mixtral-tiny, bert-tiny"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch is 0: must be positive"),
        ({"sequence": 0}, "sequence is 0: 'gpt-tiny' takes 1 to 512 (max_positions)"),
        ({"sequence": 513}, "sequence is 513: 'gpt-tiny' takes 1 to 512 (max_positions)"),
        (
            {"dtype": "int8"},
            (
                "TransformerConfig.dtype is 'int8': must be one of "
                "'float64', 'float32', 'bfloat16', 'float16'"
            ),
        ),
    ],
    ids=str,
)
def test_build_refusals(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=" is ") as caught:
        zoo.build("gpt-tiny", **arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize("name", SMALL)
def test_build(name: str) -> None:
    config = zoo.entry(name).config
    model, inputs = zoo.build(name, batch=3)
    assert not model.training
    assert len(inputs) == (1 if config.causal else 2)
    assert inputs[0].shape[:2] == (3, zoo.entry(name).default_sequence)
    with torch.no_grad():
        out = model(*inputs)
    assert out.shape[:2] == inputs[0].shape[:2]
    assert out.shape[2] == (config.vocab_size if config.has_head else config.hidden_size)
    assert out.isfinite().all()
    assert 0.5 < out.std() < 2.0


@pytest.mark.parametrize("name", SMALL)
def test_build_is_reproducible(name: str) -> None:
    (model, inputs), (again, inputs_again) = zoo.build(name), zoo.build(name)
    _, others = zoo.build(name, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(inputs, inputs_again, strict=True))
    assert not torch.equal(inputs[0], others[0])
    assert torch.equal(model(*inputs), again(*inputs))


def test_padding_mask_has_tokens_and_padding_in_every_row() -> None:
    _, (_, mask) = zoo.build("bert-tiny", batch=10, sequence=20)
    lengths = mask.sum(dim=1)
    assert (lengths >= 1).all()
    assert (lengths < 20).all()
    assert torch.equal(mask, (torch.arange(20)[None] < lengths[:, None]).long())


def test_float64_runs_the_same_model() -> None:
    model, inputs = zoo.build("dense-4l-small")
    exact, exact_inputs = zoo.build("dense-4l-small", dtype="float64")
    assert torch.equal(exact_inputs[0], inputs[0].double())
    with torch.no_grad():
        difference = (exact(*exact_inputs) - model(*inputs)).abs().max()
    assert 0 < difference < 1e-4


def test_dense_4l_has_the_papers_weights_without_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with FakeTensorMode():
        model, inputs = zoo.build("dense-4l")
        out = model(*inputs)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 500
    assert all(isinstance(weight, FakeTensor) for weight in model.state_dict().values())
    assert out.shape == (1, 16384, 8192)
    assert out.dtype == torch.float16
    linear = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    assert sum(p.nbytes for p in linear) == 4 * (4 * 8192**2 + 2 * 8192 * 32768) * 2
    assert sum(p.nbytes for p in norms) == 9 * 8192 * 2
    assert sum(p.nbytes for p in model.parameters()) == pytest.approx(6.44e9, rel=0.01)


@pytest.mark.parametrize("name", SMALL)
def test_small_entries_build_under_fake_mode_and_on_meta(name: str) -> None:
    with FakeTensorMode():
        model, inputs = zoo.build(name, batch=2)
        assert isinstance(model(*inputs), FakeTensor)
    with torch.device("meta"):
        model, inputs = zoo.build(name, batch=2)
        assert model(*inputs).is_meta


@pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")  # torch.export's own, in copyreg
@pytest.mark.parametrize("name", some_fast(SMALL, fast=EXPORTED.__contains__))
def test_export_with_a_dynamic_sequence(name: str) -> None:
    model, inputs = zoo.build(name, batch=2)
    sequence = torch.export.Dim("sequence", min=2, max=zoo.entry(name).config.max_positions)
    shapes = tuple({1: sequence} for _ in inputs)
    exported = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    _, longer = zoo.build(name, batch=2, sequence=101, seed=5)
    with torch.no_grad():
        assert torch.equal(exported.module()(*longer), model(*longer))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    attention = targets.count("aten.scaled_dot_product_attention.default")
    assert attention == zoo.entry(name).config.num_layers
