"""Whether a captured graph computes what the model computes when it is called.

A module may look at its surroundings: at the grad mode, at `torch.compiler.is_compiling()`, at what
kernels there are. What torch.export traced is then another branch than the one that a user gets.
So where the weights are at hand, the example goes through both, and what comes out is compared at
the scale of each output. Where it differs by more than a strict limit, the captured graph runs once
more with the result of each op rounded otherwise: what that changes, any kernel may change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree as pytree

from ringcompile.capture import huggingface
from ringcompile.capture.flat_call import FlatCall, flat
from ringcompile.capture.source_lines import location_of
from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.ir.program import Structure
from ringcompile.ops.bodies import body_of

# The difference that is always allowed, of an output's largest value.
_ALLOWED = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# A difference may be so many times what other rounding changes.
_TIMES_ROUNDING = 16.0
# So many whole numbers (positions of the largest of many, say) may differ: rounding decides ties.
_OTHER_CHOICES = 0.02
# What a model keeps beside its parameters is copied before it runs, up to so many bytes.
_COPIED = 2**28
NOT_COMPARED = "the captured program was not compared with the model as it is called"
_HINT = (
    "the model's code takes another path when it is captured: it may ask for the grad mode, "
    "torch.compiler.is_compiling() or self.training. PyTorch's own transformer layers have a fast "
    "path, which torch.backends.mha.set_fastpath_enabled(False) turns off"
)
_PADDING = (
    "at positions that attention_mask hides, the captured program and the model give different "
    "numbers; at all other positions the numbers agree"
)
Change = Callable[[torch.Tensor], torch.Tensor]
Kept = list[tuple[fx.Node, torch.Tensor]]


def compare(
    call: FlatCall, exported: ExportedProgram, keep: Kept | None = None
) -> tuple[str, ...]:
    """Run the example through the model and through the captured graph.

    Args:
        call: the model and its example, in the surroundings in which the user calls it.
        exported: what was captured of it.
        keep: gets the value of each node of it.

    Returns:
        Notes: why the comparison could not be made.

    Raises:
        RingCompileError: they differ by more than rounding explains; at the layer and its line.
    """
    if not has_data(call.model):
        return (f"{NOT_COMPARED}: its weights are not loaded",)
    with torch.no_grad(), _data_kept(call.model):
        try:
            structure, expected = _called(call)
        except Exception as error:  # whatever the user's code raises
            said = (str(error).strip().splitlines() or [""])[0][:200]
            return (f"{NOT_COMPARED}, because that raises {type(error).__name__}: {said}",)
        found = run_captured(call, exported, keep=keep)
        _check_forms(call.structure, structure, found, expected)
        if _differ(found, expected) is None:
            return ()
        seen = _seen(call)
        worst = _differ(seen(found), seen(expected))
        if worst is None:
            return (_PADDING,)
        rounded = _worst(seen(run_captured(call, exported, _rounded_otherwise)), seen(found))
        if rounded is not None and worst.far <= _TIMES_ROUNDING * rounded.far:
            return ()
        raise _parted(call, exported, worst)


def has_data(model: nn.Module) -> bool:
    """Whether a model's weights are loaded."""
    tensors = [*model.parameters(), *model.buffers()]
    return not any(isinstance(t, FakeTensor) or t.is_meta for t in tensors)


# -- both runs -------------------------------------------------------------------------------------


def _called(call: FlatCall) -> tuple[Structure, list[torch.Tensor]]:
    """What the model returns when the user calls it."""
    torch.manual_seed(0)
    args, kwargs = call.arguments(*(tensor.clone() for tensor in call.example.values()))
    leaves: list[torch.Tensor] = []
    return flat(call.model(*args, **kwargs), leaves), leaves


def run_captured(
    call: FlatCall, exported: ExportedProgram, change: Change | None = None,
    keep: Kept | None = None,
) -> list[torch.Tensor]:
    """What the captured graph returns; `keep` gets the value of each node."""
    torch.manual_seed(0)
    signature = exported.graph_signature
    state = {**exported.state_dict, **exported.constants,
             **dict(call.named_parameters(remove_duplicate=False)),
             **dict(call.named_buffers(remove_duplicate=False))}
    inputs = iter(tensor.clone() for tensor in call.example.values())
    values = [
        next(inputs) if spec.target is None else state[spec.target]
        for spec in signature.input_specs
    ]
    returned = _Interpreter(exported.graph_module, change, keep).run(*values)
    return list(returned)[len(signature.buffers_to_mutate) :]


class _Interpreter(fx.Interpreter):
    def __init__(
        self, graph_module: fx.GraphModule, change: Change | None, keep: Kept | None
    ) -> None:
        super().__init__(graph_module)
        self.change, self.keep = change, keep

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        made = body_of(target)(*args, **kwargs)
        if self.change is None:
            return made
        return pytree.tree_map_only(torch.Tensor, self.change, made)

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if self.keep is not None and n.op == "call_function":
            self.keep += [(n, t) for t in pytree.tree_leaves(made) if torch.is_tensor(t)]
        return made


def _rounded_otherwise(value: torch.Tensor) -> torch.Tensor:
    """Each number of a result up or down by its last digit, as another kernel might give it."""
    if not value.is_floating_point():
        return value
    step = torch.finfo(value.dtype).eps
    return value * (1 + step * (torch.rand_like(value) - 0.5).sign()).to(value.dtype)


@contextlib.contextmanager
def _data_kept(model: nn.Module) -> Iterator[None]:
    """Put back what a run of the model writes into tensors that it keeps."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers(), *_plain_tensors(model))}
    tensors = [t for t in held.values() if not t.is_inference()]
    versions = [t._version for t in tensors]
    parameters = {id(p) for p in model.parameters()}
    small = [t for t in tensors if id(t) not in parameters]
    fits = sum(t.nbytes for t in small) <= _COPIED
    copies = {id(t): t.clone() for t in small} if fits else {}
    yield
    for tensor, version in zip(tensors, versions, strict=True):
        if tensor._version == version:
            continue
        if id(tensor) not in copies:
            raise RingCompileError(
                "the model changes one of its own tensors (a buffer, say) while it runs; "
                "inference must not change state",
                hint="call model.eval(), and turn caches and counters off",
            )
        tensor.copy_(copies[id(tensor)])


def _plain_tensors(model: nn.Module) -> Iterable[torch.Tensor]:
    values = (value for module in model.modules() for value in vars(module).values())
    return [t for v in values for t in pytree.tree_leaves(v) if torch.is_tensor(t)]


# -- comparing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Difference:
    """The output that is furthest off, by how much of its largest value, and what is allowed."""

    output: int
    far: float
    allowed: float


def _worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> _Difference | None:
    pairs = enumerate(zip(found, expected, strict=True))
    all_of = [_Difference(i, _far(f, e), _ALLOWED.get(e.dtype, 0.0)) for i, (f, e) in pairs]
    return max(all_of, key=lambda d: d.far / max(d.allowed, 1e-30), default=None)


def _differ(found: list[torch.Tensor], expected: list[torch.Tensor]) -> _Difference | None:
    """The worst difference, if it is more than is always allowed."""
    worst = _worst(found, expected)
    return None if worst is None or worst.far <= worst.allowed else worst


def _seen(call: FlatCall) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """Leaves out of values [B, S, ...] what belongs to padding of a Hugging Face model.

    transformers itself fills it differently from one attention function to the next.
    """
    mask = call.example.get("attention_mask")
    if not huggingface.is_model(call.model) or mask is None or mask.dim() != 2:
        return lambda values: values
    keep = mask.bool()
    return lambda values: [v[keep] if v.shape[:2] == keep.shape else v for v in values]


def _far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a part of the largest expected number."""
    if expected.numel() == 0 or torch.equal(found, expected):
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        share = float((found != expected).double().mean())
        return share if share > _OTHER_CHOICES else 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    f, e = found.to(wide), expected.to(wide)
    finite = e.isfinite()
    same = (f == e) | (f.isnan() & e.isnan())
    if not torch.equal(finite, f.isfinite()) or not bool(same[~finite].all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    largest = float(e[finite].abs().max())
    return float((f[finite] - e[finite]).abs().max()) / max(largest, 1e-30)


def _check_forms(
    captured: Structure, called: Structure, found: list[torch.Tensor], expected: list[torch.Tensor]
) -> None:
    forms = [[f"{str(t.dtype)[6:]} {list(t.shape)}" for t in ts] for ts in (found, expected)]
    if forms[0] != forms[1] or captured != called:
        raise RingCompileError(
            "the captured graph does not return what the model returns when it is called: "
            f"{', '.join(forms[0])} instead of {', '.join(forms[1])}", hint=_HINT,
        )


# -- where they part -------------------------------------------------------------------------------


def _parted(call: FlatCall, exported: ExportedProgram, worst: _Difference) -> RingCompileError:
    """The error at the first layer that gives something else than it does when it is called."""
    keep: Kept = []
    run_captured(call, exported, keep=keep)
    layers = [(location_of(node), tensor) for node, tensor in keep]
    location = _first_other(call, layers) or layers[-1][0]
    finite = worst.far < float("inf")
    far = f"by {worst.far:.1e} of its largest value" if finite else "in what is not finite"
    kind = type(call.model.get_submodule(location.layer)).__name__
    return RingCompileError(
        f"the captured graph does not compute what the model computes when it is called: output "
        f"{worst.output} differs {far}, beginning with {kind}", hint=_HINT, location=location,
    )


def _first_other(
    call: FlatCall, captured: list[tuple[SourceLocation, torch.Tensor]]
) -> SourceLocation | None:
    seen = _seen(call)
    names = {id(module): name for name, module in call.model.named_modules()}
    for module, tensors in _results_of_modules(call):
        name = names.get(id(module))
        if name is None:
            continue
        inside = [
            (at, value) for at, value in captured
            if not name or f"{at.layer}.".startswith(f"{name}.")
        ]
        same = [value for _, value in inside]
        if not all(any(_close(v, t, seen) for v in same) for t in tensors):
            last = inside[-1][0] if inside else SourceLocation()
            return SourceLocation(last.file, last.line, name)
    return None


def _close(
    found: torch.Tensor, expected: torch.Tensor,
    seen: Callable[[list[torch.Tensor]], list[torch.Tensor]],
) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return _far(*seen([found, expected])) <= 10 * _ALLOWED.get(expected.dtype, 0.0)


def _results_of_modules(call: FlatCall) -> list[tuple[nn.Module, list[torch.Tensor]]]:
    """What each module returns when the model is called, in the order in which they finish.

    A hook for all modules at once: with one on a layer, PyTorch's own would leave its fast path.
    """
    made: list[tuple[nn.Module, list[torch.Tensor]]] = []

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
        made.append((module, [t for t in leaves if torch.is_tensor(t) and not t.is_nested]))

    handle = register_module_forward_hook(keep)
    try:
        _called(call)
    finally:
        handle.remove()
    return made
