"""A prompt as inputs, and what comes next as text: by the tokenizer of the model's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program

_NUM_SHOWN = 5


def read_prompt(file: Path) -> str:
    """The text of a file.

    Raises:
        RingCompileError: it cannot be read, or is no UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RingCompileError(f"cannot read the prompt from '{file}': {error}") from None


def load_tokenizer(given: str | None, recorded: str | None) -> Any:
    """The tokenizer of a checkpoint folder.

    Args:
        given: the folder that the user names.
        recorded: what the artifact says it was made from.

    Raises:
        RingCompileError: there is no such folder, or it has no tokenizer that can be read.
    """
    folder = given or recorded
    if folder is None or not Path(folder).is_dir():
        what = f"'{folder}' is no checkpoint folder" if folder else "the artifact names no model"
        raise RingCompileError(
            f"{what}, so that there is no tokenizer for a prompt",
            hint="name the folder with --tokenizer, or pass token ids with --inputs",
        )
    try:
        import transformers
    except ImportError:
        raise RingCompileError(
            "a prompt needs transformers, which is not installed",
            hint="pip install 'ringcompile[hf]'",
        ) from None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RingCompileError(
            f"cannot read the tokenizer in '{folder}': {first}",
            hint="name a folder that has one with --tokenizer",
        ) from None


def prompt_inputs(program: Program, tokenizer: Any, text: str) -> dict[str, torch.Tensor]:
    """Whole inputs of a program for a prompt, the same one for every sequence of its batch.

    Args:
        program: it takes token ids, and what can be said of tokens: a mask, positions, types.
        tokenizer: as transformers has it.
        text: the prompt.

    Raises:
        RingCompileError: the text has no tokens, or the program takes an input that a prompt does
            not give.
    """
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise RingCompileError("the prompt has no tokens")
    replicas = program.mesh.size("dp") if program.mesh is not None else 1
    batch = program.batch if isinstance(program.batch, int) else max(
        replicas, program.batch_range[0]
    )
    tokens = torch.tensor([ids] * batch)
    known = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens).contiguous(),
        "token_type_ids": torch.zeros_like(tokens),
    }
    names = [spec.name for spec in program.inputs]
    known[names[0]] = tokens  # whatever it is called, the first input holds the tokens
    if unknown := [name for name in names if name not in known]:
        raise RingCompileError(
            f"a prompt does not say what the input '{unknown[0]}' is",
            hint="pass all inputs with --inputs",
        )
    return {spec.name: known[spec.name].to(spec.type.dtype) for spec in program.inputs}


def next_tokens(outputs: Mapping[str, torch.Tensor], tokenizer: Any) -> str:
    """The most probable tokens behind the prompt, with their probabilities; empty without logits.

    Args:
        outputs: by name; logits are [batch, positions, vocabulary].
        tokenizer: as transformers has it.
    """
    scores = (t for t in outputs.values() if t.dim() == 3 and t.is_floating_point())
    logits = next((t for t in scores if t.shape[-1] >= len(tokenizer)), None)
    if logits is None:
        return ""
    chances = logits[0, -1].float().softmax(-1)
    best = chances.topk(min(_NUM_SHOWN, len(chances)))
    return ", ".join(
        f"{tokenizer.decode([int(token)])!r} ({chance:.1%})"
        for chance, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
