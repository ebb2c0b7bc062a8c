"""What `dispatch` and `ops` ask of a backend. Each is a module that has all of this; a class that derives from
`Backend` has what is written here where it says nothing itself. A reason is a sentence that says why not, or None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from fastattn import low_parts
from fastattn.low_parts import NONE, LowParts
from fastattn.spec import AttnInputs, AttnSpec

if TYPE_CHECKING:
    from fastattn.backends.inputs import Gradients


class Backend(Protocol):
    """Forward, backward and weights of one call, and whether they can run. All get a checked spec and its inputs."""

    READS_BLOCKS: bool = False
    """Whether its forward reads keys and values that lie in blocks, where they lie."""
    HAS_BACKWARD: bool = False
    """Whether there is a backward at all. Where there is none, nobody asks for it."""
    READS_BLOCKS_BACKWARD: bool = False
    LOOKS_AT_STORAGE: bool = False
    """Whether it finds out itself that a tensor's memory was taken away."""
    ROUNDS_LSE: str | None = None
    """Why its gradients beside large scores are coarse."""

    def why_not(self, spec: AttnSpec) -> str | None:
        """The first reason why it cannot run the call's forward."""
        ...

    def prepare(self, spec: AttnSpec, *, by_name: bool = False) -> str | None:
        """`why_not`, just before a run, once whatever that needs is done; `by_name`: nothing else may run the call."""
        return self.why_not(spec)

    def needs_asking(self, spec: AttnSpec) -> str | None:
        """The reason why a free choice passes it by, though it can run the call."""
        return None

    def why_not_backward(self, spec: AttnSpec) -> str | None:
        """The first reason why it cannot run the backward of a call that `why_not` lets pass."""
        return None

    def notes(self, spec: AttnSpec, inputs: AttnInputs) -> list[str]:
        """What else a verdict that names it says."""
        return []

    def kernel_name(self, spec: AttnSpec) -> str:
        """The kernels of the forward."""
        ...

    def kernel_name_backward(self, spec: AttnSpec) -> str:
        """The kernels of the backward."""
        raise NotImplementedError("its backward does not exist yet")

    def forward(self, spec: AttnSpec, inputs: AttnInputs) -> tuple[Tensor, Tensor]:
        """out [batch, num_heads, q_len, head_dim_v], lse [batch, num_heads, q_len]."""
        ...

    def forward_with_low(self, spec: AttnSpec, inputs: AttnInputs) -> tuple[Tensor, Tensor, LowParts]:
        """out, lse and what their rounding took, for a backward."""
        return low_parts.not_kept(spec, *self.forward(spec, inputs))

    def backward(
        self,
        spec: AttnSpec,
        inputs: AttnInputs,
        out: Tensor,
        lse: Tensor,
        d_out: Tensor,
        d_lse: Tensor | None,
        *,
        wants_dbias: bool = True,
        low: LowParts = NONE,
    ) -> Gradients:
        """dq, dk, dv, dbias, dsinks in their inputs' shapes and dtypes; no dbias where nobody wants it. `low` is what
        `forward_with_low` gave; who keeps none takes out and lse at their word.
        """
        raise NotImplementedError("its backward does not exist yet")

    def weights(
        self, spec: AttnSpec, inputs: AttnInputs, lse: Tensor | None, rows: Tensor | None, *, mean: bool
    ) -> Tensor | None:
        """weights float32 [batch, num_heads, q_len or len(rows), kv_len], before dropout, or their mean over the heads;
        None: the plain formulation has to compute them.
        """
        return None
