"""The ways people write a mixture of experts in plain PyTorch: one module each.

Letters in shapes: B batch, S sequence, T = B * S tokens, D width, E experts, K choices a token,
C slots of an expert, F inner width. Every module maps [B, S, D] to [B, S, D], but for the one that
also returns a loss. Tokens are counted in the order of x.reshape(T, D).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.moe_parts import (
    CAPACITY_FACTOR,
    Mixture,
    PlainExpert,
    Stacked,
    capacity_of,
)

# -- one-hot matrix products ---------------------------------------------------------------------


class GShardGroups(Stacked):
    """GShard (arXiv 2006.16668): each sequence is a group with slots of its own."""

    capacity_factor = CAPACITY_FACTOR

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.route(x)
        capacity = capacity_of(x.shape[1], self.top_k, self.num_experts)
        chosen = F.one_hot(experts, self.num_experts)  # [B, S, K, E]
        # Choice by choice: all first choices of a sequence come before its second ones.
        in_turn = chosen.transpose(1, 2).flatten(1, 2)
        arrival = (in_turn.cumsum(1) - in_turn).view(chosen.transpose(1, 2).shape).transpose(1, 2)
        slot = (arrival * chosen).sum(-1)  # [B, S, K]
        slots = torch.arange(capacity, device=x.device)
        at_slot = (slot[..., None] == slots).to(x.dtype)  # past the capacity: a row of zeros
        pairs = chosen.to(x.dtype)
        dispatch = torch.einsum("bske,bskc->bsec", pairs, at_slot)
        combine = torch.einsum("bsk,bske,bskc->bsec", weights, pairs, at_slot)
        inputs = torch.einsum("bsec,bsd->ebcd", dispatch, x)
        inner = F.silu(torch.einsum("ebcd,edf->ebcf", inputs, self.up))
        outputs = torch.einsum("ebcf,efd->ebcd", inner, self.down)
        return torch.einsum("bsec,ebcd->bsd", combine, outputs)


class GShardTokens(Stacked):
    """The same over all tokens of the batch, masks as in DeepSpeed's top-2 gate."""

    capacity_factor = CAPACITY_FACTOR

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        capacity = capacity_of(tokens.shape[0], self.top_k, self.num_experts)
        taken = torch.zeros(self.num_experts, dtype=torch.int64, device=tokens.device)
        combine = tokens.new_zeros(tokens.shape[0], self.num_experts, capacity)
        for choice in range(self.top_k):
            mask = F.one_hot(experts[:, choice], num_classes=self.num_experts)
            location = torch.cumsum(mask, dim=0) - 1 + taken
            taken = taken + mask.sum(dim=0)
            mask = mask * torch.lt(location, capacity)
            slot = (location * mask).sum(dim=1)
            gates = weights[:, choice, None] * mask.to(tokens.dtype)
            combine = combine + torch.einsum("te,tc->tec", gates, self.at_slot(slot, combine))
        dispatch = combine.bool().to(tokens.dtype)
        inputs = torch.einsum("tec,td->ecd", dispatch, tokens)
        inner = F.silu(torch.bmm(inputs, self.up))
        return torch.einsum("tec,ecd->td", combine, torch.bmm(inner, self.down))

    def at_slot(self, slot: Tensor, combine: Tensor) -> Tensor:
        slots = torch.arange(combine.shape[2], device=slot.device)
        return (slot[:, None] == slots).to(combine.dtype)


class OneHotSlots(GShardTokens):
    """DeepSpeed's own words: under export, one_hot fixes the capacity and with it the length."""

    def at_slot(self, slot: Tensor, combine: Tensor) -> Tensor:
        return F.one_hot(slot, num_classes=combine.shape[2]).to(combine.dtype)


class DenseWeights(Stacked):
    """No dispatch at all: every expert computes every token, weights are zero where not chosen."""

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        gates = (F.one_hot(experts, self.num_experts) * weights[..., None]).sum(1)  # [T, E]
        inner = F.silu(torch.einsum("td,edf->tef", tokens, self.up))
        outputs = torch.einsum("tef,efd->ted", inner, self.down)
        return torch.einsum("te,ted->td", gates, outputs)


# -- loops over experts --------------------------------------------------------------------------


class WhereLoop(Mixture):
    """Mixtral's first form: the tokens of each expert by nonzero, added back by index_add_."""

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        out = torch.zeros_like(tokens)
        expert_mask = F.one_hot(experts, num_classes=self.num_experts).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            choice, token = torch.where(expert_mask[number])
            current = expert(tokens[token]) * weights[token, choice, None]
            out.index_add_(0, token, current.to(tokens.dtype))
        return out


class BooleanLoop(Mixture):
    """Boolean indexing on both sides."""

    def make_experts(self) -> None:
        self.experts = nn.ModuleList(PlainExpert(self.size) for _ in range(self.num_experts))

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            chosen = experts == number
            mask = chosen.any(dim=-1)
            gate = (weights * chosen).sum(dim=-1)
            out[mask] += gate[mask].unsqueeze(-1) * expert(tokens[mask])
        return out


class DenseLoop(Mixture):
    """Every expert on every token, chosen with torch.where."""

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            gate = torch.where(experts == number, weights, 0.0).sum(-1, keepdim=True)
            out = out + gate * expert(tokens)
        return out


class DenseLoopInPlace(Mixture):
    """The same with `+=`, and with masked_fill instead of where."""

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        out = tokens.new_zeros(tokens.shape)
        for number in range(self.num_experts):
            gate = weights.masked_fill(experts != number, 0.0).sum(-1)
            out += gate.unsqueeze(1) * self.experts[number](tokens)
        return out


# -- sorting -------------------------------------------------------------------------------------


class GroupedMM(Stacked):
    """Choices sorted by expert, one grouped product over ragged groups, and the order undone."""

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        flat = experts.reshape(-1)
        order = torch.argsort(flat)
        rows = tokens[order // self.top_k]
        counts = torch.histc(flat.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        inner = F.silu(F.grouped_mm(rows, self.up, offs=offsets))
        outputs = F.grouped_mm(inner, self.down, offs=offsets)
        restored = outputs[torch.argsort(order)].view(-1, self.top_k, self.size)
        return (restored * weights[..., None]).sum(1)


class GroupedMMIndexAdd(Stacked):
    """The same with counts from a one-hot, and index_add as the way back."""

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        order = experts.view(-1).argsort(stable=True)
        token = order // self.top_k
        counts = F.one_hot(experts.view(-1), self.num_experts).sum(0)
        offsets = counts.cumsum(0).to(torch.int32)
        inner = F.silu(F.grouped_mm(tokens[token], self.up, offs=offsets))
        outputs = F.grouped_mm(inner, self.down, offs=offsets)
        outputs = outputs * weights.view(-1)[order].unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, token, outputs)


class PaddedBuffer(Stacked):
    """Sorted choices put into slots of a padded buffer by index_put_, bmm, gathered back."""

    capacity_factor = CAPACITY_FACTOR

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        capacity = capacity_of(tokens.shape[0], self.top_k, self.num_experts)
        flat = experts.flatten()
        order = torch.argsort(flat, stable=True)
        by_expert = flat[order]
        counts = torch.bincount(flat, minlength=self.num_experts)
        starts = counts.cumsum(0) - counts
        slot = torch.arange(flat.shape[0], device=tokens.device) - starts[by_expert]
        fits = slot < capacity
        place = torch.where(fits, by_expert * capacity + slot, self.num_experts * capacity)
        buffer = tokens.new_zeros(self.num_experts * capacity + 1, self.size)
        buffer[place] = tokens[order // self.top_k]
        inputs = buffer[:-1].view(self.num_experts, capacity, self.size)
        outputs = torch.bmm(F.silu(torch.bmm(inputs, self.up)), self.down)
        padded = torch.cat([outputs.flatten(0, 1), outputs.new_zeros(1, self.size)])
        gate = weights.flatten()[order] * fits
        out = torch.zeros_like(tokens)
        return out.index_add_(0, order // self.top_k, padded[place] * gate[:, None])


class ScatterAdd(Stacked):
    """Slots from a cumsum over a one-hot (token by token), in and out with scatter_add."""

    capacity_factor = CAPACITY_FACTOR

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        capacity = capacity_of(tokens.shape[0], self.top_k, self.num_experts)
        flat = experts.reshape(-1)
        arrival = F.one_hot(flat, self.num_experts).cumsum(0) - 1
        slot = arrival.gather(1, flat[:, None]).squeeze(1)
        fits = (slot < capacity).to(tokens.dtype)[:, None]
        place = (flat * capacity + slot.clamp(max=capacity - 1))[:, None].expand(-1, self.size)
        rows = tokens.repeat_interleave(self.top_k, dim=0) * fits
        buffer = tokens.new_zeros(self.num_experts * capacity, self.size)
        buffer = buffer.scatter_add(0, place, rows)
        inputs = buffer.view(self.num_experts, capacity, self.size)
        outputs = torch.bmm(F.silu(torch.bmm(inputs, self.up)), self.down).flatten(0, 1)
        back = outputs.gather(0, place) * fits * weights.reshape(-1, 1)
        token = torch.arange(tokens.shape[0], device=tokens.device).repeat_interleave(self.top_k)
        return torch.zeros_like(tokens).scatter_add_(0, token[:, None].expand_as(back), back)


# -- gathering and scattering weights ------------------------------------------------------------


class GatheredWeights(Stacked):
    """Each choice's own weight matrices: for few tokens."""

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        inner = F.silu(torch.einsum("td,tkdf->tkf", tokens, self.up[experts]))
        outputs = torch.einsum("tkf,tkfd->tkd", inner, self.down[experts])
        return torch.einsum("tk,tkd->td", weights, outputs)


class ScatteredGates(Stacked):
    """Llama 4's form: scores scattered into [T, E], tokens repeated for each expert, one bmm."""

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        gates = torch.zeros(tokens.shape[0], self.num_experts, dtype=tokens.dtype)
        gates = gates.scatter_(1, experts, weights).transpose(0, 1)  # [E, T]
        repeated = tokens.repeat(self.num_experts, 1).view(self.num_experts, -1, self.size)
        outputs = torch.bmm(F.silu(torch.bmm(repeated, self.up)), self.down)
        return (outputs * gates[..., None]).sum(0)


# -- other routers -------------------------------------------------------------------------------


class SharedExpert(DenseLoop):
    """Qwen2-MoE: an expert for all tokens, behind a sigmoid gate, beside the routed ones."""

    def make_experts(self) -> None:
        super().make_experts()
        self.shared = PlainExpert(self.size)
        self.shared_gate = nn.Linear(self.size, 1, bias=False)

    def mix(self, tokens: Tensor) -> Tensor:
        return super().mix(tokens) + self.for_all(tokens)

    def for_all(self, tokens: Tensor) -> Tensor:
        return torch.sigmoid(self.shared_gate(tokens)) * self.shared(tokens)


class GroupLimited(Stacked):
    """DeepSeek-V3 (arXiv 2412.19437): sigmoid scores, a bias that only chooses, groups first."""

    def make_experts(self) -> None:
        super().make_experts()
        self.register_buffer("correction", torch.linspace(-0.2, 0.2, self.num_experts))
        self.num_groups = 2
        self.scaling = 2.5

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(tokens).sigmoid()
        biased = scores + self.correction
        grouped = biased.view(-1, self.num_groups, self.num_experts // self.num_groups)
        best_group = grouped.topk(2, dim=-1)[0].sum(dim=-1).topk(1, dim=-1, sorted=False)[1]
        allowed = torch.zeros_like(grouped[..., 0]).scatter_(1, best_group, 1)
        allowed = allowed.unsqueeze(-1).expand_as(grouped).reshape(-1, self.num_experts)
        experts = biased.masked_fill(~allowed.bool(), 0.0).topk(self.top_k, dim=-1)[1]
        weights = scores.gather(1, experts)
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.scaling, experts

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        out = torch.zeros_like(tokens)
        for number in range(self.num_experts):
            gate = (weights * (experts == number)).sum(-1, keepdim=True)
            out = out + gate * self.expert(number, tokens)
        return out


class ExpertChoice(Stacked):
    """Experts pick tokens (arXiv 2202.09368): each output depends on all tokens."""

    def mix(self, tokens: Tensor) -> Tensor:
        scores = self.router(tokens).softmax(-1)
        capacity = max(1, tokens.shape[0] * self.top_k // self.num_experts)
        gates, picked = scores.t().topk(capacity, dim=-1)  # [E, C]
        inner = F.silu(torch.bmm(tokens[picked], self.up))
        outputs = torch.bmm(inner, self.down) * gates[..., None]
        return torch.zeros_like(tokens).index_add(0, picked.flatten(), outputs.flatten(0, 1))


class BestFirst(Stacked):
    """Slots go to the tokens that score highest (V-MoE, arXiv 2106.05974): a sort over tokens."""

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        capacity = capacity_of(tokens.shape[0], self.top_k, self.num_experts)
        importance = torch.argsort(weights[:, 0], dim=0, descending=True, stable=True)
        chosen = F.one_hot(experts[importance], self.num_experts)  # [T, K, E]
        in_turn = chosen.flatten(0, 1)
        arrival = ((in_turn.cumsum(0) - in_turn) * in_turn).sum(-1).view(experts.shape)
        fits = torch.empty_like(experts).index_copy(0, importance, arrival) < capacity
        gates = (F.one_hot(experts, self.num_experts) * (weights * fits)[..., None]).sum(1)
        inner = F.silu(torch.einsum("td,edf->tef", tokens, self.up))
        return torch.einsum("te,tef,efd->td", gates, inner, self.down)


# -- what cannot be captured, and a second output ------------------------------------------------


class CountsOnHost(Mixture):
    """DeepSeek's inference form: counts to the host, then a Python loop over slices."""

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        order = experts.view(-1).argsort(stable=True)
        rows = tokens[order // self.top_k]
        counts = torch.bincount(experts.view(-1), minlength=self.num_experts).tolist()
        outputs, start = [], 0
        for number, count in enumerate(counts):
            if count == 0:
                continue
            outputs.append(self.experts[number](rows[start : start + count]))
            start += count
        restored = torch.empty_like(rows)
        restored[order] = torch.cat(outputs)
        return (restored.view(-1, self.top_k, self.size) * weights[..., None]).sum(1)


class SkipIdle(Mixture):
    """An expert that no token chose is skipped by a Python `if`."""

    def mix(self, tokens: Tensor) -> Tensor:
        weights, experts = self.route(tokens)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            mask = (experts == number).any(-1)
            if mask.any():
                gate = (weights * (experts == number)).sum(-1, keepdim=True)
                out[mask] += (gate * expert(tokens))[mask]
        return out


class WithLoss(DenseLoop):
    """Returns the load-balancing loss of Switch (arXiv 2101.03961) beside its output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        tokens = x.reshape(-1, self.size)
        scores = self.router(tokens).softmax(-1)
        first = F.one_hot(self.route(tokens)[1][:, 0], self.num_experts).to(x.dtype)
        loss = self.num_experts * (first.mean(0) * scores.mean(0)).sum()
        return super().forward(x), loss
