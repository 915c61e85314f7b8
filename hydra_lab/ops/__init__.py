"""The model's operations as plain functions of tensors.

One package per operation: `ssd`, `causal_conv`, `sparse_attention`, `chunk_moe`, `product_key`, `workspace`. Each has

    __init__.py     the public functions: they validate, then run the backend that was asked for
    reference.py    an oracle that reads like the equation
    torch.py        the fast path on any device
    kernels.py      Triton kernels, forward and backward, for CUDA devices
    README.md       the maths, the shapes and where they come from

`use_backend` chooses between them. Operations know neither the model's configuration nor its modules.
"""

from hydra_lab.ops.backend import Backend as Backend
from hydra_lab.ops.backend import use_backend as use_backend
