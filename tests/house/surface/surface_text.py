"""What of the public surface can be written down as text: names, signatures, operators, state_dict keys, the command
line, the environment. Each function gives {heading: lines}; make.py keeps them, test_surface.py compares.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
import sys
import types
import typing
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[3]

MODULES = (
    ("fastattn", "README, docs/torch.md, every example", None),
    ("fastattn.bench", "`python -m fastattn.bench`", ()),
    ("fastattn.blocks", "docs/masks.md names block_list; the others are what it takes and gives",
     ("BlockList", "Grid", "block_list")),
    ("fastattn.cache", "the classes of fastattn.KVCache and of its `key` and `value`", ("CacheView", "KVCache")),
    ("fastattn.cli", "the entry point of the wheel", ("main",)),
    ("fastattn.dispatch", "docs/adding.md: the list of backends; the classes of fastattn.Verdict, BackendUnavailable",
     ("BACKENDS", "BackendUnavailable", "Verdict")),
    ("fastattn.functional", "its __all__", None),
    ("fastattn.integrations.diffusers", "docs/integrations.md", ("NAME", "attention", "register")),
    ("fastattn.integrations.flash_attn", "docs/integrations.md, its __all__", None),
    ("fastattn.integrations.patch", "the class of fastattn.patch; its __all__", None),
    ("fastattn.integrations.registry", "docs/integrations.md", ("NAME", "register")),
    ("fastattn.integrations.torch", "its __all__: what replace_attention gives", None),
    ("fastattn.integrations.transformers", "README, docs/transformers.md, its __all__", None),
    ("fastattn.kernels", "where an installed package's kernels are", ()),
    ("fastattn.masks", "README, docs/masks.md, its __all__", None),
    ("fastattn.nn", "README, docs/torch.md, its __all__", None),
    ("fastattn.scores", "docs/adding.md: score= and normalizer= of attention", ("DotProduct", "Softmax")),
    ("fastattn.simulator", "docs/simulator.md",
     ("FLAVOURS", "Stored", "build", "load", "schedule", "stored", "why_not")),
    ("fastattn.spec", "docs/adding.md: what a backend is given", ("AttnInputs", "AttnSpec", "FlatSpec")),
    ("fastattn.testing", "docs/adding.md, docs/benchmark.md: tests of a user's own backend; its __all__", None),
    ("fastattn.varlen", "its __all__", None),
)  # fmt: skip
"""Each public module: why it is one, and its public names where they are not its __all__."""

DUNDERS = ("__and__", "__call__", "__enter__", "__eq__", "__exit__", "__hash__", "__iter__", "__len__", "__or__")


# ---- names and signatures


def names(module):
    """The lines of one module of MODULES. ImportError where the library that it is for is not installed."""
    given = next(names for name, _, names in MODULES if name == module)
    loaded = importlib.import_module(module)
    lines = []
    recorded = _recorded_homes(module)
    for name in sorted(loaded.__all__ if given is None else given):
        value = getattr(loaded, name)
        described = _described(name, value)
        now, home = getattr(value, "__module__", None), recorded.get(name)
        if home and home != now and _still_there(home, value):
            described[0] = described[0].replace(f" of {now}", f" of {home}")
        lines += described
    return lines


def _recorded_homes(module):
    """The `__module__` that names.txt has for each function and class of a public module."""
    path = Path(__file__).with_name("names.txt")
    lines = parse(path.read_text(encoding="utf-8")).get(module, []) if path.exists() else []
    found = (re.match(r"(\w+): (?:function|class) of ([\w.]+)", line) for line in lines)
    return {each[1]: each[2] for each in found if each}


def _still_there(home, value):
    """Whether a module of that name still has this very object, which is what a pickle that recorded it asks for. The
    module itself may have moved (fastattn/stable_names.py).
    """
    try:
        return getattr(importlib.import_module(home), value.__qualname__, None) is value
    except ImportError:
        return False


def _described(name, value):
    if isinstance(value, types.ModuleType):
        return [f"{name}: module {value.__name__}"]
    if isinstance(value, type):
        return _described_class(name, value)
    if callable(value) and hasattr(value, "__module__"):
        return [f"{name}: function of {value.__module__}", *_signature_lines(value)]
    if isinstance(value, dict):
        return [f"{name}: dict", *(f"    {key}" for key in value)]
    return [f"{name}: {type(value).__name__} {_value(value)}"]


def _described_class(name, cls):
    lines = [f"{name}: class of {cls.__module__}, {cls.__qualname__}"]
    bases = [base for base in cls.__mro__[1:] if base is not object and not base.__name__.startswith("_")]
    lines += [f"    is a {base.__qualname__}" for base in bases]
    maker = next(base for base in cls.__mro__ if "__init__" in vars(base) or "__new__" in vars(base))
    if _is_ours(maker):
        lines += _signature_lines(cls)
    if dataclasses.is_dataclass(cls):
        lines += [f"    field {each.name}: {_annotation(each.type)}" for each in dataclasses.fields(cls)]
    lines += [f"    field {each}" for each in getattr(cls, "_fields", ())]
    members = {}
    for owner in cls.__mro__:
        if _is_ours(owner):
            for member, value in vars(owner).items():
                members.setdefault(member, value)
    fields = {*getattr(cls, "__dataclass_fields__", ()), *getattr(cls, "_fields", ())}
    for member in sorted(members):
        if (member.startswith("_") and member not in DUNDERS) or member in fields:
            continue
        lines.append(f"    {_member(member, members[member])}")
    return lines


def _member(name, value):
    if isinstance(value, staticmethod | classmethod):
        return f"{type(value).__name__} {name}{_signature(value.__func__)}"
    if isinstance(value, types.FunctionType):
        return f"def {name}{_signature(value)}"
    kind = type(value).__name__
    return f"{kind if 'property' in kind else 'attribute'} {name}"


def _is_ours(cls):
    return cls.__module__.split(".")[0] == "fastattn"


def _signature(of):
    parts, back = _parts(of)
    return f"({', '.join(parts)}){back}"


def _signature_lines(of):
    """A parameter a line, so that a diff shows which one has changed."""
    parts, back = _parts(of)
    return ["    (", *(f"        {part}" for part in parts), f"    ){back}"]


def _parts(of):
    """Parameters and result as inspect has them, without what differs between versions of Python: how annotations and
    defaults are shown.
    """
    found = inspect.signature(of)
    parts, kinds = [], [each.kind for each in found.parameters.values()]
    star = inspect.Parameter.VAR_POSITIONAL in kinds
    for each in found.parameters.values():
        if each.kind is each.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        mark = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        hint = "" if each.annotation is each.empty else f": {_annotation(each.annotation)}"
        default = "" if each.default is each.empty else f" = {_value(each.default)}"
        parts.append(f"{mark}{each.name}{hint}{default}")
    if inspect.Parameter.POSITIONAL_ONLY in kinds:
        parts.insert(kinds.count(inspect.Parameter.POSITIONAL_ONLY), "/")
    result = found.return_annotation
    back = "" if result is found.empty or isinstance(of, type) else f" -> {_annotation(result)}"
    return parts, back


def _annotation(hint):
    if isinstance(hint, str):
        return hint
    if isinstance(hint, typing.ForwardRef):
        return hint.__forward_arg__
    return "None" if hint in (None, type(None)) else inspect.formatannotation(hint)


def _value(value):
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    if isinstance(value, str | int | float | type(None)):
        return repr(value)
    if isinstance(value, type | types.FunctionType):
        return value.__qualname__
    if "factory" in repr(value):
        return "<factory>"
    return str(value) if str(value).startswith("torch.") else type(value).__name__


# ---- operators


def operators():
    """Every schema: those that Python registers, as torch has them; those of the native libraries, as their source has
    them, since no library need be built.
    """
    import torch

    import fastattn  # noqa: F401

    registered = [str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fastattn::")]
    # Tests load libraries under names of their own, of the same arguments.
    native = {schema.partition("(")[2] for schema in native_schemas()}
    by_python = sorted(schema for schema in registered if schema.partition("(")[2] not in native)
    return {"registered by Python": _by_argument(by_python), "of the native libraries": _by_argument(native_schemas())}


def _by_argument(schemas):
    """An argument a line, as above."""
    return [
        line for schema in schemas for line in schema.replace(", ", ",\n    ").replace("(", "(\n    ", 1).split("\n")
    ]


def native_schemas():
    """As torch would print those of csrc/ops.cpp."""
    import torch

    text = (ROOT / "csrc" / "ops.cpp").read_text().replace("\\\n", " ")
    defines = dict(re.findall(r"^\s*#\s*define\s+(\w+)\s+(.*)$", text, re.MULTILINE))

    def joined(expression):
        parts = re.findall(r'"([^"]*)"|(\w+)', expression)
        return "".join(joined(defines[name]) if name else literal for literal, name in parts)

    found = re.findall(r"\bm\.def\((.*?)\);", text, re.DOTALL)
    return sorted(str(torch._C.parse_schema("fastattn::" + joined(each))) for each in found)


# ---- state_dict


def state_dicts():
    """The keys and shapes of every module of fastattn.nn, built small, with and without what adds parameters."""
    from fastattn import nn

    layer = {"d_model": 8, "nhead": 2, "dim_feedforward": 16}
    encoder, decoder = nn.TransformerEncoderLayer(**layer), nn.TransformerDecoderLayer(**layer)
    built = {
        "MultiheadAttention": nn.MultiheadAttention(8, 2),
        "MultiheadAttention without bias": nn.MultiheadAttention(8, 2, bias=False),
        "MultiheadAttention of other keys and values, bias_kv": nn.MultiheadAttention(
            8, 2, kdim=4, vdim=6, add_bias_kv=True
        ),
        "MultiheadAttention of fewer key heads": nn.MultiheadAttention(8, 4, num_kv_heads=2),
        "TransformerEncoderLayer": encoder,
        "TransformerDecoderLayer": decoder,
        "TransformerEncoder": nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False),
        "TransformerDecoder": nn.TransformerDecoder(decoder, 2),
        "Transformer": nn.Transformer(8, 2, 1, 1, 16),
    }
    return {
        name: [f"{key} {list(tensor.shape)}" for key, tensor in module.state_dict().items()]
        for name, module in built.items()
    }


# ---- the command line

COMMANDS = (
    "fastattn", "fastattn bench", "fastattn bench report", "fastattn bench compare", "fastattn build", "fastattn check",
    "fastattn info", "fastattn inspect", "fastattn models", "python -m fastattn.bench.pipeline", ".ci/setup_venv.py",
)  # fmt: skip


class Found(Exception):
    """The parser that was asked for help."""


def command(words):
    """Every option of a command, taken from the parser that `--help` reaches. ImportError where it needs rich."""
    if words.startswith("fastattn bench"):
        importlib.import_module("rich")
    real = argparse.ArgumentParser.parse_known_args
    mixed = argparse.ArgumentParser.parse_known_intermixed_args

    def caught(parse):
        def parse_or_stop(self, args=None, namespace=None):
            if "--help" in (sys.argv[1:] if args is None else args):
                raise Found(self)
            return parse(self, args, namespace)

        return parse_or_stop

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", caught(real)),
        mock.patch.object(argparse.ArgumentParser, "parse_known_intermixed_args", caught(mixed)),
    ):
        try:
            _run(words)
        except Found as found:
            parser = found.args[0]
        else:
            raise AssertionError(f"{words} --help asks no parser")
    inner = words.split()[1:]
    if words.startswith("fastattn ") and inner[0] != "bench":  # argparse's own command of a command
        [commands] = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
        parser = commands.choices[inner[0]]
    return _options(parser)


def _run(words):
    if words.startswith(".ci"):
        path = ROOT / words
        spec = importlib.util.spec_from_file_location("surface_script", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with mock.patch.object(sys, "argv", [words, "--help"]):
            module.arguments()
    elif words.startswith("python -m"):
        importlib.import_module(words.split()[2]).main(["--help"])
    else:
        from fastattn.cli import main

        main([*words.split()[1:], "--help"])


def _options(parser):
    lines = [f"prog: {parser.prog}" if parser.prog.startswith(("fastattn", "make")) else "prog: of the file"]
    lines.append(f"description: {parser.description}")
    lines += [f"epilog: {line}" for line in (parser.epilog or "").strip().splitlines()]
    for each in parser._actions:
        if isinstance(each, argparse._SubParsersAction):
            lines += [f"command {choice.dest}: {choice.help}" for choice in each._choices_actions]
            continue
        if isinstance(each, argparse._HelpAction):
            continue
        lines.append(f"{', '.join(each.option_strings) or each.dest} -> {each.dest}")
        shown = {
            "default": each.default, "takes": each.nargs, "choices": each.choices and list(each.choices),
            "required": (each.required and each.option_strings) or None, "shown as": each.metavar,
            "constant": each.const,
        }  # fmt: skip
        lines += [f"    {name}: {_default(value)}" for name, value in shown.items() if value is not None]
        lines.append(f"    help: {'(not shown)' if each.help == argparse.SUPPRESS else each.help}")
    return lines


def _default(value):
    """A default that the machine decides is said to be one."""
    if value == min(8, os.cpu_count() or 1) and type(value) is int:
        return "processors, 8 at most"
    return value.as_posix() if isinstance(value, Path) else repr(value)


# ---- the environment

READ = re.compile(r"(?:getenv\(|environ(?:\.get|\.pop|\.setdefault)?[(\[])\s*\"(\w+)\"")

OURS = re.compile(r"FASTATTN_[A-Z0-9_]+")


def environment():
    """The names of all variables that the sources read, and of all that are ours."""
    files = [path for top in ("fastattn", "kernels", "bench", ".ci") for path in (ROOT / top).rglob("*.py")]
    found = set()
    for path in [*files, ROOT / "setup.py"]:
        text = path.read_text(encoding="utf-8")
        found |= set(READ.findall(text))
        strings = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
        found |= {value for value in strings if isinstance(value, str) and OURS.fullmatch(value)}
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            found |= set(READ.findall(path.read_text(encoding="utf-8")))
    variables = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {"read by the sources": sorted(found), "of the Makefile": sorted(variables)}


def quietly(call, *args):
    """What a command prints is not asked for."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return call(*args)


# ---- the files


def render(sections):
    """{heading: lines} as a file's text."""
    return "\n\n".join("\n".join([f"== {heading}", *lines]).rstrip() for heading, lines in sections.items()) + "\n"


def parse(text):
    """The reverse of `render`."""
    parts = re.split(r"^== (.*)\n?", text, flags=re.MULTILINE)
    return {heading: body.strip("\n").split("\n") for heading, body in zip(parts[1::2], parts[2::2], strict=True)}
