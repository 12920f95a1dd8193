"""Weights are stored once, read back exactly, by slices, or by reference."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch._subclasses import FakeTensorMode

from ringcompile.artifact import load
from ringcompile.artifact.shards import write_weights
from ringcompile.artifact.weights import Weights, check_files
from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Weight
from tests.artifact.support import compile_model, save_model

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def stored(
    folder: Path, tensors: dict[str, Any], shard_bytes: int = 10**9, **references: Any
) -> Weights:
    """The tensors, written and opened again."""
    weights = [Weight(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
    places, records = write_weights(folder, weights, tensors.__getitem__, references, shard_bytes)
    check_files(folder, places, records)
    assert {path.name for path in folder.glob("*.safetensors")} >= records.keys()
    return Weights(folder, places)


def names_in(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(12).reshape(3, 4).to(dtype)
    read = stored(tmp_path, {"w": values})("w")
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 3, 4)], ids=str)
def test_every_shape_comes_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = {"w": torch.rand(shape), "other": torch.rand(shape)}
    read = stored(tmp_path, values)
    for name, value in values.items():
        assert read(name).shape == shape
        assert torch.equal(read(name), value)


def test_views_of_one_tensor_come_back(tmp_path: Path) -> None:
    base = torch.rand(4, 6)
    tensors = {
        "base": base,
        "same": base,
        "transposed": base.T,
        "slice": base[1:3],
        "flat": base.view(-1),
        "column": base[:, 2],
        "expanded": base[:1].expand(4, 6),
        "other": base.clone(),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    }
    read = stored(tmp_path, tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read(name), tensor), name
    assert names_in(tmp_path / "weights.safetensors") == tensors.keys() - {"same"}


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    parallel = compile_model("gpt-tiny")
    sizes = {w.name: w.num_bytes for w in parallel.program.weights.values()}
    embedding = parallel.source("tokens.weight") if "tokens.weight" in sizes else None
    folder = save_model(parallel, tmp_path / "out")
    found = load(folder)
    kept = names_in(folder / "weights.safetensors")
    distinct = {parallel.source(name).data_ptr() for name in sizes}
    assert len(kept) == len(distinct)
    assert (folder / "weights.safetensors").stat().st_size < sum(
        sizes[name] for name in kept
    ) + 20_000
    assert embedding is None or torch.equal(found.source("tokens.weight"), embedding)
    for name in sizes:
        assert torch.equal(found.source(name), parallel.source(name))


def test_aliases_name_the_tensor_they_share(tmp_path: Path) -> None:
    tied = torch.rand(8, 8)
    read = stored(tmp_path, {"head": tied, "body": torch.rand(8), "embedding": tied})
    assert read.places["embedding"].tensor == "head"
    assert torch.equal(read("embedding"), tied)


def test_a_source_that_makes_tensors_anew_has_no_twins(tmp_path: Path) -> None:
    """A dropped tensor's memory is given to the next one; that must not make them aliases."""
    weights = [Weight(f"w{i}", torch.float32, (64, 64)) for i in range(50)]
    places, _ = write_weights(
        tmp_path,
        weights,
        lambda name: torch.full((64, 64), float(name[1:])),
        {},
        shard_bytes=1,  # each is written and dropped at once
    )
    read = Weights(tmp_path, places)
    assert [read(f"w{i}")[0, 0].item() for i in range(50)] == list(range(50))


def test_large_weights_come_in_shards(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.rand(100) for i in range(7)}
    tensors["large"] = torch.rand(1000)
    tensors["twin"] = tensors["w0"]
    read = stored(tmp_path, tensors, shard_bytes=1000)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"weights-000{i}.safetensors" for i in range(1, 6)]
    assert [len(names_in(tmp_path / file)) for file in files] == [2, 2, 2, 1, 1]
    for name, tensor in tensors.items():
        assert torch.equal(read(name), tensor)


def test_a_share_is_read_by_slices(tmp_path: Path) -> None:
    tensor = torch.rand(6, 8)
    read = stored(tmp_path, {"w": tensor})
    for cut in [
        (slice(2, 4),),
        (slice(None), slice(4, 8)),
        (slice(0, 0), slice(1, 2)),
        (slice(3, None),),
    ]:
        assert torch.equal(read.share("w", cut), tensor[cut])
    for cut in [
        (slice(0, 7),),
        (slice(4, 2),),
        (slice(0, 6, 2),),
        (slice(-2, None),),
        (slice(None),) * 3,
    ]:
        with pytest.raises(RingCompileError, match="is not a piece of 'w'"):
            read.share("w", cut)
    with pytest.raises(RingCompileError, match="no weight 'v'"):
        read.share("v", ())


def test_a_source_can_be_sent_to_another_process(tmp_path: Path) -> None:
    read = stored(tmp_path, {"w": torch.ones(3)})
    assert torch.equal(pickle.loads(pickle.dumps(read))("w"), torch.ones(3))


def test_weights_without_data_are_noted(tmp_path: Path) -> None:
    with FakeTensorMode():
        fake = torch.nn.Parameter(torch.empty(3, 4))
    tensors = {"fake": fake, "meta": torch.empty(2, device="meta"), "real": torch.ones(2)}
    read = stored(tmp_path, tensors)
    assert {name: place.where for name, place in read.places.items()} == {
        "fake": "none",
        "meta": "none",
        "real": "file",
    }
    assert torch.equal(read("real"), torch.ones(2))
    with pytest.raises(RingCompileError, match="'fake' was not saved") as caught:
        read("fake")
    assert caught.value.hint == "transform the model again with its weights"


def test_an_artifact_without_weights_loads(tmp_path: Path) -> None:
    folder = save_model(compile_model("llama-tiny"), tmp_path / "out", source=None)
    assert not list(folder.glob("*.safetensors"))
    found = load(folder)
    found.check()
    assert {row["where"] for row in found.manifest["weights"].values()} == {"none"}


def test_a_checkpoint_can_stay_where_it_is(tmp_path: Path) -> None:
    parallel = compile_model("llama-tiny")
    name = next(iter(parallel.program.weights.values())).name
    checkpoint = tmp_path / "model.safetensors"
    save_file({"theirs": parallel.source(name).clone()}, checkpoint)
    folder = save_model(parallel, tmp_path / "out", references={name: (checkpoint, "theirs")})
    assert name not in names_in(folder / "weights.safetensors")
    source = load(folder).source
    assert torch.equal(source(name), parallel.source(name))
    assert torch.equal(source.share(name, (slice(0, 1),)), parallel.source(name)[:1])
    save_file({"theirs": torch.ones(2)}, checkpoint)
    with pytest.raises(RingCompileError, match="holds F32"):
        source(name)
    checkpoint.unlink()
    with pytest.raises(RingCompileError, match="is missing") as caught:
        source(name)
    assert "put it back" in (caught.value.hint or "")


def test_a_reference_must_be_there(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "c.safetensors")
    for path, tensor in [("none", "a"), ("c.safetensors", "b"), (".", "a")]:
        with pytest.raises(RingCompileError):
            stored(tmp_path, {"w": torch.ones(2)}, w=(tmp_path / path, tensor))
    with pytest.raises(RingCompileError, match=r"weight 'w' is float32 \[3\]"):
        stored(tmp_path, {"w": torch.ones(3)}, w=(tmp_path / "c.safetensors", "a"))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3), "it was captured as float32"),
        (torch.ones(2, dtype=torch.float16), "is float16"),
        (torch.ones(2).to_sparse(), "safetensors cannot hold"),
    ],
    ids=["shape", "dtype", "sparse"],
)
def test_data_that_does_not_fit_is_refused(
    tmp_path: Path, tensor: torch.Tensor, message: str
) -> None:
    with pytest.raises(RingCompileError, match=message):
        write_weights(tmp_path, [Weight("w", torch.float32, (2,))], lambda _: tensor, {})


def test_a_dtype_that_safetensors_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RingCompileError, match="complex128"):
        stored(tmp_path, {"w": torch.ones(2, dtype=torch.complex128)})
