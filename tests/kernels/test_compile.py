"""What every row of the tile table compiles to, for the GPU it is meant for, in every compile case; without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("rich", reason="fastattn inspect needs rich")

import triton
from filelock import FileLock

from fastattn.cli.inspect_triton import markdown
from fastattn.kernels.host import tile_table
from fastattn.kernels.host.tile_table import TABLE
from fastattn.kernels.inspect import compile as compiling
from fastattn.kernels.inspect.codegen_checks import failed_checks, figure

ROOT = Path(__file__).resolve().parents[2]
MOST = 200
"""Compiles in a test run."""


def inspect(*arguments, **environment):
    """`fastattn inspect` in a process of its own, which has Triton's interpreter where the tests do."""
    command = [sys.executable, "-m", "fastattn.cli", "inspect", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def inspected(tmp_path_factory):
    """Every row of the tile table, compiled once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    path = shared / "inspected.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            done = inspect("--table", "--json", str(path), TRITON_INTERPRET="1")
            assert done.returncode in (0, 1), done.stderr
    return [
        compiling.read_compiled({k: v for k, v in row.items() if k != "broken"}) for row in json.loads(path.read_text())
    ]


def rows_that(rows, **wanted):
    return [row for row in rows if all(getattr(row.problem, name) in each for name, each in wanted.items())]


def test_no_codegen_check_fails(inspected):
    assert len(inspected) == len(compiling.table_plan())
    assert [f"{row.problem}: {words}" for row in inspected for words in failed_checks(row)] == []


def takes_over(heavier, row):
    """Whether what carries much goes to another row."""
    covers = heavier.head_dim >= row.head_dim and heavier.bits >= row.bits
    return (heavier.target, heavier.kernel) == (row.target, row.kernel) and covers and heavier.load > row.load


def test_the_plan_reaches_every_row_bare_and_with_every_feature_in_few_compiles():
    """With every feature, unless another row takes what carries more, and bare, unless the row is for what carries."""
    plan = compiling.table_plan()
    assert len(plan) <= MOST and len(set(plan)) == len(plan)
    reached = {}
    for each in plan:
        launched = compiling.launches(each.target, each.head_dim, each.dtype, each.form)[each.kernel]
        reached.setdefault(launched.row, set()).add(each.form)
    for row in TABLE:
        if row.target in compiling.GPUS:
            full = {case for case in reached.get(row, ()) if case == "spans" or case.endswith("every-feature")}
            heavier = [each for each in TABLE if takes_over(each, row)]
            assert full or heavier, row
            assert row.load or reached[row] - full, row


def test_a_round_of_the_main_loop_multiplies_whole_tiles(inspected):
    """The products in the machine code are those of the tiles in the table: none is lost between the two."""
    rows = [row for row in inspected if row.main and row.main.tiles is not None]
    assert {row.problem.kernel for row in rows} >= {"fwd", "dq", "dkv"}
    for row in rows:
        assert row.main.tiles >= 1, row.problem
    for row in rows_that(rows, target=["sm90"], head_dim=[64, 128], form=["bare", "causal"]):
        assert row.main.tiles == 1, row.problem


def test_a_round_of_the_forward_takes_an_exponential_a_weight(inspected):
    for row in rows_that(inspected, kernel=["fwd"], form=["bare"], dtype=["bf16"]):
        weights = row.tile["block_m"] * row.tile["block_n"]
        assert row.main.counts["MUFU.EX2"] * row.main.warps * 32 >= weights, row.problem


def test_the_main_loop_checks_no_mask(inspected):
    """It costs as much whether something is hidden elsewhere or not."""
    for kernel in ("fwd", "dq"):
        for head_dim in (64, 128):
            chosen = rows_that(inspected, target=["sm90"], kernel=[kernel], head_dim=[head_dim])
            bare, causal = (rows_that(chosen, form=[form])[0].main for form in ("bare", "causal"))
            assert causal.issued <= 1.1 * bare.issued
            assert len(rows_that(chosen, form=["causal"])[0].loops) > 1


def test_what_has_no_loop_with_products_says_so(inspected):
    for row in rows_that(inspected, dtype=["fp32"], form=["bare"]):
        assert (
            row.error is None and row.main is None and row.counts["FFMA" if "d" in row.problem.kernel else "FMUL"] > 0
        )


def test_the_figures_that_chose_the_rows_are_what_this_compiler_makes(inspected):
    compiler = re.search(r"what Triton (\S+) makes", tile_table.__doc__)[1]
    if compiler != triton.__version__:
        pytest.skip(f"the rows were chosen with triton {compiler}; here is {triton.__version__}")
    made = {}
    for each in inspected:
        job = each.problem
        row = compiling.launches(job.target, job.head_dim, job.dtype, job.form)[job.kernel].row
        made.setdefault(row, about(figure(each)))
    assert made == {row: about(row.chosen) for row in TABLE if row.target in compiling.GPUS}


def about(text):
    """Registers in eights: from one run of the compiler to the next they differ by one."""
    return re.sub(r"(\d+)(?= registers| \| \d+ B )", lambda found: str(int(found[1]) // 8), text)


DOCS = ["--form", "bare", "--kernel", "fwd,dq,dkv"]
"""What the tables of docs/performance.md show."""


def test_the_tables_in_the_docs_are_what_this_compiler_makes(inspected):
    text = (ROOT / "docs" / "performance.md").read_text()
    assert f"fastattn inspect {' '.join(DOCS)} --md docs/performance.md" in text
    block = re.search(r"<!-- inspect -->\n(.*?)<!-- /inspect -->", text, re.DOTALL)[1]
    version = re.search(r"Compiled with triton (\S+)\.", block)[1]
    if version != triton.__version__:
        pytest.skip(f"the docs show triton {version}; here is {triton.__version__}")
    shown = rows_that(
        inspected, target=["sm90"], kernel=["fwd", "dq", "dkv"], head_dim=[64, 128], dtype=["bf16"], form=["bare"]
    )
    order = [each.problem for each in shown]
    plan = compiling.plan(["sm90"], ["fwd", "dq", "dkv"], [64, 128], ["bf16"], ["bare"])
    assert set(plan) == set(order)
    shown.sort(key=lambda row: plan.index(row.problem))
    assert about(block) == about(markdown(shown)), "print it anew, with the command above the tables"
