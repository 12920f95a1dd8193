"""`ringcompile generate`: prompts in, text out, and what is wrong in one message."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import ringcompile as rc
from ringcompile.cli import cli
from ringcompile.errors import RingCompileError
from ringcompile.ops import bodies
from ringcompile.ops.cached import cached_attention
from tests.generate.models import VOCABULARY, Learned, Rotary, cached, ids

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


def test_recorded_steps(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, file = ids(5), tmp_path / "ids.txt"
    file.write_text(" ".join(map(str, prompt[0].tolist())))
    found = run(out, "--input-ids", file, "--max-new-tokens", 6, "--cuda-graphs", "rehearse")
    assert found.exit_code == 0, found.output
    assert [int(word) for word in found.stdout.split()] == expected(prompt, 6)
    assert "note" not in found.stderr
    monkeypatch.setitem(
        bodies.ON_DEVICE, "cached_attention",
        lambda *args, **how: (args[0].tolist(), cached_attention(*args, **how, on_device=True))[1],
    )
    found = run(out, "--input-ids", file, "--max-new-tokens", 2, "--cuda-graphs", "rehearse")
    assert found.exit_code == 0, found.output
    notes = [line for line in found.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "Tensor.tolist needs the host" in notes[0]


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


IDS_HINT = "name the folder with --tokenizer, or pass token ids with --input-ids"
NO_WORDS = "so there is no tokenizer for the prompt"
NO_IDS = "'IDS' does not hold token ids"
TOO_MANY = "new ones do not fit the cache, which is for 80"
LARGER = "compile with cache=81 (--cache 81), or ask for fewer tokens"
ROWS_HINT = "write numbers separated by spaces, or JSON: one list, or several of the same length"


@pytest.mark.parametrize(
    ("content", "options", "message", "hint"),
    [
        ("1 2 x", (), f"{NO_IDS}: invalid literal for int() with base 10: 'x'", ROWS_HINT),
        ("[[1, 2], [3]]", (), f"{NO_IDS}: expected sequence of length 2 at dim 1 (got 1)",
         ROWS_HINT),
        ("", (), "'IDS' holds no token ids", None),
        ("1 2", ("--max-new-tokens", 80), f"2 tokens and 80 {TOO_MANY}", LARGER),
        (" ".join(["1"] * 81), ("--max-new-tokens", 1), f"81 tokens and 1 {TOO_MANY}", LARGER),
        ("1 2", ("--temperature", -1), "temperature -1.0: it must be 0 or more", None),
        ("1 2", ("--top-k", 0), "top_k 0: it must be at least 1", None),
        ("1 2", ("--top-p", 1.5), "top_p 1.5: it must be above 0 and at most 1", None),
        ("1 2", ("--tokenizer", "nowhere"), f"'nowhere' is no checkpoint folder, {NO_WORDS}",
         IDS_HINT),
    ],
)
def test_what_is_refused(
    out: Path, tmp_path: Path, content: str, options: tuple[object, ...], message: str,
    hint: str | None,
) -> None:
    (tmp_path / "ids").write_text(content)
    found = run(out, "--input-ids", tmp_path / "ids", *options)
    said = f"error: {message}".replace("IDS", str(tmp_path / "ids"))
    assert isinstance(found.exception, RingCompileError)
    assert str(found.exception) == said + (f"\n  hint: {hint}" if hint else "")
    assert found.stdout == ""


def test_prompts_that_are_refused(out: Path, words: Path, tmp_path: Path) -> None:
    none, missing = tmp_path / "none", "[Errno 2] No such file or directory"
    for arguments, message in (
        (("--prompt", "w1"),
         f"the artifact does not name a checkpoint, {NO_WORDS}\n  hint: {IDS_HINT}"),
        (("--prompt", "", "--tokenizer", words), "the prompt has no tokens"),
        (("--prompt-file", none), f"cannot read the prompt from '{none}': {missing}: '{none}'"),
    ):
        assert str(run(out, *arguments).exception) == f"error: {message}"
    found = run(out, "--prompt", "w1", "--tokenizer", tmp_path)
    assert f"error: cannot read the tokenizer in '{tmp_path}': " in str(found.exception)
    assert run(out).exit_code == 2
    assert run(out, "--prompt", "w1", "--input-ids", "ids").exit_code == 2
    assert run(out, "--input-ids", "ids", "--chat").exit_code == 2


def test_an_artifact_without_a_cache(tmp_path: Path) -> None:
    parallel = cached(Learned, "ring=2")[1]
    rc.ParallelProgram(parallel.program, parallel.mesh).save(tmp_path / "plain")
    (tmp_path / "ids").write_text("1 2")
    found = run(tmp_path / "plain", "--input-ids", tmp_path / "ids")
    assert str(found.exception) == (
        "error: the program was compiled without a cache\n"
        "  hint: pass cache=N to transform, or --cache N on the command line"
    )


def test_another_batch_than_the_session_s() -> None:
    with rc.Session(cached(Learned, "ring=2")[1]) as session:
        session.extend(ids(3))
        with pytest.raises(RingCompileError) as caught:
            session.extend(ids(3, batch=2))
    assert str(caught.value) == (
        "error: input 'ids' has 2 sequences, the session is for 1\n"
        "  hint: open another session for another batch"
    )


def in_session(leader: int) -> list[str]:
    """The processes of a process session that are still there, whatever became of its leader."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().rpartition(")")
            state, _, _, session = rest.split()[:4]
            if int(session) == leader and state != "Z":
                found.append(name)
    return found


@pytest.mark.slow  # test_interrupt.py has a command with ranks among the fast ones
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_ctrl_c_in_the_middle_leaves_no_process(tmp_path: Path) -> None:
    cached(Rotary, "ring=2", cache=20_000)[1].save(tmp_path / "long")
    (tmp_path / "ids").write_text("1 2 3")
    command = [sys.executable, "-m", "ringcompile", "generate", str(tmp_path / "long"),
               "--input-ids", str(tmp_path / "ids"), "--max-new-tokens", "19000",
               "--backend", "gloo"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(4)  # the first tokens are there, and most are not
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the ranks get it too
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.decode().strip()) == (1, "aborted")
    deadline = time.monotonic() + 10
    while (left := in_session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


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
