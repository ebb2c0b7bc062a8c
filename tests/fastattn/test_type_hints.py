"""Public names can be looked into, though they are exported from a package: their type hints, their source."""

import importlib
import inspect
import typing

import pytest

PACKAGES = (
    "fastattn",
    "fastattn.cache",
    "fastattn.integrations.diffusers",
    "fastattn.integrations.flash_attn",
    "fastattn.integrations.torch",
    "fastattn.masks",
    "fastattn.nn",
    "fastattn.testing",
)
PUBLIC = [
    (package, name)
    for package in PACKAGES
    for name in importlib.import_module(package).__all__
    if callable(getattr(importlib.import_module(package), name))
]


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_type_hints_of_a_public_name_are_found(package, name):
    public = getattr(importlib.import_module(package), name)
    hints = typing.get_type_hints(public)
    assert set(hints) >= set(vars(public).get("__annotations__", ()))


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_the_source_of_a_public_name_is_found(package, name):
    public = getattr(importlib.import_module(package), name)
    kind = "class" if isinstance(public, type) else "def"
    assert f"{kind} {public.__name__}" in inspect.getsource(public)


def test_masks_exports_what_kinds_defines():
    assert importlib.import_module("fastattn.masks").__all__ == importlib.import_module("fastattn.masks.kinds").__all__
