"""What every file keeps to: its size, one vocabulary, no asserts, tiles in one table, one rule a mask."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = [path for top in ("fastattn", "kernels", "bench", "tools") for path in sorted((ROOT / top).rglob("*.py"))]
CODE.append(ROOT / "setup.py")
TEXT = [
    path
    for pattern in ("*.py", "*.md", "*.toml", "*.in", "Makefile", ".ci/run", "docs/**/*.md", "tests/**/*.py")
    for path in sorted(ROOT.glob(pattern))
]
KERNELS = [path for path in CODE if path.parent == ROOT / "kernels"]
MOST_LINES = 400

# One vocabulary: q_len, kv_len, head_dim, num_heads, num_kv_heads, BLOCK_M, BLOCK_N.
BANNED = re.compile(r"\b(seqlen_?[qk]|N_CTX|qo_len|kv_seq_?len|nheads|n_heads|headdim|d_head|D_HEAD|kBlockN)\b")
MACHINE_PATH = re.compile(r"(?<![\w./~-])/(root|tmp|work|mnt|opt|home/\w+|Users/\w+)/")

TILES = {"configs.py", "compile.py"}
LARGEST_LITERAL = 15

ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def name(path):
    return str(path.relative_to(ROOT))


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=name)


def lines_with(pattern, text):
    return [
        f"line {number}: {line.strip()}" for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)
    ]


def asserts(source):
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def large_literals(source):
    """Integers of 16 and more: tile sizes belong in the table."""
    return [
        f"line {node.lineno}: {node.value}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value > LARGEST_LITERAL
    ]


def position_rules(source):
    """Comparisons by order of a query's position with a key's: what a mask is made of."""
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        and any(isinstance(order, ORDER) for order in node.ops)
        and {"q_idx", "kv_idx"} <= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    ]


@each(CODE)
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


@each(CODE)
def test_a_file_uses_the_one_vocabulary(path):
    assert lines_with(BANNED, path.read_text()) == []


@each([path for path in TEXT + CODE if path != Path(__file__)])
def test_a_file_names_no_machine(path):
    assert lines_with(MACHINE_PATH, path.read_text()) == []


@each(CODE)
def test_a_refusal_is_raised_never_asserted(path):
    assert asserts(path.read_text()) == []


@each([path for path in KERNELS if path.name not in TILES])
def test_tile_sizes_stand_in_the_table(path):
    assert large_literals(path.read_text()) == []


@each([path for path in CODE if name(path) not in ("fastattn/masks.py", "kernels/masks.py")])
def test_positions_are_compared_in_the_definition_and_in_the_rules_alone(path):
    assert position_rules(path.read_text()) == []


def test_the_checks_see_what_they_look_for():
    assert lines_with(BANNED, "def f(seqlen_k):") and lines_with(BANNED, "x = N_CTX + 1")
    assert not lines_with(BANNED, "kv_len = head_dim_v")
    assert lines_with(MACHINE_PATH, 'open("' + "/home/someone/" + 'x")') and not lines_with(MACHINE_PATH, "docs/work/x")
    assert asserts("def f(x):\n    assert x") == [2]
    assert large_literals("BLOCK_M = 64") and not large_literals("half = 2\nname = 'sm_90'")
    assert position_rules("keep = kv_idx[None, :] >= q_idx[:, None] - left") and not position_rules("kv_idx < kv_len")
