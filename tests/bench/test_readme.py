"""The README's figures are those of the committed measurement that it names, to the digit."""

import re
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the benchmark needs rich")

from fastattn.bench.files import markdown, read_json

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_table_is_the_measurements():
    readme = (ROOT / "README.md").read_text()
    source = re.search(r"<!-- table: (\S+) -->", readme)[1]
    rows, environment = read_json(ROOT / source)
    headline, _, _, _, *rest = markdown(rows, environment).splitlines()
    summary = "\n".join(rest[: rest.index("")])
    assert summary.count("\n") > 5
    for part in (headline, summary):
        assert part in readme, f"print it anew: fastattn bench --from {source} --md table.md"
    assert not environment["dirty"], "measure a clean tree"
