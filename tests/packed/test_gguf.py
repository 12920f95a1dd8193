"""GGUF files: the model that transformers reads, with weights that stay packed, or a refusal."""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import nn

import ringcompile as rc
from ringcompile.capture.gguf_blocks import BLOCK_TYPES, BlockLinear
from ringcompile.capture.loaders import load_model
from tests.packed.gguf_writer import LAYERS, TYPES, VOCABULARY, WIDTH, Writer, llama
from tests.packed.test_packed import bytes_of
from tests.support import difference, run, some_fast
from tests.test_cli import ringcompile

EXACT = 1e-12


def as_transformers_reads(file: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, local_files_only=True,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()


def ids(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCABULARY, (2, length), generator=generator)


def logits(model: nn.Module, length: int) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(length)).logits


def kinds(model: nn.Module) -> dict[str, str]:
    """The linear layers of a model, and how they are packed."""
    names = {id(kind): name for name, kind in BLOCK_TYPES.items()}
    return {
        name: names[id(layer.kind)] if isinstance(layer, BlockLinear) else "no"
        for name, layer in model.named_modules() if isinstance(layer, nn.Linear | BlockLinear)
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_are_unpacked_as_the_package_does(name: str) -> None:
    kind, known = gguf.GGMLQuantizationType[name], BLOCK_TYPES[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (known.values, known.num_bytes)
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (3, 2 * known.num_bytes), dtype=np.uint8)
    blocks = data.reshape(3, 2, -1)  # no infinities: the upper byte of a scale is small
    for place in {"Q6_K": (209,)}.get(name, (1, 3)):
        blocks[..., place] &= 0x3F
    expected = torch.from_numpy(gguf.dequantize(data, kind))
    found = BlockLinear(name, torch.from_numpy(data), None).unpacked()
    assert expected.isfinite().all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_model_is_what_transformers_reads(file: Path, dtype: str) -> None:
    """To the bit, although rows of queries and keys are in another order in the file."""
    loaded = load_model(str(file), dtype=dtype)
    layers = kinds(loaded.module)
    assert layers.pop("lm_head") == "Q8_0"
    assert list(layers.values()) == [*TYPES.values()] * LAYERS
    assert loaded.name == "small"
    expected = as_transformers_reads(file, getattr(torch, dtype))
    assert torch.equal(logits(loaded.module, 7), logits(expected, 7))


def other_types(writer: Writer) -> None:
    writer.layers({**TYPES, "attn_q": "F16", "ffn_up": "BF16", "ffn_down": "F32"})
    writer.ends(head=None)


def with_biases(writer: Writer) -> None:
    writer.layers(TYPES, ("attn_q", "attn_k", "attn_v"))
    writer.ends()


@pytest.mark.parametrize(
    ("arch", "write", "packed"), [("llama", other_types, 4), ("qwen2", with_biases, 7)],
    ids=["llama, floats and a tied head", "qwen2, biases"],
)
def test_other_files(
    tmp_path: Path, arch: str, write: Callable[[Writer], None], packed: int
) -> None:
    """What is no block stays a float, and a tied head what the embedding is."""
    writer = Writer(tmp_path / "other.gguf", arch)
    write(writer)
    file = writer.write()
    model = load_model(str(file)).module
    layers = [how for name, how in kinds(model).items() if name != "lm_head"]
    assert len(layers) - layers.count("no") == packed * LAYERS
    assert torch.equal(logits(model, 7), logits(as_transformers_reads(file), 7))
    empty = load_model(str(file), weights=False).module
    assert kinds(empty) == kinds(model)


@pytest.mark.parametrize("spec", some_fast(
    ["tp=2", "ring=2,tp=2", "pp=2"], fast=lambda spec: spec == "ring=2,tp=2"))
def test_shares_of_blocks(file: Path, spec: str) -> None:
    loaded = load_model(str(file), dtype="float64")
    program = rc.capture(loaded.module, loaded.args)
    parallel = rc.transform(program, spec)
    for length in (24, 13):
        found = run(parallel, (ids(length),)).outputs
        assert difference(found, logits(loaded.module, length)) < EXACT
    if spec == "tp=2":
        sizes = {weight.name: weight.num_bytes for weight in program.weights.values()}
        for name, count in bytes_of(parallel, 0).items():
            # 96 inputs are three blocks, which two ranks do not divide.
            ways = 1 if any(part in name for part in ("down", "norm", "inv_freq")) else 2
            assert count == sizes[name] // ways, name


def test_k_blocks_are_shared_out_too(tmp_path: Path) -> None:
    file = Writer(tmp_path / "k.gguf")

    def layer(kind: str) -> BlockLinear:
        data = file.blocks((512, 512), gguf.GGMLQuantizationType[kind])
        return BlockLinear(kind, torch.from_numpy(data), None)

    model = nn.Sequential(*map(layer, ("Q4_K", "Q6_K", "Q5_K", "Q4_K")))
    x = torch.randn(1, 6, 512, dtype=torch.float64)
    parallel = rc.transform(rc.capture(model, (x,)), "tp=2")
    assert difference(run(parallel, (x,)).outputs, model(x)) < EXACT
    assert sum(bytes_of(parallel, 0).values()) * 2 == sum(w.nbytes for w in model.buffers())


def test_on_the_command_line(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = ringcompile("transform", str(file), "-o", str(out), "--parallel", "tp=2")
    assert made.returncode == 0, made.stderr
    assert "Converting" not in made.stderr
    verified = ringcompile("verify", str(out), "--numerics", "--seq", "9")
    assert verified.returncode == 0, verified.stderr
    assert "outputs agree" in verified.stdout


def rope(writer: Writer) -> None:
    writer.layers(TYPES)
    writer.ends()
    writer.numbers("rope_freqs.weight", (8,))


def yarn(writer: Writer) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    other_types(writer)


def one_of_three(writer: Writer) -> None:
    writer.add_uint16("split.count", 3)
    other_types(writer)


def without_a_weight(writer: Writer) -> None:
    writer.layers(TYPES)
    writer.numbers("token_embd.weight", (VOCABULARY, WIDTH))


def no_unpacking(writer: Writer) -> None:
    other_types(writer)
    kind = gguf.GGMLQuantizationType.Q8_K
    size = gguf.GGML_QUANT_SIZES[kind][1]
    writer.add_tensor("extra.weight", np.zeros((1, size), np.uint8), raw_dtype=kind)


ELSE = "take the model's safetensors"
REFUSED: dict[str, tuple[str, Callable[[Writer], None], str, str]] = {
    "positions that are scaled by a tensor": (
        "llama", rope,
        r"scales rotary positions \('rope_freqs.weight'\), which transformers [\d.]+ does not read",
        f"{ELSE}, whose config.json says how"),
    "positions that are scaled by yarn": (
        "llama", yarn, r"scales rotary positions \('rope.scaling.type = yarn'\), which", ELSE),
    "one of several files": (
        "llama", one_of_three, "is one of 3 files of a model", "put them together: llama-gguf"),
    "a weight that is missing": (
        "llama", without_a_weight,
        "lacks 1 of the weights of LlamaForCausalLM, such as 'model.norm.weight'; transformers",
        "download the file again, or name another one"),
    "biases that the class has not": (
        "llama", with_biases,
        r"holds 'blk.0.attn_q.bias', which LlamaForCausalLM of transformers [\d.]+ does not have",
        f"{ELSE} instead"),
    "a type that cannot be unpacked": (
        "llama", no_unpacking,
        "weight 'extra.weight' is of type Q8_K, which the package gguf cannot unpack",
        f"{ELSE} instead, or a file with weights of another type"),
    "an architecture that transformers does not read": (
        "rwkv6", other_types, "transformers cannot read '.*refused.gguf': ValueError: .*rwkv6",
        "docs/what-works.md says which GGUF files are read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    arch, write, reason, hint = REFUSED[name]
    writer = Writer(tmp_path / "refused.gguf", arch)
    write(writer)
    check_refused(writer.write(), reason, hint)


def check_refused(file: Path, reason: str, hint: str) -> None:
    for weights in (True, False):
        if "lacks" in reason and not weights:
            continue
        with pytest.raises(rc.RingCompileError) as refused:
            load_model(str(file), weights=weights)
        assert re.search(reason, str(refused.value).splitlines()[0])
        assert f"hint: {hint}" in str(refused.value)


def unknown_type(data: bytes) -> bytes:
    """The type of the first norm is 99."""
    name = b"blk.0.attn_norm.weight"
    place = data.index(name) + len(name) + 4 + 8
    return data[:place] + (99).to_bytes(4, "little") + data[place + 4 :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "cannot read '.*': "),
    "cut in the header": (lambda data: data[:200], "cannot read '.*': "),
    "cut in the weights": (lambda data: data[:-100], "cannot read '.*': "),
    "no GGUF": (lambda data: b"GGML" + data[4:], "cannot read '.*': ValueError: GGUF magic"),
    "a type of the future": (
        unknown_type, "holds weights of type 99, which the package gguf does not know"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged(file: Path, tmp_path: Path, name: str) -> None:
    damage, reason = DAMAGES[name]
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(damage(file.read_bytes()))
    hint = "take the model's safetensors" if "future" in name else "download the file again, or"
    check_refused(damaged, reason, hint)


def test_a_package_that_is_not_installed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    check_refused(file, "is a GGUF file, and gguf is not installed",
                  r"pip install 'ringcompile[hf]'")


def test_every_type_is_in_the_page_of_what_works() -> None:
    page = Path("docs/what-works.md").read_text(encoding="utf-8")
    assert all(name in page for name in BLOCK_TYPES)
