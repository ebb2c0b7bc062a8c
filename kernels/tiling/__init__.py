"""Which tiles a program visits, and how a tile is loaded, multiplied and stored."""
