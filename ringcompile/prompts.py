"""What `ringcompile generate` reads and writes: prompts, token ids, a checkpoint's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ringcompile.capture import gguf_files
from ringcompile.errors import RingCompileError
from ringcompile.generation import Sampling, stream
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram
from ringcompile.session import Session

_NUM_SHOWN = 5


@dataclass(frozen=True)
class Asked:
    """What is to be continued, and by which artifact.

    Attributes:
        parallel: the artifact, as it was loaded.
        text: the prompt, if it is text.
        input_ids: else the file of its token ids.
        chat: whether the text goes into the chat template.
        tokenizer: a checkpoint's folder; None for the one that was compiled.
        eos: the tokens that end the text; the tokenizer's where there are none.
    """

    parallel: ParallelProgram
    text: str | None
    input_ids: Path | None
    chat: bool = False
    tokenizer: str | None = None
    eos: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What follows.

    Attributes:
        columns: the new tokens [batch], one column after another.
        decode: the text of new tokens; None where there is no tokenizer.
        reports: whether this process is the one to print: rank 0 of a job, if it is in one.
    """

    columns: Iterator[torch.Tensor]
    decode: Callable[[list[int]], str] | None
    reports: bool


@contextmanager
def answer(asked: Asked, how: Mapping[str, Any]) -> Iterator[Answer]:
    """Open a session and begin to generate.

    Args:
        asked: the prompt.
        how: `max_new_tokens`, `chunk`, `temperature`, `top_k`, `top_p`, `seed`, `backend`,
            `cuda_graphs`.

    Raises:
        RingCompileError: files that cannot be read, no tokenizer, or as `generation.generate`.
    """
    parallel = asked.parallel
    parallel.with_cache()
    known = None
    if asked.text is not None or asked.tokenizer is not None:
        known = load_tokenizer(asked.tokenizer, parallel.options.get("model"), "--input-ids")
    ids = _encoded(known, asked) if asked.input_ids is None else read_ids(asked.input_ids)
    ends = list(asked.eos) or ([] if known is None else _ends(known))
    sampling = Sampling(how["temperature"], how["top_k"], how["top_p"], how["seed"])
    with Session(parallel, how["backend"], cuda_graphs=how["cuda_graphs"]) as session:
        columns = stream(
            session, ids, how["max_new_tokens"], sampling, eos_token_id=ends, chunk=how["chunk"]
        )
        decode = None if known is None or len(ids) > 1 else _decoder(known)
        yield Answer(columns, decode, session.reports)


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        RingCompileError: it cannot be read, or is no UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RingCompileError(f"cannot read the prompt from '{file}': {error}") from None


def read_ids(file: Path) -> torch.Tensor:
    """Token ids, int64 [batch, tokens]: numbers between blanks or commas, or JSON.

    Raises:
        RingCompileError: there are none, or rows of different lengths.
    """
    text = read_text(file).strip()
    try:
        rows = json.loads(text) if text.startswith("[") else [
            int(number) for number in text.replace(",", " ").split()
        ]
        ids = torch.tensor(rows, dtype=torch.int64)
    except (ValueError, TypeError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise RingCompileError(
            f"'{file}' does not hold token ids: {first}",
            hint="write numbers separated by spaces, or JSON: one list, or several of the same "
                 "length",
        ) from None
    ids = ids if ids.dim() == 2 else ids.reshape(1, -1)
    if not ids.numel():
        raise RingCompileError(f"'{file}' holds no token ids")
    return ids


def load_tokenizer(given: str | None, recorded: str | None, otherwise: str) -> Any:
    """The tokenizer of a checkpoint folder, or of a GGUF file.

    Args:
        given: the folder or file that the user names.
        recorded: what the artifact says it was made from.
        otherwise: the option that takes token ids in place of text.

    Raises:
        RingCompileError: there is no such folder, or it has no tokenizer that can be read.
    """
    folder = given or recorded
    is_gguf = folder is not None and gguf_files.is_file(folder)
    if folder is None or not (is_gguf or Path(folder).is_dir()):
        unnamed = "the artifact does not name a checkpoint"
        what = f"'{folder}' is no checkpoint folder" if folder else unnamed
        raise RingCompileError(
            f"{what}, so there is no tokenizer for the prompt",
            hint=f"name the folder with --tokenizer, or pass token ids with {otherwise}",
        )
    try:
        import transformers
    except ImportError:
        raise RingCompileError(
            "a prompt needs transformers, which is not installed",
            hint="pip install 'ringcompile[hf]'",
        ) from None
    try:
        if is_gguf:
            return transformers.AutoTokenizer.from_pretrained(**gguf_files.source(Path(folder)))
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RingCompileError(
            f"cannot read the tokenizer in '{folder}': {first}",
            hint="name a folder that has one with --tokenizer",
        ) from None


def _encoded(tokenizer: Any, asked: Asked) -> torch.Tensor:
    assert asked.text is not None
    if not asked.chat:
        ids = tokenizer(asked.text)["input_ids"]
    elif tokenizer.chat_template is None:
        raise RingCompileError("the tokenizer has no chat template", hint="leave --chat out")
    else:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked.text}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise RingCompileError("the prompt has no tokens")
    return torch.tensor([ids], dtype=torch.int64)


def _ends(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))


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
            f"the model also needs the input '{unknown[0]}', which cannot be derived from a prompt",
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
