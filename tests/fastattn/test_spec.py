"""The spec: what it refuses and how, what it counts, and its way through an operator's schema."""

import pytest
import torch

from fastattn import attention, attention_weights
from fastattn.masks import Causal, Dense, Full, Lengths, Packed, Segments, Window
from fastattn.masks.paged import Paged
from fastattn.spec import AttnInputs, AttnSpec
from fastattn.testing import CASES, make_inputs


def t(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


Q, K = t(2, 4, 5, 8), t(2, 2, 7, 8)

REFUSED = {
    "rank": ((t(4, 5, 8), K, K), {}, ValueError, r"query: 4 dimensions .* got shape \[4, 5, 8\]"),
    "key-rank": ((Q, t(2, 7, 8), K), {}, ValueError, "key: 4 dimensions"),
    "not-a-tensor": ((Q, None, K), {}, TypeError, "key: a tensor is needed, got NoneType"),
    "query-not-a-tensor": ((3, K, K), {}, TypeError, "query: a tensor is needed, got int"),
    "batch": ((Q, t(1, 2, 7, 8), t(1, 2, 7, 8)), {}, ValueError, r"batch sizes must be equal .* got 2, 1, 1"),
    "heads": ((Q, t(2, 3, 7, 8), t(2, 3, 7, 8)), {}, ValueError, "must be a multiple .* got 4 and 3"),
    "no-key-heads": ((Q, t(2, 0, 7, 8), t(2, 0, 7, 8)), {}, ValueError, "must be a multiple .* got 4 and 0"),
    "value-heads": ((Q, K, t(2, 1, 7, 8)), {}, ValueError, "numbers of heads must be equal, got 2 and 1"),
    "lengths": ((Q, K, t(2, 2, 6, 8)), {}, ValueError, "lengths must be equal, got key 7 and value 6"),
    "head-dim": ((Q, t(2, 2, 7, 4), K), {}, ValueError, "same head_dim"),
    "no-head-dim": ((t(1, 1, 2, 0),) * 3, {}, ValueError, "at least 1"),
    "dtype": ((Q, K.half(), K), {}, ValueError, "key: .*must share a dtype; query is torch.float32, key torch.float16"),
    "integers": ((Q.int(), K.int(), K.int()), {}, ValueError, "dtype must be one of float16, .* got torch.int32"),
    "device": ((Q, K.to("meta"), K), {}, ValueError, "query is on cpu, key on meta"),
    "mask-kind": ((Q, K, K), {"mask": "causal"}, TypeError, "mask: a fastattn.masks.Mask, a bool tensor .* got str"),
    "mask-dtype": ((Q, K, K), {"mask": torch.ones(5, 7)}, ValueError, "bool .True = attend.*torch.float32.*bias="),
    "mask-ints": ((Q, K, K), {"mask": torch.ones(5, 7, dtype=torch.uint8)}, ValueError, "torch.uint8"),
    "mask-shape": (
        (Q, K, K),
        {"mask": torch.ones(5, 6) > 0},
        ValueError,
        r"\[5, 6\] does not broadcast to .*\[2, 4, 5, 7\]",
    ),
    "mask-heads": ((Q, K, K), {"mask": torch.ones(2, 2, 5, 7) > 0}, ValueError, "does not broadcast"),
    "mask-rank": ((Q, K, K), {"mask": torch.ones(1, 1, 1, 5, 7) > 0}, ValueError, "at most 4 dimensions"),
    "mask-batch": ((Q, K, K), {"mask": Lengths(torch.tensor([1, 2, 3]))}, ValueError, r"kv_lengths must be \[2\]"),
    "mask-device": (
        (Q, K, K),
        {"mask": Causal(offset=torch.zeros(2, dtype=torch.int64, device="meta"))},
        ValueError,
        "device",
    ),
    "mask-ids": ((Q, K, K), {"mask": Segments(torch.zeros(2, 5).long())}, ValueError, r"kv_ids must be \[2 or 1, 7\]"),
    "mask-packed": (
        (Q, K, K),
        {"mask": Packed(*(torch.tensor([0, 5]),) * 2)},
        ValueError,
        "batch must be 1, got batch 2",
    ),
    "inner-mask": ((Q, K, K), {"mask": Causal() & Dense(torch.ones(3, 3) > 0)}, ValueError, "does not broadcast"),
    "bias-dtype": ((Q, K, K), {"bias": t(5, 7).half()}, ValueError, "bias: float32 or the query's dtype"),
    "bias-bool": ((Q, K, K), {"bias": t(5, 7) > 0}, ValueError, "a bool mask goes into mask="),
    "bias-shape": ((Q, K, K), {"bias": t(7, 5)}, ValueError, r"bias: shape \[7, 5\] does not broadcast"),
    "sinks-shape": ((Q, K, K), {"sinks": t(2)}, ValueError, r"sinks: one number per query head, \[4\]"),
    "sinks-dtype": ((Q, K, K), {"sinks": torch.arange(4)}, ValueError, "sinks: a floating-point tensor"),
    "softcap": (
        (Q, K, K),
        {"softcap": 0.0},
        ValueError,
        "softcap: a positive finite number or None is needed, 1.18e-38 to 3.4e\\+38, got 0.0",
    ),
    "softcap-nan": ((Q, K, K), {"softcap": float("nan")}, ValueError, "softcap"),
    "softcap-inf": ((Q, K, K), {"softcap": float("inf")}, ValueError, "softcap: a positive finite number"),
    "softcap-text": ((Q, K, K), {"softcap": "3"}, TypeError, "softcap: a Python number is needed, got str"),
    "softcap-too-small": ((Q, K, K), {"softcap": 1e-39}, ValueError, "softcap: .* got 1e-39"),
    "softcap-beyond-float32": ((Q, K, K), {"softcap": 1e39}, ValueError, r"softcap: .* got 1e\+39"),
    "scale": ((Q, K, K), {"scale": float("inf")}, ValueError, "scale: a finite number"),
    "scale-nan": ((Q, K, K), {"scale": float("nan")}, ValueError, "scale: a finite number is needed.*got nan"),
    "scale-beyond-float32": ((Q, K, K), {"scale": -1e39}, ValueError, r"at most 3.4e\+38 in size, got -1e\+39"),
    "scale-huge": ((Q, K, K), {"scale": 10**400}, ValueError, "scale: a finite number"),
    "scale-tensor": ((Q, K, K), {"scale": t(1).requires_grad_()}, TypeError, "got Tensor; a learned factor goes into"),
    "dropout-none": ((Q, K, K), {"dropout_p": None}, TypeError, "dropout_p: a Python number is needed, got NoneType"),
    "sparse": ((Q.to_sparse(), K, K), {}, ValueError, "query: a dense tensor is needed, got torch.sparse_coo"),
    "nested": (
        (Q, torch.nested.nested_tensor([K[0]], layout=torch.jagged), K),
        {},
        ValueError,
        "key: a dense tensor is needed, got nested",
    ),
    "dropout": ((Q, K, K), {"dropout_p": 1.5}, ValueError, "dropout_p: a probability from 0 to 1 is needed, got 1.5"),
    "dropout-negative": ((Q, K, K), {"dropout_p": -0.5}, ValueError, "dropout_p"),
    "seed": ((Q, K, K), {"dropout_p": 0.5, "dropout_seed": torch.tensor([1.0])}, ValueError, "dropout_seed"),
    "score": ((Q, K, K), {"score": "additive"}, ValueError, "score: only DotProduct.. .the default. is there yet"),
    "normalizer": ((Q, K, K), {"normalizer": "sigmoid"}, ValueError, "normalizer: only Softmax.. .the default."),
    "backend": ((Q, K, K), {"backend": "tritn"}, ValueError, "unknown backend 'tritn'; there are .*nearest: 'triton'"),
    "backend-case": ((Q, K, K), {"backend": "CPU"}, ValueError, "unknown backend 'CPU'; there are .*nearest: 'cpu'"),
    "backend-number": ((Q, K, K), {"backend": 3}, ValueError, "unknown backend 3; there are [a-z, ]*$"),
    "seed-unused": ((Q, K, K), {"dropout_seed": torch.tensor([1.0])}, ValueError, "dropout_seed: an int64 tensor"),
    "scale-bool": ((Q, K, K), {"scale": True}, TypeError, "scale: a Python number is needed, got bool"),
    "softcap-bool": ((Q, K, K), {"softcap": True}, TypeError, "softcap: a Python number is needed, got bool"),
    "deterministic": ((Q, K, K), {"deterministic": "no"}, TypeError, "deterministic: True or False .* got 'no'"),
    "mask-class": (
        (Q, K, K),
        {"mask": Window},
        TypeError,
        r"mask: the class Window itself is none; Window\(\.\.\.\) makes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_a_sentence_and_nothing_is_computed(name, monkeypatch):
    tensors, arguments, error, says = REFUSED[name]
    monkeypatch.setattr("fastattn.ops.attention", lambda *_: pytest.fail("something was computed"))
    with pytest.raises(error, match=says):
        attention(*tensors, **arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"heads": "max"}, "heads: 'all' or 'mean' is needed"),
        ({"rows": [[1]]}, "rows: a list of ints"),
        ({"rows": [0.5]}, "rows: a list of ints"),
        ({"rows": slice(0, 2)}, r"rows: a list of ints .* got slice\(0, 2, None\)"),
        ({"rows": [5]}, "rows: .*from -5 to 4"),
        ({"rows": [-6]}, "rows: .*from -5 to 4"),
        ({"lse": t(2, 4, 6)}, r"lse: floating \[batch, num_heads, q_len\] = \[2, 4, 5\] on cpu"),
        ({"lse": t(2, 4, 5).long()}, "lse: floating .* got torch.int64"),
        ({"lse": t(2, 4, 5).to("meta")}, "lse: .* on cpu is needed, .* on meta"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_input_to_attention_weights(arguments, says):
    with pytest.raises((TypeError, ValueError), match=says):
        attention_weights(Q, K, **arguments)


def test_flops_and_bytes():
    spec = AttnSpec.of(AttnInputs(t(2, 4, 6, 8), t(2, 2, 10, 8), t(2, 2, 10, 4)), mask=Window(2, 0))
    pairs = 2 * 4 * 6 * 10
    assert spec.flops() == 2 * pairs * (8 + 4)
    assert spec.flops("bwd") == 2 * pairs * (3 * 8 + 2 * 4)
    assert spec.flops("fwd+bwd") == spec.flops() + spec.flops("bwd")
    assert spec.visible_pairs() == 2 * 4 * 6 * 3
    assert spec.flops(useful=True) == 2 * spec.visible_pairs() * 12
    queries, keys, lse = 2 * 4 * 6 * 12, 2 * 2 * 10 * 12, 2 * 4 * 6
    assert spec.bytes() == 4 * (queries + keys + lse)
    with pytest.raises(ValueError, match="mode: one of"):
        spec.flops("backward")


@pytest.mark.parametrize("name", CASES)
def test_a_spec_survives_the_operator_border(name):
    problem = make_inputs(CASES[name])
    spec = problem.spec
    again = AttnSpec.from_flat(problem.inputs, spec.flat())
    for field in AttnSpec.__dataclass_fields__:
        if field != "mask":
            assert getattr(again, field) == getattr(spec, field), field
    sizes = spec.q_len, spec.kv_len
    assert torch.equal(again.mask.dense(*sizes), spec.mask.dense(*sizes))
    assert type(again.mask) is type(spec.mask)


def test_whether_gradients_are_wanted_is_said_where_the_call_is_made():
    """An operator's kernel runs with grad mode off, and a program that was traced without gradients may run with it."""
    inputs = AttnInputs(*(t(1, 2, 3, 4) for _ in range(3)), bias=t(3, 3).requires_grad_())
    with torch.no_grad():
        quiet = AttnSpec.of(inputs)
        loud = AttnSpec.from_flat(inputs, quiet.flat()._replace(needs_grad=True))
    assert not quiet.needs_grad and not AttnSpec.from_flat(inputs, quiet.flat()).needs_grad
    assert loud.needs_grad and loud.flat().needs_grad and AttnSpec.of(inputs).needs_grad


def test_zero_heads_and_zero_batch_are_problems_too():
    for shape in ((0, 2, 3, 4), (2, 0, 3, 4)):
        empty = torch.randn(shape, requires_grad=True)
        out = attention(empty, empty, empty, mask=Full())
        assert out.shape == shape
        out.sum().backward()


def test_a_spec_in_blocks_round_trips():
    table = torch.tensor([[1, 0], [2, 2]], dtype=torch.int32)
    inputs = AttnInputs(t(2, 3, 1, 8), t(4, 3, 5, 8), t(4, 3, 5, 6))
    spec = AttnSpec.of(inputs, mask=Paged(Causal(offset=torch.tensor([3, 4])), table, 5))
    again = AttnSpec.from_flat(inputs, spec.flat())
    assert (spec.batch, spec.kv_len, spec.num_kv_heads) == (2, 10, 3) == (again.batch, again.kv_len, again.num_kv_heads)
    assert torch.equal(again.pages.table, table) and again.pages.block_size == 5
    assert isinstance(again.mask, Causal) and isinstance(spec.mask, Causal)
