"""The table of providers, by name."""

from __future__ import annotations

from fastattn.bench.cases.operations import known
from fastattn.bench.measure.providers.base import Provider
from fastattn.bench.measure.providers.fastattn import Fastattn
from fastattn.bench.measure.providers.flex import Flex
from fastattn.bench.measure.providers.module import TorchModule
from fastattn.bench.measure.providers.peers import PEERS
from fastattn.bench.measure.providers.read import Read
from fastattn.bench.measure.providers.sdpa import SDPA_BACKENDS, Sdpa
from fastattn.dispatch import BACKENDS


def provider(name: str) -> Provider:
    """The provider of that name; ValueError lists them."""
    every = known_providers()
    known("providers", [name], every)
    return every[name]


def known_providers() -> dict[str, Provider]:
    every = [Fastattn(), *map(Fastattn, BACKENDS), Sdpa(), *map(Sdpa, SDPA_BACKENDS), Flex(), TorchModule(), Read()]
    every += PEERS.values()
    return {each.name: each for each in every}
