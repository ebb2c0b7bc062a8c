"""What every file keeps to: its size, one vocabulary, no asserts, tiles in one table, one rule a mask."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = [path for top in ("fastattn", "kernels", "bench", ".ci") for path in sorted((ROOT / top).rglob("*.py"))]
CODE.append(ROOT / "setup.py")
TEXT = [
    path
    for pattern in ("*.py", "*.md", "*.toml", "*.in", "Makefile", ".ci/run", "docs/**/*.md", "tests/**/*.py")
    for path in sorted(ROOT.glob(pattern))
]
KERNELS = [path for path in CODE if ROOT / "kernels" in path.parents]
MOST_LINES = 400

# One vocabulary: q_len, kv_len, head_dim, num_heads, num_kv_heads, BLOCK_M, BLOCK_N.
BANNED = re.compile(r"\b(seqlen_?[qk]|N_CTX|qo_len|kv_seq_?len|nheads|n_heads|headdim|d_head|D_HEAD|kBlockN)\b")
MACHINE_PATH = re.compile(r"(?<![\w./~-])/(root|tmp|work|mnt|opt|home/\w+|Users/\w+)/")

TILES = {"tile_table.py", "compile.py"}
TILE_SIZE = re.compile(r"BLOCK_\w+|num_warps|num_stages")

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


def tile_sizes(source):
    """Numbers given to a tile size by name: assigned, passed on, or a parameter's default."""

    def given(node):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((ast.unparse(target), node.value) for target in targets)
        elif isinstance(node, ast.keyword):
            yield node.arg or "", node.value
        elif isinstance(node, ast.arguments):
            positional = [*node.posonlyargs, *node.args]
            yield from (
                (arg.arg, value) for arg, value in zip(reversed(positional), reversed(node.defaults), strict=False)
            )
            yield from ((arg.arg, value) for arg, value in zip(node.kwonlyargs, node.kw_defaults, strict=True))

    return [
        f"{bound} = {value.value}"
        for node in ast.walk(ast.parse(source))
        for bound, value in given(node)
        if TILE_SIZE.match(bound) and isinstance(value, ast.Constant) and type(value.value) is int
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
    assert tile_sizes(path.read_text()) == []


@each([path for path in CODE if name(path) not in ("fastattn/masks/kinds.py", "kernels/rules/masks.py")])
def test_positions_are_compared_in_the_definition_and_in_the_rules_alone(path):
    assert position_rules(path.read_text()) == []


def test_the_checks_see_what_they_look_for():
    assert lines_with(BANNED, "def f(seqlen_k):") and lines_with(BANNED, "x = N_CTX + 1")
    assert not lines_with(BANNED, "kv_len = head_dim_v")
    assert lines_with(MACHINE_PATH, 'open("' + "/home/someone/" + 'x")') and not lines_with(MACHINE_PATH, "docs/work/x")
    assert asserts("def f(x):\n    assert x") == [2]
    assert tile_sizes("BLOCK_M = 64") and tile_sizes("run(x, num_warps=4)") and tile_sizes("def f(q, BLOCK_N=32): pass")
    assert not tile_sizes("BLOCK_M = config.block_m\nhalf = 2\nrun(num_warps=config.warps)")
    assert position_rules("keep = kv_idx[None, :] >= q_idx[:, None] - left") and not position_rules("kv_idx < kv_len")


MOST_SHARED = 7


def shared_lines(sources):
    """Runs of more lines than MOST_SHARED that stand in two places; blank lines and comments do not count."""
    places = {}
    for where, source in sources.items():
        lines = [line.strip() for line in source.splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        for first in range(len(lines) - MOST_SHARED):
            places.setdefault(tuple(lines[first : first + MOST_SHARED + 1]), []).append((where, first))
    return [found for found in places.values() if len(found) > 1]


def test_no_two_places_in_kernels_share_eight_lines():
    assert shared_lines({name(path): path.read_text() for path in KERNELS}) == []
    lines = "\n".join(f"line {number}" for number in range(MOST_SHARED + 1))
    assert shared_lines({"here": lines, "there": f"other\n\n{lines}"}) == [[("here", 0), ("there", 1)]]
