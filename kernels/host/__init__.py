"""The host's side of a launch: from a spec and tensors to compiled kernels and their parameters."""
