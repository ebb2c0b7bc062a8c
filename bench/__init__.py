"""The benchmark, installed as fastattn.bench."""

if __name__ != "fastattn.bench":
    raise ImportError(
        "this folder is fastattn's benchmark and is imported as fastattn.bench, not as a top-level 'bench'; "
        "run `pip install --no-build-isolation -e .`, or leave this folder if you meant another package of that name"
    )
