"""Every command of the documentation is run, page by page, in a folder with what it needs."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from ringcompile.cli import cli
from tests.test_docs import PAGES, commands

ROOT = Path(__file__).parents[1]

# Not run here, and why.
NOT_RUN = {
    "ringcompile calibrate -o mine.json": "takes minutes; tests/cost runs it with --quick",
}
# Pages that go on with an artifact `out` that the reader has.
WITH_OUT = {"before-you-have-gpus.md", "benchmarks.md"}
WORDS = ["[UNK]", "once", "upon", "a", "time", "The", "capital", "of", "France", "is"]
NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.qkv, self.head = nn.Embedding(64, 32), nn.Linear(32, 96), nn.Linear(32, 64)

    def forward(self, ids):
        x = self.table(ids)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + y.transpose(1, 2).flatten(2))
"""


def prepare(folder: Path) -> None:
    """What the pages take for granted: a checkpoint, a module, inputs."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "my-llama")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "my-llama")
    own = (ROOT / "docs" / "own-model.md").read_text()
    (folder / "mine.py").write_text(own.partition("```python\n")[2].partition("```")[0])
    (folder / "net.py").write_text(NET)
    torch.save(runpy.run_path(str(folder / "net.py"))["Net"]().state_dict(), folder / "net.pt")
    (folder / "question.txt").write_text("once upon a time")
    (folder / "ids.txt").write_text("1 2 3")
    save_file({"input_ids": torch.ones(1, 40, dtype=torch.int64)}, folder / "in.safetensors")


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=() if page.name == "quickstart.md" else (
        pytest.mark.slow)) for page in PAGES if list(commands(page.read_text()))],
)
def test_documented_commands_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = ["ringcompile transform llama-tiny -o out --parallel ring=2"]
    for line in [*(before if page.name in WITH_OUT else []), *commands(page.read_text())]:
        if line in NOT_RUN:
            continue
        words = shlex.split(re.sub(r"\bMODEL\b", "llama-tiny", line))[1:]
        again = ["--overwrite"] if "-o" in words and words[0] == "transform" else []
        done = CliRunner().invoke(cli, [*words, *again])
        assert done.exit_code == 0, (line, done.output, done.exception)
