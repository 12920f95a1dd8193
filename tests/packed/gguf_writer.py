"""Small GGUF files with random weights, as llama.cpp writes them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

VOCABULARY, WIDTH, HIDDEN, HEADS, KV_HEADS, LAYERS = 64, 64, 96, 4, 2, 2
KV = WIDTH // HEADS * KV_HEADS
# Of each weight of a layer its size, and the type that it is stored in.
SIZES = {
    "attn_q": (WIDTH, WIDTH), "attn_k": (KV, WIDTH), "attn_v": (KV, WIDTH),
    "attn_output": (WIDTH, WIDTH), "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH),
    "ffn_down": (WIDTH, HIDDEN),
}
TYPES = {
    "attn_q": "Q8_0", "attn_k": "Q4_0", "attn_v": "Q4_1", "attn_output": "Q5_0",
    "ffn_gate": "Q5_1", "ffn_up": "Q4_0", "ffn_down": "Q8_0",
}


class Writer(gguf.GGUFWriter):
    """A file of an architecture whose layers are those of a Llama.

    Args:
        path: the file.
        arch: what GGUF calls it.
    """

    def __init__(self, path: Path, arch: str = "llama") -> None:
        super().__init__(path, arch)
        self.random = np.random.default_rng(0)
        self.add_block_count(LAYERS)
        self.add_context_length(128)
        self.add_embedding_length(WIDTH)
        self.add_feed_forward_length(HIDDEN)
        self.add_head_count(HEADS)
        self.add_head_count_kv(KV_HEADS)
        self.add_layer_norm_rms_eps(1e-5)
        self.add_rope_freq_base(10000.0)
        self.add_vocab_size(VOCABULARY)

    def numbers(self, name: str, size: tuple[int, ...], kind: str = "F32") -> None:
        """A random weight, around 1 where it is a norm's."""
        drawn = self.random.standard_normal(size, dtype=np.float32)
        data = 1 + drawn / 8 if "norm" in name else drawn / size[-1] ** 0.5
        wanted = gguf.GGMLQuantizationType[kind]
        if kind in ("Q4_K", "Q5_K", "Q6_K"):  # the package packs none
            data = self.blocks(size, wanted)
        else:
            data = gguf.quantize(data, wanted)
        self.add_tensor(name, data, raw_dtype=wanted)

    def blocks(self, size: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
        """Random bytes with small scales."""
        values, width = gguf.GGML_QUANT_SIZES[kind]
        blocks = self.random.integers(0, 256, (size[0], size[1] // values, width), dtype=np.uint8)
        places = (208,) if kind.name == "Q6_K" else (0, 2)
        for place in places:
            blocks[..., place : place + 2] = np.array([1e-3], np.float16).view(np.uint8)
        return blocks.reshape(size[0], -1)

    def layers(self, types: dict[str, str], biases: tuple[str, ...] = ()) -> None:
        """Norms, linear layers and biases of all layers."""
        for layer in range(LAYERS):
            for norm in ("attn_norm", "ffn_norm"):
                self.numbers(f"blk.{layer}.{norm}.weight", (WIDTH,))
            for name, size in SIZES.items():
                self.numbers(f"blk.{layer}.{name}.weight", size, types[name])
            for name in biases:
                self.numbers(f"blk.{layer}.{name}.bias", SIZES[name][:1])

    def ends(self, head: str | None = "Q8_0") -> None:
        """The embedding, the last norm, and a head of its own if it has one."""
        self.numbers("token_embd.weight", (VOCABULARY, WIDTH), "Q8_0")
        self.numbers("output_norm.weight", (WIDTH,))
        if head:
            self.numbers("output.weight", (VOCABULARY, WIDTH), head)

    def write(self) -> Path:
        """All of it."""
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        self.close()
        assert self.path is not None
        return Path(self.path)


def llama(path: Path, types: dict[str, str] = TYPES, head: str | None = "Q8_0") -> Path:
    """A Llama with grouped-query attention."""
    writer = Writer(path)
    writer.layers(types)
    writer.ends(head)
    return writer.write()
