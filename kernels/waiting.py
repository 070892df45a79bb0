"""What a CUDA graph cannot record: operations whose answer the host waits for."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_one_at_a_time = threading.Lock()


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the GPU raises RuntimeError, which tells it apart
    before a capture, that it would spoil: torch's generator of random numbers stays unusable after a failed
    one. Both the mode and the filter of warnings are the process's: other threads that wait for the GPU
    meanwhile fail too, and one at a time may be in here."""
    with _one_at_a_time, warnings.catch_warnings():
        mode = torch.cuda.get_sync_debug_mode()
        warnings.simplefilter("ignore")  # the mode calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
