"""fastattn: every kind of attention as one fused call, behind the API of torch.nn."""
