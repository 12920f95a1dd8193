"""Full-size models for 16 ranks: captured and transformed without weights in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compile_time import LLAMA_70B

SECONDS, BYTES = 60, 2e9
VERIFIED = 5  # seconds for 16 ranks of 3,000 nodes
# Seconds are CPU seconds of the one thread that works: wall time where nothing else runs.
# What one process does from the model's name to the checked programs of all ranks.
SCRIPT = """
import json, re, sys, time
from math import prod
from pathlib import Path
import ringcompile as rc
from ringcompile.capture.loaders import load_model
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import local_shape

def held(rank):
    nodes = [node for node in rank.graph.nodes if node.name in rank.weights]
    shapes = [local_shape(type_of(node), rank.mesh, rank.sequence) for node in nodes]
    return sum(prod(s) * type_of(n).dtype.itemsize for s, n in zip(shapes, nodes, strict=True))

start = time.process_time()
loaded = load_model(sys.argv[1], weights=False)
program = rc.capture(loaded.module, loaded.args, loaded.kwargs)
captured = time.process_time() - start
parallel = rc.transform(program, sys.argv[2])
ranks = parallel.ranks()
made = time.process_time() - start
parallel.verify()
print(json.dumps({
    "seconds": made,
    "captured": captured,
    "verified": time.process_time() - start - made,
    # Not getrusage: its maximum is inherited from the process that started this one.
    "bytes": int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024,
    "nodes": len(ranks[5].graph.nodes),
    "held": [held(rank) for rank in ranks],
    "weights": sum(weight.num_bytes for weight in program.weights.values()),
}))
"""


def measured(model: str, spec: str = "ring=16") -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, spec], capture_output=True, text=True, check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(model, spec, {key: value for key, value in found.items() if key != "held"})
    assert found["verified"] < VERIFIED * max(found["nodes"] / 3000, 1)
    return found


# Numbers of one layer of the reference models: D = 8192, four projections of attention, an MLP of
# 4 D, or 8 experts like it and their router; two norms. Outside: a norm, and angles in float32.
D, LAYERS, EXPERTS = 8192, 4, 8
NORMS, LAST, ANGLES = 2 * D * 2, D * 2, 256 * 4
SPLIT = {"dense-4l": 12 * D * D * 2, "moe-4l": (4 + 8 * EXPERTS) * D * D * 2}
WHOLE = {"dense-4l": NORMS, "moe-4l": NORMS + EXPERTS * D * 2}


def shares(model: str, spec: str) -> list[int]:
    """Bytes of weights that each of the 16 ranks has to hold."""
    if "tp=8,pp=2" not in spec:  # a rank of a ring, or of heads, holds all
        return [LAYERS * (SPLIT[model] + WHOLE[model]) + LAST + ANGLES] * 16
    stage = LAYERS // 2 * (SPLIT[model] // 8 + WHOLE[model]) + ANGLES
    return [stage, stage + LAST] * 8  # neighbouring ranks are of different stages


@pytest.mark.parametrize(
    ("model", "spec"),
    [(model, spec) for model in SPLIT for spec in ("ring=16", "tp=8,pp=2", "ring=4,ulysses=4")],
)
@pytest.mark.slow  # test_closed_forms.py has the weights of the full models among the fast ones
def test_reference_models(model: str, spec: str) -> None:
    """The check that experts are token-wise included: large weights are checked as rank one."""
    found = measured(model, spec)
    assert found["weights"] == LAYERS * (SPLIT[model] + WHOLE[model]) + LAST + ANGLES
    assert found["held"] == shares(model, spec)
    assert found["bytes"] < BYTES
    assert found["seconds"] < SECONDS


MODELS_32 = {
    "dense": {**LLAMA_70B, "num_hidden_layers": 32, "hidden_size": 4096,
              "intermediate_size": 14336, "num_attention_heads": 32},
    "experts": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "use_cache": False,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS_32)
def test_check_of_32_layers(kind: str, tmp_path: Path) -> None:
    """From the command line, in CPU seconds: `check` reads no weights, so none need be there."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS_32[kind]))
    script = (
        "import sys, time; from ringcompile.cli import cli\n"
        "try: cli.main(sys.argv[1:], standalone_mode=False)\n"
        "finally: print('seconds', time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "check", str(tmp_path), "--parallel", "ring=8"],
        capture_output=True, text=True, check=False, timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, seconds = done.stdout.splitlines()
    print(kind, seconds)
    assert lines[-1] == "supported"
    assert sum("ring: keys" in line for line in lines) == 32
    assert float(seconds.split()[1]) < 30


@pytest.mark.slow
def test_llama_3_70b(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    found = measured(str(tmp_path))
    assert found["weights"] == pytest.approx(141e9, rel=0.01)
    assert found["bytes"] < BYTES
    assert found["seconds"] < SECONDS
