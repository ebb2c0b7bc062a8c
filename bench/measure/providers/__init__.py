"""Who computes a case: fastattn by backend, PyTorch's own attentions, other libraries."""
