"""Where there is no GPU the kernels run in Triton's interpreter, which is chosen when they are first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
