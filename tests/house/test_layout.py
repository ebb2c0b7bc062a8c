"""docs/layout.md and the tree agree: every folder of code has a row there, which names its files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "layout.md"
ENDINGS = {".py", ".h", ".cpp", ".cu"}
UNSAID = {"__init__", "__main__"}

ROW = re.compile(r"^\| `([\w/]+)/` \| ([^|]*) \|", re.MULTILINE)
LINK = re.compile(r"`((?:fastattn|kernels|bench|csrc|tests|docs)/[\w./*]+)`")


def rows(page):
    """{folder: files, without their endings}."""
    return {folder: set(files.split()) for folder, files in ROW.findall(page)}


def folders():
    tops = ("fastattn", "kernels", "bench", "csrc")
    found = {path.parent for top in tops for path in (ROOT / top).rglob("*") if path.suffix in ENDINGS}
    return sorted(str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts)


@pytest.mark.parametrize("folder", folders())
def test_a_folder_has_a_row_that_names_its_files(folder):
    files = {path.stem for path in (ROOT / folder).iterdir() if path.suffix in ENDINGS} - UNSAID
    assert rows(PAGE.read_text(encoding="utf-8")).get(folder) == files


def test_every_row_is_of_a_folder_and_every_place_is_there():
    page = PAGE.read_text(encoding="utf-8")
    assert set(rows(page)) == set(folders())
    missing = [place for place in LINK.findall(page) if not any(ROOT.glob(place.rstrip("/")))]
    assert missing == []


def test_a_row_is_read():
    assert rows("| `fastattn/masks/` | base kinds | what |\nno row") == {"fastattn/masks": {"base", "kinds"}}
