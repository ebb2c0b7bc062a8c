"""A bound that a mask has none of is one number in Python, Triton and C++, named once in each."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
DEFINITION = re.compile(r"^.*\bkUnbounded\s*=\s*([^;]+);", re.MULTILINE)
WRITTEN_OUT = re.compile(r"2\s*\*\*\s*29|1\s*<<\s*29|0x1f{7}\b|\b53687091[12]\b", re.IGNORECASE)


def number(expression: ast.expr) -> int:
    """A constant expression: `2**29 - 1`, or the first argument of `tl.constexpr(...)`."""
    if isinstance(expression, ast.Call):
        [expression] = expression.args
    return eval(compile(ast.Expression(expression), "constant", "eval"), {"__builtins__": {}})


def of_python(path: str) -> list[int]:
    found = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    named = [each for each in found if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "UNBOUNDED"]
    return [number(each.value) for each in named]


def sources() -> dict[Path, str]:
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in SUFFIXES]
    files += [path for folder in ("fastattn", "kernels") for path in (ROOT / folder).rglob("*.py")]
    return {path: path.read_text(encoding="utf-8") for path in files}


def of_cpp() -> list[int]:
    texts = [text for path, text in sources().items() if path.suffix in SUFFIXES]
    return [number(ast.parse(said, mode="eval").body) for text in texts for said in DEFINITION.findall(text)]


FOUND = {
    "Python": lambda: of_python("fastattn/masks/base.py"),
    "Triton": lambda: of_python("kernels/rules/masks.py"),
    "C++": of_cpp,
}


@pytest.mark.parametrize("language", FOUND)
def test_unbounded_is_defined_once_and_alike(language):
    assert FOUND[language]() == [2**29 - 1]


def test_three_of_them_fit_an_int32_and_no_position_is_as_large():
    assert 3 * (2**29 - 1) < 2**31


def test_nobody_writes_it_out():
    lines = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path, text in sources().items()
        for line in text.splitlines()
        if WRITTEN_OUT.search(line) and "nbounded" not in line.lower()
    ]
    assert lines == []


def test_the_checks_see_what_they_look_for():
    for said in ("tl.constexpr(2**29 - 1)", "(1 << 29) - 1"):
        assert number(ast.parse(said, mode="eval").body) == 2**29 - 1
    assert DEFINITION.findall("x\nconstexpr int32_t kUnbounded = (1 << 29) - 1;  // a = 3;\n") == ["(1 << 29) - 1"]
    assert all(map(WRITTEN_OUT.search, ("2**29", "1 << 29", "0x1fffffff", "536870911")))
