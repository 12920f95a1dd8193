"""Text, token by token: what a session's logits say comes next, greedily or by chance."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import target_name
from ringcompile.ir.nodes import reached, results_of
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram
from ringcompile.session import Session


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from logits. By default it is the most probable one.

    Attributes:
        temperature: sample, with logits divided by this; 0 takes the most probable token.
        top_k: sample from this many of the most probable tokens.
        top_p: sample from the smallest set of tokens whose probabilities sum to this or more.
        seed: the seed of the random numbers.

    Raises:
        RingCompileError: a value out of range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature >= 0:
            raise RingCompileError(f"temperature {self.temperature}: it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise RingCompileError(f"top_k {self.top_k}: it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RingCompileError(f"top_p {self.top_p}: it must be above 0 and at most 1")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        unset = self.temperature is None and self.top_k is None and self.top_p is None
        return unset or self.temperature == 0

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The next token of each sequence, int64 [batch], from logits [batch, vocabulary]."""
        if self.greedy:
            return logits.argmax(-1)
        scores = logits.float() / (1.0 if self.temperature is None else self.temperature)
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        probabilities = scores.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            probabilities = probabilities.masked_fill(beyond.gather(-1, order.argsort(-1)), 0.0)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def generate(
    parallel: ParallelProgram,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    attention_mask: torch.Tensor | None = None,
    chunk: int | None = None,
    backend: str = "lockstep",
) -> torch.Tensor:
    """Generate tokens after prompts.

    The most probable token is taken, or one is sampled if `temperature`, `top_k` or `top_p` is
    given. Tokens are chosen in the calling process, so that all ranks continue with the same ones.

    Args:
        parallel: from `transform` with `cache`, or `load`.
        input_ids: int64 [batch, tokens], the prompts; shorter ones are padded on the left.
        max_new_tokens: the largest number of tokens to add.
        temperature: sample, with logits divided by this; 0 takes the most probable token.
        top_k: sample from this many of the most probable tokens.
        top_p: sample from the smallest set of tokens whose probabilities sum to this or more.
        seed: the seed of the random numbers.
        eos_token_id: a sequence ends with this token, or any of these.
        pad_token_id: what follows in a sequence that has ended; by default the first end token.
        attention_mask: [batch, tokens], 0 at padding; the model has to take it as an input. If it
            takes position_ids, they are counted from the mask; if not, padding takes places too,
            and a warning says so.
        chunk: process this many tokens of the prompts at a time; by default all.
        backend: as for `Session`.

    Returns:
        int64 [batch, tokens + new tokens]: the prompts and the new tokens.

    Raises:
        RingCompileError: as `Session` and its `extend`; prompts and new tokens that do not fit the
            cache; an input of the model that cannot be made from the arguments.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    with Session(parallel, backend) as session:
        columns = list(stream(
            session, input_ids, max_new_tokens, sampling, eos_token_id=eos_token_id,
            pad_token_id=pad_token_id, attention_mask=attention_mask, chunk=chunk,
        ))
    new = torch.stack(columns, 1) if columns else input_ids[:, :0]
    return torch.cat([input_ids, new], 1)


def stream(
    session: Session,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    attention_mask: torch.Tensor | None = None,
    chunk: int | None = None,
) -> Iterator[torch.Tensor]:
    """The new tokens of all sequences, int64 [batch], one column after another; see `generate`.

    Args:
        session: empty, or with what comes before the prompts.
        input_ids: see `generate`, and so are the rest.
        max_new_tokens: see `generate`.
        sampling: how tokens are chosen; greedily by default.
        eos_token_id: see `generate`.
        pad_token_id: see `generate`.
        attention_mask: see `generate`; not where the session has tokens already.
        chunk: see `generate`.

    Raises:
        RingCompileError: as `generate`.
    """
    sampling = sampling or Sampling()
    _check(session, input_ids, max_new_tokens, chunk)
    feed = _Feed(session.program, input_ids, attention_mask, session.length)
    ends = _tokens(eos_token_id)
    padding = pad_token_id if pad_token_id is not None else (ends[0] if ends else 0)
    random = torch.Generator().manual_seed(sampling.seed)
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool)
    new = input_ids
    for _ in range(max_new_tokens):
        for part in new.split(chunk or new.shape[1], 1):
            outputs = session.extend(feed.inputs(part), last=True)
        chosen = session.agreed(partial(_chosen, outputs, sampling, random))
        token = chosen.masked_fill(ended, padding)
        yield token
        ended |= torch.isin(token, torch.tensor(ends, dtype=token.dtype))
        if bool(ended.all()):
            return
        new = token.unsqueeze(1)


def _chosen(outputs: object, sampling: Sampling, random: torch.Generator) -> torch.Tensor:
    return sampling.choose(_logits(outputs)[:, -1], random)


def _check(session: Session, ids: torch.Tensor, max_new_tokens: int, chunk: int | None) -> None:
    if ids.dim() != 2 or ids.shape[1] < 1:
        raise RingCompileError(
            f"the prompt has shape {list(ids.shape)}", hint="pass [batch, tokens], one at least"
        )
    if max_new_tokens < 0:
        raise RingCompileError(f"max_new_tokens={max_new_tokens}: it must be 0 or more")
    if chunk is not None and chunk < 1:
        raise RingCompileError(f"chunk={chunk}: it must be at least 1")
    # The last new token is not taken in.
    needed = session.length + ids.shape[1] + max(max_new_tokens - 1, 0)
    if needed > session.capacity:
        raise RingCompileError(
            f"{session.length + ids.shape[1]} tokens and {max_new_tokens} new ones do not fit the "
            f"cache, which is for {session.capacity}",
            hint=f"compile with cache={needed} (--cache {needed}), or ask for fewer tokens",
        )


def _tokens(given: int | Sequence[int] | None) -> list[int]:
    if given is None:
        return []
    return [given] if isinstance(given, int) else list(given)


def _logits(outputs: object) -> torch.Tensor:
    """The logits [batch, tokens, vocabulary] among a model's outputs."""
    found = outputs.get("logits") if isinstance(outputs, dict) else outputs
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if isinstance(found, torch.Tensor) and found.dim() == 2:
        found = found.unsqueeze(1)  # of the last token alone
    if not isinstance(found, torch.Tensor) or found.dim() != 3:
        raise RingCompileError(
            "the model does not return logits of shape [batch, tokens, vocabulary]",
            hint="use a Session and choose tokens from what it returns",
        )
    return found


class _Feed:
    """What the program takes besides tokens, made for the new tokens of each call."""

    def __init__(
        self, program: Program, ids: torch.Tensor, mask: torch.Tensor | None, start: int
    ) -> None:
        self.names = [spec.name for spec in program.inputs]
        self.dtypes = {spec.name: spec.type.dtype for spec in program.inputs}
        self.tokens = "input_ids" if "input_ids" in self.names else self.names[0]
        unknown = [name for name in self.names if name != self.tokens and name not in _MADE]
        if unknown:
            raise RingCompileError(
                f"the model takes '{unknown[0]}', which cannot be derived from a prompt",
                hint="use a Session and pass it for the new tokens of every call",
            )
        self.mask = _padding(ids, mask, self.names, start)
        if "position_ids" not in self.names and not bool(self.mask.all()) and not _counts(program):
            warnings.warn(_BY_PLACE, stacklevel=4)
        self.counts = torch.full((ids.shape[0],), start, dtype=torch.int64)
        self.taken = 0

    def inputs(self, new: torch.Tensor) -> dict[str, torch.Tensor]:
        """All inputs, by name, for these new tokens [batch, tokens]."""
        mask = torch.ones_like(new)
        known = self.mask[:, self.taken : self.taken + new.shape[1]]
        mask[:, : known.shape[1]] = known
        positions = (self.counts[:, None] + mask.cumsum(1) - 1).clamp(min=0)
        self.counts, self.taken = self.counts + mask.sum(1), self.taken + new.shape[1]
        made = {self.tokens: new, "attention_mask": mask, "position_ids": positions}
        return {name: made[name].to(self.dtypes[name]) for name in self.names}


_MADE = ("attention_mask", "position_ids")
_BY_PLACE = (
    "the prompts are padded, and the model takes no position_ids: it numbers tokens by their "
    "place, padding included. With learned or other absolute positions the results are not those "
    "without padding, nor those of transformers' `generate`. Capture the model with position_ids "
    "as well; they are then counted from the mask"
)


def _padding(
    ids: torch.Tensor, mask: torch.Tensor | None, names: list[str], start: int
) -> torch.Tensor:
    """The mask of the prompts; raises RingCompileError where it cannot be honoured."""
    if mask is None:
        return torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise RingCompileError(
            f"the mask has shape {list(mask.shape)}, but the prompts have {list(ids.shape)}"
        )
    if bool((mask != 0).all()):
        return torch.ones_like(ids)
    if "attention_mask" not in names:
        raise RingCompileError(
            "the prompts are padded, and the program takes no attention_mask",
            hint="capture the model with an attention_mask of shape [batch, tokens]",
        )
    ordered = mask.long().cummax(1).values
    if start or not bool((ordered == mask.long()).all()) or not bool(mask[:, -1].all()):
        raise RingCompileError(
            "prompts have to be padded on the left, and the session has to be empty",
            hint="pad with padding_side='left'",
        )
    return mask


def _counts(program: Program) -> bool:
    """Whether a program sums up whole numbers that come from the mask it takes: its positions."""
    names = program.placeholders
    taken = [node for node in program.graph.nodes if names.get(node.name) == "attention_mask"]
    found = reached(taken, _whole_numbers)
    return any(target_name(node.target).startswith("ringcompile.running_sum") for node in found)


def _whole_numbers(node: fx.Node) -> list[fx.Node]:
    """What reads a node and gives whole numbers or truth values."""
    return [user for user in node.users if user.op == "call_function"
            and not any(result.dtype.is_floating_point for result in results_of(user))]
