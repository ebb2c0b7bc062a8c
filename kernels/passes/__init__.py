"""The kernels: one forward pass, the passes of the backward."""
