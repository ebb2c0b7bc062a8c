"""What a kernel computes with a tile of scores: mask, score, softmax, dropout."""
