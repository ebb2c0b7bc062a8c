"""`fastattn inspect`: its options, what it says, how it ends. Nothing is compiled here but one kernel."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("rich", reason="fastattn inspect needs rich")

from fastattn import cli
from fastattn.cli import inspect_triton
from fastattn.kernels.host.tile_table import TABLE
from fastattn.kernels.inspect import codegen_checks, compile_pool, sass
from fastattn.kernels.inspect import compile as compiling
from fastattn.kernels.inspect.compile import Compiled, CompileJob, Loop, read_compiled
from fastattn.kernels.inspect.listing import innermost

BARE = CompileJob("sm90", "fwd", 128, "bf16", "bare")
LOOP = Loop(
    warps=8,
    issued=400,
    counts={"HGMMA": 12, "UTMALDG": 2, "MUFU": 34, "MUFU.EX2": 34, "FFMA": 32, "FMUL": 4, "BAR": 2, "SYNCS": 3},
    parts={"half": {"HGMMA.64x64x16": (12, 4194304.0)}, "issue": {"instructions": (400, 3200.0)}},
    flop=4194304.0,
    tiles=1.0,
    clocks={
        **dict.fromkeys(("special", "fp32", "alu", "shared", "issue"), 512.0),
        "tensor": 1024.0,
        "bound": 1.0,
        "serial": 0.4,
    },
)
TILE = {"block_m": 128, "block_n": 64, "num_stages": 3}
GOOD = Compiled(BARE, "3.6.0", None, 8, TILE, 200, 0, 130 * 1024, 227 * 1024, {"HGMMA": 24}, [LOOP])


@pytest.fixture
def answers(monkeypatch):
    """Jobs are answered by a function instead of a compiler."""

    def install(answer):
        def compile_all(jobs, processes):
            yield from (answer(job) for job in jobs)

        monkeypatch.setattr(compile_pool, "compile_all", compile_all)

    install(lambda job: replace(GOOD, problem=job))
    return install


def run(capsys, *arguments):
    code = cli.main(["inspect", *arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("option", ["target", "dtype", "form"])
def test_a_name_that_is_none_is_refused_with_those_that_are(capsys, option):
    code, out, said = run(capsys, f"--{option}", "nope")
    assert (code, out) == (2, "")
    assert f"no {option} 'nope'; there are " in said


def test_a_kernel_that_is_not_launched_is_refused(capsys):
    code, _, said = run(capsys, "--kernel", "nope")
    assert code == 2 and "no kernel is launched for what was chosen" in said


def test_the_defaults_are_hoppers_half_precision_at_the_usual_heads(answers, capsys):
    code, out, said = run(capsys)
    rows = [line for line in out.splitlines() if line.startswith("sm90 ")]
    for kernel in ("fwd", "dq", "dkv"):
        for head_dim in (64, 128):
            for form in ("bare", "causal"):
                assert any(line.startswith(f"sm90 {kernel} d{head_dim} bf16 {form} ") for line in rows)
    assert code == 0 and "all codegen checks hold" in out
    assert "sm90 fwd d64 bf16 bare" in said  # the progress


def test_all_takes_what_is_not_chosen(answers, capsys):
    _, out, _ = run(capsys, "--all", "--kernel", "fwd", "--dtype", "fp16", "--json", "-")
    jobs = [row["problem"] for row in json.loads(out)]
    assert {each["target"] for each in jobs} == set(compiling.GPUS)
    assert {each["head_dim"] for each in jobs} == {row.head_dim for row in TABLE}
    assert {each["dtype"] for each in jobs} == {"fp16"} and {each["kernel"] for each in jobs} == {"fwd"}


def test_table_keeps_to_what_is_chosen(answers, capsys):
    _, out, _ = run(capsys, "--table", "--target", "sm100", "--form", "bare", "--json", "-")
    assert {(row["problem"]["target"], row["problem"]["form"]) for row in json.loads(out)} == {("sm100", "bare")}


def test_json_is_one_list_that_reads_back(answers, capsys, tmp_path):
    path = tmp_path / "new" / "rows.json"
    code, out, _ = run(capsys, "--kernel", "fwd", "--form", "bare", "--head-dim", "128", "--json", str(path))
    (row,) = json.loads(path.read_text())
    assert row.pop("broken") == [] and code == 0
    again = read_compiled(row)
    assert again.problem == BARE and again.main.clocks == LOOP.clocks
    assert "1,024" in out  # the tables are still shown


def test_every_row_has_figures_or_words(answers, capsys):
    """One does not compile, one multiplies nothing, one does not say how much, one is too large."""
    rows = {
        "fwd": Compiled(BARE, error="CompilationError: no such thing"),
        "dq": replace(GOOD, loops=[]),
        "dkv": replace(GOOD, loops=[replace(LOOP, clocks=None, parts={"unknown": {"UTCHMMA": (4, 0.0)}})]),
        "delta": replace(GOOD, shared_bytes=300 * 1024),
    }
    answers(lambda job: replace(rows[job.kernel], problem=job))
    code, out, _ = run(capsys, "--form", "bare", "--head-dim", "256")
    assert code == 1
    for words in (
        "fwd d256 bf16 bare: does not compile: CompilationError: no such thing",
        "dq d256 bf16 bare: no loop with tensor instructions",
        "dkv d256 bf16 bare: no budget, as the size of a product is not in the listing (UTCHMMA)",
        "delta d256 bf16 bare: 74752 B more shared memory than the target has",
        "✗ sm90 fwd d256 bf16 bare: compiles",
        "✗ sm90 delta d256 bf16 bare: shared memory fits the target",
        "codegen checks failed: 2",
    ):
        assert words in out


PLANTED = {
    "compiles": {"error": "no"},
    "shared memory fits the target": {"shared_bytes": 228 * 1024},
    "HGMMA in the main loop": {"loops": [replace(LOOP, counts={"HMMA": 64, "UTMALDG": 2})]},
    "UTMALDG in the main loop": {"loops": [replace(LOOP, counts={"HGMMA": 12, "LDGSTS": 8})]},
    "nothing is spilled": {"spilled_bytes": 8},
}


@pytest.mark.parametrize("words", PLANTED)
def test_each_check_sees_what_it_is_for(words):
    assert {check.words for check in codegen_checks.CODEGEN_CHECKS} == set(PLANTED)
    assert codegen_checks.failed_checks(GOOD) == []
    assert codegen_checks.failed_checks(replace(GOOD, **PLANTED[words])) == [words]


def test_a_kernel_that_lost_its_loop_fails_the_checks():
    assert "HGMMA in the main loop" in codegen_checks.failed_checks(replace(GOOD, loops=[]))


def test_checks_concern_the_target_a_row_belongs_to():
    borrowed = replace(GOOD, problem=replace(BARE, target="gfx942"), shared_bytes=80 * 1024, shared_limit=64 * 1024)
    assert (
        codegen_checks.failed_checks(borrowed)
        == codegen_checks.failed_checks(replace(borrowed, error="no such layout"))
        == []
    )


def test_control_c_shows_what_was_compiled(answers, capsys):
    def answer(job):
        if job.kernel == "dq":
            raise KeyboardInterrupt
        return replace(GOOD, problem=job)

    answers(answer)
    code, out, said = run(capsys, "--form", "bare", "--head-dim", "64", "--kernel", "fwd,dq,dkv")
    assert code == 130
    assert "sm90 fwd d64 bf16 bare" in out and "dkv d64" not in out
    assert "stopped after 1 of 3" in said


def test_without_triton_it_says_what_brings_it(monkeypatch, capsys):
    monkeypatch.setattr(inspect_triton.importlib.util, "find_spec", lambda name: None if name == "triton" else object())
    code, _, said = run(capsys)
    assert code == 2 and "pip install 'fastattn[triton]'" in said


def test_markdown_goes_between_the_marks_of_a_file(answers, capsys, tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- inspect -->\nold\n<!-- /inspect -->\nafter\n")
    for _ in range(2):
        run(capsys, "--kernel", "fwd", "--form", "bare", "--md", str(path))
    text = path.read_text()
    assert text.startswith("before\n<!-- inspect -->\nCompiled with triton 3.6.0.\n")
    assert text.endswith("<!-- /inspect -->\nafter\n") and "old" not in text
    assert text.count("| sm90 fwd d128 bf16 bare |") == 2
    assert "half      4,194,304 FLOP / 4,096 = 1,024 clocks: 12 HGMMA.64x64x16" in text


def test_verbose_spells_out_every_loop(answers, capsys):
    answers(lambda job: replace(GOOD, problem=job, loops=[LOOP, replace(LOOP, issued=700)]))
    _, out, _ = run(capsys, "--kernel", "fwd", "--form", "bare", "--head-dim", "64", "-v")
    assert "main loop: 400 instructions, 8 warps" in out and "another loop: 700 instructions, 8 warps" in out


# ---- the compile pool

DIES = """
import json, os, sys
for line in sys.stdin:
    job = json.loads(line)
    if job["kernel"] == "dq":
        print("kernel.py:3:4: error: no such layout", file=sys.stderr, flush=True)
        os.abort()
    print(json.dumps({"problem": job, "loops": [], "registers": os.getpid()}), flush=True)
"""


def test_a_compiler_that_dies_takes_one_job_with_it(monkeypatch):
    monkeypatch.setattr(compile_pool, "COMMAND", (sys.executable, "-c", DIES))
    jobs = [replace(BARE, kernel=kernel) for kernel in ("fwd", "dq", "dkv", "delta")]
    rows = {row.problem.kernel: row for row in compile_pool.compile_all(jobs, 1)}
    assert rows["dq"].error == "the compiler's process ended with -6: no such layout"
    assert [name for name, row in rows.items() if row.error is None] == ["fwd", "dkv", "delta"]
    assert rows["fwd"].registers != rows["dkv"].registers == rows["delta"].registers


@pytest.fixture
def stopped(monkeypatch):
    """The compilers that were stopped."""
    found = []
    monkeypatch.setattr(
        compile_pool.Compiler,
        "stop",
        lambda self, stop=compile_pool.Compiler.stop: (found.append(self), stop(self)),
    )
    return found


def leave_once(monkeypatch, event):
    """Control-C as soon as the event has come."""

    def as_completed(futures):
        event.wait()
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(compile_pool, "as_completed", as_completed)


def test_leaving_before_the_first_starts_nothing(stopped):
    compile_pool.compile_all([BARE], 1).close()
    assert stopped == []


def test_leaving_early_ends_the_processes(monkeypatch, stopped):
    """Even one that is being started, which nobody knows of yet."""
    starting = threading.Event()

    def slow(*arguments, start=subprocess.Popen, **options):
        starting.set()
        time.sleep(0.3)
        return start(*arguments, **options)

    monkeypatch.setattr(compile_pool, "COMMAND", (sys.executable, "-c", "import time; time.sleep(20)"))
    monkeypatch.setattr(compile_pool.subprocess, "Popen", slow)
    leave_once(monkeypatch, starting)
    with pytest.raises(KeyboardInterrupt):
        next(compile_pool.compile_all([BARE], 1))
    (compiler,) = stopped
    assert compiler.process.returncode == -signal.SIGKILL


def test_leaving_early_ends_a_process_at_work(monkeypatch, stopped):
    asked = threading.Event()
    monkeypatch.setattr(compile_pool, "COMMAND", (sys.executable, "-c", "import time; time.sleep(20)"))
    monkeypatch.setattr(compile_pool, "asdict", lambda job: asked.set() or {})
    leave_once(monkeypatch, asked)
    with pytest.raises(KeyboardInterrupt):
        next(compile_pool.compile_all([BARE], 1))
    (compiler,) = stopped
    assert compiler.process.returncode == -signal.SIGKILL


def test_what_a_stopped_process_has_not_read_is_no_error(monkeypatch):
    monkeypatch.setattr(compile_pool, "COMMAND", (sys.executable, "-c", ""))
    compiler = compile_pool.Compiler()
    monkeypatch.setattr(compile_pool, "asdict", lambda job: {"ended": compiler.process.wait()})
    assert compiler.compile(BARE).error == "the compiler's process ended with 0"
    compiler.close()
    assert compiler.process.stdin.closed and compiler.process.stdout.closed


def test_a_stopped_compiler_starts_no_process():
    compiler = compile_pool.Compiler()
    compiler.stop()
    with pytest.raises(RuntimeError, match="has been stopped"):
        compiler.compile(BARE)
    compiler.close()
    assert compiler.process is None


def test_a_real_row_comes_from_a_process_without_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (row,) = compile_pool.compile_all([replace(BARE, kernel="delta", head_dim=64)], 1)
    assert row.error is None and row.registers > 0 and row.main is None
    (row,) = compile_pool.compile_all([replace(BARE, kernel="nope")], 1)
    assert row.error.startswith("ValueError: this call launches no kernel 'nope'; it launches fwd, ")


def test_gfx942_is_compiled_and_not_disassembled(capsys):
    code, out, _ = run(capsys, "--target", "gfx942", "--kernel", "delta", "--form", "bare", "--head-dim", "64")
    assert code == 0
    assert "gfx942 delta d64 bf16 bare: compiled, not disassembled: no registers, no instructions, no budget" in out
    assert re.search(r"gfx942 delta d64 bf16 bare +64, 4 warps, 1 stages +- +- +0 of 64 KiB", out)


# ---- loops of warps with roles

ROLES = """\
        /*0000*/                   MOV R1, R2 ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0030*/                   FADD R1, R1, R1 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
        /*0080*/                   EXIT ;
"""


def test_roles_that_do_the_same_are_one_loop_of_more_warps():
    code = sass.parse(ROLES)
    assert len(innermost(code, sass.is_tensor)) == 2
    checked, unchecked = sorted(compiling._loops(code, 8, "", "sm90"), key=lambda loop: -loop.issued)
    assert (checked.issued, unchecked.issued) == (3, 2)
    assert compiling._loops(code, 8, "", "sm90")[0] == unchecked
    ttgir = "    partition0(%arg0: i32 loc(#loc)) num_warps(4) {\n    partition1(%arg0: i32) num_warps(4) {\n"
    (together,) = compiling._loops(code, 12, ttgir, "sm90")
    assert together.warps == 8 and together.flop == 2 * 2 * 64 * 64 * 16
