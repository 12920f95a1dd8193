"""Linear layers whose weights are packed, written in plain PyTorch as libraries lay them out.

Each packs a random weight, and unpacks it in its forward pass: shifts, masks, views, a look-up in
a table, a multiplication with scales that are repeated over groups, and then a matmul. Codes are
random: every pattern of bits stands for some weight, so nothing has to be quantised first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

GROUP = 8


class Packed(nn.Module):
    """A linear layer without bias from `in_features` to `out_features`.

    Attributes:
        group: values that have a scale in common.
    """

    def __init__(self, in_features: int, out_features: int, group: int = GROUP) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = in_features, out_features, group
        self.build()

    def build(self) -> None:
        """Register the buffers."""
        raise NotImplementedError

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, [out, in]."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.unpack(x.dtype))

    def codes(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        """A buffer of random bits."""
        bits = torch.iinfo(dtype)
        self.register_buffer(name, torch.randint(bits.min, bits.max + 1, shape, dtype=dtype))

    def numbers(self, name: str, *shape: int) -> None:
        """A buffer of random scales, small enough for results of about one."""
        scales = (0.5 + torch.rand(shape)) / self.in_features**0.5 / 8
        self.register_buffer(name, scales)


class Int8(Packed):
    """A byte for each weight, a scale for each output."""

    def build(self) -> None:
        self.codes("weight", torch.int8, self.out_features, self.in_features)
        self.numbers("scale", self.out_features, 1)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype) * self.scale.to(dtype) / 16


class Int8Behind(Int8):
    """As `Int8`, with the scales multiplied behind the matmul."""

    def build(self) -> None:
        self.codes("weight", torch.int8, self.out_features, self.in_features)
        self.numbers("scale", self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype) / 16


class Int8ZeroPoint(Int8):
    """Unsigned bytes around a zero point for each output."""

    def build(self) -> None:
        self.codes("weight", torch.uint8, self.out_features, self.in_features)
        self.codes("zero", torch.uint8, self.out_features)
        self.numbers("scale", self.out_features)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        centred = self.weight.to(torch.int16) - self.zero.to(torch.int16)[:, None]
        return centred.to(dtype) * self.scale.to(dtype).unsqueeze(1) / 16


class Int4Bytes(Packed):
    """Two neighbours along the inputs in a byte, low nibble first; groups along the inputs."""

    def build(self) -> None:
        self.codes("packed", torch.uint8, self.out_features, self.in_features // 2)
        self.numbers("scales", self.out_features, self.in_features // self.group)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        nibbles = torch.stack([self.packed & 0xF, self.packed >> 4], dim=-1)
        codes = nibbles.view(self.out_features, -1, self.group).to(dtype) - 8
        return (codes * self.scales.to(dtype)[..., None]).view(self.out_features, -1)


class Int4Halves(Int4Bytes):
    """Low nibbles are the first half of a group's values, high nibbles the second half."""

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        blocks = self.packed.view(self.out_features, -1, self.group // 2)
        codes = torch.cat([blocks & 0xF, blocks >> 4], dim=-1).to(dtype) - 8
        return (codes * self.scales.to(dtype).unsqueeze(-1)).flatten(1)


class Int4Planes(Int4Bytes):
    """Low nibbles are the first half of the inputs, high nibbles the second half."""

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        codes = torch.cat([self.packed & 0xF, self.packed >> 4], dim=1).to(dtype) - 8
        scales = self.scales.to(dtype).repeat_interleave(self.group, dim=1)
        return codes * scales


class Gptq(Packed):
    """Eight neighbours along the inputs in an int32, packed zero points, groups by an index."""

    def build(self) -> None:
        words, groups = self.in_features // 8, self.in_features // self.group
        self.codes("qweight", torch.int32, words, self.out_features)
        self.codes("qzeros", torch.int32, groups, self.out_features // 8)
        self.numbers("scales", groups, self.out_features)
        self.register_buffer("g_idx", torch.arange(self.in_features) // self.group)
        self.register_buffer("wf", torch.arange(0, 32, 4, dtype=torch.int32), persistent=False)

    def nibbles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight's codes [in, out], and the zero points' [groups, out]."""
        zeros = torch.bitwise_right_shift(
            self.qzeros.unsqueeze(2).expand(-1, -1, 8), self.wf.unsqueeze(0)
        ).to(torch.int16)
        zeros = torch.bitwise_and(zeros, 15).reshape(self.scales.shape) + 1
        weight = torch.bitwise_right_shift(
            self.qweight.unsqueeze(1).expand(-1, 8, -1), self.wf.unsqueeze(-1)
        ).to(torch.int16)
        return torch.bitwise_and(weight, 15).reshape(self.in_features, -1), zeros

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        weight, zeros = self.nibbles()
        g_idx = self.g_idx.long()
        return self.scales.to(dtype)[g_idx] * (weight - zeros[g_idx])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.unpack(x.dtype)
        flat = torch.matmul(x.reshape(-1, x.shape[-1]), weight)
        return flat.reshape(*x.shape[:-1], self.out_features)


class GptqShuffled(Gptq):
    """Groups in any order along the inputs, as `desc_act` leaves them."""

    def build(self) -> None:
        super().build()
        self.g_idx = self.g_idx[torch.randperm(self.in_features)]


class GptqGroups(Gptq):
    """Groups by a view instead of an index."""

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        weight, zeros = self.nibbles()
        grouped = weight.reshape(-1, self.group, self.out_features)
        scales = self.scales.to(dtype).unsqueeze(1)
        return (scales * (grouped - zeros.unsqueeze(1))).reshape(-1, self.out_features)


_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


class Awq(Packed):
    """Eight outputs in an int32, interleaved; zero points alike; groups along the inputs."""

    def build(self) -> None:
        groups = self.in_features // self.group
        self.codes("qweight", torch.int32, self.in_features, self.out_features // 8)
        self.codes("qzeros", torch.int32, groups, self.out_features // 8)
        self.numbers("scales", groups, self.out_features)

    def nibbles(self, words: torch.Tensor) -> torch.Tensor:
        """[rows, out / 8] -> [rows, out]."""
        shifts = torch.arange(0, 32, 4, device=words.device)
        codes = torch.bitwise_right_shift(words[:, :, None], shifts[None, None, :]).to(torch.int8)
        codes = codes.view(codes.shape[0], -1)
        order = torch.arange(codes.shape[1], device=words.device).view(-1, 8)
        return torch.bitwise_and(codes[:, order[:, _AWQ_ORDER].view(-1)], 15)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        scales = self.scales.to(dtype).repeat_interleave(self.group, dim=0)
        zeros = self.nibbles(self.qzeros).repeat_interleave(self.group, dim=0)
        return (self.nibbles(self.qweight) - zeros) * scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self.unpack(x.dtype))


class AwqShifts(Awq):
    """The same words, with the order in the shifts."""

    def nibbles(self, words: torch.Tensor) -> torch.Tensor:
        shifts = torch.tensor(_AWQ_ORDER, dtype=torch.int32) * 4
        return ((words.unsqueeze(-1) >> shifts) & 0xF).flatten(-2)


class Fp8Blocks(Packed):
    """float8_e4m3fn, with a scale for each square of `group` x `group` weights."""

    def build(self) -> None:
        size = (self.out_features, self.in_features)
        self.register_buffer("weight", torch.randn(size).to(torch.float8_e4m3fn))
        self.numbers("weight_scale_inv", *(-(-n // self.group) for n in size))

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = self.weight_scale_inv.shape
        blocks = self.weight.to(dtype).reshape(rows, self.group, columns, self.group)
        return (blocks * self.weight_scale_inv.to(dtype)[:, None, :, None]).reshape(
            self.out_features, self.in_features) * 8


class Fp8Repeated(Fp8Blocks):
    """The same with scales repeated over blocks, and cut where the last block is not full."""

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        scales = self.weight_scale_inv.to(dtype)
        scales = scales.repeat_interleave(self.group, 0).repeat_interleave(self.group, 1)
        return self.weight.to(dtype) * scales[: self.out_features, : self.in_features] * 8


class Nf4(Packed):
    """A flat list of bytes with two look-ups each, high nibble first; an absmax for each block."""

    def build(self) -> None:
        count = self.in_features * self.out_features
        self.codes("weight", torch.uint8, count // 2, 1)
        self.numbers("absmax", count // self.group)
        self.register_buffer("code", torch.linspace(-1, 1, 16) ** 3)

    def scales(self) -> torch.Tensor:
        """One number a block."""
        return self.absmax

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        packed = self.weight.reshape(-1)
        index = torch.stack([packed >> 4, packed & 0xF], dim=-1).reshape(-1)
        values = self.code.to(dtype)[index.long()].reshape(-1, self.group)
        values = values * self.scales().to(dtype)[:, None] * 8
        return values.reshape(self.out_features, self.in_features)


class Nf4Twice(Nf4):
    """The absmax of blocks are bytes themselves, with a table, an absmax a run, and an offset."""

    RUN = 4

    def build(self) -> None:
        super().build()
        del self.absmax
        blocks = self.in_features * self.out_features // self.group
        self.codes("absmax", torch.uint8, blocks)
        self.numbers("absmax_of_runs", blocks // self.RUN)
        self.register_buffer("code_of_absmax", torch.linspace(0.1, 1, 256))
        self.register_buffer("offset", torch.tensor(0.01))

    def scales(self) -> torch.Tensor:
        values = F.embedding(self.absmax.int(), self.code_of_absmax[:, None])
        runs = values.view(-1, self.RUN) * self.absmax_of_runs.unsqueeze(-1)
        return runs.view(-1) + self.offset


class Mxfp4(Packed):
    """Two table look-ups a byte, an exponent for each block; written entry by entry."""

    def build(self) -> None:
        blocks = self.in_features // self.group
        self.codes("blocks", torch.uint8, self.out_features, blocks, self.group // 2)
        self.register_buffer(
            "exponents", torch.randint(121, 124, (self.out_features, blocks), dtype=torch.uint8)
        )
        positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        self.register_buffer("lut", torch.cat([positive, -positive]))

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        exponents = self.exponents.to(torch.int32) - 127
        lut = self.lut.to(dtype)
        low, high = (self.blocks & 0x0F).to(torch.long), (self.blocks >> 4).to(torch.long)
        values = torch.stack((lut[low], lut[high]), dim=-1).view(*self.blocks.shape[:-1], -1)
        return torch.ldexp(values, exponents.unsqueeze(-1)).flatten(1)


class Mxfp4Interleaved(Mxfp4):
    """The same with every other entry written in place, as Hugging Face unpacks gpt-oss."""

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        rows = self.blocks.reshape(-1, self.group // 2)
        exponents = (self.exponents.to(torch.int32) - 127).reshape(-1, 1)
        lut = self.lut.to(dtype)
        out = torch.empty(rows.shape[0], self.group, dtype=dtype)
        out[:, 0::2] = lut[(rows & 0x0F).to(torch.int)]
        out[:, 1::2] = lut[(rows >> 4).to(torch.int)]
        torch.ldexp(out, exponents, out=out)
        return out.reshape(self.out_features, self.in_features)


class Ternary(Packed):
    """Four values of -1, 0 and 1 in a byte, in planes along the outputs, as BitNet packs them."""

    def build(self) -> None:
        self.codes("packed", torch.uint8, self.out_features // 4, self.in_features)
        self.numbers("scale", 1)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        planes = [(self.packed >> shift) & 3 for shift in (0, 2, 4, 6)]
        return (torch.cat(planes, dim=0).to(dtype) - 1) * self.scale.to(dtype) * 8


class Signs(Packed):
    """One bit a weight, eight neighbours along the inputs in a byte; groups along the inputs."""

    def build(self) -> None:
        self.codes("packed", torch.uint8, self.out_features, self.in_features // 8)
        self.numbers("scales", self.out_features, self.in_features // self.group, 1)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
        bits = (self.packed.unsqueeze(-1) & places).ne(0).to(dtype) * 2 - 1
        grouped = bits.view(self.out_features, -1, self.group)
        return (grouped * self.scales.to(dtype) * 4).view(self.out_features, -1)


class Gguf(Packed):
    """Q8_0 of GGUF files: rows of blocks, each a float16 scale and a signed byte a value."""

    def build(self) -> None:
        blocks = self.in_features // self.group
        codes = torch.randint(-128, 128, (self.out_features, blocks, self.group), dtype=torch.int8)
        scales = ((0.5 + torch.rand(self.out_features, blocks, 1)) / 512).to(torch.float16)
        rows = torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)], dim=-1)
        self.register_buffer("weight", rows.reshape(self.out_features, -1))

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        blocks = self.weight.reshape(-1, self.group + 2)
        scales, codes = torch.split(blocks, [2, self.group], dim=1)
        values = scales.view(torch.float16).to(dtype) * codes.view(torch.int8)
        return values.reshape(self.out_features, self.in_features)


LAYOUTS: dict[str, Callable[..., Packed]] = {
    "int8": Int8,
    "int8, scaled behind": Int8Behind,
    "int8 with zero points": Int8ZeroPoint,
    "int4 in bytes": Int4Bytes,
    "int4 in halves of groups": Int4Halves,
    "int4 in halves of rows": Int4Planes,
    "GPTQ": Gptq,
    "GPTQ, groups in any order": GptqShuffled,
    "GPTQ, groups by view": GptqGroups,
    "AWQ": Awq,
    "AWQ, order in the shifts": AwqShifts,
    "fp8 in blocks": Fp8Blocks,
    "fp8, scales repeated": Fp8Repeated,
    "NF4": Nf4,
    "NF4, absmax packed": Nf4Twice,
    "MXFP4": Mxfp4,
    "MXFP4, written in place": Mxfp4Interleaved,
    "ternary in planes": Ternary,
    "signs": Signs,
    "GGUF Q8_0": Gguf,
}
