"""What a rank reads of a saved model with packed weights: bytes by the formula, right numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

import ringcompile as rc
from ringcompile.runtime.runner import read_weights
from tests.packed.block import HEADS as QUERY_HEADS
from tests.packed.block import HIDDEN, KV_HEADS, WIDTH
from tests.packed.layouts import GROUP, LAYOUTS
from tests.packed.test_packed import ids, llama
from tests.support import compiled, difference

KV = WIDTH // QUERY_HEADS * KV_HEADS
FLOAT, WORD = 4, 4
# Of each linear layer the layout, and the bytes that one of two ranks has: codes, then what
# belongs to groups, then what every rank has.
LAYERS = {
    "q_proj": ("int8", (WIDTH * WIDTH + FLOAT * WIDTH) // 2),
    "k_proj": ("int4 in bytes", (KV * WIDTH // 2 + FLOAT * KV * WIDTH // GROUP) // 2),
    "v_proj": (
        "AWQ, order in the shifts",
        (WIDTH * KV // 2 + WIDTH // GROUP * (KV // 2 + FLOAT * KV)) // 2 + 2 * 8 * WORD,
    ),
    "o_proj": (
        "GPTQ, groups by view",
        (WIDTH * WIDTH // 2 + WIDTH // GROUP * (WIDTH // 2 + FLOAT * WIDTH)) // 2 + 8 * WORD,
    ),
    "gate_proj": ("fp8 in blocks", (HIDDEN * WIDTH + FLOAT * HIDDEN * WIDTH // GROUP**2) // 2),
    "up_proj": (
        "NF4", (HIDDEN * WIDTH // 2 + FLOAT * HIDDEN * WIDTH // GROUP) // 2 + 16 * FLOAT
    ),
    "down_proj": (
        "NF4", (HIDDEN * WIDTH // 2 + FLOAT * HIDDEN * WIDTH // GROUP) // 2 + 16 * FLOAT
    ),
}


def test_a_rank_reads_its_share_of_packed_weights(tmp_path: Path) -> None:
    model = llama(*(layout for layout, _ in LAYERS.values()))
    compiled(model, (ids(12),), "tp=2").save(tmp_path / "out")
    loaded = rc.load(tmp_path / "out")
    for rank in range(2):
        program = loaded.rank(rank)
        read: Counter[str] = Counter()
        for placeholder, tensor in read_weights(program, loaded.source).items():
            layer = program.weights[placeholder].name.split(".")[-2]
            read[layer] += tensor.numel() * tensor.dtype.itemsize
        assert {layer: read[layer] for layer in LAYERS} == {
            layer: count for layer, (_, count) in LAYERS.items()
        }
    assert difference(rc.run(loaded, (ids(13),)), model(ids(13))) < 1e-12


def test_numbers_of_a_saved_model_are_verified(tmp_path: Path) -> None:
    """In float64 and with larger scales; bytes stay the bytes they are."""
    torch.manual_seed(0)
    model = llama("GGUF Q8_0", "fp8 in blocks", "GPTQ")
    compiled(model, (ids(12),), "tp=2").save(tmp_path / "out")
    # A comparison that could not run would be left out, with a note.
    found = rc.verify(rc.load(tmp_path / "out"), inputs={"ids": ids(13)})
    assert found.passed
    assert len(found.numerics) == 2
    assert found.notes == ()


def test_every_layout_is_in_the_page_of_what_works() -> None:
    page = Path("docs/what-works.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in page for name in LAYOUTS)
