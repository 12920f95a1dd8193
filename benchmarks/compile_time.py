"""How long compiling takes, in CPU seconds of one thread, beside torch.export's own call.

    python -m benchmarks.compile_time [--layers 80] [--spec ring=16]... [--model dense-4l] [--save]

Without `--model` it is a Llama-3-70B configuration with so many layers. No weights are needed. The
seconds are those of the process: other work on the machine makes them longer by what processes take
from each other's caches, and no more.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import RESULTS, environment
from ringcompile.capture.export import capture
from ringcompile.capture.loaders import load_model
from ringcompile.compiler import transform
from ringcompile.garbage import few_collections
from ringcompile.ir.program import Program

SPECS = ("ring=16", "tp=8,pp=2", "pp=2,ring=4,tp=2")
LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16",
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
    "use_cache": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds[what] = seconds.get(what, 0.0) + time.process_time() - start


def captured(model: str) -> tuple[Program, dict[str, float]]:
    """A captured model, and the seconds of loading, of capture and of torch.export in it."""
    seconds: dict[str, float] = {}
    module: Any = importlib.import_module("ringcompile.capture.export")
    original = module.export

    def export(*args: Any, **kwargs: Any) -> Any:
        with _timed(seconds, "torch.export"):
            return original(*args, **kwargs)

    with _timed(seconds, "load"):
        loaded = load_model(model, weights=False)
    module.export = export
    try:
        with _timed(seconds, "capture"):
            program = capture(loaded.module, loaded.args, loaded.kwargs)
    finally:
        module.export = original
    return program, seconds


def compiled(program: Program, spec: str, folder: Path) -> dict[str, float]:
    """The seconds of each step from a captured program to a saved artifact, and its megabytes."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "program for all ranks"):
        parallel = transform(program, spec)
    with _timed(seconds, "all ranks"):
        parallel.ranks()
    with _timed(seconds, "verify"):
        parallel.verify()
    with _timed(seconds, "save"):
        parallel.save(folder)
    seconds["megabytes"] = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    return seconds


def measured(layers: int, specs: tuple[str, ...], model: str | None) -> dict[str, Any]:
    """All that is measured, by what it is of."""
    with few_collections(), tempfile.TemporaryDirectory() as folder:
        config = {**LLAMA_70B, "num_hidden_layers": layers}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        program, seconds = captured(model or folder)
        return {
            "model": model or f"Llama-3-70B, {layers} layers", "capture": seconds,
            "specs": {
                spec: compiled(program, spec, Path(folder) / f"artifact{i}")
                for i, spec in enumerate(specs)
            },
        }


@click.command()
@click.option("--layers", default=80, show_default=True, help="of the Llama configuration")
@click.option("--spec", "specs", multiple=True, default=SPECS, show_default=True)
@click.option("--model", help="another model, by its name in the zoo or its folder")
@click.option("--save", is_flag=True, help="keep the numbers beside the other results")
def main(layers: int, specs: tuple[str, ...], model: str | None, save: bool) -> None:
    """Print CPU seconds of capture and of each step of compiling."""
    found = {"environment": environment(), **measured(layers, specs, model)}
    for name, seconds in (("capture", found["capture"]), *found["specs"].items()):
        click.echo(f"{name:<20}" + "  ".join(f"{k} {v:.2f}" for k, v in seconds.items()))
    if save:
        (RESULTS / "compile-time.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
