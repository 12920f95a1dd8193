"""What was captured is held against the model as the user calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from ringcompile.capture.export import capture
from ringcompile.capture.surroundings import fake_weights
from ringcompile.errors import RingCompileError
from tests.support import some_fast

WIDTH = 16
EXAMPLE = torch.randn(2, 13, WIDTH, generator=torch.Generator().manual_seed(0))


class Inner(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Outer(nn.Module):
    """The function of a test, between two layers."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), Inner(function)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.inner(self.first(x)))


def by_compiling(m: Inner, x: Tensor) -> Tensor:
    return m.linear(x) if torch.compiler.is_compiling() else m.linear(x) * 1.01


def by_exporting(m: Inner, x: Tensor) -> Tensor:
    if torch.compiler.is_exporting():
        return x.relu()
    return x.sigmoid()


def by_fake_tensors(m: Inner, x: Tensor) -> Tensor:
    return x + 1 if type(x) is Tensor else x + 2


def by_a_counter(m: Inner, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + (0 if torch.compiler.is_compiling() else 1)
    return x * (1 + m.calls)


def by_data(m: Inner, x: Tensor) -> Tensor:
    return x * (2 if not torch.compiler.is_compiling() and x.sum() != 0 else 1)


PART = [by_compiling, by_exporting, by_fake_tensors, by_a_counter, by_data]


@pytest.mark.parametrize("function", PART, ids=lambda f: f.__name__)
def test_where_they_part(function: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = Outer(function).eval()
    with pytest.raises(RingCompileError, match="does not compute what the model") as caught:
        capture(model, (EXAMPLE,))
    error = caught.value
    assert error.location is not None
    assert error.location.layer == "inner"
    assert "beginning with Inner" in error.message
    assert error.location.text.startswith(("return ", "m.calls"))
    assert capture(model, (EXAMPLE,), compare_with_eager=False).name == "Outer"


class Padded(nn.Module):
    """PyTorch's own encoder, whose fast path gives zeros where the other path computes."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=hidden)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fast_path_of_the_encoder() -> None:
    hidden = torch.zeros(2, 13, dtype=torch.bool)
    hidden[0, 9:] = True
    model = Padded().eval()
    with pytest.raises(RingCompileError, match="beginning with TransformerEncoder") as caught:
        capture(model, (EXAMPLE, hidden))
    assert caught.value.location is not None
    assert caught.value.location.layer == "encoder"
    assert "torch.backends.mha.set_fastpath_enabled(False)" in str(caught.value.hint)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert capture(model, (EXAMPLE, hidden)).notes == ()
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def returns_more(m: Inner, x: Tensor) -> Any:
    return (x, x) if torch.compiler.is_compiling() else (x, x[:, :5])


def test_another_form() -> None:
    with pytest.raises(RingCompileError) as caught:
        capture(Inner(returns_more).eval(), (EXAMPLE,))
    assert caught.value.message == (
        "the captured graph does not return what the model returns when it is called: float32 "
        "[2, 13, 16], float32 [2, 13, 16] instead of float32 [2, 13, 16], float32 [2, 5, 16]"
    )


SAME: dict[str, Callable[[Inner, Tensor], Any]] = {
    "nan and inf": lambda m, x: (x.log(), 1 / x.relu()),
    "whole numbers": lambda m, x: (m.linear(x).argmax(-1), (x > 0), (x * 9).long()),
    "half precision": lambda m, x: m.linear(x.half().float()).half(),
    "bfloat16": lambda m, x: nn.functional.linear(x.bfloat16(), m.linear.weight.bfloat16()),
    "chaos": lambda m, x: (m.linear(x) * 300).sin() * 40 % 1,
    "tiny numbers": lambda m, x: x * 1e-30,
    "nothing": lambda m, x: x[:, :, :0],
    "complex": lambda m, x: torch.fft.fft(x, dim=-1),
    "random": lambda m, x: x + torch.rand(WIDTH),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same(name: str) -> None:
    assert capture(Inner(SAME[name]).eval(), (EXAMPLE,)).notes == ()


def writes_buffers(m: Inner, x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        m.count += 1  # type: ignore[operator, assignment]
        m.plain.add_(1)  # type: ignore[operator, union-attr]
    return x


def test_data_is_put_back() -> None:
    model = Inner(writes_buffers).eval()
    model.register_buffer("count", torch.zeros(1))
    model.plain = torch.zeros(1)  # type: ignore[assignment]
    count, plain = model.count, model.plain
    capture(model, (EXAMPLE,))
    assert (model.count, model.plain) == (count, plain)
    assert (float(count), float(plain)) == (0, 0)  # type: ignore[arg-type]


def test_without_weights() -> None:
    text = (
        "the captured program was not compared with the model as it is called: its weights are "
        "not loaded"
    )
    with fake_weights():
        model = Inner(lambda m, x: m.linear(x))
    assert capture(model.eval(), (EXAMPLE,)).notes == (text,)


def test_what_the_model_cannot_run() -> None:
    def fails(m: Inner, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            raise NotImplementedError("only on a GPU")
        return x

    (note,) = capture(Inner(fails).eval(), (EXAMPLE,)).notes
    assert note.endswith(
        "compared with the model as it is called, because that raises "
        "NotImplementedError: only on a GPU"
    )


SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 16, "vocab_size": 50,
}  # fmt: skip


@pytest.mark.parametrize("how", some_fast(["sdpa", "eager"], fast=lambda how: how == "eager"))
def test_hugging_face(how: str) -> None:
    """As the user calls it: with its own attention, but without a cache, padding included."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, attn_implementation=how)
    ).eval()
    ids, seen = torch.arange(26).view(2, 13), torch.ones(2, 13, dtype=torch.long)
    seen[0, :4] = 0
    found = capture(model, (ids,), {"attention_mask": seen}).notes
    filled_alike = how == "sdpa"
    hidden = [] if filled_alike else ["at positions that attention_mask hides"]
    assert [note[:38] for note in found] == hidden
    assert model.config._attn_implementation == how
