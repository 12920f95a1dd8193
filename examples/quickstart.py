"""From a checkpoint folder to the next token and to perplexity, on two ranks in this process.

    python examples/quickstart.py FOLDER "The capital of France is"
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ringcompile as rc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="a Hugging Face checkpoint with a tokenizer")
    parser.add_argument("text")
    parser.add_argument("--parallel", default="ring=2")
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.folder)
    model = AutoModelForCausalLM.from_pretrained(asked.folder).eval()
    ids = tokenizer(asked.text, return_tensors="pt").input_ids

    # Lengths stay open: what is captured with these tokens runs with any number of them.
    program = rc.capture(model, (torch.zeros(1, 24, dtype=torch.int64),))
    parallel = rc.transform(program, asked.parallel)

    last = rc.run(parallel, (ids,), last=1)["logits"]  # only this row goes through the head
    print("next token:", repr(tokenizer.decode([int(last[0, -1].argmax())])))

    logits = rc.run(parallel, (ids,))["logits"]
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    print(f"perplexity of the text: {float(loss.exp()):.2f}")


if __name__ == "__main__":
    main()
