"""The command line as a user has it: output, exit codes, refusals, nothing left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ringcompile import compiler, execution
from ringcompile.cli import main
from ringcompile.models import zoo
from tests.support import TOLERANCE, difference

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("zoo_captured_once")
USER_CODE = '''
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.w = kind, nn.Linear(8, 8)

    def forward(self, x):
        x = self.w(x)
        if self.kind == "unknown":
            return torch.linalg.pinv(x)
        if self.kind == "branch":
            return x if x.sum() > 0 else -x
        if self.kind == "dropout":
            return F.dropout(x, 0.5, training=True)
        return F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3, is_causal=True)


def good(): return Net("good").eval(), (torch.randn(1, 19, 8),)
def unknown(): return Net("unknown").eval(), (torch.randn(1, 19, 8),)
def branch(): return Net("branch").eval(), (torch.randn(1, 19, 8),)
def dropout(): return Net("dropout").eval(), (torch.randn(1, 19, 8),)
def nothing(): return 3
'''


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def ringcompile(*args: str, cwd: Path | None = None, **env: str) -> Done:
    """The command in this process: the same entry point without Python's start."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd or ROOT)
        patch.setattr(sys, "argv", ["ringcompile", *args])
        for name, value in env.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code: object = 0
            except SystemExit as end:
                code = end.code or 0
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact `out` of llama-tiny at ring=2, and a user's module."""
    path = tmp_path_factory.mktemp("cli")
    (path / "mine.py").write_text(USER_CODE)
    (path / "folder.pt").mkdir()
    (path / "theirs").mkdir()
    (path / "theirs" / "thesis.tex").write_text("")
    done = ringcompile("transform", "llama-tiny", "-o", "out", "--parallel", "ring=2", cwd=path)
    assert done.returncode == 0, done.stderr
    assert "2 programs" in done.stdout
    return path


def test_run_gives_the_single_devices_numbers(folder: Path) -> None:
    module, inputs = zoo.build("llama-tiny", sequence=45)
    save_file({"inputs": inputs[0]}, folder / "in.safetensors")
    done = ringcompile(
        "run", "out", "--inputs", "in.safetensors", "--outputs", "res.safetensors", "--json",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ranks"] == 2
    assert all(report["bytes_sent"])
    with torch.no_grad():
        expected = module(*inputs)
    assert difference(load_file(folder / "res.safetensors")["output"], expected) <= TOLERANCE


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npy"])
def test_outputs_are_written_by_suffix(folder: Path, suffix: str) -> None:
    done = ringcompile(
        "run", "out", "--backend", "lockstep", "--seq", "40", "--last", "3",
        "--outputs", f"last{suffix}", cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "output: float32 [1, 3, 512], mean" in done.stdout
    readers: dict[str, Callable[[Path], Any]] = {
        ".safetensors": lambda path: load_file(path)["output"],
        ".pt": lambda path: torch.load(path, weights_only=True)["output"],
        ".npy": lambda path: torch.from_numpy(np.load(path)),
    }
    found = readers[suffix](folder / f"last{suffix}")
    made = compiler.load(folder / "out")
    expected = execution.run(made, execution.random_inputs(made, 40))[:, -3:]
    assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npy"])
def test_inputs_are_read_by_suffix(folder: Path, suffix: str) -> None:
    tokens, path = torch.arange(33)[None], folder / f"tokens{suffix}"
    writers: dict[str, Callable[[], Any]] = {
        ".safetensors": lambda: save_file({"inputs": tokens}, path),
        ".pt": lambda: torch.save({"inputs": tokens}, path),
        ".npy": lambda: np.save(path, tokens.numpy()),
    }
    writers[suffix]()
    done = ringcompile(
        "run", "out", "--backend", "lockstep", "--inputs", path.name, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "[1, 33, 512]" in done.stdout


def test_verify(folder: Path) -> None:
    done = ringcompile("verify", "out", "--numerics", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["transfers"] == 4  # two layers, one transfer each way
    assert len({row["length"] for row in report["numerics"]}) >= 3
    assert all(row["difference"] <= 2e-5 and not row["wrong"] for row in report["numerics"])


def test_dump(folder: Path) -> None:
    text = ringcompile("dump", "out", "--rank", "1", cwd=folder).stdout
    assert "ring.shift_start" in text
    assert "llama-tiny" in text
    done = ringcompile("dump", "out", "--rank", "0", "--format", "json", cwd=folder)
    assert json.loads(done.stdout)["nodes"]
    placed = ringcompile("dump", "out", "--after", "place", cwd=folder).stdout
    assert "s/ring" in placed
    assert "shift_start" not in placed


def test_check(folder: Path) -> None:
    done = ringcompile("check", "bert-tiny", "--parallel", "ring=4", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["supported"]
    assert {row["mask"] for row in report["attention"]} == {"full + key mask"}
    refused = ringcompile("check", "mine:unknown", "--parallel", "ring=4", cwd=folder)
    assert refused.returncode == 1
    assert "linalg_pinv" in refused.stdout
    assert "mine.py:15" in refused.stdout


def test_dump_of_what_a_pass_changed(folder: Path) -> None:
    done = ringcompile("dump", "out", "--diff", "fuse-merge", cwd=folder)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["--- before", "+++ after"]
    assert any(line.startswith("+%") and "attend_merge" in line for line in lines)
    assert any(line.startswith("-%") and "= merge(" in line for line in lines)
    changed = [line for line in lines[2:] if line[0] in "+-"]
    assert len(changed) < 12
    assert lines[-1].startswith(f"{sum(line[0] == '-' for line in changed)} lines less, ")
    early = ringcompile("dump", "out", "--diff", "place", cwd=folder)
    assert "s/ring" in early.stdout
    assert not [line for line in early.stdout.splitlines() if "shift_start" in line]


def test_dump_of_a_layer(folder: Path) -> None:
    done = ringcompile("dump", "out", "--rank", "1", "--layer", "blocks.1.mlp", cwd=folder)
    lines = done.stdout.splitlines()
    assert 4 <= len(lines) <= 8
    assert all("blocks.1.mlp" in line or "//" in line for line in lines)
    whole = ringcompile("dump", "out", "--rank", "1", cwd=folder).stdout
    assert lines[0].split(":")[0] + ":" in whole


def test_check_names_layers_that_are_alike_once(folder: Path) -> None:
    done = ringcompile("check", "llama-tiny", "--parallel", "ring=2", "--seq", "2048")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Transformer with ring=2, order zigzag\n")  # on a line of its own
    assert "blocks.0.attention and" in done.stdout
    assert done.stdout.count("causal") == 1
    assert done.stdout.endswith(
        "rank 0 sends 0.2621 MB for each sequence a run\n"
        "rank 1 sends 0.5243 MB for each sequence a run\nsupported\n")


def test_info(folder: Path) -> None:
    done = ringcompile("info", "out", cwd=folder)
    assert done.stdout.splitlines() == [
        "llama-tiny, ring=2, order zigzag, 2 ranks",
        "  input  inputs: int64 [b, s]",
        "  output output: float32 [b, s, 512]",
        "  length of the sequence: s, at least 1 token",
        "  batch: any number of sequences",
        "  weights of a rank: 1.18 MB",
        "run on this machine: ringcompile run out",
        "run as a job: torchrun --nproc-per-node 2 -m ringcompile run out",
    ]
    facts = json.loads(ringcompile("info", "out", "--json", cwd=folder).stdout)
    module = zoo.build("llama-tiny", sequence=24)[0]
    held = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    assert facts["weight_bytes"] == [held, held]
    assert facts["options"]["model"] == "llama-tiny"


def test_names_with_blanks_can_be_pasted(folder: Path) -> None:
    done = ringcompile(
        "transform", "gpt-tiny", "-o", "my out", "--parallel", "ring=2", "--no-weights", cwd=folder)
    assert done.stdout.endswith("next: ringcompile run 'my out', ringcompile view 'my out'\n")


def test_passes_and_printing(folder: Path) -> None:
    done = ringcompile(
        "transform", "llama-tiny", "--parallel", "ring=2", "--passes", "canonicalize,place")
    assert done.returncode == 0, done.stderr
    assert "after" in done.stdout or "place" in done.stdout
    done = ringcompile(
        "transform", "gpt-tiny", "-o", "printed", "--parallel", "ring=2", "--print-ir-after-all",
        "--time-passes", "--verify-each", "--no-weights", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "ring.attention" in done.stdout
    assert "lower-ring" in done.stderr
    refused = ringcompile("run", "printed", cwd=folder)
    assert refused.returncode == 1
    assert "weight" in refused.stderr


def test_a_variable_sets_an_option(folder: Path) -> None:
    done = ringcompile(
        "transform", "gpt-tiny", "-o", "by-variable", cwd=folder,
        RINGCOMPILE_TRANSFORM_PARALLEL="ring=3")
    assert done.returncode == 0, done.stderr
    assert "3 programs" in done.stdout


def test_models() -> None:
    assert set(json.loads(ringcompile("models", "--json").stdout)) == set(zoo.names())


WRONG: dict[str, tuple[list[str], int, list[str]]] = {
    "no such model": (
        ["transform", "nope", "-o", "x", "--parallel", "ring=2"], 1, ["no model 'nope'", "hint:"]),
    "malformed spec": (
        ["transform", "llama-tiny", "-o", "x", "--parallel", "ring:2"], 1, ["read 'ring:2'"]),
    "unknown axis": (
        ["transform", "llama-tiny", "-o", "x", "--parallel", "rng=2"], 1, ["mesh axis 'rng'"]),
    "axis twice": (
        ["transform", "llama-tiny", "-o", "x", "--parallel", "ring=2,ring=2"], 1, ["given twice"]),
    "axis of size 0": (
        ["transform", "llama-tiny", "-o", "x", "--parallel", "ring=0"], 1, ["at least 1"]),
    "more stages than layers": (
        ["transform", "llama-tiny", "-o", "x", "--parallel", "pp=3"], 1,
        ["pp=3 asks for more stages than the model has layers: 2", "hint: use pp=2 or less"]),
    "a stage that is no layer": (
        ["transform", "llama-tiny", "-o", "x", "--parallel", "pp=2", "--stages", "nowhere"], 1,
        ["no stage can begin with 'nowhere'", "layers: blocks.1"]),
    "no such plan": (
        ["transform", "llama-tiny", "-o", "x", "--parallel", "tp=2", "--plan", "none.json"], 1,
        ["cannot read the plan 'none.json'"]),
    "no spec": (["transform", "llama-tiny", "-o", "x"], 2, ["--parallel"]),
    "no folder": (["transform", "llama-tiny", "--parallel", "ring=2"], 2, ["-o"]),
    "unknown pass": (
        ["transform", "llama-tiny", "--parallel", "ring=2", "--passes", "foo"], 1,
        ["unknown pass 'foo'", "canonicalize"]),
    "folder is there": (
        ["transform", "llama-tiny", "-o", "out", "--parallel", "ring=2"], 1, ["--overwrite"]),
    "a folder that is no artifact": (
        ["transform", "nope", "-o", "folder.pt", "--parallel", "ring=2", "--overwrite"], 1,
        ["no model 'nope'"]),
    "a file in the way": (
        ["transform", "llama-tiny", "-o", "mine.py", "--parallel", "ring=2"], 1,
        ["mine.py' is a file"]),
    "a folder that is not ours": (
        ["transform", "nope", "-o", "theirs", "--parallel", "ring=2", "--overwrite"], 1,
        ["theirs' is not an artifact, so it is not overwritten"]),
    "op without a rule": (
        ["transform", "mine:unknown", "-o", "x", "--parallel", "ring=2"], 1,
        ["mine.py:15: error:", "linalg_pinv", "return torch.linalg.pinv(x)", "hint:"]),
    "branch on data": (
        ["transform", "mine:branch", "-o", "x", "--parallel", "ring=2"], 1,
        ["mine.py:17: error:", "depends on the values", "return x if"]),
    "dropout left on": (
        ["transform", "mine:dropout", "-o", "x", "--parallel", "ring=2"], 1,
        ["mine.py:19: error:", "dropout with p=0.5"]),
    "not a model": (
        ["transform", "mine:nothing", "-o", "x", "--parallel", "ring=2"], 1, ["returns int"]),
    "no such function": (
        ["transform", "mine:nobody", "-o", "x", "--parallel", "ring=2"], 1, ["cannot import"]),
    "no artifact": (["run", "nowhere"], 1, ["nowhere"]),
    "foreign folder": (["verify", "."], 1, ["manifest.json"]),
    "wrong world size": (["run", "out", "--nproc", "3"], 1, ["3", "2"]),
    "no such rank": (["dump", "out", "--rank", "7"], 1, ["rank 7", "0 to 1"]),
    "unknown pass to compare": (["dump", "out", "--diff", "foo"], 1, ["unknown pass 'foo'"]),
    "unknown layer": (
        ["dump", "out", "--layer", "blocks.9"], 1,
        ["the program has no layer 'blocks.9'", "layers are: ", "blocks.0"]),
    "unknown pass to dump after": (["dump", "out", "--after", "foo"], 1, ["unknown pass 'foo'"]),
    "inputs not there": (["run", "out", "--inputs", "no.safetensors"], 1, ["no.safetensors"]),
    "outputs of an unknown kind": (
        ["run", "out", "--outputs", "x.bin"], 1,
        ["error: 'x.bin': unknown suffix '.bin'\n",
         "  hint: name it with one of: .safetensors, .pt, .npy\n"]),
    "outputs without a kind": (
        ["run", "out", "--outputs", "x"], 1, ["'x' has no suffix, which says what kind of file"]),
    "outputs in no folder": (
        ["run", "out", "--outputs", "no/x.pt"], 1, ["cannot write 'no/x.pt': there is no folder"]),
    "outputs over a folder": (
        ["run", "out", "--outputs", "folder.pt"], 1, ["cannot write 'folder.pt': it is a folder"]),
    "two kinds of inputs": (
        ["run", "out", "--inputs", "a.pt", "--prompt", "b"], 2,
        ["give only one of --inputs, --prompt and --prompt-file"]),
    "a prompt without a tokenizer": (
        ["run", "out", "--prompt", "Once"], 1,
        ["error: 'llama-tiny' is no checkpoint folder, so there is no tokenizer for the prompt",
         "  hint: name the folder with --tokenizer, or pass token ids with --inputs\n"]),
    "a prompt that is not there": (
        ["run", "out", "--prompt-file", "no.txt"], 1, ["cannot read the prompt from 'no.txt'"]),
    "last of nothing": (["run", "out", "--last", "0"], 2, ["--last"]),
    "checkpoint that is none": (
        ["check", ".", "--parallel", "ring=2"], 1, ["not a Hugging Face checkpoint"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(folder: Path, name: str) -> None:
    args, code, texts = WRONG[name]
    done = ringcompile(*args, cwd=folder)
    shown = done.stdout + done.stderr
    assert done.returncode == code, shown
    assert "Traceback" not in shown
    for text in texts:
        assert text in shown
    assert not (folder / "x").exists()
    assert not [path for path in folder.iterdir() if "tmp" in path.name]


def test_as_a_module_of_its_own(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ringcompile", "dump", "out", "--rank", "9"], capture_output=True,
        text=True, timeout=120, cwd=folder, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert done.stderr == "error: rank 9 does not exist\n  hint: ranks are 0 to 1\n"


@pytest.mark.slow
def test_torchrun(folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "-m", "ringcompile", "run", "out", "--outputs", "torchrun.safetensors"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 ranks" in done.stdout
    assert load_file(folder / "torchrun.safetensors")["output"].shape == (1, 128, 512)
