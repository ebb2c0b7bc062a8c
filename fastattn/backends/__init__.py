"""Adapters: the way of a call to the kernels. Which backend runs a call is chosen in fastattn/dispatch.py."""
