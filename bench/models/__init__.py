"""Real architectures with random weights, run with fastattn and with their library's own eager attention.

`fastattn models` compares them and writes docs/models.md; the tests go through the same rows.
"""
