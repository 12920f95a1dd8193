"""A checkpoint whose module runs on all ranks of a torchrun job, called as the model itself.

    torchrun --nproc-per-node 2 examples/parallelize.py FOLDER "The capital of France is"
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

    example = torch.zeros(1, 24, dtype=torch.int64)  # other lengths run, too
    model = rc.parallelize(model, example, asked.parallel)

    logits = model(ids).logits  # whole, on every rank
    if torch.distributed.get_rank() == 0:
        print("next token:", repr(tokenizer.decode([int(logits[0, -1].argmax())])))


if __name__ == "__main__":
    main()
