"""The end of every command's `--help`: examples, mesh axes, and environment variables."""

from __future__ import annotations

from ringcompile.axes import AXES

# By command; each is parsed by the command itself in the tests.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "bench": ("bench out --seq 4096", "bench out --steps 20 --threads 1"),
    "calibrate": ("calibrate -o mine.json", "calibrate --quick -o mine.json"),
    "check": ("check ./my-llama --parallel ring=8", "check mine:small --parallel ring=4,tp=2"),
    "dump": ("dump out --rank 1", "dump out --after place", "dump out --rank 0 --format json"),
    "generate": ("generate out --prompt 'Once upon a time'", "generate out --input-ids ids.txt"),
    "info": ("info out",),
    "models": ("models",),
    "plan": ("plan dense-4l --gpus 16 --cluster h100x16 --seq 131072",),
    "run": ("run out --prompt 'Once upon a time'",
            "run out --inputs in.safetensors --outputs out.safetensors",
            "run out --seq 1024 --trace measured.json"),
    "simulate": ("simulate out --cluster h100x16 --seq 16384",
                 "simulate out --cluster h100x16 --trace trace.json --plot timeline.png"),
    "transform": ("transform ./my-llama -o out --parallel ring=4",
                  "transform llama-tiny -o out --parallel ring=2,tp=2 --seq 4096",
                  "transform ./my-llama -o out --parallel ring=4 --cache 8192"),
    "verify": ("verify out", "verify out --numerics"),
    "view": ("view out --open", "view out --trace measured.json"),
}
_UNDER_TORCHRUN = "torchrun --nproc-per-node 8 -m ringcompile {}"


def epilog(command: str, options: tuple[str, ...]) -> str:
    """Examples, the axes of a parallel spec, and how environment variables set options.

    Args:
        command: its name.
        options: the names of its parameters that are options.
    """
    lines = [f"ringcompile {words}" for words in EXAMPLES[command]]
    if command in ("run", "generate"):
        lines.append(_UNDER_TORCHRUN.format(EXAMPLES[command][0]))
    parts = ["\b\nExamples:", *(f"  {line}" for line in lines)]
    text = "\n".join(parts)
    if "parallel" in options:
        rows = "\n".join(f"  {axis.name:8} {axis.splits}" for axis in AXES.values())
        text = f"{text}\n\n\b\nAxes of SPEC:\n{rows}"
    if not options:
        return text
    others = [name for name in options if name != "as_json"]  # whose flag is --json
    one = "seq" if "seq" in options else min(others, default="as_json")
    variable = f"RINGCOMPILE_{command}_{one}".upper()
    return f"{text}\n\n\b\nEvery option can be set by an environment variable, such as\n{variable}."
