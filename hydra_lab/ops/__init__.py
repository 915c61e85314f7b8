"""The model's operations as plain functions of tensors.

One package per operation: `ssd`, `causal_conv`, `sparse_attention`, `chunk_moe`, `product_key`. Each has

    __init__.py     the public functions: they validate, then run the backend that was asked for
    reference.py    an oracle that reads like the equation
    torch.py        the fast path on any device
    README.md       the maths, the shapes and where they come from

Operations know neither the model's configuration nor its modules.
"""
