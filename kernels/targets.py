"""What the GPU kernels are meant to reach, as data for `python -m kernels.roofline`."""

from collections.abc import Sequence
from dataclasses import dataclass

BASELINE, COPY, STREAM = "bf16 cuBLAS", "copy of the same bytes", "kernel over the same bytes"
FEW, SIXTY_FOUR, MANY = (1, 4, 16), (64,), (1024, 4096, 8192)
SHAPE = "llama-3-8b"
LINEARS = ("qkv", "o", "gate_up", "down")
W4A8, W4A16, CHAIN = "linear w4a8", "linear w4a16 g128", "chain w4a8"
AT_REST, A16_AT_REST = "ours w4a8, weights at rest", "ours w4a16, weights at rest"
PLAIN, A16_PLAIN = "ours w4a8", "ours w4a16"
WITH_QUANTISE = "humming w4a8 + quantise"


@dataclass(frozen=True)
class Target:
    """`ours` against the fastest of some other contestants of the same contest, turn by turn, at every layer
    and number of rows named: at least `least` times as fast. aim: what was hoped for. limit: what the memory
    or the tensor cores allow at best. needed: where it names anybody, others may be missing, and the fastest
    of those that ran counts, but nothing is judged unless one of each of these groups ran."""

    title: str
    operation: str
    ours: str
    against: Sequence[str]
    layers: Sequence[str]
    rows: Sequence[int]
    least: float
    aim: float | None = None
    limit: float | None = None
    needed: Sequence[Sequence[str]] = ()


def _against(operation: str, ours: str, theirs: str, rows: Sequence[int], more: str = "") -> Target:
    return Target(f"{ours} against {theirs}{more}", operation, ours, (theirs,), LINEARS, rows, 1.0)


def _pass(title: str, operation: str, layers: Sequence[str], rows: Sequence[int]) -> Target:
    return Target(title, operation, "ours a4", (COPY, STREAM), layers, rows, 1 / 1.4, 1 / 1.3, 1.0)


RMSNORM = ("rmsnorm + quantise", ("hidden",))
HADAMARD = ("hadamard + quantise", ("heads", "hidden", "intermediate"))
KV4, ATTENTION = "ours kv4", "kv_attention"
TORCH_ATTENTION = {
    backend: (f"torch {backend}", f"torch {backend}, heads folded")
    for backend in ("flash", "cuDNN", "efficient", "math")
}
"""PyTorch's backends, each with the two ways in which it is asked."""
BF16_ATTENTION = ("ours bf16", *(name for names in TORCH_ATTENTION.values() for name in names))
FASTEST_ATTENTION = (TORCH_ATTENTION["flash"], TORCH_ATTENTION["cuDNN"])
"""Without these, the fastest attention in bf16 is not known."""
CONTEXTS, BATCHES = (1024, 8192, 32768), ("batch 1", "batch 8")


def _attention(title: str, contexts: Sequence[int], layers: Sequence[str], least: float) -> Target:
    return Target(title, ATTENTION, KV4, BF16_ATTENTION, layers, contexts, least, 3.0, 3.7, FASTEST_ATTENTION)


DECIDING = (
    Target("W4A4, many rows", W4A8, "ours w4a4", (BASELINE,), LINEARS, MANY, 1.7, 1.8, 2.0),
    Target("W4A8, few rows", W4A8, AT_REST, (BASELINE,), LINEARS, FEW, 3.2, 3.5, 4.0),
    Target("W4A8, 64 rows", W4A8, AT_REST, (BASELINE,), LINEARS, SIXTY_FOUR, 2.7, 3.0, 3.8),
    Target("W4A16 g128, few rows", W4A16, A16_AT_REST, (BASELINE,), LINEARS, FEW, 3.2, 3.4, 3.9),
    _against(W4A8, "ours w4a4", "humming w4a8", MANY),
    _against(W4A8, "ours w4a4 + quantise, plain", WITH_QUANTISE, MANY),
    _against(W4A8, "ours w4a8", "humming w4a8", MANY),
    _against(W4A8, AT_REST, "humming w4a8", (*FEW, *SIXTY_FOUR)),
    _against(W4A8, "ours w4a8 + quantise, weights at rest", WITH_QUANTISE, (*FEW, *SIXTY_FOUR, *MANY)),
    _against(W4A16, A16_AT_REST, "humming w4a16", FEW),
    _pass("RMSNorm + quantise", *RMSNORM, MANY),
    _pass("Hadamard + quantise", *HADAMARD, MANY),
    _attention("KV4 decode attention at 32k against the fastest bf16", CONTEXTS[-1:], BATCHES, 2.5),
)
INFORMATION = (
    Target("W4A8, few rows, plain", W4A8, PLAIN, (BASELINE,), LINEARS, FEW, 3.2, 3.5, 4.0),
    Target("W4A8, 64 rows, plain", W4A8, PLAIN, (BASELINE,), LINEARS, SIXTY_FOUR, 2.7, 3.0, 3.8),
    Target("W4A16 g128, few rows, plain", W4A16, A16_PLAIN, (BASELINE,), LINEARS, FEW, 3.2, 3.4, 3.9),
    _against(W4A8, PLAIN, "humming w4a8", (*FEW, *SIXTY_FOUR), ", few rows"),
    _against(W4A8, "ours w4a8 + quantise, plain", WITH_QUANTISE, (*FEW, *SIXTY_FOUR, *MANY)),
    _against(W4A8, "ours w4a4 + quantise, weights at rest", WITH_QUANTISE, MANY),
    _against(W4A16, A16_PLAIN, "humming w4a16", FEW),
    *(
        Target(
            f"chain of linears, {ours.split(', ')[1]}",
            CHAIN,
            ours,
            (WITH_QUANTISE,),
            ("o", "up, down"),
            (*FEW, *SIXTY_FOUR),
            1.0,
        )
        for ours in ("ours w4a8 + quantise, weights at rest", "ours w4a8 + quantise, plain")
    ),
    _against(W4A8, "ours w4a8, default choice", "humming w4a8", (*FEW, *SIXTY_FOUR, *MANY)),
    _against(W4A16, "ours w4a16, default choice", "humming w4a16", FEW),
    _pass("RMSNorm + quantise, few rows", *RMSNORM, (*FEW, *SIXTY_FOUR)),
    _pass("Hadamard + quantise, few rows", *HADAMARD, (*FEW, *SIXTY_FOUR)),
    _attention("KV4 decode attention at 1k and 8k", CONTEXTS[:2], BATCHES, 1.0),
    _attention(
        "KV4 decode attention, heads of 64",
        CONTEXTS[-1:],
        tuple(f"heads of 64, {each}" for each in BATCHES),
        2.0,
    ),
    Target("KV4 append of a prompt", "rope_append", "ours", (COPY, STREAM), ("kv4, Hadamard",), MANY, 0.5),
    Target("KV4 dequantised", "kv_dequantise", "ours", (COPY, STREAM), ("kv4",), CONTEXTS, 0.7, None, 1.0),
)
"""Of a run, what decides whether the kernels are what they are meant to be, and what is told besides."""

DECIDING_NOTE = """\
These decide. A target is met where the median over turns reaches it; faster than another package means \
faster in nine of ten turns. A copy may be the driver's own or a kernel over the same bytes: the faster in \
each turn. "Weights at rest" is what a decoder reaches whose kernels follow one another on one stream: the \
kernel in front is another linear or a pass that does not write weights, and the owner of the CUDA graph \
promises so. The linear then fetches weights before the kernel in front has ended. Other packages are \
launched as their documentation says; kernels without this promise are the plain ones below."""
INFORMATION_NOTE = """\
Nothing of this decides. Passes over 1 to 64 rows last two to five microseconds, about what it takes to \
launch a kernel and to fetch its first operands: their bytes hardly matter. The default choice is what a \
shape gets that the tuning table does not have. A chain runs quantise, linear, quantise, linear on one \
stream."""
