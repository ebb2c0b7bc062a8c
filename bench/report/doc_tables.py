"""`fastattn bench report`: the tables of the documents, rendered from the committed measurements that they name.

    <!-- table: bench/results/cpu-default.json -->
    (written by `fastattn bench report`)
    <!-- end of table -->

A name may be followed by `as=KIND` and by `only=REGEX`, as `--only` takes it. Kinds: `ratios`, fastattn against each of
the others with intervals; `rates`, FLOP/s in the place of times; `direct`, the figures of direct.py. A measurement
that is not there yet is a line that says so.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastattn.bench.measure.env import headline, say_busy
from fastattn.bench.options import Parser
from fastattn.bench.report import direct, ratio_tables
from fastattn.bench.report.writers import rates, read_json, summary

OK, DIFFERENT, USAGE = 0, 1, 2

BEGIN = re.compile(r"<!-- table: (?P<source>\S+)(?: as=(?P<kind>\w+))?(?: only=(?P<only>\S+))? -->")
END = "<!-- end of table -->"
MARKDOWN: dict[str | None, Callable[[list[Any]], list[str]]] = {
    None: summary, "ratios": ratio_tables.markdown, "rates": rates, "direct": direct.markdown,
}  # fmt: skip
"""What makes a table's lines, by its kind."""
DOCUMENTS = ("README.md", "docs/*.md")


def render(text: str, root: Path) -> str:
    """`text` with each marked table as its measurement has it. ValueError for a marker that cannot be filled."""
    parts, place = [], 0
    for match in BEGIN.finditer(text):
        end = text.find(END, match.end())
        following = BEGIN.search(text, match.end())
        if end < 0 or (following is not None and following.start() < end):
            raise ValueError(f"the table of {match['source']} has no end; write {END} below it")
        parts += [text[place : match.end()], "\n\n", _filled(root, match), "\n\n"]
        place = end
    return "".join([*parts, text[place:]])


def _filled(root: Path, match: re.Match[str]) -> str:
    source, kind = match["source"], match["kind"]
    if kind not in MARKDOWN:
        raise ValueError(f"as={kind} is no kind of table; there are {', '.join(filter(None, MARKDOWN))}; none: times")
    if not (root / source).is_file():
        return f"Not measured yet: `{source}` is not there."
    return table(root / source, match["only"], kind)


def table(path: Path, only: str | None = None, kind: str | None = None) -> str:
    """Machine, versions, commit and date in one line, then a line a case: who took how long; or a line a pair."""
    rows, environment = read_json(path)
    found: list[Any] = direct.read_direct(path) if kind == "direct" else rows
    shown = [each for each in found if only is None or re.search(only, each.name)]
    if not shown:
        asked = (f" as={kind}" if kind else "") + (f" that {only!r} finds" if only else "")
        raise ValueError(f"{path} has no row{asked}")
    lines = [f"{headline(environment)} · {environment['date'][:10]}", ""]
    busy = say_busy(environment)
    if busy:
        lines += [busy, ""]
    below = ratio_tables.ceilings(environment) if kind == "ratios" else []
    return "\n".join([*lines, *MARKDOWN[kind](shown), *below])


def documents(root: Path) -> list[Path]:
    """The files below `root` that hold a marked table."""
    paths = [path for pattern in DOCUMENTS for path in sorted(root.glob(pattern))]
    # A line of its own: docs also speak of the marker.
    return [path for path in paths if re.search(f"^{BEGIN.pattern}$", path.read_text(encoding="utf-8"), re.MULTILINE)]


def main(argv: list[str]) -> int:
    """Write the tables, or with --check only say which differ: exit code 1."""
    parser = Parser("fastattn bench report", description="Render the documents' tables anew.")
    parser.add_argument("root", nargs="?", type=Path, default=Path(), metavar="DIR", help="a checkout (default: here)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a table differs")
    given = parser.parse_args(argv)
    paths = documents(given.root)
    if not paths:
        print(
            f"fastattn bench report: no marked table in {given.root.resolve()}; run it in a checkout", file=sys.stderr
        )
        return USAGE
    different = []
    for path in paths:
        before = path.read_text(encoding="utf-8")
        try:
            after = render(before, given.root)
        except ValueError as failure:
            print(f"fastattn bench report: {path}: {failure}", file=sys.stderr)
            return USAGE
        if after != before:
            different.append(path)
            if not given.check:
                path.write_text(after, encoding="utf-8")
    for path in paths:
        changed = "differs from its measurement" if given.check else "rendered anew"
        print(f"{path}: {changed if path in different else 'as measured'}")
    return DIFFERENT if different and given.check else OK
