"""`make gpu` without a GPU: its steps, with scripted children (scripted.py)."""

import json
import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="make gpu needs rich")

from rich.console import Console

from fastattn.bench.cases.operations import BenchCase
from fastattn.bench.cases.suites import Cell, suite
from fastattn.bench.gpu import cells as gpu_cells
from fastattn.bench.gpu import pipeline, resume, steps, summary
from fastattn.bench.gpu import run_tests as gpu_tests
from fastattn.bench.gpu.children import AFTER_THE_END
from fastattn.bench.gpu.pipeline import LAST_WORDS, Run, Settings
from fastattn.bench.gpu.summary import best_two, failures, print_summary
from fastattn.bench.measure.rows import Row

SCRIPTED = runpy.run_path(str(Path(__file__).with_name("scripted.py")))
CELLS, FAILING, GOOD, SMOKE = (SCRIPTED[name] for name in ("CELLS", "FAILING", "GOOD", "SMOKE"))
Script, check_lines, row_of, said_of = (SCRIPTED[name] for name in ("Script", "check_lines", "row_of", "said_of"))
worker, workers = SCRIPTED["worker"], SCRIPTED["workers"]


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Runs the steps; returns the run, what it said, and the machine that was asked."""
    return SCRIPTED["runner"](tmp_path, monkeypatch)


@pytest.fixture
def whole():
    return workers([worker("self", "causal")], [worker("cross", "gqa")])


def test_all_is_well_and_in_one_file(go, whole):
    run, said, machine = go(whole)
    record = json.loads(run.path.read_text())
    ran = [name for name, step in record["steps"].items() if step["ok"]]
    assert ran == ["build", "smoke", "check", "headline", "tests", "sweep", "flex"]
    assert list(record["steps"]) == list(pipeline.STEPS) and not any(failures(record).values())
    assert record["smoke"]["cpu"]["difference"] == 0.01
    assert record["steps"]["check"]["words"] == "3 right, 0 wrong, 1 refused"
    assert [test["outcome"] for test in record["tests"]["tests"]["tests"].values()] == ["passed", "passed"]
    assert len(record["rows"]) == 12 and len(record["flex"]) == 3 and not any(record["left"].values())
    assert any(words.startswith("[2/2] gqa/fp32/B1-H1-N8-D8/fwd: fastattn 1 ms, sdpa 2 ms") for words in said)
    assert record["environment"]["device"] == "cpu" and record["schema"] == pipeline.SCHEMA
    assert [command.split()[0] for command, _ in machine.asked][-1] == "fastattn.bench.gpu.worker"


def test_a_worker_that_dies_costs_its_cell_alone_and_a_hang_says_where(go):
    stack = ("synchronize.py:1083 in synchronize",)
    hung = worker("self", dies_in="causal", code=1, words="hung", stack=stack)
    run, *_ = go(workers([hung], [worker(dies_in="cross", code=-11), worker("gqa")]))
    crashed = run.record["crashed"]
    assert crashed["headline"][CELLS[1].name]["words"] == "hung: synchronize.py:1083 in synchronize (fastattn)"
    assert crashed["headline"][CELLS[1].name]["stack"] == list(stack)
    assert crashed["sweep"][CELLS[2].name]["words"] == "was killed by SIGSEGV: the last line (fastattn)"
    assert {row["op"] for row in run.record["rows"]} == {"self", "gqa"}
    assert run.record["steps"]["sweep"] == {"ok": False, "seconds": 5.0, "words": "2 of 2 cells, 1 crashed or hung"}


def test_a_worker_whose_device_broke_costs_no_cell_that_it_did_not_begin(go):
    run, *_ = go(workers([worker("self", code=70), worker("causal", code=70)], [worker("cross", "gqa")]))
    assert not any(run.record["crashed"].values()) and len(run.record["rows"]) == 12


def test_a_worker_that_dies_before_it_begins_is_not_asked_for_ever(go):
    run, _, machine = go(
        {"fastattn.bench.gpu.worker": Script([], 1, words="ended with 1")}, steps=("headline", "sweep")
    )
    assert sum(map(len, run.record["crashed"].values())) == len(CELLS)
    assert sum("gpu.worker" in command for command, _ in machine.asked) == len(CELLS)


def test_a_provider_that_hung_twice_is_left_out(go, monkeypatch):
    monkeypatch.setattr(gpu_cells, "headline", lambda device: CELLS[:4])
    hung = [worker(dies_in=op, code=1, words="hung", stack=("x.py:1 in f",)) for op in ("self", "causal")]
    run, _, machine = go({"fastattn.bench.gpu.worker": [*hung, worker("cross", "gqa")]}, steps=("headline",))
    providers = [json.loads(command.split(" ", 1)[1])["providers"] for command, _ in machine.asked]
    assert providers == [["fastattn", "sdpa"], ["fastattn", "sdpa"], ["sdpa"]]
    assert "without fastattn, which hung 2 times" in run.record["steps"]["headline"]["words"]


def test_a_backend_whose_smallest_call_fails_is_noted_first_and_left_out(go, capsys, whole):
    bad = Script(["Traceback"], 1, words="hung", stack=("synchronize.py:1083 in synchronize",))
    run, _, machine = go({**whole, "fastattn.bench.gpu.smoke": [bad, SMOKE]})
    assert run.record["smoke"]["cpu"]["words"] == "hung: synchronize.py:1083 in synchronize"
    asked = [command for command, _ in machine.asked]
    assert not any("--backends cpu" in command for command in asked) and not any(
        "pytest" in command for command in asked
    )
    tasks = [json.loads(command.split(" ", 1)[1]) for command in asked if "gpu.worker" in command]
    assert all("fastattn" not in task["providers"] for task in tasks)
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("✗ cpu's smallest call: hung") for line in said[:5])


@pytest.mark.parametrize("tool", ["compute-sanitizer", None])
def test_memcheck_looks_at_a_smallest_call_of_cuda_that_fails(go, monkeypatch, tool):
    gpu = {"device": "cuda", "gpu": "H200", "commit": None, "dirty": None, "date": "2030-01-01"}
    monkeypatch.setattr(pipeline.env, "environment", lambda device: gpu)
    monkeypatch.setattr(steps.shutil, "which", lambda name, path: tool)
    scripts = {"fastattn.bench.gpu.smoke": [Script([], 1, words="hung"), SMOKE]}
    scripts["compute-sanitizer"] = Script(["========= Invalid __global__ read of size 16 bytes"])
    run, _, machine = go(scripts, device="cuda", steps=("smoke",))
    found = run.record["smoke"]
    assert found["cuda"]["ok"] is False and found["triton"]["ok"]
    if tool is None:
        assert found["cuda"]["memcheck"] == ["compute-sanitizer is not installed"]
    else:
        assert found["cuda"]["memcheck"] == scripts[tool].lines
        command, seconds = machine.asked[1]
        assert command.startswith("compute-sanitizer --tool memcheck --print-limit 8 fastattn.bench.gpu.smoke cuda")
        assert seconds == 60


def test_a_smallest_call_that_is_wrong_says_by_how_much(go):
    run, *_ = go({"fastattn.bench.gpu.smoke": [SMOKE, Script([{"difference": 2.0, "ok": False}], 1)]}, steps=("smoke",))
    assert run.record["smoke"]["reference"]["words"] == "off by 2"
    assert run.record["steps"]["smoke"] == {"ok": False, "seconds": 2.0} | {
        "words": "cpu off by 0.01, reference fails and is left out"
    }


def test_a_check_that_hangs_costs_its_case_alone(go):
    hung = Script([{"begin": "causal"}], 1, words="hung", stack=("x.py:1 in f",))
    rest = check_lines("cpu", True, True)
    rest.lines = rest.lines[2:]
    run, *_ = go({"fastattn.cli check --device cpu --backends cpu": [hung, rest]}, steps=("check",))
    rows = {(row["room"], row["case"]): row for row in run.record["checks"]}
    assert rows["cpu", "causal"]["words"] == "hung: x.py:1 in f" and rows["cpu", "bias"]["ok"]
    assert len(rows) == 4 and run.record["steps"]["check"]["words"] == "3 right, 1 wrong, 0 refused"


def test_a_budget_that_ends_keeps_what_there_is_and_is_no_failure(go):
    slow = {"fastattn.bench.gpu.worker": worker("self", "causal", "cross", "gqa", each=8.0)}
    run, _, machine = go(slow, budget=120.0, steps=("headline", "sweep"))
    assert 0 < len(run.record["rows"]) < 12 and run.record["left"]["sweep"]
    assert run.record["steps"]["sweep"]["ok"] is None
    assert machine.clock() <= 120.0 + AFTER_THE_END


def test_each_step_takes_its_share_at_most_and_the_set_up_counts(go):
    slow = Script(["x"] * 1000, each=1.0)
    scripts = dict.fromkeys(GOOD, slow) | {"fastattn.cli info": Script([]), "fastattn.bench.gpu.worker": slow}
    scripts |= {"fastattn.bench.gpu.smoke": Script(SMOKE.lines, each=9.0)}
    run, _, machine = go(scripts, budget=400.0, spent=20.0)
    given = [(command.split(" {")[0].split(" -")[0], seconds) for command, seconds in machine.asked]
    assert given[0] == ("fastattn.cli build", pytest.approx(100))
    assert [seconds for name, seconds in given if "smoke" in name] == pytest.approx([40, 40])
    assert next(seconds for name, seconds in given if "check" in name) == pytest.approx(68 + AFTER_THE_END)
    assert machine.clock() <= 400 - 20 - LAST_WORDS + AFTER_THE_END
    assert run.record["steps"]["flex"]["words"] == "not reached: the budget was spent"


def test_a_step_alone_may_take_it_all(go):
    _, _, machine = go({}, steps=("tests",), budget=200.0)
    assert machine.asked[0][1] == pytest.approx(200 - LAST_WORDS)


def test_failures_come_first_and_ratios_last(go, capsys):
    checks = {"fastattn.cli check --device cpu --backends cpu": check_lines("cpu", True, False)}
    checks["fastattn.cli check --device cpu --backends cpu"].lines[-1]["row"]["words"] = "dq is off"
    wrong = worker("self")
    wrong.lines += [{"done": CELLS[1].name, "rows": [row_of(CELLS[1]) | {"correct": False}]}]
    run, *_ = go({"pytest": FAILING, **checks, **workers([wrong], [worker("cross", "gqa")])})
    test = "tests/cpu/test_attention.py::one: AssertionError: 1 is not 2"
    assert failures(run.record)["tests"] == [test]
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    said = capsys.readouterr().out
    order = ["cpu, bias: dq is off", "causal/fp32", test, "✗ check", "✗ headline", "✗ tests ", "1.50x", "on average"]
    places = [said.index(words) for words in order]
    assert places == sorted(places)
    assert len(said.splitlines()) < 40


def test_what_pytest_could_not_collect_is_a_failure_in_its_words(go):
    words = "E   ModuleNotFoundError: No module named 'triton'\n"
    line = {"collection": "tests/cpu/test_attention.py", "outcome": "failed", "words": words}
    run, *_ = go({"pytest": Script([line], 1, words="ended with 1")}, steps=("tests",))
    assert run.record["steps"]["tests"]["words"] == "nothing ran, 1 files could not be collected"
    assert failures(run.record)["files"] == [f"tests/cpu/test_attention.py: {words.strip()}"]


def test_a_pytest_that_breaks_says_its_last_words(go):
    run, *_ = go({"pytest": Script(["usage"], 4, words="ended with 4")}, steps=("tests",))
    assert run.record["steps"]["tests"]["ok"] is False
    assert run.record["steps"]["tests"]["words"] == "nothing ran, pytest ended with 4: the last line"


def test_without_xdist_a_test_that_hangs_costs_itself_alone(go, monkeypatch):
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None)
    begun = {"begin": "tests/cpu/test_attention.py::hangs"}
    hung = Script([said_of("one"), begun], 1, words="hung", stack=("x.py:1 in f",))
    run, _, machine = go({"pytest": [hung, Script([said_of("two")])]}, steps=("tests",))
    tests = {name.partition("::")[2]: test for name, test in run.record["tests"]["tests"]["tests"].items()}
    assert {name: test["outcome"] for name, test in tests.items()} == {
        "one": "passed", "hangs": "failed", "two": "passed",
    }  # fmt: skip
    assert tests["hangs"]["stack"] == ["x.py:1 in f"] and not any(
        "-n" in command.split() for command, _ in machine.asked
    )


def test_a_pytest_that_is_not_there_is_a_failure(go):
    run, *_ = go({"pytest": Script([], 1, words="ended with 1")}, steps=("tests",))
    assert run.record["steps"]["tests"] == {"ok": False, "seconds": 0.0} | {
        "words": "nothing ran, pytest ended with 1: the last line"
    }


def test_a_test_whose_end_fails_too_keeps_both_words(go):
    lines = [said_of("one", "failed", "the sum is off"), said_of("one", "error", "so is its end")]
    run, *_ = go({"pytest": Script(lines, 1)}, steps=("tests",))
    kept = run.record["tests"]["tests"]["tests"]["tests/cpu/test_attention.py::one"]
    assert (kept["outcome"], kept["words"]) == ("error", "the sum is off; then so is its end")


def test_what_another_library_does_wrong_is_noted_and_no_failure(go, capsys):
    script = worker("self")
    wrong = row_of(CELLS[1], "flex") | {"correct": False, "samples_ms": [], "reason": "wrong: dq"}
    script.lines.append({"done": CELLS[1].name, "rows": [row_of(CELLS[1]), wrong]})
    run, *_ = go(workers([script], [worker("cross", "gqa")]))
    assert run.record["steps"]["headline"]["ok"] is True and not any(failures(run.record).values())
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    assert "· causal/fp32/B1-H1-N8-D8/fwd/flex: wrong: dq" in capsys.readouterr().out


def test_ties_are_called_ties_and_a_busy_machine_is_said(go, capsys):
    script = worker("cross", "gqa")
    even = [row_of(CELLS[2]) | {"samples_ms": [1.0, 1.1, 0.9, 1.0]}, row_of(CELLS[2], "sdpa", 1.0)]
    script.lines[2] = {"done": CELLS[2].name, "rows": even}
    run, *_ = go(workers([worker("self", "causal")], [script]))
    run.record["environment"] |= {"busy": True, "load_average": [7.5, 1, 1], "cores": 2}
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    said = capsys.readouterr().out
    assert "≈1.00x" in said and said.count("1.50x") == 4 and "busy (load 7.5 on 2 cores)" in said


def test_the_ratio_under_sustained_load_stands_beside_the_usual_one(go, capsys, whole):
    run, *_ = go(whole)
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    assert "sustained" not in capsys.readouterr().out  # nobody measured it
    for row in (each for each in run.record["rows"] if each["op"] == "self"):
        row["sustained_ms"] = [3.0 if row["provider"] == "fastattn" else 6.0] * 4
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    said = capsys.readouterr().out
    assert "sustained" in said and said.count("1.50x") == 7 and said.count("2.00x") == 1


def test_the_screen_holds_the_first_cells_and_says_how_many_more(go, capsys, whole, monkeypatch):
    monkeypatch.setattr(summary, "MOST_CELLS", 3)
    run, *_ = go(whole)
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    said = capsys.readouterr().out
    assert "cross fp32" in said and "gqa fp32" not in said and "and 1 more cells in the file" in said
    assert "4 cells; ≈ a tie" in said


def test_a_file_says_nothing_of_where_things_lie(tmp_path):
    root, packages = Path(resume.__file__).resolve().parents[2], "/somewhere/lib/python3.12/dist-packages"
    text = json.dumps([f"{root}/bench/x.py:1", f"{packages}/torch/cuda.py:2", f"OSError: {Path.home()}/.cache/a.so"])
    assert json.loads(resume.without_places(text)) == ["bench/x.py:1", "torch/cuda.py:2", "OSError: ~/.cache/a.so"]


def test_the_best_other_is_the_fastest_that_is_not_ours():
    rows = [Row.of(row_of(CELLS[0], name, time)) for name, time in (("fastattn", 2.0), ("sdpa", 3.0), ("flex", 1.0))]
    rows.append(Row.of(row_of(CELLS[0], "fastattn-triton", 0.1)))
    ours, best = best_two(rows)
    assert (ours.provider, best.provider) == ("fastattn", "flex")
    assert best_two(rows[1:2]) == (None, rows[1])
    assert best_two(rows[1:])[0].provider == "fastattn-triton"  # a free choice that was left out


def test_flex_is_timed_beside_fastattn_and_has_one_row_beside_the_others(go, whole):
    run, _, machine = go(whole)
    providers = [
        json.loads(command.split(" ", 1)[1])["providers"] for command, _ in machine.asked if "gpu.worker" in command
    ]
    assert providers == [["fastattn", "sdpa"], ["fastattn", "sdpa"], ["fastattn", "flex"]]
    names = [row["name"] for row in run.record["rows"]]
    assert names.count(f"{CELLS[0].name}/flex") == 1 and names[2] == f"{CELLS[0].name}/flex"


def test_every_test_that_wants_a_gpu_is_in_a_step(request):
    """The files by what they say; pytest's own collection of them all takes half a minute."""
    root = request.config.rootpath
    wants = re.compile(r"pytest\.mark\.gpu\b|def test_\w+\([^)]*\b(device|execute)\b")
    files = [path for path in (root / "tests").rglob("test_*.py") if path.parent.name != "bench"]  # `device`, a word
    found = {path for path in files if wants.search(path.read_text())}
    named = {
        root / path.split("::")[0]
        for selections in gpu_tests.SELECTIONS["cuda"].values()
        for selection in selections
        if selection.marked == "gpu"
        for path in selection.paths
    }
    assert found == named


def test_tuning_names_the_row_to_paste_or_says_that_it_stays(go, capsys):
    line = {
        "kernel": "fwd",
        "head_dim": 64,
        "mask": "full",
        "table": "A",
        "table_ms": 2.0,
        "tflops": 1.0,
        "reason": None,
    }
    other = line | {"head_dim": 128}
    lines = [line | {"row": "A", "ms": 2.0}, line | {"row": "B", "ms": 1.0}, line | {"row": "C", "ms": None}]
    lines += [other | {"row": "A", "ms": 2.0}, other | {"row": "B", "ms": 1.99}]
    run, said, _ = go({"fastattn.kernels.host.tune": Script(lines)}, steps=("tune",))
    assert run.record["steps"]["tune"]["words"] == "4 rows timed, 1 refused" and "2.00x: full B" in said[2]
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    said = capsys.readouterr().out.splitlines()
    assert said[said.index("fwd d64 full: 1 TFLOP/s, 2.00x the table's row") + 1].strip() == "B,"
    assert said[said.index("fwd d128 full: 1 TFLOP/s, 1.01x the table's row") + 1].strip() == "the row stays"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["test"], "step 'test' is not known; there are build, smoke, check, headline, instructions, tests, sweep, "),
        (["swep"], "did you mean 'sweep'?"),
        (["--budget", "3"], "BUDGET must be more than 5 seconds, got 3"),
        (["--peers", "nowhere"], "PEERS=nowhere is no folder"),
    ],
)
def test_a_wrong_command_line_is_a_sentence(flags, words, capsys):
    assert pipeline.main(["--device", "cpu", *flags]) == pipeline.USAGE
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_suite_has_every_cell_once_and_the_first_ones_tell_most(device):
    cells = suite(device)
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.mode for cell in cells[:6]} == {"fwd", "bwd"}
    assert len({cell.case.op for cell in cells[:12]}) >= 3


def test_one_real_cell_from_a_real_worker(tmp_path, monkeypatch):
    """The child's side and the parent's, on the CPU."""
    cell = Cell(BenchCase("causal", "fp32", 1, 2, 2, 64, 64, 16), "fwd")
    line = "import sys; from fastattn.bench.gpu import worker; from fastattn.bench.cases import suites as suite; "
    line += "from fastattn.bench.cases.operations import BenchCase; "
    line += "worker.suite = lambda device: [suite.Cell(BenchCase('causal', 'fp32', 1, 2, 2, 64, 64, 16), 'fwd')]; "
    line += "sys.exit(worker.main(sys.argv[1:]))"
    for name in ("suite", "headline"):
        monkeypatch.setattr(gpu_cells, name, lambda device: [cell])
    run = Run(Settings(device="cpu", out=tmp_path, budget=200.0, steps=("headline",)), lambda words: None)
    started = run.child

    def child(command, seconds, silence):
        made = started(command, seconds, silence)
        made.command = [made.command[0], "-c", line, command[-1]]
        return made

    run.child = child
    run.steps()
    assert run.record["steps"]["headline"]["words"] == "1 of 1 cells" and run.record["steps"]["headline"]["ok"]
    assert [row["provider"] for row in run.record["rows"]] == ["fastattn", "sdpa"]
    assert all(row["correct"] and row["median_ms"] > 0 for row in run.record["rows"])
