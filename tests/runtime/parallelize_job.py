"""One rank of the job of test_parallelize.py: every case, its result or its error, as JSON."""

import gc
import json
import sys
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import ringcompile as rc
from tests.support import difference

IDS = torch.arange(2 * 13).reshape(2, 13) % 64
LONGER = torch.arange(27)[None] % 64


@dataclass
class Output:
    hidden: torch.Tensor
    logits: torch.Tensor


class Tiny(nn.Module):
    """One attention; `scale` is a flag."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.project = nn.Embedding(64, 32), nn.Linear(32, 96)
        self.head = nn.Linear(32, 64)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0
    ) -> Output:
        batch, length = ids.shape
        mixed = self.project(self.embedding(ids)).view(batch, length, 3, 4, 8)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        seen = None if mask is None else mask[:, None, None, :] > 0
        attended = nn.functional.scaled_dot_product_attention(
            query * scale, key, value, seen, is_causal=seen is None
        )
        hidden = attended.transpose(1, 2).reshape(batch, length, 32)
        return Output(hidden, self.head(hidden))


def tiny(seed: int = 0) -> nn.Module:
    return Tiny(seed).eval()


def near(found: Any, expected: Any) -> str:
    found_by_name, by_name = (
        vars(value) if isinstance(value, Output) else value for value in (found, expected)
    )
    return type(found).__name__ if difference(found_by_name, by_name) < 2e-5 else "differs"


def whole() -> Any:
    model = tiny()
    expected = [model(IDS), model(LONGER)]
    compiled = rc.parallelize(model, torch.zeros(1, 24, dtype=torch.int64), "ring=2")
    del model
    return [near(compiled(IDS), expected[0]), near(compiled(ids=LONGER), expected[1]),
            str(compiled)]


def with_a_mask() -> Any:
    model, mask = tiny(), torch.ones_like(IDS)
    split = weakref.ref(model.project.weight)
    compiled = rc.parallelize(model, {"mask": mask, "ids": IDS, "scale": 0.5}, "tp=2")
    mask[0, :3] = 0
    expected = model(IDS, mask, scale=0.5)
    del model
    gc.collect()
    return [near(compiled(IDS, mask, 0.5), expected), split() is None]


def local() -> Any:
    model = tiny()
    share = rc.parallelize(model, IDS, "ring=2", outputs="local")(IDS)
    rows = share.positions["logits"]
    real = rows < IDS.shape[1]
    wanted = model(IDS).logits[:, rows[real]]
    return [share.rank, near(share.outputs["logits"][:, real], wanted), len(rows)]


def devices() -> Any:
    model, mesh = tiny(), init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ring"))
    compiled = rc.parallelize(model, (IDS,), mesh)
    # Its own groups are used, no others are made.
    same = compiled._peer.exchange.groups["ring"] is mesh.get_group("ring")
    return [near(compiled(IDS), model(IDS)), same]


def by_run() -> Any:
    model = tiny()
    parallel = rc.transform(rc.capture(model, (IDS,)), "ring=2")
    found = rc.run(parallel, (IDS,), backend="gloo")
    (share,) = rc.run(parallel, (IDS,), backend="gloo", outputs="local")
    return [found and near(found, model(IDS)), share.rank]


def by_session() -> Any:
    parallel = rc.transform(rc.capture(tiny(), (IDS,)), "tp=2", cache=32)
    with rc.Session(parallel, "gloo") as session:
        found = session.extend(IDS)
    return found is not None and near(found, tiny()(IDS))


def other_weights() -> Any:
    return rc.parallelize(tiny(seed=dist.get_rank()), IDS, "ring=2")


@cache
def compiled_tiny() -> nn.Module:
    return rc.parallelize(tiny(), IDS, "ring=2")


def other_inputs() -> Any:
    return compiled_tiny()(IDS + dist.get_rank())


def other_flag() -> Any:
    return compiled_tiny()(IDS, scale=2.0)


def a_tensor_for_none() -> Any:
    return compiled_tiny()(IDS, torch.ones_like(IDS))


def unknown_argument() -> Any:
    return compiled_tiny()(IDS, padding=IDS)


def no_names() -> Any:
    return rc.parallelize(tiny(), IDS, init_device_mesh("cpu", (2,)))


def no_axes() -> Any:
    return rc.parallelize(tiny(), IDS, init_device_mesh("cpu", (2,), mesh_dim_names=("seq",)))


def part_of_a_mesh() -> Any:
    whole = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "tp"))
    return rc.parallelize(tiny(), IDS, whole["ring"])


def too_many_ranks() -> Any:
    return rc.parallelize(tiny(), IDS, "ring=4")


def a_cache() -> Any:
    return rc.parallelize(tiny(), IDS, "ring=2", cache=32)


def no_example() -> Any:
    return rc.parallelize(tiny(), 13, "ring=2")


def no_such_form() -> Any:
    return rc.parallelize(tiny(), IDS, "ring=2", outputs="first")


CASES = [
    whole, with_a_mask, local, devices, by_run, by_session, other_weights, other_inputs, other_flag,
    a_tensor_for_none, unknown_argument, no_names, no_axes, part_of_a_mesh, too_many_ranks, a_cache,
    no_example, no_such_form,
]

if __name__ == "__main__":
    results = {}
    for case in CASES:
        try:
            with torch.no_grad():
                results[case.__name__] = case()
        except rc.RingCompileError as error:
            results[case.__name__] = str(error)
    Path(sys.argv[1], f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
