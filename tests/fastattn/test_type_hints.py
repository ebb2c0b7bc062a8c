"""typing.get_type_hints finds what the annotations of public names mean, though they are exported from a package."""

import importlib
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
