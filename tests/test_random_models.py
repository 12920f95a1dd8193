"""Ways of writing a mixture do what their table says; random models match, or are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch

from ringcompile.ops.kernels import select
from tests import random_cases, random_models, random_transformer
from tests.moe_styles import WithLoss
from tests.moe_table import STYLES, Style, reference
from tests.random_cases import Case, case_of
from tests.random_models import Outcome, trial
from tests.support import some_fast

# Seeds that between them make every choice which any of the 550 makes, as a test holds. Of ways of
# writing a mixture one of each kind: test_experts.py has them all.
ORDINARY = (0, 4, 22, 27, 37, 176, 311, 318, 335, 437, 441)
QUICK = (0, 22, 176, 318, 437)  # these are fast
MANY = tuple(seed for seed in range(550) if seed not in ORDINARY)
SHARE_MATCHED = 0.9  # nearly all; the rest is refused, and what is wrong or crashes is a failure


def made(name: str, top_k: int = 2, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return STYLES[name].factory(size=16, num_experts=8, top_k=top_k).eval()


def exported(name: str, length: int) -> torch.export.ExportedProgram:
    x = torch.randn(2, length, 16, dtype=STYLES[name].dtype)
    with torch.no_grad():
        return torch.export.export(
            made(name).to(x.dtype), (x,), dynamic_shapes={"x": {1: torch.export.Dim.DYNAMIC}},
            strict=False)


def first(value: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value[0]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", [name for name in STYLES if name != "experts choose"])
def test_a_style_computes_its_mixture(name: str, top_k: int) -> None:
    style = STYLES[name]
    module, x = made(name, top_k), torch.randn(2, 21, 16)
    if style.dtype is torch.float32:
        module, x = module.double(), x.double()
    with torch.no_grad():
        found, expected = first(module(x)), reference(style, module, x)
    assert (found - expected).abs().max() <= (1e-12 if x.dtype == torch.float64 else 1e-5)
    if style.order is not None:
        everything = Style(style.factory)
        assert (found - reference(everything, module, x)).abs().max() > 1e-3, "nothing was dropped"


def test_experts_that_choose() -> None:
    module, x = made("experts choose").double(), torch.randn(2, 21, 16, dtype=torch.float64)
    tokens, expected = x.flatten(0, 1), torch.zeros(42, 16, dtype=torch.float64)
    scores = module.router(tokens).softmax(-1).detach()
    for expert in range(8):
        for token in sorted(range(42), key=lambda t: -float(scores[t, expert]))[: 42 * 2 // 8]:
            row = module.expert(expert, tokens[token : token + 1])[0]
            expected[token] = expected[token] + scores[token, expert] * row
    torch.testing.assert_close(module(x), expected.view(x.shape), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.order is None])
def test_what_a_token_depends_on(name: str) -> None:
    """A token alone gives what it gives among others, if the style is one of single tokens."""
    module, x = made(name), torch.randn(2, 21, 16)
    with torch.no_grad():
        pairs = zip(torch.utils._pytree.tree_leaves(module(x)),
                    torch.utils._pytree.tree_leaves(module(x[:, 4:5])), strict=True)
        same = [torch.allclose(a[:, 4:5] if a.ndim else a, b, atol=1e-5) for a, b in pairs]
    assert all(same) == STYLES[name].tokenwise


@pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")  # torch.export's own, in copyreg
@pytest.mark.parametrize("name", some_fast(
    STYLES, fast=lambda name: list(STYLES).index(name) % 4 == 0 or not STYLES[name].any_length))
def test_what_export_makes_of_a_style(name: str) -> None:
    style = STYLES[name]
    if not style.captured:
        with pytest.raises(RuntimeError, match="data-dependent"):
            exported(name, 9)
        return
    program = exported(name, 9)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    mutating = {t._schema.name.removeprefix("aten::") for t in targets
                if isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable}
    assert mutating == set(style.mutates)
    module, longer = made(name).to(style.dtype), torch.randn(2, 30, 16, dtype=style.dtype)
    if not style.any_length:
        with pytest.raises(AssertionError, match="Guard failed"):
            program.module()(longer)
        return
    with torch.no_grad():
        assert torch.equal(first(program.module()(longer)), first(module(longer)))


def test_the_loss_is_that_of_the_whole_batch() -> None:
    module, x = WithLoss(16, 4, 2), torch.randn(2, 21, 16)
    _, loss = module(x)
    halves = [module(part)[1] for part in x.split((10, 11), dim=1)]
    assert (loss - sum(halves) / 2).abs() > 1e-5


# -- random whole models -------------------------------------------------------------------------


@lru_cache
def outcome(seed: int) -> Outcome:
    return trial(case_of(seed))


@pytest.mark.parametrize(
    "seed", some_fast(sorted({*ORDINARY, *MANY}), fast=QUICK.__contains__))
def test_random_model(seed: int) -> None:
    found = outcome(seed)
    assert found.kind in ("matched", "refused"), f"{found.detail}\n{case_of(seed).words()}"


@pytest.mark.parametrize(
    "seeds", [QUICK, *(pytest.param(seeds, marks=pytest.mark.slow) for seeds in (ORDINARY, MANY))],
    ids=["quick", "ordinary", "many"])
def test_most_random_models_match(seeds: Sequence[int]) -> None:
    kinds = [outcome(seed).kind for seed in seeds]
    assert kinds.count("matched") >= SHARE_MATCHED * len(kinds)


def ring_case() -> Case:
    """A case with nothing to refuse and attention over several ranks."""
    return dataclasses.replace(
        case_of(0), mlp="plain", attention="sdpa", documents="none", padding="none", head="logits",
        band="causal", mask_form="flag", positions="rotary", counted="arange", ranks=3,
        inputs="tokens", extra_output=False, fixed=False, lengths=(2, 24, 31))


def test_a_fault_on_purpose_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial(ring_case()).kind == "matched"

    def average(out: torch.Tensor, lse: torch.Tensor, out_b: torch.Tensor, lse_b: object) -> None:
        out.lerp_(out_b.to(out.dtype), 0.5)

    monkeypatch.setattr(select, "merge", average)
    assert trial(ring_case()).kind == "wrong"


def test_numbers_that_are_off_by_a_little_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = random_models.run

    def off(*args: object) -> object:
        result = right(*args)  # type: ignore[arg-type]
        result.outputs[0, -1, -1] += 1e-6
        return result

    monkeypatch.setattr(random_models, "run", off)
    found = trial(ring_case())
    assert (found.kind, found.detail[:12]) == ("wrong", "at length 2:")


def test_a_failure_at_run_time_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> object:
        raise random_models.RingCompileError("failed")

    monkeypatch.setattr(random_models, "run", fails)
    assert trial(ring_case()).kind == "crashed"


def test_a_seed_is_replayed() -> None:
    case = case_of(11)
    assert case == case_of(11) != case_of(12)
    models = [random_transformer.RandomModel(case).state_dict() for _ in range(2)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    inputs = [random_transformer.inputs_of(case, 13)["inputs"] for _ in range(2)]
    assert torch.equal(*inputs)


def choices(case: Case) -> set[object]:
    """What a case chooses from a few values: words, flags, how many ranks, which kind of axis."""
    kind = "drops" if case.mlp in random_cases.DROPS else "dropless"
    mlp = kind if case.mlp in random_cases.MIXTURES else case.mlp
    named = {**vars(case), "mlp": mlp}.items()
    return {
        *((name, value) for name, value in named if isinstance(value, str | bool)),
        ("ranks", case.ranks),
        ("axes", case.axes),
        ("shorter than the ranks", min(case.lengths) < case.ranks),
        ("divides", any(length % case.ranks for length in case.lengths)),
    }


def test_the_ordinary_seeds_choose_what_any_seed_chooses() -> None:
    found = [set().union(*(choices(case_of(seed)) for seed in seeds)) for seeds in (ORDINARY, MANY)]
    assert found[0] >= found[1]


def test_every_choice_is_drawn() -> None:
    """No branch of the generator is dead: each field takes its values within the slow seeds."""
    cases = [case_of(seed) for seed in MANY]
    assert {case.mlp for case in cases} == {"plain", "gated", *random_cases.MIXTURES}
    assert {case.band for case in cases} == {"bidirectional", *random_cases.BANDS}
    assert {case.head for case in cases} == {*random_transformer.POOLED, "last real"}
    assert {case.ranks for case in cases} == set(range(1, 9))
    assert any(min(case.lengths) < case.ranks for case in cases)
    assert any(length % case.ranks for case in cases for length in case.lengths)
