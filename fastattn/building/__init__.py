"""The C++ and CUDA libraries: how they are compiled, where they are kept, how they are found and loaded."""
