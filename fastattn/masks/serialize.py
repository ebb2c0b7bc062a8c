"""Masks as primitives: what an operator's schema can carry.

A mask becomes a code, a list of ints and a list of tensors. The code spells the tree in prefix order, a word a value:
the class, then each field: `i` an int (in the list), `x` a tensor (in the list), `n` None, `s=...` a string, `b=...`
a bool. Masks are registered as pytrees here too.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.utils._pytree import GetAttrKey, KeyEntry, register_pytree_node

from fastattn.masks import kinds as masks
from fastattn.masks.kinds import Full, Mask
from fastattn.masks.paged import Paged

Serialized = tuple[str, list[int], list[Tensor]]

CLASSES: dict[str, type[Mask]] = {
    name: cls
    for name, cls in (*((name, getattr(masks, name)) for name in masks.__all__), (Paged.__name__, Paged))
    if inspect.isclass(cls) and issubclass(cls, Mask) and dataclasses.is_dataclass(cls)
}
FIELDS: dict[str, tuple[str, ...]] = {
    name: tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
    for name, cls in CLASSES.items()
}
ALIGNMENT = 16
"""Bytes of the widest load: kernels read memory otherwise where an address is no multiple of it."""
CHECKS_VALUES = frozenset(name for name, cls in CLASSES.items() if "validate" in inspect.signature(cls).parameters)


def no_mask() -> Serialized:
    """The code of Full()."""
    return Full.__name__, [], []


def is_known(mask: Mask) -> bool:
    """Whether a mask is one of the library's, all through."""
    name = type(mask).__name__
    inner = (getattr(mask, field) for field in FIELDS.get(name, ()))
    return CLASSES.get(name) is type(mask) and all(is_known(each) for each in inner if isinstance(each, Mask))


def is_plain(mask: Mask) -> bool:
    """Whether it also holds no tensor: then it never changes."""
    return not mask.tensors and is_known(mask)


def pack(mask: Mask) -> Serialized:
    """Mask -> (code, numbers, tensors)."""
    words: list[str] = []
    numbers: list[int] = []
    tensors: list[Tensor] = []

    def put(value: object) -> None:
        if isinstance(value, Mask):
            name = type(value).__name__
            words.append(name)
            for field in FIELDS[name]:
                put(getattr(value, field))
        elif isinstance(value, Tensor):
            words.append("x")
            tensors.append(value)
        elif value is None:
            words.append("n")
        elif isinstance(value, bool):
            words.append(f"b={int(value)}")
        elif isinstance(value, str):
            words.append(f"s={value}")
        else:
            words.append("i")
            numbers.append(value)  # type: ignore[arg-type]

    put(mask)
    return " ".join(words), numbers, tensors


def structure(mask: Mask) -> tuple[object, ...] | None:
    """All of a mask but what its tensors hold, by value: its code, numbers, and how each tensor lies in memory. None
    where it is a class of the user's.
    """
    if not is_known(mask):
        return None
    code, numbers, tensors = pack(mask)
    lie = ((each.dtype, each.shape, each.stride(), each.data_ptr() % ALIGNMENT == 0) for each in tensors)
    return code, *numbers, *lie


def unpack(code: str, numbers: list[int], tensors: list[Tensor]) -> Mask:
    """The way back. Values were checked when the mask was made and are not looked at again."""
    ints, rest, words = iter(numbers), iter(tensors), iter(code.split())
    return _take(words, ints, rest)  # type: ignore[return-value]


def _take(words: Iterator[str], ints: Iterator[int], tensors: Iterator[Tensor]) -> object:
    word = next(words)
    if word == "x":
        return next(tensors)
    if word == "i":
        return next(ints)
    if word == "n":
        return None
    if word[:2] == "b=":
        return word[2:] == "1"
    if word[:2] == "s=":
        return word[2:]
    values = {field: _take(words, ints, tensors) for field in FIELDS[word]}
    if word in CHECKS_VALUES:
        values["validate"] = False
    return CLASSES[word](**values)


def _to_tree(mask: Mask) -> tuple[list[object], list[list[object]]]:
    """Pytree children (tensors and inner masks), and the rest in JSON's types: [field, value], or [field] for a
    child.
    """
    children: list[object] = []
    context: list[list[object]] = []
    for field in FIELDS[type(mask).__name__]:
        value = getattr(mask, field)
        if isinstance(value, (Tensor, Mask)):
            children.append(value)
            context.append([field])
        else:
            context.append([field, value])
    return children, context


def _to_keyed_tree(mask: Mask) -> tuple[list[tuple[KeyEntry, object]], list[list[object]]]:
    children, context = _to_tree(mask)
    names = (str(field) for field, *value in context if not value)
    return [(GetAttrKey(name), child) for name, child in zip(names, children, strict=True)], context


def _from_tree(name: str, children: Iterable[object], context: list[list[object]]) -> Mask:
    rest = iter(children)
    values = {field: value[0] if value else next(rest) for field, *value in context}
    # Leaves may be placeholders of any kind while a tree is being mapped over, which no constructor would take.
    mask = object.__new__(CLASSES[name])
    for field in FIELDS[name]:
        object.__setattr__(mask, field, values[field])
    return mask


for _name, _class in CLASSES.items():
    register_pytree_node(
        _class,
        _to_tree,
        functools.partial(_from_tree, _name),
        flatten_with_keys_fn=_to_keyed_tree,
        serialized_type_name=f"fastattn.masks.{_name}",
    )
