"""Weights are stored once, read back exactly, by slices, or by reference."""

import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch._subclasses import FakeTensorMode

from ringcompile.artifact import load
from ringcompile.artifact.blocks import BLOCK_BYTES, blocks_of
from ringcompile.artifact.opened import OpenFolder
from ringcompile.artifact.shards import WrittenWeights, write_weights
from ringcompile.artifact.weights import WeightPlace, Weights, open_weight_files
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
    return opened(
        folder, write_weights(folder, weights, tensors.__getitem__, references, shard_bytes)
    )


def opened(folder: Path, written: WrittenWeights) -> Weights:
    files = open_weight_files(OpenFolder(folder), written.places, written.records)
    assert {path.name for path in folder.glob("*.safetensors")} >= written.records.keys()
    return Weights(written.places, files, written.references, written.digests)


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
    written = write_weights(
        tmp_path,
        weights,
        lambda name: torch.full((64, 64), float(name[1:])),
        {},
        shard_bytes=1,  # each is written and dropped at once
    )
    read = opened(tmp_path, written)
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
    saved = checkpoint.read_bytes()
    checkpoint.unlink()
    assert torch.equal(source(name), parallel.source(name)), "what was opened stays open"
    source = load(folder).source
    with pytest.raises(RingCompileError, match="is missing") as caught:
        source(name)
    assert "put it back" in (caught.value.hint or "")
    checkpoint.write_bytes(saved)
    assert torch.equal(source(name), parallel.source(name))


def fifo(path: Path) -> None:
    os.mkfifo(path)


OTHER_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (fifo, "is not a regular file"),
    "a link to /dev/zero": (lambda p: p.symlink_to("/dev/zero"), "is not a regular file"),
    "a folder": (Path.mkdir, "is not a regular file"),
    "a link to nothing": (lambda p: p.symlink_to("/nowhere"), "is missing"),
    "an empty file": (lambda p: p.write_bytes(b""), "has 0 bytes, it was saved with"),
    "another model": (
        lambda p: save_file({"theirs": torch.ones(7)}, p), "bytes, it was saved with"
    ),
    "tensors of other names": (
        lambda p: save_file({"others": torch.ones(8, 8)}, p), "is not the file that the artifact"
    ),
    "other values": (
        lambda p: save_file({"theirs": torch.ones(8, 8)}, p), "was changed after it was saved"
    ),
}


@pytest.mark.parametrize(("put", "message"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_reference_is_the_file_it_was(
    tmp_path: Path, put: Callable[[Path], object], message: str
) -> None:
    checkpoint = tmp_path / "model.safetensors"
    save_file({"theirs": torch.zeros(8, 8)}, checkpoint)
    weights = [Weight("w", torch.float32, (8, 8))]
    written = write_weights(tmp_path, weights, None, {"w": (checkpoint, "theirs")})
    assert opened(tmp_path, written)("w").sum() == 0
    checkpoint.unlink()
    put(checkpoint)
    with pytest.raises(RingCompileError, match=message):
        opened(tmp_path, written)("w")


@pytest.mark.parametrize("path", ["/dev/zero", "/etc/passwd", "/proc/self/mem", "c.safetensors"])
def test_a_reference_to_anything_is_not_opened(tmp_path: Path, path: str) -> None:
    with pytest.raises(RingCompileError, match=r"no \.safetensors file|no full path"):
        WeightPlace.from_json("w", {"dtype": "float32", "shape": [2], "where": "reference",
                              "file": path, "tensor": "w"})


def test_a_flipped_bit_anywhere_is_found_where_it_is_read(tmp_path: Path) -> None:
    rows, block = 64, BLOCK_BYTES // 4
    sizes = {"large": (rows, block // 16), "small": (3,), "none": (0,)}
    tensors = {name: torch.rand(size) for name, size in sizes.items()}
    read = stored(tmp_path, tensors)
    path = tmp_path / "weights.safetensors"
    pristine = path.read_bytes()
    assert sum(len(row) for row in read.digests["weights.safetensors"].values()) == 64 * (4 + 1)
    start = read.files["weights.safetensors"].entries["large"].start
    for place in (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 17, 4 * BLOCK_BYTES - 1):
        flipped = bytearray(pristine)
        flipped[start + place] ^= 4
        path.write_bytes(flipped)
        block_of_it = place // BLOCK_BYTES
        message = f"'large' in 'weights.safetensors' was changed after.*block {block_of_it} of"
        with pytest.raises(RingCompileError, match=message):
            read("large")
        for quarter in range(4):
            cut = (slice(quarter * 16, quarter * 16 + 16),)
            if quarter == block_of_it:
                with pytest.raises(RingCompileError, match=message):
                    read.share("large", cut)
            else:
                assert torch.equal(read.share("large", cut), tensors["large"][cut])
        assert torch.equal(read("small"), tensors["small"])


def test_a_file_cut_short_while_it_is_open_is_refused(tmp_path: Path) -> None:
    read = stored(tmp_path, {"w": torch.rand(2000)})
    os.truncate(tmp_path / "weights.safetensors", 4096)
    with pytest.raises(RingCompileError, match="became shorter after it was opened"):
        read("w")


@given(st.data())
def test_the_blocks_of_a_piece_are_those_of_its_bytes(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 6), max_size=3).map(tuple))
    ranges = [
        range(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape
    ][: data.draw(st.integers(0, len(shape)))]
    itemsize = data.draw(st.sampled_from([1, BLOCK_BYTES // 8, BLOCK_BYTES, 3 * BLOCK_BYTES // 2]))
    index = torch.arange(math.prod(shape)).reshape(shape)
    cut = tuple(slice(r.start, r.stop) for r in ranges)
    wanted = {
        byte // BLOCK_BYTES
        for i in index[cut].flatten().tolist()
        for byte in (i * itemsize, i * itemsize + itemsize // 2, (i + 1) * itemsize - 1)
    }
    assert set(blocks_of(shape, itemsize, ranges)) == wanted


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


def test_without_blake3_it_says_what_to_install(tmp_path: Path) -> None:
    """By a process that never had it."""
    folder = save_model(compile_model("gpt-tiny"), tmp_path / "out")
    script = (
        "import sys; sys.modules['blake3'] = None\n"
        "from ringcompile.__main__ import main\n"
        "sys.exit(main())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, "run", str(folder), "--backend", "lockstep", "--seq", "8"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=False,
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == (
        "error: the digests of weights need the package blake3, which is not installed here\n"
        "  hint: pip install blake3\n"
    )
