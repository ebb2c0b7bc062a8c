"""The smallest call of a backend, as `make gpu` makes it."""

import json

import torch

import fastattn
from fastattn.bench.gpu import smoke


def test_each_call_brings_other_tensors(monkeypatch, capsys):
    """The first is Triton's own launch and later ones are packed: one call alone would say nothing of these."""
    seen, attention = [], fastattn.attention

    def watched(query, *rest, **options):
        seen.append(query.data_ptr())
        return attention(query, *rest, **options)

    monkeypatch.setattr(fastattn, "attention", watched)
    assert smoke.main(["reference", "cpu"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is True and 0 <= said["difference"] < smoke.CLOSE
    assert len(set(seen)) == smoke.CALLS == 3


def test_a_later_call_that_is_wrong_is_a_failure(monkeypatch, capsys):
    """NaN too."""
    calls, attention = [], fastattn.attention
    for wrong in (1.0, torch.nan):
        calls.clear()

        def last_one_wrong(*given, wrong=wrong, **options):
            calls.append(None)
            return attention(*given, **options) + (wrong if len(calls) == smoke.CALLS else 0.0)

        monkeypatch.setattr(fastattn, "attention", last_one_wrong)
        assert smoke.main(["reference", "cpu"]) == 1
        assert json.loads(capsys.readouterr().out)["ok"] is False
