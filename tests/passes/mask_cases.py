"""Masks as people write them, and what each is taken for; `test_masks` compiles them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.test_ops_across_the_sequence import TABLE

INF, MIN = float("-inf"), torch.finfo(torch.float32).min
PAIRS = "mask bool[1, 1, s/ring, s]"
BIAS = "bias f32[1, 1, s/ring, s]"

Mask = Callable[[torch.Tensor], torch.Tensor | None]


def index(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[1])


def query(x: torch.Tensor) -> torch.Tensor:
    return index(x)[:, None]


def key(x: torch.Tensor) -> torch.Tensor:
    return index(x)[None, :]


def apart(x: torch.Tensor) -> torch.Tensor:
    return query(x) - key(x)


def causal(x: torch.Tensor) -> torch.Tensor:
    return query(x) >= key(x)


def apart_in(positions: torch.Tensor) -> torch.Tensor:
    """Causal by the positions of each sequence, [B, S]."""
    return (positions[:, :, None] >= positions[:, None, :])[:, None]


def ones(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)


def full(x: torch.Tensor, value: float) -> torch.Tensor:
    return torch.full((x.shape[1], x.shape[1]), value)


def token(x: torch.Tensor) -> torch.Tensor:
    """A flag of every token that depends on the data, [B, S]."""
    return x[:, :, 0] > -1


def by_key(x: torch.Tensor) -> torch.Tensor:
    return token(x)[:, None, None, :]


def slopes() -> torch.Tensor:
    return torch.tensor([0.1, 0.2, 0.4]).view(1, 3, 1, 1)


BANDS: dict[str, tuple[Mask, str]] = {
    "no mask": (lambda x: None, "full"),
    "true everywhere": (ones, "full"),
    "true, of one element": (lambda x: torch.ones(1, 1, dtype=torch.bool), "full"),
    "query >= key": (causal, "causal"),
    "key <= query": (lambda x: key(x) <= query(x), "causal"),
    "key < query + 1": (lambda x: key(x) < query(x) + 1, "causal"),
    "query - key >= 0": (lambda x: apart(x) >= 0, "causal"),
    "query - key > -1": (lambda x: apart(x) > -1, "causal"),
    "key - query <= 0": (lambda x: key(x) - query(x) <= 0, "causal"),
    "query + -1 * key >= 0": (lambda x: torch.add(query(x), key(x), alpha=-1) >= 0, "causal"),
    "not key > query": (lambda x: ~(key(x) > query(x)), "causal"),
    "logical not": (lambda x: torch.logical_not(key(x) > query(x)), "causal"),
    "transposed and mirrored": (lambda x: (query(x) <= key(x)).T, "causal"),
    "of one more dim": (lambda x: causal(x)[None, None], "causal"),
    "expanded": (lambda x: causal(x)[None, None].expand(x.shape[0], 3, -1, -1), "causal"),
    "permuted": (lambda x: causal(x)[:, None, :, None].permute(1, 3, 0, 2), "causal"),
    "one of three equal positions": (
        lambda x: apart_in(index(x).expand(3, x.shape[0], -1)[0]), "causal"),
    "the second of two counts": (
        # Of [count, position] + 2 * count the rows are moved on by 2; their differences are not.
        lambda x: apart_in((index(x)[None, :] + 2 * torch.arange(2)[:, None])[1][None]), "causal"),
    "counts behind the second": (
        lambda x: (index(x)[:, None, None] + torch.arange(2)[:, None])[:, 1] >= key(x) - 3,
        "band -4..None"),
    "expanded positions": (
        lambda x: query(x).expand(-1, x.shape[1]) >= key(x).expand(x.shape[1], -1), "causal"),
    "looked up positions": (lambda x: index(x)[index(x)][:, None] >= key(x), "causal"),
    "positions from one": (lambda x: (index(x) + 1)[:, None] >= (index(x) + 1)[None, :], "causal"),
    "positions of int32": (
        lambda x: torch.arange(x.shape[1], dtype=torch.int32)[:, None] >= key(x), "causal"),
    "the slice of a larger one": (
        lambda x: torch.ones(64, 64, dtype=torch.bool).tril()[: x.shape[1], : x.shape[1]],
        "causal"),
    "the last slice of a larger one": (
        lambda x: torch.ones(64, 64, dtype=torch.bool).tril()[-x.shape[1] :, -x.shape[1] :],
        "causal"),
    "and true": (lambda x: causal(x) & ones(x), "causal"),
    "or false": (lambda x: causal(x) | ~ones(x), "causal"),
    "times true": (lambda x: causal(x) * ones(x), "causal"),
    "as numbers and back": (lambda x: (causal(x).long() * 2 - 1) > 0, "causal"),
    "one where it is seen": (lambda x: torch.where(causal(x), 1, 0) == 1, "causal"),
    # Nearly causal, and not.
    "query > key": (lambda x: query(x) > key(x), "band 1..None"),
    "query + 1 >= key": (lambda x: query(x) + 1 >= key(x), "band -1..None"),
    "query - 1 >= key": (lambda x: query(x) - 1 >= key(x), "band 1..None"),
    "one against zero": (lambda x: (index(x) + 1)[:, None] >= key(x), "band -1..None"),
    "a shifted slice": (
        lambda x: torch.ones(64, 64, dtype=torch.bool).tril()[1 : x.shape[1] + 1, : x.shape[1]],
        "band -1..None"),
    "transposed": (lambda x: causal(x).T, "band None..0"),
    "permuted the wrong way": (
        lambda x: causal(x)[:, None, :, None].permute(1, 3, 2, 0), "band None..0"),
    "from the end": (
        lambda x: torch.arange(x.shape[1] - 1, -1, -1)[:, None]
        >= torch.arange(x.shape[1] - 1, -1, -1)[None, :],
        "band None..0"),
    "negated": (lambda x: ~causal(x), "band None..-1"),
    # Triangles.
    "tril": (lambda x: ones(x).tril(), "causal"),
    "tril of numbers": (lambda x: full(x, 1.0).tril().bool(), "causal"),
    "tril == 1": (lambda x: full(x, 1.0).tril() == 1, "causal"),
    "tril of a batch": (
        lambda x: torch.ones(x.shape[0], 3, x.shape[1], x.shape[1]).bool().tril(), "causal"),
    "not triu(1)": (lambda x: ~ones(x).triu(1), "causal"),
    "tril(1)": (lambda x: ones(x).tril(1), "band -1..None"),
    "tril(-1)": (lambda x: ones(x).tril(-1), "band 1..None"),
    "tril(-3)": (lambda x: ones(x).tril(-3), "band 3..None"),
    "tril == 0": (lambda x: full(x, 1.0).tril() == 0, "band None..-1"),
    "triu": (lambda x: ones(x).triu(), "band None..0"),
    "triu(-2)": (lambda x: ones(x).triu(-2), "band None..2"),
    "not triu": (lambda x: ~ones(x).triu(), "band 1..None"),
    "not triu(-2)": (lambda x: ~ones(x).triu(-2), "band 3..None"),
    "tril transposed": (lambda x: ones(x).tril().T, "band None..0"),
    # Windows.
    "window": (lambda x: causal(x) & (apart(x) < 5), "causal window 5"),
    "window, inclusive": (lambda x: causal(x) & (apart(x) <= 5), "causal window 6"),
    "window, by key": (lambda x: causal(x) & (key(x) > query(x) - 5), "causal window 5"),
    "window of triangles": (lambda x: ones(x).tril() & ones(x).triu(-4), "causal window 5"),
    "triangle of a triangle": (lambda x: ones(x).tril().triu(-4), "causal window 5"),
    "triangle of a triangle of numbers": (
        lambda x: full(x, 1.0).triu(-4).tril().bool(), "causal window 5"),
    "triangle of a window": (lambda x: (causal(x) & (apart(x) < 9)).triu(-4), "causal window 5"),
    "itself only": (lambda x: causal(x) & (apart(x) < 1), "causal window 1"),
    "both sides": (lambda x: (apart(x) <= 3) & (apart(x) >= -3), "band -3..3"),
    "both sides, unequal": (lambda x: (apart(x) <= 6) & (key(x) - query(x) < 3), "band -2..6"),
    "distance": (lambda x: apart(x).abs() < 4, "band -3..3"),
    "distance, inclusive": (lambda x: apart(x).abs() <= 4, "band -4..4"),
    "distance of keys": (lambda x: (key(x) - query(x)).abs() < 4, "band -3..3"),
    "equal positions": (lambda x: query(x) == key(x), "causal window 1"),
    "equal to the next": (lambda x: query(x) == key(x) + 1, "band 1..1"),
    "where == 0": (lambda x: (query(x) < key(x)) == 0, "causal"),
    "where != 1": (lambda x: (query(x) < key(x)) != 1, "causal"),
    # Zero and -inf.
    "triu(1) of -inf": (lambda x: full(x, INF).triu(1), "causal"),
    "triu of -inf": (lambda x: full(x, INF).triu(), "band 1..None"),
    "triu(2) of -inf": (lambda x: full(x, INF).triu(2), "band -1..None"),
    "tril(-1) of -inf": (lambda x: full(x, INF).tril(-1), "band None..0"),
    "triu(1) of -inf, scaled": (lambda x: full(x, INF).triu(1) * 2.0, "causal"),
    "where": (lambda x: torch.where(causal(x), 0.0, INF), "causal"),
    "where, the other way": (lambda x: torch.where(causal(x), INF, 0.0), "band None..-1"),
    "masked fill": (lambda x: full(x, 0.0).masked_fill(~causal(x), INF), "causal"),
    "masked fill of tril == 0": (
        lambda x: full(x, 0.0).masked_fill(full(x, 1.0).tril() == 0, INF), "causal"),
    "masked fill, the other way": (
        lambda x: full(x, 0.0).masked_fill(causal(x), INF), "band None..-1"),
    "two triangles added": (
        lambda x: full(x, INF).triu(1)[None, None] + full(x, INF).tril(-4)[None, None],
        "causal window 4"),
    # Zero and the most negative number.
    "triu(1) of min": (lambda x: full(x, MIN).triu(1), "causal"),
    "where min": (lambda x: torch.where(causal(x), 0.0, MIN), "causal"),
    "masked fill of min": (lambda x: full(x, 0.0).masked_fill(key(x) > query(x), MIN), "causal"),
    "1 - mask times min": (lambda x: (1.0 - causal(x).to(torch.float32)) * MIN, "causal"),
    "triu(1) of min, scaled": (lambda x: full(x, MIN).triu(1) * 0.125, "causal"),
    "window of min": (
        lambda x: torch.where(causal(x) & (apart(x) < 5), 0.0, MIN), "causal window 5"),
}  # fmt: skip

# Parts that no band describes are kept, beside the band where there is one.
KEPT: dict[str, tuple[Mask, str]] = {
    # The batch is a size like the length, and no number that bands are made of.
    "the batch size away": (
        lambda x: query(x) >= key(x) + x.shape[0], "full + mask bool[1, 1, s/ring, s]"),
    "keys by data": (by_key, "full + key mask"),
    "keys by data, expanded": (
        lambda x: by_key(x).expand(-1, 3, x.shape[1], -1), "full + key mask"),
    "keys by data, additive": (
        lambda x: torch.zeros(x.shape[0], 1, 1, x.shape[1]).masked_fill(~by_key(x), INF),
        "full + key mask"),
    "keys by position": (lambda x: (index(x) % 4 != 1)[None, None, None, :], "full + key mask"),
    "bias by key": (lambda x: (index(x) * 0.1)[None, None, None, :], "full + key mask"),
    "causal and keys": (lambda x: by_key(x) & causal(x), "causal + key mask"),
    "keys and causal, expanded": (
        lambda x: by_key(x) & causal(x).expand(x.shape[0], 1, -1, -1), "causal + key mask"),
    "window and keys": (
        lambda x: by_key(x) & causal(x) & (apart(x) < 5), "causal window 5 + key mask"),
    "-inf and keys": (
        lambda x: torch.zeros(x.shape[0], 1, 1, x.shape[1]).masked_fill(~by_key(x), INF)
        + full(x, INF).triu(1),
        "causal + key mask"),
    "min and keys": (
        lambda x: torch.zeros(x.shape[0], 1, 1, x.shape[1]).masked_fill(~by_key(x), MIN)
        + full(x, MIN).triu(1),
        "full + bias f32[b, 1, s/ring, s]"),
    "learned bias by key": (
        lambda x: TABLE[: x.shape[1], 0][None, None, None, :] + full(x, INF).triu(1),
        "causal + key mask"),
    "queries by data": (
        lambda x: token(x)[:, None, :, None] | causal(x),
        "full + data-dependent mask bool[b, 1, s/ring, s]"),
    "queries by data and causal": (
        lambda x: token(x)[:, None, :, None] & causal(x),
        "causal + data-dependent mask bool[b, 1, s/ring, 1]"),
    "queries and keys by data": (
        lambda x: token(x)[:, None, :, None] & by_key(x),
        "full + key mask + data-dependent mask bool[b, 1, s/ring, 1]"),
    "bias by query": (
        lambda x: (index(x) * 0.1)[None, None, :, None], "full + bias f32[1, 1, s/ring, 1]"),
    "ALiBi": (lambda x: -apart(x) * slopes(), "full + relative bias f32[1, 3, s/ring, s]"),
    "ALiBi and causal": (
        lambda x: -apart(x) * slopes() + full(x, INF).triu(1),
        "causal + relative bias f32[1, 3, s/ring, s]"),
    "causal and ALiBi": (
        lambda x: full(x, INF).triu(1) + -apart(x) * slopes(),
        "causal + relative bias f32[1, 3, s/ring, s]"),
    "ALiBi where causal": (lambda x: torch.where(causal(x), -0.1 * apart(x), INF),
                           f"causal + relative {BIAS}"),
    "ALiBi filled where not causal": (
        lambda x: (-0.1 * apart(x)).masked_fill(~causal(x), INF), f"causal + relative {BIAS}"),
    "ALiBi, and keys by data": (
        lambda x: torch.where(by_key(x) & causal(x), -0.1 * apart(x), INF),
        f"causal + key mask + relative {BIAS}"),
    "ALiBi where causal, of min": (lambda x: torch.where(causal(x), -0.1 * apart(x), MIN),
                                   f"causal + relative {BIAS}"),
    "ALiBi filled with min, as Falcon does": (
        lambda x: (-0.1 * apart(x)).masked_fill(torch.where(causal(x), 0.0, MIN) < -1, MIN),
        f"causal + relative {BIAS}"),
    "a bias filled with min where a row may be of hidden keys alone": (
        lambda x: (-0.1 * apart(x)).masked_fill(query(x) <= key(x), MIN),
        f"full + relative {BIAS}"),
    "learned where causal": (lambda x: torch.where(causal(x), TABLE[: x.shape[1], 0], INF),
                             "causal + key mask"),
    "shifted by what is learned": (
        lambda x: query(x) >= key(x) + (TABLE[0, 0] > 0).long(), f"full + {PAIRS}"),
    "one of the heads otherwise": (
        lambda x: torch.stack([causal(x), ones(x), causal(x)])[None],
        "full + mask bool[1, 3, s/ring, s]"),
    "prefix": (lambda x: causal(x) | (key(x) < 4), "full + prefix"),
    "causal or a window": (
        lambda x: causal(x) | (apart(x).abs() < 5), f"band -4..None + {PAIRS}"),
    "flipped": (lambda x: causal(x).flip(0), f"full + {PAIRS}"),
    "rows in another order": (
        lambda x: torch.cat([causal(x)[1:], causal(x)[:1]]), f"full + {PAIRS}"),
    "twice as steep": (lambda x: 2 * query(x) >= key(x), f"full + {PAIRS}"),
    "every other row of a larger one": (
        lambda x: torch.ones(64, 64).bool().tril()[: 2 * x.shape[1] : 2, : x.shape[1]],
        f"full + {PAIRS}"),
    "the length away": (lambda x: query(x) + x.shape[1] >= key(x), f"full + {PAIRS}"),
    "nothing": (lambda x: ~ones(x), f"full + {PAIRS}"),
    "triu(1) of -1e9": (lambda x: full(x, -1e9).triu(1), f"full + {BIAS}"),
    "triu(1) of another dtype's min": (lambda x: full(x, -65504.0).triu(1), f"full + {BIAS}"),
    "1 - mask times -1e4": (
        lambda x: (1.0 - causal(x).to(torch.float32)) * -1e4, f"full + relative {BIAS}"),
    "one and -inf": (lambda x: torch.where(causal(x), 1.0, INF), f"full + relative {BIAS}"),
    # Of a row that sees nothing the most negative number makes an average of all values.
    "triu of min": (lambda x: full(x, MIN).triu(), f"full + {BIAS}"),
    "mask times min": (lambda x: causal(x).to(torch.float32) * MIN, f"full + relative {BIAS}"),
}  # fmt: skip

# Right either way: what is not proved to be a band stays a mask, and may be proved one day.
CAUTIOUS: dict[str, tuple[Mask, str]] = {
    "both scaled": (lambda x: 2 * query(x) >= 2 * key(x), "causal"),
    "positions in steps": (
        lambda x: torch.arange(0, 2 * x.shape[1], 2)[:, None]
        >= torch.arange(0, 2 * x.shape[1], 2)[None, :],
        "causal"),
    "positions as numbers": (lambda x: query(x).to(torch.float32) >= key(x), "causal"),
    "against half a step": (lambda x: apart(x) >= -0.5, "causal"),
    "the sign": (lambda x: apart(x).sign() >= 0, "causal"),
    "squares": (lambda x: apart(x) ** 2 < 9, "band -2..2"),
    "tril of triu": (lambda x: ones(x).triu(-4).tril(), "causal window 5"),
    "nested where": (
        lambda x: torch.where(causal(x), torch.where(apart(x) < 5, 0.0, INF), INF),
        "causal window 5"),
    "bias and causal, two dims": (lambda x: apart(x) * 0.1 + full(x, INF).triu(1),
                                  f"causal + relative {BIAS}"),
    "-inf twice": (lambda x: full(x, INF).triu(1) + full(x, INF).triu(1), "causal"),
}  # fmt: skip

# Easily taken for what they are not; beside each, what would have to be left out of account.
ALPHA = "_add and _rsub forget alpha where one operand is a choice of two numbers"
SINGLE = "a dim of size 1 keeps its coefficient, and is broadcast"
NARROW = "arithmetic in uint8 wraps around"
MISTAKEN: dict[str, tuple[Mask, str]] = {
    "sub with alpha": (lambda x: torch.sub(causal(x).float(), 1, alpha=0) >= 0, ALPHA),
    "add with alpha": (lambda x: torch.add(causal(x).float(), -1, alpha=0) > -0.5, ALPHA),
    "rsub with alpha": (lambda x: torch.rsub(causal(x).float(), 1, alpha=0) > 0, ALPHA),
    "bias added with alpha": (
        lambda x: torch.add(full(x, INF).triu(1)[None, None], -0.1 * apart(x), alpha=2),
        "_parts forgets alpha where it takes a sum apart"),
    "one row of a triangle": (
        lambda x: torch.ones(1, x.shape[1]).bool().tril().expand(x.shape[1], -1), SINGLE),
    "one row of a triangle and causal": (
        lambda x: torch.ones(1, x.shape[1]).bool().tril() & causal(x), SINGLE),
    "one column of a triangle": (
        lambda x: torch.ones(x.shape[1], 1).bool().tril(-3).expand(-1, x.shape[1]), SINGLE),
    "one position for all": (
        lambda x: torch.arange(1).expand(x.shape[1])[None, :] <= query(x), SINGLE),
    "positions before the first": (
        lambda x: index(x)[index(x) - 1][:, None] >= key(x),
        "_index takes negative indices for positions before the first, not for the last"),
    "positions of uint8": (
        lambda x: query(x).to(torch.uint8) - key(x).to(torch.uint8) >= 0, NARROW),
    "distance of uint8": (lambda x: apart(x).to(torch.uint8) < 5, NARROW),
    "flags of uint8": (lambda x: (causal(x).to(torch.uint8) - 1) >= 0, NARROW),
    "keys by data or causal": (
        lambda x: by_key(x) | causal(x),
        "partition slices the queries' dim before it gathers the keys', each rank its own rows"),
}  # fmt: skip

MASKS = {name: row[0] for table in (BANDS, KEPT, CAUTIOUS, MISTAKEN) for name, row in table.items()}
