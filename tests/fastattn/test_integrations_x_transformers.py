"""x-transformers: its decoders and encoders exchanged and put back. entmax: a normaliser that is not there yet."""

import copy

import pytest
import torch
from torch import nn

from fastattn import attention, patch, replace_attention
from fastattn.dispatch import BackendUnavailable

x_transformers = pytest.importorskip("x_transformers", reason="needs x-transformers, of the extra models")
Attend, Decoder, Encoder, Wrapper = (
    x_transformers.attend.Attend, x_transformers.Decoder, x_transformers.Encoder, x_transformers.TransformerWrapper,
)  # fmt: skip
SMALL = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}
MODELS = {
    "decoder": (Decoder, {}),
    "decoder, rotary, grouped heads": (Decoder, {"rotary_pos_emb": True, "attn_kv_heads": 2}),
    "decoder, one key head": (Decoder, {"attn_one_kv_head": True}),
    "decoder, ALiBi": (Decoder, {"alibi_pos_bias": True}),
    "encoder": (Encoder, {}),
    "encoder, normed": (Encoder, {"attn_qk_norm": True}),
    "encoder, L2 distance": (Encoder, {"attn_l2_distance": True}),
    "encoder, zeros to look at": (Encoder, {"attn_add_zero_kv": True}),
}
REAL = torch.ones(2, 9, dtype=torch.bool)
REAL[1, 6:] = False


def made(name, **more):
    kind, options = MODELS[name]
    torch.manual_seed(0)
    model = Wrapper(num_tokens=50, max_seq_len=16, attn_layers=kind(**SMALL, **options, **{"attn_flash": True, **more}))
    with torch.no_grad():
        for parameter in model.parameters():  # so that scores are no trifle
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    return model.eval(), {"x": tokens} | ({"mask": REAL} if kind is Encoder else {})


def results(model, given):
    out = model(**given)[REAL]
    return out, *torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)


def state(model):
    return {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", MODELS)
def test_exchanged_and_put_back(name, calls, same):
    model, given = made(name)
    fired = []
    attend = next(module for module in model.modules() if type(module) is Attend)
    attend.register_forward_hook(lambda *_: fired.append(1))
    want, before = results(model, given), state(model)
    same(results(made(name, attn_flash=False)[0], given), want)  # its own two ways agree
    assert not calls
    del fired[:]
    report = replace_attention(model)
    assert len(report) == 2 and isinstance(attend, Attend)
    have = results(model, given)
    same(have, want)
    assert len(calls) == 2 and len(fired) == 1
    assert torch.equal(copy.deepcopy(model)(**given), model(**given))
    assert {row.what for row in replace_attention(model).rows} == {"it is on fastattn already"}
    report.restore()
    assert state(model) == before
    del calls[:]
    for one, other in zip(results(model, given), want, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert not calls
    with patch():
        same(results(model, given), want)
    assert len(calls) == 2


def test_generating_with_its_cache(calls):
    model, given = made("decoder, rotary, grouped heads")
    wrapped = x_transformers.AutoregressiveWrapper(model)
    found = []
    for _ in range(2):
        found.append(wrapped.generate(given["x"], 5, temperature=0.0, cache_kv=True))
        replace_attention(wrapped)
    assert torch.equal(*found) and len(calls) == 10


def test_a_backend_by_name(calls):
    model, given = made("decoder")
    report = replace_attention(model, backend="reference")
    model(**given)
    assert calls == ["reference"] * 2
    report.restore()
    replace_attention(model.double(), backend="triton")
    with pytest.raises(BackendUnavailable, match="backend 'triton' cannot run this call"):
        model(**given)


def test_what_computes_the_weights_itself_is_left_alone(calls):
    model, given = made("encoder", attn_flash=False)
    before = state(model)
    report = replace_attention(model)
    rows = [row for row in report.rows if row.module == "Attend"]
    assert len(report) == 0 and len(rows) == 2
    assert all("attn_flash=True lets it call torch's SDPA" in row.what for row in rows)
    assert state(model) == before
    model(**given)
    assert not calls


class EntmaxAttention(nn.Module):
    def forward(self, x):
        return pytest.importorskip("entmax").entmax15(x @ x.mT / x.shape[-1] ** 0.5, dim=-1) @ x


def test_entmax_is_reserved_and_its_modules_are_left_alone():
    entmax = pytest.importorskip("entmax", reason="needs entmax, of the extra models")
    x = torch.randn(1, 2, 5, 8)
    for normalizer in (entmax.entmax15, entmax.Sparsemax(dim=-1)):
        with pytest.raises(ValueError, match=r"normalizer: only Softmax\(\) \(the default\) is there yet, got"):
            attention(x, x, x, normalizer=normalizer)
    model = nn.Sequential(EntmaxAttention())
    want = model(x)
    (row,) = replace_attention(model).rows
    assert not row.changed and "its forward calls none of torch's attention functions" in row.what
    with patch():
        assert torch.equal(model(x), want)
