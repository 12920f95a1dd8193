"""A checkpoint with a tokenizer: the quickstart, and prompts on the command line."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.test_cli import ringcompile

ROOT = Path(__file__).parents[2]
WORDS = ["[UNK]", "once", "upon", "a", "time", "there", "was", "ring"]
TEXT = "once upon a time there was a ring"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "tiny"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def expected(checkpoint: Path) -> tuple[str, float]:
    """The next word, and the perplexity, by transformers itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    ids = torch.tensor([[WORDS.index(word) for word in TEXT.split()]])
    with torch.no_grad():
        logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    return WORDS[int(logits[0, -1].argmax())], float(loss.exp())


def test_quickstart(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", str(checkpoint), TEXT])
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    word, perplexity = expected(checkpoint)
    assert capsys.readouterr().out == (
        f"next token: {word!r}\nperplexity of the text: {perplexity:.2f}\n"
    )


def test_the_module_itself_as_a_job_of_one_rank(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": port}
    for name, value in job.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(
        sys, "argv", ["parallelize.py", str(checkpoint), TEXT, "--parallel", "ring=1"])
    try:
        runpy.run_path(str(ROOT / "examples" / "parallelize.py"), run_name="__main__")
    finally:
        torch.distributed.destroy_process_group()
    assert capsys.readouterr().out == f"next token: {expected(checkpoint)[0]!r}\n"


@pytest.mark.slow
def test_the_module_itself_under_torchrun(checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "examples/parallelize.py", str(checkpoint), TEXT],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=200, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"next token: {expected(checkpoint)[0]!r}\n"


def test_a_prompt_on_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    done = ringcompile(
        "transform", str(checkpoint), "-o", "out", "--parallel", "ring=2", "--extra-inputs",
        "attention_mask", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")  # no progress bars in a pipe
    (tmp_path / "prompt.txt").write_text(TEXT)
    shown = [
        ringcompile("run", "out", "--backend", "lockstep", *words, cwd=tmp_path).stdout
        for words in (["--prompt", TEXT], ["--prompt-file", "prompt.txt"])
    ]
    word, _ = expected(checkpoint)
    for text in shown:
        assert f"logits: float32 [1, 1, {len(WORDS)}]" in text
        assert f"next: {word!r} (" in text
