"""The operators fastattn::attention_forward and fastattn::attention_backward: what compilers and autograd see.

They take the tensors and the spec as primitives, so that torch.compile, torch.export and every dispatch mode treat
attention as one node. The backends of forward and backward are chosen inside, at run time, as an exported program may
run on another device; both from the same spec, which says whether gradients are wanted: inside, where grad mode is
off, nothing else does. Made with torch.library.Library, as custom_op costs more a call.

A call that nobody watches (plain eager tensors, no mode, no profiler) goes to the backend directly: the dispatcher's
two passes through Python cost more than a small problem takes. Its two backends are chosen before the forward, and the
backward keeps to that. Both ways end in the same two functions, `_run_forward`, `_run_backward`. What rounding takes
from out and lse goes from the forward to the backward beside them (low_parts.py).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn import dispatch, process, reference, sharding, storage, tracing
from fastattn.low_parts import NONE, LowParts
from fastattn.masks import Full
from fastattn.spec import AttnInputs, AttnSpec, FlatSpec

if TYPE_CHECKING:
    from fastattn.backends.inputs import Gradients

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? sinks, Tensor? dropout_seed"
_SPEC = (
    "str mask_code, SymInt[] mask_numbers, Tensor[] mask_tensors, float scale, float? softcap, float dropout_p, "
    "bool deterministic, bool needs_grad, str backend"
)
_SCHEMAS = (
    f"attention_forward({_INPUTS}, {_SPEC}) -> (Tensor out, Tensor lse, Tensor lse_low, Tensor out_low)",
    "attention_backward(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, Tensor? lse_low, Tensor? out_low, "
    f"{_INPUTS}, {_SPEC}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
)
_FIRST = process.kept("operators") is None  # a process defines a namespace once, and may import fastattn again
if _FIRST:
    process.keep("operators", torch.library.Library("fastattn", "DEF"))
    for _schema in _SCHEMAS:
        process.kept("operators").define(_schema, tags=torch.Tag.pt2_compliant_tag)
FORWARD = torch.ops.fastattn.attention_forward.default
BACKWARD = torch.ops.fastattn.attention_backward.default
_BACKWARD = ("out", "lse", "the gradient of out", "the gradient of lse")
N_INPUTS = len(AttnInputs._fields)
BIAS = AttnInputs._fields.index("bias")
N_RESULTS = 6  # of the forward and their gradients, before the backward's inputs
_PLAIN = (Tensor, torch.nn.Parameter)
_modes_active, _profiler_enabled = torch._C._len_torch_dispatch_stack, torch.autograd._profiler_enabled


def attention(inputs: AttnInputs, spec: AttnSpec, backend: str | None) -> tuple[Tensor, Tensor]:
    """out, lse of a checked call; `backend=None` leaves the choice to the list of backends."""
    if not _watched(inputs):
        forward, backward = dispatch.choose(spec, backend, to_run=True)
        if backward is None:
            return _run_forward(spec, inputs, forward)[:2]
        return _Eager.apply(*inputs, spec, forward, backward)
    if any(map(sharding.is_sharded, inputs[:3])):
        part = sharding.localized(inputs, spec)
        out, lse = attention(part.inputs, part.spec, backend)
        return part.gathered(out), part.gathered(lse)
    packed = spec.flat()
    if not torch.jit.is_tracing():
        return FORWARD(*inputs, *packed, backend or "")[:2]
    with tracing.recorded_by_jit():  # which records once more without gradients, and wants the same graph
        return FORWARD(*inputs, *packed._replace(needs_grad=False), backend or "")[:2]


def attention_weights(
    inputs: AttnInputs, spec: AttnSpec, backend: str | None, lse: Tensor | None, rows: Tensor | None, *, mean: bool
) -> Tensor:
    """weights [batch, num_heads, q_len or len(rows), kv_len], or their mean over the heads, by the backend that would
    run the attention, where it can; the plain formulation where a derivative is wanted or somebody watches.
    """
    if any(map(sharding.is_sharded, inputs[:3])):
        part = sharding.localized(inputs, spec, lse)
        weights = attention_weights(part.inputs, part.spec, backend, part.lse, rows, mean=mean)
        if not mean:
            return part.gathered(weights)
        return part.gathered(weights * (part.spec.num_heads / max(spec.num_heads, 1)), summed=True)
    recorded = spec.needs_grad or (lse is not None and lse.requires_grad and torch.is_grad_enabled())
    if spec.num_heads and not (recorded or tracing.transforms_active() or _watched(inputs)):
        _check_mask(spec)
        module = dispatch.load(dispatch.choose(spec, backend, to_run=True)[0])
        computed = module.weights(spec, inputs, lse, rows, mean=mean)
        if computed is not None:
            return computed
    if not (_watched(inputs) or tracing.transforms_active()):
        storage.check((*inputs._fields, "lse"), (*inputs, lse))
    weights = reference.attention_weights(spec, inputs, lse, rows)
    return weights.sum(1) / max(spec.num_heads, 1) if mean else weights


def _watched(inputs: AttnInputs) -> bool:
    """Whether someone wants to see the operator: a compiler, a tracer, a dispatch mode, a profiler, a tensor
    subclass.
    """
    if torch.compiler.is_compiling():
        return True
    query, key, value, bias, sinks, _ = inputs
    return (
        _modes_active() > 0
        or _profiler_enabled()
        or torch.jit.is_tracing()
        or not (type(query) in _PLAIN and type(key) in _PLAIN and type(value) in _PLAIN)
        or not (bias is None or type(bias) in _PLAIN)
        or not (sinks is None or type(sinks) in _PLAIN)
        or query.is_meta
    )


def _check_mask(spec: AttnSpec) -> None:
    """A mask's tensors are read before a kernel looks at anything."""
    if type(spec.mask) is not Full and (tensors := spec.mask.tensors):
        storage.check([f"a tensor of mask={type(spec.mask).__name__}(...)"] * len(tensors), tensors)


def _run_forward(spec: AttnSpec, inputs: AttnInputs, backend: str) -> tuple[Tensor, Tensor, LowParts]:
    module = dispatch.load(backend)
    _check_mask(spec)
    if not module.LOOKS_AT_STORAGE:
        storage.check(inputs._fields, inputs)
    if not spec.needs_grad:
        return *module.forward(spec, inputs), NONE
    return module.forward_with_low(spec, inputs)


def _run_backward(
    spec: AttnSpec,
    inputs: AttnInputs,
    backend: str,
    out: Tensor,
    lse: Tensor,
    low: LowParts,
    d_out: Tensor,
    d_lse: Tensor | None,
    *,
    wants_dbias: bool = True,
) -> Gradients:
    if tracing.holds_many(d_out) or (d_lse is not None and tracing.holds_many(d_lse)):
        backend = "reference"  # no kernel takes a batch of gradients at once
    module = dispatch.load(backend)
    _check_mask(spec)
    if not (module.LOOKS_AT_STORAGE or tracing.functorch_active() or tracing.holds_many(d_out)):
        storage.check((*inputs._fields, *_BACKWARD), (*inputs, out, lse, d_out, d_lse))
    return module.backward(spec, inputs, out, lse, d_out, d_lse, wants_dbias=wants_dbias, low=low)


def _present(inputs: tuple[Any, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The backward operator's gradients with None where there is no such input (an operator must return a tensor)."""
    return tuple(None if given is None else grad for given, grad in zip(inputs, grads, strict=False))


class _Eager(torch.autograd.Function):
    """The call without the dispatcher. Second derivatives go through the backward operator, which has its own."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, spec, forward, backward = args
        inputs = AttnInputs(*tensors)
        out, lse, low = _run_forward(spec, inputs, forward)
        # The mask's tensors are saved too, so that torch notices when one is changed in between.
        # In the operator's order: a checkpoint may go the one way and come back the other.
        ctx.save_for_backward(*inputs, *spec.mask.tensors, out, lse, *low)
        ctx.spec, ctx.backend = spec, backward
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        if d_out is None and d_lse is None:
            return (None,) * (N_INPUTS + 3)
        *saved, out, lse, lse_low, out_low = ctx.saved_tensors
        inputs = AttnInputs(*saved[:N_INPUTS])
        d_out = torch.zeros_like(out) if d_out is None else d_out
        if tracing.functorch_active():  # vmap over torch.autograd.grad
            return (*reference.pull_back(ctx.spec, inputs, lse, d_out, d_lse), None, None, None, None)
        if torch.is_grad_enabled():
            grads = BACKWARD(d_out, d_lse, out, lse, lse_low, out_low, *inputs, *ctx.spec.flat(), ctx.backend)
            return (*_present(inputs, grads), None, None, None, None)
        wants_dbias = ctx.needs_input_grad[BIAS]
        low = LowParts(lse_low, out_low)
        grads = _run_backward(ctx.spec, inputs, ctx.backend, out, lse, low, d_out, d_lse, wants_dbias=wants_dbias)
        return (*grads, None, None, None, None)


def _unpack(args: tuple[Any, ...]) -> tuple[AttnInputs, AttnSpec, str | None]:
    inputs = AttnInputs(*args[:N_INPUTS])
    return inputs, AttnSpec.from_flat(inputs, FlatSpec(*args[N_INPUTS:-1])), args[-1] or None


def _forward(*args: Any) -> tuple[Tensor, ...]:
    inputs, spec, backend = _unpack(args)
    out, lse, low = _run_forward(spec, inputs, dispatch.choose(spec, backend, to_run=True)[0])
    return out, lse, *low.as_results(inputs.query)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, spec, _ = _unpack(args)
    out, lse = spec.empty_out(inputs.query), spec.empty_lse(inputs.query)
    return out, lse, *LowParts.empty(spec, out, lse).as_results(inputs.query)


def _backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor | None,
    out_low: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    inputs, spec, backend = _unpack(args)
    if not spec.needs_grad:  # traced without gradients, and run with them
        spec = dataclasses.replace(spec, needs_grad=True)
    # The forward, or who recorded it, has held a name against the call.
    chosen = backend or dispatch.choose(spec, None, to_run=True)[1]
    low = LowParts(lse_low, out_low)
    grads = _run_backward(spec, inputs, chosen, out, lse, low, d_out, d_lse)  # type: ignore[arg-type]
    return tuple(
        inputs.query.new_empty(0) if grad is None or given is None else reference.like(grad, given)
        for grad, given in zip(grads, inputs, strict=False)
    )


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    inputs = args[N_RESULTS : N_RESULTS + 5]
    return tuple(inputs[0].new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the tensors for the backward pass and the primitives beside them. A backend asked for by name that has no
    backward says so here, where a program was traced without gradients and is run with them.
    """
    _, spec, backend = _unpack(inputs)
    if backend is not None and not spec.needs_grad:
        dispatch.choose(dataclasses.replace(spec, needs_grad=True), backend)
    mask_tensors = inputs[N_INPUTS + 2]
    ctx.save_for_backward(*inputs[:N_INPUTS], *mask_tensors, *output[:2], *LowParts.of_results(output[2:]))
    ctx.mark_non_differentiable(*output[2:])
    ctx.primitives = inputs[N_INPUTS:]
    ctx.set_materialize_grads(False)


def _args(ctx: Any, saved: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operator's arguments after the gradients, with the mask's tensors put back in their place."""
    code, numbers, _, *rest = ctx.primitives
    return (*saved[:N_INPUTS], code, numbers, list(saved[N_INPUTS:]), *rest)


def _no_grads(ctx: Any) -> tuple[Any, ...]:
    """What stands for the seed and the primitives among returned gradients.

    torch wants a list of None for a list of tensors, and takes any empty list for one.
    """

    def none(given: Any) -> list[None] | None:
        tensors = isinstance(given, (list, tuple)) and all(isinstance(each, Tensor) for each in given)
        return [None] * len(given) if tensors else None

    return (None, *map(none, ctx.primitives))


def _forward_grad(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, *_: None) -> tuple[Any, ...]:
    *saved, out, lse, lse_low, out_low = ctx.saved_tensors
    if d_out is None and d_lse is None:
        return (*(None,) * (N_INPUTS - 1), *_no_grads(ctx))
    d_out = torch.zeros_like(out) if d_out is None else d_out
    args = _args(ctx, tuple(saved))
    grads = BACKWARD(d_out, d_lse, out, lse, lse_low, out_low, *args)
    return (*_present(args, grads), *_no_grads(ctx))


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    d_out, d_lse, rest = *inputs[:2], inputs[N_RESULTS:]
    mask_tensors = rest[N_INPUTS + 2]
    ctx.save_for_backward(*rest[:N_INPUTS], *mask_tensors, d_out, d_lse)
    ctx.primitives = tuple(rest[N_INPUTS:])


def _start(tensor: Tensor) -> Tensor:
    """Where a derivative begins: apart from the other inputs, and still part of the graph that made the tensor."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def _backward_grad(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Second derivatives: differentiate the plain formulation twice. `out` and `lse` count as functions of the
    inputs. Third and further ones differentiate this in turn.
    """
    *saved, d_out, d_lse = ctx.saved_tensors
    inputs, spec, _ = _unpack(_args(ctx, tuple(saved)))
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = inputs._over(_start)
        primals = leaves.differentiable
        results = reference.plain(spec, leaves)
        given = d_out, torch.zeros_like(results[1]) if d_lse is None else d_lse
        cotangents = [_start(each) for each in given]
        first = torch.autograd.grad(results, primals, cotangents, create_graph=True, materialize_grads=True)
    weights = [grad for grad, leaf in zip(grads, leaves, strict=False) if leaf is not None]
    *d_primals, dd_out, dd_lse = torch.autograd.grad(
        first, [*primals, *cotangents], weights, create_graph=further, materialize_grads=True
    )
    return (
        dd_out,
        None if d_lse is None else dd_lse,
        *(None,) * (N_RESULTS - 2),
        *leaves.in_place_of(d_primals),
        *_no_grads(ctx),
    )


def _register_flops() -> None:
    """FLOP formulas for torch.utils.flop_counter, in its own convention: hidden pairs count too."""
    from torch.utils.flop_counter import register_flop_formula

    def spec(*shapes: Any) -> AttnSpec:
        meta = [torch.empty(tuple(shape), device="meta") for shape in shapes]
        return AttnSpec.from_flat(AttnInputs(*meta), FlatSpec("Full", [], [], 1.0, None, 0.0, True, False))

    @register_flop_formula(torch.ops.fastattn.attention_forward)
    def _forward_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return spec(query, key, value).flops("fwd")

    @register_flop_formula(torch.ops.fastattn.attention_backward)
    def _backward_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return spec(*args[N_RESULTS : N_RESULTS + 3]).flops("bwd")


class _AfterImport:
    """Runs a function when a module gets imported, without importing it: torch.utils.flop_counter pulls triton in."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self.module, self.then = module, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """What the usual finder says; only a spec that is then imported, and not merely asked for, ends the wait."""
        if name != self.module:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path, target)
        if found is not None and found.loader is not None:
            load = found.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self.then()

            found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found


def _latest(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of that name in whichever import of this module is the process's now."""

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        return getattr(sys.modules.get(__name__), function.__name__, function)(*args, **named)

    return call


def _register() -> None:
    """Give the operators what they do."""
    library = process.kept("operators")
    for name, run, fake, save, grad in (
        ("attention_forward", _forward, _forward_fake, _save, _forward_grad),
        ("attention_backward", _backward, _backward_fake, _save_backward, _backward_grad),
    ):
        library.impl(name, _latest(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastattn::{name}", _latest(fake), lib=library)
        torch.library.register_autograd(f"fastattn::{name}", _latest(grad), setup_context=_latest(save), lib=library)
    if "torch.utils.flop_counter" in sys.modules:
        _register_flops()
    else:
        sys.meta_path.insert(0, _AfterImport("torch.utils.flop_counter", _register_flops))


if _FIRST:
    _register()
