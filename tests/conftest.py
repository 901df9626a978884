"""Set for every test before anything of ours is imported."""

import os

# Triton kernels run under its interpreter, on CPU tensors. Compiling them for GPUs is tested in processes of their own.
os.environ.setdefault("TRITON_INTERPRET", "1")
