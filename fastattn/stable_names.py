"""Modules by the names that they had before they moved: those that docs, pickles or `python -m` have named.

A finder, asked last, answers `import fastattn.mask` with the module fastattn.masks.base itself, so that classes are the
same objects under either name. None of them is imported before somebody asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

FORMER_NAMES = {
    "bench.pipeline": "bench.gpu.pipeline",
    "blocks": "masks.blocks",
    "cache_kinds": "cache.contiguous",
    "cache_paged": "cache.paged",
    "flat": "masks.serialize",
    "foreign": "masks.flex",
    "fuzz": "testing.strategies",
    "hiding": "testing.nan_padding",
    "integrations.caught": "integrations.sdpa_redirect",
    "integrations.classes": "integrations.exchange",
    "integrations.flash_alibi": "integrations.flash_attn.alibi",
    "integrations.flash_cache": "integrations.flash_attn.cache",
    "integrations.patch": "integrations.torch.patching",
    "integrations.recording": "integrations.torch.recording",
    "integrations.registry": "integrations.torch.registry",
    "integrations.steps": "integrations.torch.generators",
    "integrations.torchvision": "integrations.vision.swin",
    "integrations.transformers_arguments": "integrations.transformers.arguments",
    "integrations.transformers_mask": "integrations.transformers.model_mask",
    "integrations.transformers_masks": "masks.mask_mod",
    "integrations.transformers_own": "integrations.transformers.own_code",
    "integrations.transformers_replace": "integrations.transformers.replacement",
    "integrations.transformers_rules": "masks.mask_mod_rules",
    "integrations.unknown": "integrations.left_alone",
    "leaves": "masks.program",
    "mask": "masks.base",
    "mha": "torch_api.mha",
    "nn.twin": "nn.torch_modules",
    "paged": "masks.paged",
    "projections": "torch_api.projections",
    "sdpa": "torch_api.sdpa",
    "simulator": "testing.simulator",
    "yardstick": "testing.tolerance",
    "yardstick_elements": "testing.tolerance_elements",
}
"""Within fastattn: the former name of a module, and its name."""


class _FormerName(Loader):
    """Loads a module by handing out the one that is meant."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has put the former name's in its place

    def get_code(self, name: str) -> CodeType | None:
        """For `python -m` with the former name."""
        found = importlib.util.find_spec(self.name)
        loader: Any = found.loader if found else None
        return loader.get_code(self.name)


class FormerNames(MetaPathFinder):
    """Finds the modules of FORMER_NAMES."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "fastattn" or name not in FORMER_NAMES:
            return None
        return ModuleSpec(fullname, _FormerName(f"fastattn.{FORMER_NAMES[name]}"))


def install() -> None:
    """Ask the finder after all others; once, however often fastattn is imported."""
    sys.meta_path[:] = [each for each in sys.meta_path if type(each).__name__ != FormerNames.__name__]
    sys.meta_path.append(FormerNames())
