"""SmolLM2-135M on real English text: one device against ring attention on four processes.

Makes a Hugging Face checkpoint from the packaged weights, compiles it for `ring=4` through the same
calls as the command line, runs both on the same text, and prints a table. Then both answer a
question about the text, token by token, with the same words. `make demo` runs it.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import time
from pathlib import Path

import torch
from real_models import english_text, smollm2_checkpoint
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import ringcompile as rc
from ringcompile.generation import stream
from ringcompile.runtime.outputs import EVERYTHING
from ringcompile.runtime.tasks import Result

BUILD = Path(__file__).parents[1] / "build"
RANKS = 4
# The question is about the beginning of the text; a small model answers in a sentence or two.
ABOUT, NEW_TOKENS, CACHE = 400, 32, 1024
QUESTION = "What does the assert statement do? Answer in one sentence."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=3072)
    tokens = parser.parse_args().tokens
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console = Console()
    with console.status("making the checkpoint"):
        checkpoint = smollm2_checkpoint(BUILD)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        ids = english_text(tokens, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()

    with console.status("compiling for ring=4"):
        out, compile_seconds = compiled(model, ids[:, :24], checkpoint)
    with console.status(f"one device, {tokens} tokens"):
        start = time.perf_counter()
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
        single_seconds = time.perf_counter() - start
    prompt = question(tokenizer, ids)
    with console.status("one device answers a question"), torch.no_grad():
        told = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    answer = told[0, prompt.shape[1] :].tolist()
    with rc.Session(rc.load(out), "gloo") as session:
        with console.status(f"{RANKS} processes, {tokens} tokens"):
            done = session.result(ids, EVERYTHING)
        print(f"\n{QUESTION}\none device: {tokenizer.decode(answer, skip_special_tokens=True)}")
        same = answered(session, prompt, tokenizer) == answer
    console.print(compared(done, expected, ids, model.config, single_seconds))
    apart = (done.outputs["logits"] - expected).abs().max()
    difference = float(apart / expected.abs().max())
    print(f"largest difference of the logits: {difference:.1e} of the largest logit")
    print(f"sent by rank: {', '.join(f'{stats.bytes_sent:,}' for stats in done.stats)} bytes")
    print(f"captured, transformed and saved in {compile_seconds:.1f} s")
    print(f"programs: {out} (read {out / 'rank1.py'}, or: ringcompile dump {out} --rank 1)")
    if not difference <= 2e-5:  # NaN is no smaller
        raise SystemExit("the numbers differ")
    if not same:
        raise SystemExit("the words differ")


def compiled(model: torch.nn.Module, example: torch.Tensor, checkpoint: Path) -> tuple[Path, float]:
    """The folder of the saved programs, and the seconds that they took."""
    start = time.perf_counter()
    program = rc.capture(model, (example,), name="SmolLM2-135M")
    parallel = rc.transform(
        program, f"ring={RANKS}", cache=CACHE, record={"model": str(checkpoint)}
    )
    out = BUILD / "smollm2-ring4"
    parallel.save(out, overwrite=True)
    return out, time.perf_counter() - start


def compared(
    done: Result, expected: torch.Tensor, ids: torch.Tensor, config: object, seconds: float
) -> Table:
    """A step on one device, with its logits and seconds, beside the same step on all ranks."""
    tokens, logits = ids.shape[1], done.outputs["logits"]
    table = Table(title=f"SmolLM2-135M, {tokens} tokens of English, {os.cpu_count()} CPU cores")
    for column in ("", "one device", f"ring={RANKS}"):
        table.add_column(column, justify="left" if not column else "right")
    slowest = max(stats.seconds for stats in done.stats)
    sent = [stats.bytes_sent for stats in done.stats]
    peak = max(stats.peak_bytes for stats in done.stats)
    rows = [
        ("perplexity", f"{perplexity(expected, ids):.6f}", f"{perplexity(logits, ids):.6f}"),
        ("seconds for the step", f"{seconds:.1f}", f"{slowest:.1f}"),
        ("peak memory of a process", megabytes(own_peak()), megabytes(peak)),
        ("bytes sent, all ranks", "0", f"{sum(sent):,}"),
        ("  the least possible", "0", f"{least_bytes(config, tokens):,}"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def question(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> torch.Tensor:
    """The beginning of the text and a question about it, as the model was taught: [1, tokens]."""
    text = f"{tokenizer.decode(ids[0, :ABOUT])}\n\n{QUESTION}"
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return torch.tensor([tokenizer(asked, add_special_tokens=False)["input_ids"]])


def answered(
    session: rc.Session, prompt: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The tokens of the answer, printed as they come."""
    made: list[int] = []
    print(f"ring={RANKS}:     ", end="", flush=True)
    started = time.perf_counter()
    for column in stream(session, prompt, NEW_TOKENS, eos_token_id=tokenizer.eos_token_id):
        made.append(int(column[0]))
        print(tokenizer.decode(made[-1:], skip_special_tokens=True), end="", flush=True)
    seconds = time.perf_counter() - started
    print(f"\n{len(made)} tokens behind {prompt.shape[1]} in {seconds:.1f} s\n")
    return made


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood of each next token."""
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    return math.exp(float(loss))


def least_bytes(config: object, tokens: int) -> int:
    """What all ranks together must receive: each chunk of keys and values that a rank sees, once.

    Zigzag order: of two chunks a rank, the early one is seen by all other ranks, the late one by
    the ranks before; rank r sees P - 1 early and P - 1 - r late chunks of others.
    """
    layers, heads, width = (
        getattr(config, name)
        for name in ("num_hidden_layers", "num_key_value_heads", "head_dim")
    )
    chunk = math.ceil(tokens / (2 * RANKS)) * heads * 2 * width * 4
    return layers * chunk * sum((RANKS - 1) + (RANKS - 1 - rank) for rank in range(RANKS))


def own_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


if __name__ == "__main__":
    main()
