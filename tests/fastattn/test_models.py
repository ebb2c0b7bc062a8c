"""Real architectures with random weights: fastattn's distance from the exact formula beside eager attention's own."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fastattn import cli, spec
from fastattn.bench.models import overhead, report
from fastattn.bench.models.compare import cases, compare
from fastattn.bench.models.zoo import ZOO
from fastattn.masks import Dense

ROWS = [
    pytest.param(model, case, id=f"{key}-{case.replace(', ', '-').replace(' ', '-')}")
    for key, model in ZOO.items()
    for case in cases(model)
]
ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.bfloat16)


def needs(model):
    if importlib.util.find_spec(model.needs) is None:
        pytest.skip(f"needs {model.needs} (pip install 'fastattn[models]')")


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model, case", ROWS)
def test_a_model_is_as_exact_as_with_eager_attention(model, case, dtype):
    needs(model)
    found = compare(model, case, dtype)
    assert found.ok, found
    assert found.forward_eager > 0 and (found.gradient is None) == (found.gradient_eager is None)
    assert len(found.seen.masks) >= 1
    assert bool(found.seen.tables) == ("table" in model.masks)
    assert bool(found.seen.biases) == ("bias" in model.masks.replace("bias of one row", ""))


@pytest.mark.parametrize("key", ZOO)
def test_a_wrong_scale_is_noticed(key):
    """A hundredth off is far outside of the bound: the logits are no trivial ones."""
    needs(ZOO[key])
    assert not compare(ZOO[key], "eval", torch.float32, off=1.01).ok


@pytest.mark.parametrize("key", [key for key in ZOO if key != "clip-attention-pool"])  # whose one query has one row
def test_a_dense_mask_is_noticed(key, monkeypatch):
    """Every mask said by a table: each row would then say that it was."""
    needs(ZOO[key])
    as_mask = spec.as_mask

    def dense(mask, query, key):
        return Dense(as_mask(mask, query, key).dense(query.shape[2], key.shape[2]))

    monkeypatch.setattr(spec, "as_mask", dense)
    monkeypatch.setattr(spec, "_plain_call", lambda *_: None)  # specs that are known from other calls
    found = compare(ZOO[key], "eval", torch.float32)
    assert found.seen.tables == len(found.seen.masks) > 0


@pytest.mark.parametrize("key", ZOO)
def test_two_runs_are_bit_equal(key):
    needs(ZOO[key])
    assert compare(ZOO[key], "train", torch.float32) == compare(ZOO[key], "train", torch.float32)


def test_the_command_writes_its_page(tmp_path, capsys):
    needs(ZOO["vit"])
    page, figures = tmp_path / "models.md", tmp_path / "models.json"
    assert cli.main(["models", "--only", "^vit$", "--write", str(page), "--json", str(figures)]) == 0
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["case"], row["ok"]) for row in rows] == [("eval", True)] * 2 + [("train", True)] * 2
    assert rows[0]["seen"] == {"calls": 2, "masks": ["Full"], "tables": 0, "biases": 0}
    assert page.read_text().count("| ViT |") == 3 and "4 of 4 right" in capsys.readouterr().out


def test_an_unknown_row_is_named(capsys):
    assert cli.main(["models", "--only", "nothing"]) == 2
    assert "no row that 'nothing' finds; there are vit, clip" in capsys.readouterr().err


def test_a_way_in_costs_what_it_costs_over_its_function():
    found = overhead.measured(rounds=3, calls=3)
    assert len(found) == 4 + (importlib.util.find_spec("transformers") is not None)
    assert all(min(row.way_us) > 0 and len(row.way_us) == len(row.bare_us) == 3 for row in found)
    known = overhead.Overhead("way", "function", [3.0, 9.0, 5.0, 7.0, 1.0], [1.0] * 5)
    assert known.more_us == 4.0 and known.interval_us == (2.0, 6.0)


def test_the_committed_module_path_costs_under_10_microseconds():
    measured = json.loads((ROOT / "bench/results/models/cpu.json").read_text())["overheads"]
    modules = [row for row in measured if row["bare"] == "fastattn.multi_head_attention_forward"]
    assert len(modules) == 2 and all(row["more_us"] < 10 for row in modules)


def test_the_committed_page_has_every_row_right():
    page = (ROOT / "docs/models.md").read_text()
    assert page == report.markdown(json.loads((ROOT / "bench/results/models/cpu.json").read_text()))
    for model in ZOO.values():
        assert f"| {model.name} | {model.what} |" in page
        assert all(f"| {model.name} | {case} |" in page for case in cases(model))
    assert "**wrong**" not in page
