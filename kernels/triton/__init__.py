"""The operations of the int4 layer as Triton kernels, one file an operation. `reference` defines them.

Nothing here is imported where there is no CUDA GPU, except by the tests that compile the kernels without one.
"""
