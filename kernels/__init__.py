"""The Triton backend, installed as fastattn.kernels."""

if __name__ != "fastattn.kernels":
    raise ImportError(
        "this folder is fastattn's Triton backend and is imported as fastattn.kernels, not as a top-level 'kernels'; "
        "run `pip install --no-build-isolation -e .`, or leave this folder if you meant another package of that name"
    )
