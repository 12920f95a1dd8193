"""Full-size models for 16 ranks: captured and transformed without weights in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS, BYTES = 60, 2e9
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float16",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "use_cache": False,
}
# Seconds are CPU seconds of the one thread that works: wall time where nothing else runs.
# What one process does from the model's name to the checked programs of all ranks.
SCRIPT = """
import json, re, sys, time
from pathlib import Path
import ringcompile as rc
from ringcompile.capture.loaders import load_model

start = time.process_time()
loaded = load_model(sys.argv[1], weights=False)
program = rc.capture(loaded.module, loaded.args, loaded.kwargs)
captured = time.process_time() - start
parallel = rc.transform(program, "ring=16")
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
    "weights": sum(weight.num_bytes for weight in program.weights.values()),
}))
"""


def measured(model: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model], capture_output=True, text=True, check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(model, found)
    return found


def test_dense_4l() -> None:
    found = measured("dense-4l")
    assert found["weights"] == pytest.approx(6.44e9, rel=0.01)
    assert found["bytes"] < BYTES
    assert found["seconds"] < SECONDS


@pytest.mark.slow
def test_llama_3_70b(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    found = measured(str(tmp_path))
    assert found["weights"] == pytest.approx(141e9, rel=0.01)
    assert found["bytes"] < BYTES
    assert found["seconds"] < SECONDS
