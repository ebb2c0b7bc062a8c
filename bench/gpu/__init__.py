"""`make gpu`: a few minutes of a GPU into evidence, step by step, in child processes."""
