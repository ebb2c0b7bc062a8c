"""torch.nn.functional's attention functions on fastattn: the same signatures, the same meaning, the same errors."""
