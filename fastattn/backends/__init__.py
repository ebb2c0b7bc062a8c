"""Adapters: the only way to the kernels. Which backend runs a call is chosen in fastattn/dispatch.py."""
