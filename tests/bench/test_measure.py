"""The clock takes turns and stops in time; memory is what a call really took; the model's verdict is strict."""

import sys

import pytest
import torch

from fastattn.bench.cases.operations import OPS, bench_cases
from fastattn.bench.cases.workload import Workload
from fastattn.bench.measure.clock import Budget, CpuClock, Timing, measure, quartiles
from fastattn.bench.measure.env import environment
from fastattn.bench.measure.memory import peak_bytes
from fastattn.bench.measure.providers.table import provider
from fastattn.bench.models import minilm


class Recorder:
    """A clock that writes down who was asked, and gives each sample a length."""

    def __init__(self, seconds):
        self.seconds, self.order = seconds, []

    def warm_up(self, call, timing):
        call()

    def sample(self, call, timing):
        self.order.append(call())
        timing.spent += self.seconds
        timing.samples_ms.append(1e3 * self.seconds)

    def finish(self):
        self.order.append(".")


def test_rounds_go_through_all_providers_and_turn():
    clock = Recorder(1.0)
    measure({name: (lambda name=name: name) for name in "abc"}, clock, Budget(rounds=3, min_time=0.1, max_time=9))
    assert "".join(clock.order) == "abcbcacab."


def test_whose_turn_it_is_is_said_before_each_call():
    clock, turns = Recorder(1.0), []
    calls = {name: (lambda name=name: turns.append(f"called {name}") or name) for name in "ab"}
    measure(calls, clock, Budget(rounds=2, min_time=0.1, max_time=9), turns.append)
    assert turns == [each for name in "ab" + "abba" for each in (name, f"called {name}")]


def test_a_slow_call_stops_at_its_time_but_not_before_three_samples():
    timings = measure({"slow": lambda: None}, Recorder(5.0), Budget(rounds=50, min_time=1, max_time=6))
    assert len(timings["slow"].samples_ms) == 3


def test_a_quick_call_goes_on_until_its_least_time():
    timings = measure({"quick": lambda: None}, Recorder(0.01), Budget(rounds=3, min_time=0.2, max_time=9))
    assert len(timings["quick"].samples_ms) == 20


def test_a_call_that_raises_leaves_the_others_their_time():
    def fail():
        raise RuntimeError("no")

    timings = measure({"bad": fail, "good": lambda: None}, CpuClock(), Budget(3, 0.001, 0.01))
    assert str(timings["bad"].failure) == "no" and len(timings["good"].samples_ms) >= 3


def test_short_calls_are_repeated_within_a_sample():
    timing = Timing()
    CpuClock().warm_up(lambda: None, timing)
    assert timing.inner > 100


def test_quartiles_of_few_samples():
    assert quartiles([3.0]) == (3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident set is read from /proc")
@pytest.mark.parametrize("mebibytes", [8, 64])
def test_peak_memory_counts_what_is_freed_again(mebibytes, cpu):
    def call():
        both = [torch.ones(mebibytes << 18), torch.ones(mebibytes << 18)]
        return both[:0]

    call()
    peak, method = peak_bytes(call, cpu)
    assert method != "none"
    assert peak == pytest.approx(2 * mebibytes << 20, rel=0.15)


def test_the_environment_block_is_plain_json_and_knows_the_machine():
    block = environment("cpu", ["bench", "-N", "1k"])
    assert block["command"] == "fastattn bench -N 1k"
    assert block["torch"] == torch.__version__ and block["cpu"] and block["threads"] >= 1


IN_PARTS = [name for name, op in OPS.items() if op.form in ("4-D", "3-D mask") and not op.dropout_p]


@pytest.mark.parametrize("op", IN_PARTS)
def test_large_cases_are_checked_head_by_head_with_the_same_verdict(op, cpu, monkeypatch):
    [case] = bench_cases("cpu", ops=[op], q_len=[24], num_heads=[8], head_dim=[8], batch=[2])
    whole = Workload(case, cpu)
    results = whole.results("fwd+bwd", provider("sdpa-math").make(whole, "fwd+bwd"))
    monkeypatch.setattr("fastattn.bench.cases.workload.SLICE_PAIRS", {"cpu": 1})
    by_head = Workload(case, cpu)
    everything, parts = whole.check(results), by_head.check(results)
    assert everything.ok and parts.ok
    assert everything.heads_checked == parts.heads_checked == 16
    assert parts.worst.max_error == pytest.approx(everything.worst.max_error, rel=1e-6, abs=1e-9)
    results["dk"][-1, -1] += 0.1
    assert not by_head.check(results).ok


def test_the_sentences_are_six_topics_of_six():
    rows = minilm.sentences()
    topics = [topic for topic, _ in rows]
    assert {topics.count(topic) for topic in topics} == {6} and len(set(topics)) == 6
    assert len({text for _, text in rows}) == 36


def result(**changes):
    facts = {
        "model": "m", "sentences": 1, "calls_fastattn": 6, "calls_left_with_torch": 0, "least_cosine": 1.0,
        "torch_ms": [1.0], "fastattn_ms": [1.0], "same_neighbours": 1, "same_topic": 1, "neighbours": [],
    }  # fmt: skip
    return minilm.ModelResult(**{**facts, **changes})


@pytest.mark.parametrize(
    "changes, ok",
    [
        ({}, True),
        ({"least_cosine": 0.99985}, False),
        ({"least_cosine": float("nan")}, False),
        ({"calls_fastattn": 0}, False),
        ({"calls_left_with_torch": 1}, False),
    ],
    ids=["right", "far", "nan", "never-reached", "not-all-reached"],
)
def test_the_model_is_right_only_if_close_and_through_fastattn(changes, ok):
    assert result(**changes).ok is ok


def test_without_the_model_package_a_sentence_says_how_to_get_it(bench, monkeypatch):
    monkeypatch.setattr(minilm, "missing", lambda: minilm.MISSING)
    code, text, _ = bench("--model", "minilm", "--op", "self", "--providers", "sdpa", "--mode", "fwd")
    assert code == 0 and "pip install 'fastattn[models]'" in text.out


def test_the_real_model_gives_the_same_embeddings(cpu, monkeypatch):
    pytest.importorskip(minilm.PACKAGE)
    monkeypatch.setattr(minilm, "ROUNDS", 1)
    found = minilm.run_model(cpu, lambda words: None)
    assert found.ok, found
    assert found.same_neighbours == found.sentences
    assert found.calls_fastattn >= 6
