"""Checkpoint folders that are damaged or odd, and what a user's function may return."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ringcompile.capture.export import capture
from ringcompile.capture.loaders import load_model
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.execution import verify
from tests.test_cli import ringcompile

HUB = (
    "if this is a model on the Hugging Face Hub: `hf download meta-llama/Llama-3.2-1B "
    "--local-dir Llama-3.2-1B`, then name the folder Llama-3.2-1B"
)
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in two shards."""
    folder = tmp_path_factory.mktemp("checkpoints") / "good"
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def truncate(file: Path, left: int) -> None:
    file.write_bytes(file.read_bytes()[:left])


def only_pickles(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")


def without_a_weight(folder: Path) -> None:
    weights = {}
    for file in folder.glob("model-*.safetensors"):
        weights |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def no_header(folder: Path) -> None:
    first_shard(folder).write_bytes(struct.pack("<Q", 4) + b"oops" * 100)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "'{f}' is not a Hugging Face checkpoint: it has no config.json"),
    "config that is no JSON": (
        lambda f: (f / "config.json").write_text("{"), "cannot read '{f}/config.json': Expecting"),
    "config that is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "'{f}/config.json' does not hold a JSON object"),
    "no architecture": (
        lambda f: edit_config(f, architectures=None),
        "'{f}/config.json' does not say which class the model is: it has no 'architectures'"),
    "code of its own": (
        lambda f: edit_config(f, architectures=["MineForCausalLM"], auto_map={"AutoModel": "m.M"}),
        "'{f}/config.json': MineForCausalLM is code that comes with the checkpoint (trust_remote"),
    "a class of the future": (
        lambda f: edit_config(f, architectures=["Llama9ForCausalLM"]),
        "'{f}/config.json': transformers " + transformers.__version__
        + " has no class Llama9ForCausalLM"),
    "no weights": (
        lambda f: [file.unlink() for file in f.glob("model*")],
        "'{f}' has no weights: neither model.safetensors nor model.safetensors.index.json"),
    "a missing shard": (
        lambda f: first_shard(f).unlink(),
        "'{shard}', which model.safetensors.index.json names, is missing"),
    "a truncated shard": (
        lambda f: truncate(first_shard(f), 3000), "'{shard}' is truncated: it has 3,000 bytes of "),
    "a shard cut in its header": (
        lambda f: truncate(first_shard(f), 20),
        "'{shard}' is truncated: it has 20 bytes, and its header does not fit"),
    "an empty shard": (lambda f: truncate(first_shard(f), 0), "'{shard}' is truncated: it has 0"),
    "a shard that is none": (
        no_header, "'{shard}' is not a safetensors file: its header cannot be read"),
    "an index that is no JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("<html>"),
        "cannot read '{f}/model.safetensors.index.json': Expecting value"),
    "an index without a map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "'{f}/model.safetensors.index.json' has no 'weight_map'"),
    "a weight that is not there": (
        without_a_weight,
        "'{f}' lacks 1 of the weights of LlamaForCausalLM, such as 'model.layers.1.mlp.up_proj."),
    "pickles that are none": (only_pickles, "transformers cannot load '{f}': "),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_one_message_names_the_file(good: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    folder = tmp_path / "damaged"
    shutil.copytree(good, folder)
    shard = first_shard(folder)
    damage(folder)
    with pytest.raises(RingCompileError) as raised:
        load_model(str(folder))
    assert raised.value.message.startswith(message.format(f=folder, shard=shard))


def test_further_inputs_come_from_the_command_line(good: Path, tmp_path: Path) -> None:
    done = ringcompile(
        "transform", str(good), "-o", "out", "--parallel", "ring=2", "--extra-inputs",
        "attention_mask,position_ids", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = ringcompile("info", "out", cwd=tmp_path).stdout
    assert "input  input_ids: int64 [b, s]" in text
    assert "input  attention_mask: int64 [b, s]" in text
    assert "input  position_ids: int64 [b, s]" in text
    done = ringcompile("dump", "out", "--after", "canonicalize", cwd=tmp_path)
    assert "%position_ids: i64[b, s] = input" in " ".join(done.stdout.split())


def test_an_encoder_decoder_has_two_lengths(tmp_path: Path) -> None:
    """Its decoder's tokens are an input that nobody has to ask for."""
    transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
    )).save_pretrained(tmp_path / "t5")
    loaded = load_model(str(tmp_path / "t5"))
    program = capture(loaded.module, loaded.args, loaded.kwargs)
    shapes = {spec.name: [str(size) for size in spec.type.shape] for spec in program.inputs}
    assert shapes == {
        "input_ids": ["b", "s"], "attention_mask": ["b", "s"], "decoder_input_ids": ["b", "s2"],
    }
    done = verify(transform(program, "ring=2"), loaded.module, numerics=True, tries=2)
    assert done.passed


@pytest.mark.parametrize(
    ("spec", "extra", "message", "hint"),
    [
        ("meta-llama/Llama-3.2-1B", (), "no model 'meta-llama/Llama-3.2-1B'",
         HUB),
        ("llama-tiny", ("position_ids",),
         "'llama-tiny' is not a Hugging Face checkpoint, so it determines its inputs itself",
         "leave --extra-inputs out"),
        ("llama-tiny", ("labels",), "unknown input 'labels'",
         "one of: attention_mask, position_ids, token_type_ids, decoder_input_ids"),
    ],
)
def test_other_names(spec: str, extra: tuple[str, ...], message: str, hint: str) -> None:
    with pytest.raises(RingCompileError) as raised:
        load_model(spec, extra=extra)
    assert (raised.value.message, raised.value.hint) == (message, hint)


CODE = '''
import torch
from torch import nn

class Net(nn.Module):
    def forward(self, x, scale=None):
        return x if scale is None else x * scale

NET, X = Net().eval(), torch.ones(1, 9, 4)
def pair(): return NET, (X,)
def one(): return NET, X
def by_name(): return NET, {"x": X, "scale": X}
def three(): return NET, (X,), {"scale": X}
def table(): return {"module": NET, "args": (X,), "kwargs": {"scale": X}}
def short(): return {"module": NET, "kwargs": {"x": X}}
def wrong(): return {"model": NET, "args": (X,)}
def swapped(): return (X,), NET
def number(): return 3
def bare(): return NET
def broken():
    raise KeyError("layers")
'''


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "forms_of_a_model.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize(
    ("name", "num_args", "names"),
    [("pair", 1, []), ("one", 1, []), ("by_name", 0, ["x", "scale"]), ("three", 1, ["scale"]),
     ("table", 1, ["scale"]), ("short", 0, ["x"])],
)
def test_what_a_function_may_return(name: str, num_args: int, names: list[str]) -> None:
    loaded = load_model(f"forms_of_a_model:{name}", dtype="float64")
    assert (len(loaded.args), list(loaded.kwargs)) == (num_args, names)
    assert all(tensor.dtype == torch.float64 for tensor in loaded.inputs)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", "returns a dict of 'model', 'args'"), ("number", "returns int"),
        ("swapped", "returns a tuple of (tuple, Net)"), ("bare", "returns Net"),
        ("broken", "raised KeyError: 'layers'"),
    ],
)
def test_what_it_may_not(name: str, message: str) -> None:
    with pytest.raises(RingCompileError) as raised:
        load_model(f"forms_of_a_model:{name}")
    assert raised.value.message == f"'forms_of_a_model:{name}' {message}"
    if name == "broken":
        assert raised.value.location is not None
        assert raised.value.location.text == 'raise KeyError("layers")'
