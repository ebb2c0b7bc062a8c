"""The command line of `fastattn bench`: every flag, and the value it becomes. Imports nothing heavy."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

MODES = ("fwd", "bwd", "fwd+bwd")
PROVIDERS = ("fastattn", "sdpa", "flex")
QUICK_PROVIDERS = ("fastattn", "sdpa")
MODULE_PROVIDERS = ("fastattn", "mha")
MODELS = ("minilm", "none")
LARGEST_RANGE = 1000
SIZES = ("batch", "num_heads", "num_kv_heads", "q_len", "kv_len", "head_dim", "head_dim_v", "window")

EPILOG = """
sizes are lists: 512   1k,2k,4k   512:8k:*2 (512, 1024 ... 8192)   1k:4k:+1k
fastattn bench compare A B [--threshold 5%] [--fail]     two runs side by side, by name (--save) or file
fastattn bench report [--check]                          the tables of the documents, from bench/results
exit codes: 0 all well; 1 fastattn was wrong or crashed; 2 the command line was; 3 nothing ran; 130 Ctrl-C
examples:
  fastattn bench                                     this machine's default run, a real model at its end
  fastattn bench llama3-8b-prefill vit-b             attention of known models
  fastattn bench --op truncated -N 1k:8k:*2 --window 256 --mode fwd
  fastattn bench --op all --providers fastattn,sdpa,sdpa-math --dtype bf16,fp32 --md report.md
  fastattn bench cpu-table --save table --budget 600 the CPU backend's speed table; --resume goes on
  fastattn bench --model minilm                      the real model alone
"""


@dataclass(frozen=True)
class Options:
    """What was asked for; None means the default of the device."""

    presets: list[str] = field(default_factory=list)
    ops: list[str] | None = None
    providers: list[str] | None = None
    peers: Path | None = None
    baseline: str | None = None
    dtypes: list[str] | None = None
    modes: list[str] | None = None
    batch: list[int] | None = None
    num_heads: list[int] | None = None
    num_kv_heads: list[int] | None = None
    q_len: list[int] | None = None
    kv_len: list[int] | None = None
    head_dim: list[int] | None = None
    head_dim_v: list[int] | None = None
    window: list[int] | None = None
    only: re.Pattern[str] | None = None
    device: str = "auto"
    json: Path | None = None
    csv: Path | None = None
    md: Path | None = None
    plot: list[Path] | None = None
    out: Path | None = None
    save: str | None = None
    resume: bool = False
    repro: bool = False
    dry_run: bool = False
    quick: bool = False
    list: bool = False
    check: bool = True
    rounds: int | None = None
    min_time: float | None = None
    max_time: float | None = None
    budget: float | None = None
    model: str | None = None
    source: Path | None = None
    argv: tuple[str, ...] = ()

    @property
    def narrowed(self) -> bool:
        """Whether the caller chose what to time, rather than taking the default run."""
        sizes = (getattr(self, name) for name in SIZES)
        return bool(self.presets) or any(
            given is not None for given in (self.ops, self.only, self.providers, self.dtypes, self.modes, *sizes)
        )

    @property
    def wants_cases(self) -> bool:
        return self.model in (None, "none") or self.narrowed

    @property
    def wants_model(self) -> bool:
        return self.model == "minilm" or (self.model is None and not self.narrowed)


class Parser(argparse.ArgumentParser):
    """A mistake is one sentence, not a page of usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help has all flags\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("what to time")
    names, numbers = _list_of(str), _list_of(_sizes)
    what.add_argument("presets", nargs="*", metavar="PRESET", help="attention of known models by name, see --list")
    what.add_argument("--op", dest="ops", type=names, metavar="LIST", help="operations; `all`, or see --list")
    what.add_argument("--providers", type=names, metavar="LIST", help=f"who computes (default {','.join(PROVIDERS)})")
    what.add_argument(
        "--peers", type=Path, metavar="DIR", help="folder with unpacked wheels, for fa2, fa3, fa4, xformers (or PEERS=)"
    )
    what.add_argument("--baseline", metavar="NAME", help="whose time the speed-up is against (default sdpa)")
    what.add_argument("--dtype", dest="dtypes", type=names, metavar="LIST", help="fp32, bf16, fp16")
    what.add_argument("--mode", dest="modes", type=_list_of(_mode), metavar="LIST", help="fwd, bwd, fwd+bwd")
    what.add_argument("--only", type=regex, metavar="REGEX", help="rows whose op/dtype/sizes/mode/provider it finds")
    what.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    what.add_argument("--model", choices=MODELS, help="a real model: alone, or with the flags above at the end")
    what.add_argument("--quick", action="store_true", help="small sizes, few rounds, no compiled provider")
    what.add_argument("--list", action="store_true", help="print operations, providers and the rows that would run")
    what.add_argument("--dry-run", action="store_true", help="print the rows with the memory each will take, and leave")
    what.add_argument("--repro", action="store_true", help="print the one line that runs each row again")
    sizes = parser.add_argument_group("sizes")
    for flags, target, text in (
        (("-B", "--batch"), "batch", "batch"),
        (("-H", "--heads"), "num_heads", "query heads"),
        (("--kv-heads",), "num_kv_heads", "key heads"),
        (("-N", "--q-len"), "q_len", "query length (and the keys', unless -M)"),
        (("-M", "--kv-len"), "kv_len", "key length"),
        (("-D", "--head-dim"), "head_dim", "numbers a head"),
        (("--head-dim-v",), "head_dim_v", "numbers a head of values and outputs (default as -D)"),
        (("-W", "--window"), "window", "keys a query sees (op truncated) or sees to each side (op local)"),
    ):
        sizes.add_argument(*flags, dest=target, type=numbers, metavar="LIST", help=text)
    how = parser.add_argument_group("how long")
    how.add_argument("--rounds", type=_positive(int), metavar="N", help="samples of each row at least")
    how.add_argument("--min-time", type=_positive(float), metavar="S", help="seconds for each row at least")
    how.add_argument("--max-time", type=_positive(float), metavar="S", help="seconds for each row at most")
    how.add_argument(
        "--budget", type=_positive(float), metavar="S", help="begin no further case after so many seconds; see --resume"
    )
    how.add_argument("--no-check", dest="check", action="store_false", help="time without comparing with float64")
    where = parser.add_argument_group("files")
    where.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the JSON and the plots (default bench/out/...)"
    )
    where.add_argument("--from", dest="source", type=Path, metavar="JSON", help="show an earlier run, measure nothing")
    where.add_argument("--save", metavar="NAME", help="keep the run under a name, for `fastattn bench compare A B`")
    where.add_argument(
        "--resume", action="store_true", help="keep the rows that the file of --save, --json or --out already has"
    )
    where.add_argument("--json", type=Path, metavar="FILE")
    where.add_argument("--csv", type=Path, metavar="FILE")
    where.add_argument("--md", type=Path, metavar="FILE")
    where.add_argument("--plot", type=_plots, metavar="FILE.svg|png", help="one or more, by comma")


def parse(argv: list[str]) -> Options:
    """Options from the words behind `fastattn bench`; a mistake prints a sentence and exits with code 2."""
    parser = Parser("fastattn bench", description="Time attention beside PyTorch's own.")
    add_arguments(parser)
    namespace = parser.parse_intermixed_args(argv)
    given = {name: value for name, value in vars(namespace).items() if name in Options.__dataclass_fields__}
    return Options(**given, argv=("bench", *argv))


def _list_of(part):
    """A parser of comma-separated parts; a part may stand for several values."""

    def parse_list(text: str) -> list:
        values: list = []
        for word in filter(None, (word.strip() for word in text.split(","))):
            value = part(word)
            values += value if isinstance(value, list) else [value]
        if not values:
            raise argparse.ArgumentTypeError(f"a comma-separated list is needed, got {text!r}")
        return values

    return parse_list


def _sizes(word: str) -> list[int]:
    """`4k`, or a range first:last:*factor or first:last:+step, both ends included."""
    if ":" not in word:
        return [_size(word)]
    parts = word.split(":")
    if len(parts) != 3 or parts[2][:1] not in ("*", "+"):
        raise argparse.ArgumentTypeError(f"a range is first:last:*factor or first:last:+step, got {word!r}")
    value, last, by = _size(parts[0]), _size(parts[1]), _size(parts[2][1:])
    if parts[2][0] == "*" and by < 2:
        raise argparse.ArgumentTypeError(f"a range's factor must be at least 2, got {word!r}")
    values: list[int] = []
    while value <= last and len(values) < LARGEST_RANGE:
        values.append(value)
        value = value * by if parts[2][0] == "*" else value + by
    if not values:
        raise argparse.ArgumentTypeError(f"the range {word!r} is empty: its first number is larger than its last")
    return values


def _size(word: str) -> int:
    match = re.fullmatch(r"(\d+)([kKmM]?)", word)
    if not match or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"a size is a positive whole number such as 512, 4k or 1m, got {word!r}")
    return int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()]


def _mode(word: str) -> str:
    if word not in MODES:
        raise argparse.ArgumentTypeError(f"a mode is one of {', '.join(MODES)}, got {word!r}")
    return word


def regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as failure:
        raise argparse.ArgumentTypeError(f"not a regular expression: {text!r} ({failure})") from None


def _plots(text: str) -> list[Path]:
    paths = [Path(word) for word in text.split(",") if word]
    for path in paths:
        if path.suffix not in (".svg", ".png"):
            raise argparse.ArgumentTypeError(f"a plot's name ends in .svg or .png, got {str(path)!r}")
    return paths


def _positive(kind):
    def parse_positive(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"a positive number is needed, got {text!r}")
        return value

    return parse_positive
