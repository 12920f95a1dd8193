"""What `ringcompile generate` reads and writes: prompts, token ids, a checkpoint's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.generation import Sampling, stream
from ringcompile.parallel_program import ParallelProgram
from ringcompile.session import Session


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
        how: `max_new_tokens`, `chunk`, `temperature`, `top_k`, `top_p`, `seed`, `backend`.

    Raises:
        RingCompileError: files that cannot be read, no tokenizer, or as `generation.generate`.
    """
    parallel = asked.parallel
    known = _tokenizer(parallel, asked) if asked.text is not None or asked.tokenizer else None
    ids = _encoded(known, asked) if asked.input_ids is None else read_ids(asked.input_ids)
    ends = list(asked.eos) or ([] if known is None else _ends(known))
    sampling = Sampling(how["temperature"], how["top_k"], how["top_p"], how["seed"])
    with Session(parallel, how["backend"]) as session:
        columns = stream(
            session, ids, how["max_new_tokens"], sampling, eos_token_id=ends, chunk=how["chunk"]
        )
        decode = None if known is None or len(ids) > 1 else _decoder(known)
        yield Answer(columns, decode, session.reports)


def read_text(file: Path) -> str:
    """A prompt; raises RingCompileError where the file cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RingCompileError(f"cannot read a prompt from '{file}': {error}") from None


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
            hint="write numbers between blanks, or JSON of lists of the same length",
        ) from None
    ids = ids if ids.dim() == 2 else ids.reshape(1, -1)
    if not ids.numel():
        raise RingCompileError(f"'{file}' holds no token ids")
    return ids


def _tokenizer(parallel: ParallelProgram, asked: Asked) -> Any:
    folder = asked.tokenizer or parallel.options.get("model")
    hint = "name a checkpoint with --tokenizer, or pass token ids with --input-ids"
    if not isinstance(folder, str) or not Path(folder).is_dir():
        raise RingCompileError(f"there is no tokenizer: '{folder}' is no checkpoint", hint=hint)
    try:
        import transformers
    except ImportError:
        raise RingCompileError(
            "reading text needs transformers", hint="pip install 'ringcompile[hf]', or --input-ids"
        ) from None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RingCompileError(f"'{folder}' has no tokenizer: {first}", hint=hint) from None


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
        raise RingCompileError("the prompt is empty: it has no token")
    return torch.tensor([ids], dtype=torch.int64)


def _ends(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))
