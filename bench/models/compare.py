"""One architecture, run three ways from the same weights and inputs: exactly (the plain formula in float64), with its
library's eager attention, with fastattn.

What is compared is how far the last two are from the first: outputs, and the gradients of every parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fastattn import functional, ops
from fastattn.bench.models import oracles
from fastattn.bench.models.zoo import LENGTH, TARGET, WINDOW, Inputs, Model, padded, randomized
from fastattn.masks import Dense

SEED = 11
STEPS = 4
"""Tokens that are decoded one by one."""
SPARE_SLOTS = 2
"""Empty slots of a static cache."""
FACTOR, SLACK = 2.0, 8.0
"""What is right: at most FACTOR times eager's own distance from float64, and SLACK roundings more."""
SMALLEST = 0.1
"""A parameter's gradient counts by its own largest value, or by this share of the largest of all: that of a key's bias
is 0 but for rounding.
"""
OUTPUTS = ("logits", "last_hidden_state", "sample", "text_embeds", "image_embeds")
DROPPED = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop", "attn_dropout")


@dataclass
class Seen:
    """What reached fastattn in one run: every call's mask, and how often a table of [q_len, kv_len] was among them, or
    was made of one by the model.
    """

    masks: list[str] = field(default_factory=list)
    tables: int = 0
    biases: int = 0


@dataclass(frozen=True)
class Compared:
    """One row: the largest distance from float64, as a share of the largest value; None where nothing is compared."""

    model: str
    case: str
    dtype: str
    forward: float
    forward_eager: float
    gradient: float | None
    gradient_eager: float | None
    seen: Seen

    @property
    def ok(self) -> bool:
        """Whether both lie within what eager's own distance allows."""
        slack = SLACK * torch.finfo(getattr(torch, self.dtype)).eps
        pairs = [(self.forward, self.forward_eager), (self.gradient, self.gradient_eager)]
        return all(ours <= FACTOR * theirs + slack for ours, theirs in pairs if ours is not None and theirs is not None)


def cases(model: Model) -> list[str]:
    """eval, train, and where they make sense: padded sides, decoding with a growing and with a static cache."""
    names = ["eval", "train", *(f"{side} padding" for side in model.pads)]
    if model.decodes:
        names += ["decoding", "decoding, static cache"]
        names += ["decoding, left padding"] if "left" in model.pads else []
    return names


def compare(model: Model, case: str, dtype: torch.dtype, *, off: float = 1.0) -> Compared:
    """Run one case. `off` scales fastattn's queries, to see what a wrong scale does."""
    torch.manual_seed(SEED)
    net = randomized(model.build()).to(dtype)
    inputs = model.inputs()
    for side in ("left", "right"):
        if f"{side} padding" in case:
            inputs = padded(inputs, side)
    inputs = _cast(inputs, dtype)
    exact_net, exact_inputs = copy.deepcopy(net).double(), _cast(inputs, torch.float64)
    gradients = case != "eval" and not case.startswith("decoding")
    if case == "train":
        for each in (net, exact_net):
            _train_without_dropout(each)
    seen = Seen()
    exact = _run(model, exact_net, exact_inputs, case, gradients, "exact")
    eager = _run(model, net, inputs, case, gradients, "eager")
    with watching(seen, off):
        ours = _run(model, net, inputs, case, gradients, "fastattn")
    forward, forward_eager = (_distance([each[0]], [exact[0]]) for each in (ours, eager))
    gradient = gradient_eager = None
    if gradients:
        gradient, gradient_eager = (_distance(each[1], exact[1]) for each in (ours, eager))
    return Compared(
        model.name, case, str(dtype).removeprefix("torch."), forward, forward_eager, gradient, gradient_eager, seen
    )


@contextmanager
def watching(seen: Seen, off: float = 1.0) -> Iterator[None]:
    """Notes what `fastattn.attention` is called with; `off` scales its queries."""
    inner = ops.attention

    def attention(inputs: Any, spec: Any, backend: str | None) -> Any:
        atoms = spec.mask.atoms()
        seen.masks.append(" & ".join(sorted({type(atom).__name__ for atom in atoms})))
        seen.tables += sum(isinstance(atom, Dense) and min(atom.table.shape[-2:]) > 1 for atom in atoms)
        bias = inputs.bias
        seen.biases += bias is not None and bias.dim() > 1 and min(bias.shape[-2:]) > 1
        return inner(inputs._replace(query=inputs.query * off) if off != 1.0 else inputs, spec, backend)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(functional.ops, "attention", attention))
        stack.enter_context(_tables_of_models(seen))
        yield


@contextmanager
def _tables_of_models(seen: Seen) -> Iterator[None]:
    """Notes where a transformers model computes with its mask, which makes the table of it."""
    from fastattn.integrations.transformers.model_mask import ModelMask

    inner = ModelMask.table

    def table(mask: ModelMask) -> Tensor:
        seen.tables += 1
        return inner(mask)

    with mock.patch.object(ModelMask, "table", table):
        yield


@contextmanager
def computing(model: Model, net: Any, way: str) -> Iterator[None]:
    """The model on "fastattn", on its library's own "eager" attention, or on the "exact" formula."""
    import fastattn

    with ExitStack() as stack:
        if model.by == "patch":
            if way == "fastattn":
                stack.enter_context(fastattn.patch())
        elif model.by == "replace":
            if way == "fastattn":
                from fastattn.integrations import transformers

                for undo in reversed(transformers.replace(net)[1]):
                    stack.callback(undo)
        else:
            from fastattn.integrations import transformers

            if way == "fastattn" and model.by == "truncate":
                stack.callback(transformers.truncate(net, WINDOW, WINDOW))
            oracles.register()
            names = {"fastattn": transformers.NAME, "exact": oracles.EXACT, "eager": "eager"}
            truncated = {"exact": oracles.EXACT_TRUNCATED, "eager": oracles.EAGER_TRUNCATED}
            net.set_attn_implementation({**names, **(truncated if model.by == "truncate" else {})}[way])
        yield


def _run(
    model: Model, net: nn.Module, inputs: Inputs, case: str, gradients: bool, way: str
) -> tuple[Tensor, list[Tensor]]:
    """Outputs of real tokens, and every parameter's gradient (none where they are not wanted)."""
    with computing(model, net, way), torch.set_grad_enabled(gradients):
        if case.startswith("decoding"):
            return _decode(net, inputs, static="static" in case), []
        out = _real(_output(net(**inputs)), inputs)
        if not gradients:
            return out, []
        torch.manual_seed(SEED)
        net.zero_grad()
        (out * torch.randn(out.shape).to(out.dtype)).sum().backward()
        return out.detach(), [p.grad for p in net.parameters() if p.grad is not None]


def _output(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    if isinstance(result, tuple) and not hasattr(result, "keys"):
        return result[0]
    found = [getattr(result, name) for name in OUTPUTS if getattr(result, name, None) is not None]
    return found[0] if len(found) == 1 else torch.cat([each.flatten() for each in found])


def _real(out: Tensor, inputs: Inputs) -> Tensor:
    """Of outputs of tokens [batch, LENGTH, ...], those that are no padding."""
    real = inputs.get("attention_mask")
    return out if real is None or out.shape[:2] != real.shape else out[real.bool()]


def _decode(net: Any, inputs: Inputs, *, static: bool) -> Tensor:
    """Logits of a prefill and of STEPS tokens after it, one by one, with a cache."""
    import transformers

    paired = "decoder_input_ids" in inputs
    length = TARGET if paired else LENGTH
    config = net.config.get_text_config(decoder=True)

    def make(slots: int) -> Any:
        if static:
            return transformers.StaticCache(config=config, max_cache_len=slots)
        return transformers.DynamicCache(config=config)

    cache = make(length + SPARE_SLOTS)
    fixed: dict[str, Any] = {}
    if paired:
        cache = transformers.EncoderDecoderCache(cache, make(LENGTH))
        real = {name: each for name, each in inputs.items() if name == "attention_mask"}
        fixed["encoder_outputs"] = net.get_encoder()(input_ids=inputs["input_ids"], **real)
    name = "decoder_input_ids" if paired else "input_ids"
    found = []
    for start, stop in [(0, length - STEPS), *((each, each + 1) for each in range(length - STEPS, length))]:
        step = {name: inputs[name][:, start:stop], **fixed}
        if "attention_mask" in inputs:
            step["attention_mask"] = inputs["attention_mask"] if paired else inputs["attention_mask"][:, :stop]
        found.append(net(**step, past_key_values=cache, use_cache=True).logits)
    return _real(torch.cat(found, 1), {} if paired else inputs)


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {
        name: each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each
        for name, each in inputs.items()
    }


def _train_without_dropout(net: nn.Module) -> None:
    """Training mode with nothing random in it."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in DROPPED:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        for name in (*DROPPED, "attention_probs_dropout_prob", "hidden_dropout_prob", "encoder_layerdrop"):
            if isinstance(getattr(config, name, None), float):
                setattr(config, name, 0.0)


def _distance(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference, each tensor's as a share of its largest value."""
    largest = max((float(each.abs().max()) for each in exact if each.numel()), default=0.0)
    worst = 0.0
    for mine, theirs in zip(ours, exact, strict=True):
        if theirs.numel():
            scale = max(float(theirs.abs().max()), SMALLEST * largest)
            apart = (mine.double() - theirs.double()).abs().max() / max(scale, torch.finfo(torch.float64).tiny)
            worst = max(worst, float(apart.nan_to_num(torch.inf)))
    return worst
