"""The int4 layer that all methods share: every operation's definition in plain torch, and its kernels.

Hugging Face publishes a distribution called `kernels`, and `transformers` looks for it by that name. It takes
a visible folder `kernels/` for that library when the folder's `__version__` lies in the range that it
accepts, and then fails on names that are not here. So this module imports nothing, and its version stays at
zero, below every range; the project's own version is that of the distribution `quantgrid`. See
`methods/distribution.py`.
"""

__version__ = "0.0.0"
