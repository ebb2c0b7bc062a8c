"""Names are the field's own (docs/glossary.md): identifiers and file names that only this project used stay out.

Looked at are names in code, split into their words; what comments, docs and messages say in English is free.
"""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = [
    path
    for top in ("fastattn", "kernels", "bench", "csrc", "tests", ".ci", "docs", "examples")
    for path in sorted((ROOT / top).rglob("*"))
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".c") and not {"__pycache__", "out"} & set(path.parts)
]
CODE.append(ROOT / "setup.py")

# Words that no name has in it, and what is said instead.
WORDS = {
    "room": "backend",
    "rooms": "backends",
    "door": "adapter",
    "doors": "adapters",
    "veil": "opaque int",
    "veiled": "opaque int",
    "unveil": "opaque int",
    "soften": "online softmax step",
    "twin": "low-precision baseline",
    "twins": "low-precision baselines",
    "yardstick": "tolerance",
}
# Whole names: their words are good English elsewhere.
NAMES = {
    "Kind": "KernelVariant",
    "kEverything": "kGeneral",
    "Meeting": "TilePair",
    "met": "rowsum of P * dP",
    "Caught": "SDPA redirect",
    "Leaves": "mask program",
    "make_leaves": "mask program",
    "section_of": "L2 group",
    "FORMS": "compile cases",
    "kFar": "kUnbounded",
    "FAR": "UNBOUNDED",
}
# Names of files, without their ending.
FILES = {
    "leaves": "masks/program",
    "flat": "masks/serialize",
    "foreign": "masks/flex",
    "visible": "masked_matmul",
    "hiding": "testing/nan_padding",
    "forms": "compile_cases",
    "workers": "compile_pool",
    "gates": "codegen_checks",
    "kind": "kernel_variant",
    "caught": "sdpa_redirect",
    "narrow": "decode",
}
KEPT_NAMES = {"rms_twin": "a field of the public Agreement", "max_twin": "a field of the public Agreement"}
KEPT = {
    "tests/house/surface/surface_wheel.py": "the names that C++ files had in the version that was written down",
    "tests/house/test_vocabulary.py": "this list",
}


def words_of(name):
    """kMostRooms is k, most, rooms; test_a_room is test, a, room."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def python_names(source):
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string: token.start[0] for token in tokens if token.type == tokenize.NAME}


def cpp_names(source):
    """Without comments, strings and what is included."""
    blanked = re.sub(
        r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|#include[^\n]*', lambda part: "\n" * part[0].count("\n"), source,
        flags=re.DOTALL,
    )  # fmt: skip
    found = {}
    for number, line in enumerate(blanked.splitlines(), 1):
        found |= dict.fromkeys(re.findall(r"[A-Za-z_]\w*", line), number)
    return found


def banned(names):
    """What is wrong with each name, as a sentence."""
    for name, line in names.items():
        if name in KEPT_NAMES:
            continue
        instead = NAMES.get(name) or next((WORDS[word] for word in words_of(name) if word in WORDS), None)
        if instead:
            yield f"line {line}: {name} (say {instead})"


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_the_fields(path):
    where = path.relative_to(ROOT)
    instead = FILES.get(path.stem) or next((WORDS[word] for word in words_of(path.stem) if word in WORDS), None)
    assert instead is None, f"{where} is called {instead}"
    if str(where) in KEPT:
        return
    source = path.read_text(encoding="utf-8")
    assert list(banned(python_names(source) if path.suffix == ".py" else cpp_names(source))) == []


def test_the_check_sees_what_it_looks_for():
    assert list(banned(python_names("def f(rooms, kMostRooms):\n    open_door = FAR"))) == [
        "line 1: rooms (say backends)",
        "line 1: kMostRooms (say backends)",
        "line 2: open_door (say adapter)",
        "line 2: FAR (say UNBOUNDED)",
    ]
    assert list(banned(cpp_names('int met; // the room\n#include "room.h"\nauto s = "door";'))) == [
        "line 1: met (say rowsum of P * dP)"
    ]
    assert not list(banned(python_names("mushroom = bedroom_plan = 'room'  # door")))


def test_the_glossary_has_each_word_that_is_said_instead():
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").lower()
    said = {*WORDS.values(), *NAMES.values()} - {"kGeneral", "kUnbounded"}
    missing = [each for each in sorted(said) if each.removesuffix("s").lower() not in glossary]
    assert missing == []
