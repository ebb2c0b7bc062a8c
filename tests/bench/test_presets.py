"""Presets: sizes of known models as words of the command line."""

import pytest
import torch

from fastattn.bench import options
from fastattn.bench.cases.presets import PRESETS, preset_cases
from fastattn.bench.measure.run import plan
from fastattn.cli import main

SHORT = ["--rounds", "3", "--min-time", "0.001", "--max-time", "0.05", "--providers", "fastattn,sdpa"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_cases_on_both_devices_of_one_width_and_says_its_source(name):
    both = {device: [case for case, _ in preset_cases([name], device, None)] for device in ("cpu", "cuda")}
    widths = [{(case.op, case.num_heads, case.num_kv_heads, case.head_dim) for case in both[name]} for name in both]
    assert widths[0] == widths[1]
    pairs = {name: sum(case.batch * case.num_heads * case.q_len * case.kv_len for case in both[name]) for name in both}
    assert pairs["cpu"] < pairs["cuda"]
    assert {case.dtype for case in both["cpu"]} == {"fp32"} and {case.dtype for case in both["cuda"]} == {"bf16"}
    assert any(year in PRESETS[name].source for year in map(str, range(2017, 2027)))


@pytest.mark.parametrize(
    "name, width", [("llama3-8b-prefill", 4096), ("llama3-decode", 4096), ("vit-b", 768), ("clip-text", 512),
                    ("whisper", 768), ("superglue-2k", 256)]
)  # fmt: skip
def test_heads_times_head_dim_is_the_models_width(name, width):
    assert {case.num_heads * case.head_dim for case, _ in preset_cases([name], "cuda", None)} == {width}


def test_swin_has_one_row_of_windows_a_stage():
    cases = [case for case, _ in preset_cases(["swin"], "cpu", None)]
    assert [(case.batch, case.num_heads) for case in cases] == [(256, 3), (64, 6), (16, 12), (4, 24)]


@pytest.mark.parametrize("words", ["vit-b --dtype bf16 clip-text", "--dtype bf16 vit-b clip-text"])
def test_words_and_flags_come_in_any_order(words, cpu):
    rows = plan(options.parse([*words.split(), "--mode", "fwd", "--providers", "sdpa"]), cpu)
    assert [row.name for row in rows] == [
        "self/bf16/B8-H12-N197-D64/fwd/sdpa", "causal/bf16/B16-H8-N77-D64/fwd/sdpa"
    ]  # fmt: skip


def test_a_model_that_only_writes_has_no_backward(cpu):
    assert {row.mode for row in plan(options.parse(["llama3-decode"]), cpu)} == {"fwd"}
    assert {row.mode for row in plan(options.parse(["llama3-decode", "--mode", "bwd"]), cpu)} == {"bwd"}


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["lama3-decode"], "preset: 'lama3-decode' is not known; there are llama3-8b-prefill"),
        (["lama3-decode"], "did you mean 'llama3-decode'?"),
        (["vit-b", "-N", "4k", "--op", "self"], "vit-b bring their own operation and sizes, and ops, q_len came too"),
    ],
)
def test_a_wrong_word_is_a_sentence(words, sentence, capsys):
    assert main(["bench", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_list_shows_presets_with_their_sources(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["bench", "--list", "vit-b"]) == 0
    text = capsys.readouterr().out
    assert all(name in text and preset.source in text for name, preset in PRESETS.items())
    assert "self/" in text and "causal/" not in text


def test_a_preset_runs_as_a_user_types_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert (
        main(["bench", "clip-text", "--device", "cpu", "--mode", "fwd", "--out", "out", "--plot", "p.svg", *SHORT]) == 0
    )
    text = capsys.readouterr().out
    assert "B16 H8 N77 D64" in text and "fastattn (" in text
