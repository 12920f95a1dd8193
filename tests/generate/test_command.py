"""`ringcompile generate`: prompts in, text out, and what is wrong in one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import ringcompile as rc
from ringcompile.cli import cli
from ringcompile.errors import RingCompileError
from tests.generate.models import VOCABULARY, Learned, cached, ids

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "out"
    cached(Learned, "ring=2")[1].save(folder)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose tokens are w0, w1, ..."""
    folder = tmp_path_factory.mktemp("words")
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model)
    fast.chat_template = "{% for m in messages %}w1 {{ m['content'] }} w2{% endfor %}"
    fast.save_pretrained(folder)
    return folder


def expected(prompt: torch.Tensor, new: int) -> list[int]:
    module = cached(Learned, "ring=2")[0]
    tokens = prompt
    with torch.no_grad():
        for _ in range(new):
            tokens = torch.cat([tokens, module(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens[0, prompt.shape[1] :].tolist()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["generate", *map(str, arguments), "--backend", "lockstep"])


def test_token_ids(out: Path, tmp_path: Path) -> None:
    prompt = ids(9)
    file = tmp_path / "ids.txt"
    file.write_text(" ".join(map(str, prompt[0].tolist())))
    plain = run(out, "--input-ids", file, "--max-new-tokens", 8)
    assert plain.exit_code == 0, plain.output
    wanted = expected(prompt, 8)
    assert plain.stdout.split() == list(map(str, wanted))
    assert "8 tokens: the first after" in plain.stderr
    file.write_text(json.dumps(prompt.tolist()))
    chunked = run(out, "--input-ids", file, "--max-new-tokens", 8, "--chunk", 4, "--json")
    assert json.loads(chunked.stdout) == {"tokens": [wanted]}


def test_several_prompts_of_one_length(out: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text(str([ids(9)[0].tolist(), ids(9, seed=1)[0, :9].tolist()]))
    found = run(out, "--input-ids", tmp_path / "ids", "--max-new-tokens", 4)
    rows = [list(map(int, line.split())) for line in found.stdout.splitlines()]
    assert rows == [expected(ids(9), 4), expected(ids(9, seed=1), 4)]


def test_text(out: Path, words: Path, tmp_path: Path) -> None:
    text = " ".join(f"w{i}" for i in ids(9)[0].tolist())
    wanted = [f"w{i}" for i in expected(ids(9), 8)]
    options = ("--tokenizer", words, "--max-new-tokens", 8)
    found = run(out, "--prompt", text, *options)
    assert found.exit_code == 0, found.output
    assert found.stdout.split() == wanted
    (tmp_path / "prompt.txt").write_text(text)
    assert run(out, "--prompt-file", tmp_path / "prompt.txt", *options).stdout == found.stdout
    chat = torch.cat([torch.tensor([[1]]), ids(9), torch.tensor([[2]])], 1)
    found = run(out, "--prompt", text, "--chat", *options)
    assert found.stdout.split() == [f"w{i}" for i in expected(chat, 8)]


def test_it_ends_with_an_end_token(out: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text(str(ids(9)[0].tolist()))
    first = expected(ids(9), 1)[0]
    assert run(out, "--input-ids", tmp_path / "ids", "--eos", first).stdout.split() == [str(first)]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("1 2 x", (), "does not hold token ids"),
        ("[[1, 2], [3]]", (), "does not hold token ids"),
        ("", (), "holds no token ids"),
        ("1 2", ("--max-new-tokens", 80), "do not fit the cache, which is for 80"),
        ("1 2", ("--temperature", -1), "temperature -1.0: it must be 0 or more"),
        ("1 2", ("--tokenizer", "nowhere"), "there is no tokenizer: 'nowhere' is no checkpoint"),
    ],
)
def test_what_is_refused(
    out: Path, tmp_path: Path, content: str, options: tuple[object, ...], message: str
) -> None:
    (tmp_path / "ids").write_text(content)
    found = run(out, "--input-ids", tmp_path / "ids", *options)
    assert isinstance(found.exception, RingCompileError)
    assert message in str(found.exception)


def test_prompts_that_are_refused(out: Path, words: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--prompt", "w1"), "there is no tokenizer: 'None' is no checkpoint"),
        (("--prompt", "", "--tokenizer", words), "the prompt is empty"),
        (("--prompt", "w1", "--tokenizer", tmp_path), "has no tokenizer"),
        (("--prompt-file", tmp_path / "none"), "cannot read a prompt from"),
    ):
        assert message in str(run(out, *arguments).exception)
    assert run(out).exit_code == 2
    assert run(out, "--prompt", "w1", "--input-ids", "ids").exit_code == 2
    plain = tmp_path / "plain"
    parallel = cached(Learned, "ring=2")[1]
    rc.ParallelProgram(parallel.program, parallel.mesh).save(plain)
    (tmp_path / "ids").write_text("1 2")
    assert "without a cache" in str(run(plain, "--input-ids", tmp_path / "ids").exception)


def test_dump_shows_the_program_for_the_next_tokens(out: Path) -> None:
    found = CliRunner().invoke(cli, ["dump", str(out), "--cached", "--rank", "1"])
    assert found.exit_code == 0
    for line in ("6, 74, 4] = state cache",
                 "= cached_attention(", "ring.gather("):
        assert line in " ".join(found.output.split())
    both = CliRunner().invoke(cli, ["dump", str(out), "--cached", "--after", "place"])
    assert both.exit_code == 2


@pytest.mark.slow
def test_under_torchrun(out: Path, tmp_path: Path) -> None:
    """Rank 0 chooses, for all, and is the only one that prints."""
    (tmp_path / "ids").write_text(str(ids(9)[0].tolist()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "-m", "ringcompile", "generate", str(out), "--input-ids", str(tmp_path / "ids"),
               "--max-new-tokens", "8", "--backend", "gloo"]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == list(map(str, expected(ids(9), 8)))
