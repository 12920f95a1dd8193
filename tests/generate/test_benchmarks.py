"""The benchmarks of generating, on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.gpu import decode as gpu_decode
from benchmarks.gpu.report import Report
from tests.generate.models import ids

transformers = pytest.importorskip("transformers")

from benchmarks import decode, generation_table, weight_order  # noqa: E402  (they need transformers)


@pytest.mark.slow
def test_time_per_output_token() -> None:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=3,
    )
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    rows = decode.measure(transformers.LlamaForCausalLM(config).eval(), ids(40), 3, 1)
    torch.set_num_threads(threads)
    assert [row["side"] for row in rows] == [
        "Hugging Face", "ring=1", "ring=1 x 3", "tp=3", "ring=2"
    ]
    assert all(row["tpot_ms"] > 0 for row in rows)
    assert [row["against"] for row in rows if row["ratio"]] == [
        "Hugging Face", "ring=1 x 3", "ring=1"
    ]
    assert len(decode.table(rows).splitlines()) == 7


def test_steps_of_a_token_beside_their_recordings(tmp_path: Path) -> None:
    file = tmp_path / "decode.json"
    gpu_decode.run(Report(file, "decode"), dry=True, seconds=120)
    rows = json.loads(file.read_text())["rows"]
    kernels, steps = ([row for row in rows if key in row] for key in ("kernel", "graph_ms"))
    assert {row["kernel"] for row in kernels} == {
        "cpu-flash", "cpu-flash +mask", "math", "math +mask", "sdpa +mask"
    }
    assert all(row["max_error"] < 1e-5 for row in kernels)
    assert [row["parallel"] for row in steps] == ["ring=1", "ring=2"]
    assert all(row["graph_ms"] > 0 and row["notes"] == "" for row in steps)


def test_the_table_of_modelled_times() -> None:
    found = CliRunner().invoke(generation_table.main, [
        "--model", "llama-tiny", "--gpus", "2", "--cluster", "cpu", "--context", "64", "--batch",
        "1", "--spec", "tp=2", "--spec", "ring=2",
    ])
    assert found.exit_code == 0, found.output
    rows = found.stdout.splitlines()
    assert len(rows) == 4
    assert all(row.count("|") == len(generation_table.COLUMNS) + 1 for row in rows)
    assert {row.split("|")[3].strip() for row in rows[2:]} == {"`tp=2`", "`ring=2`"}


def test_the_table_of_orders_in_memory() -> None:
    rows = weight_order.table(1, [(8, 4), (4, 8)], 1000).splitlines()[2:]
    assert [row.split("|")[4].strip() for row in rows] == ["columns", "rows"]
    assert all(float(row.split("|")[2].split()[0]) > 0 for row in rows)
