"""Int4 execution: from a decoder that simulates quantisation to one that runs on packed codes.

A simulated decoder holds floats that stand for codes. `pack_decoder` drops them: every rounded linear keeps
its packed codes alone, inputs enter it as codes, and keys and values are held and attended to as codes. The
operations are those of kernels/ops.py, which counts what ran. The graph, the transforms and the quantisers
are the same in both, so the results differ by the order of floating-point sums alone; harness/parity.py
measures by how much.
"""

from __future__ import annotations

from methods.decoder import Block, Decoder
from methods.linear import OnlineHadamard

EXECUTIONS = ("simulate", "int4")


def pack_decoder(model: Decoder) -> list[str]:
    """Switch a decoder whose quantisers are set to int4 execution, in place, one linear at a time.

    Returns notes on what stays in floating point although the decoder is quantised.
    """
    floats: list[str] = []
    for name, linear in model.linears():
        if linear.quantised is not None:
            linear.pack()
        elif linear.packed is None and linear.activation is not None:
            floats.append(name)
    for block in model.layers:
        assert isinstance(block, Block)
        block.self_attn.packed = block.self_attn.kv is not None
    for module in model.modules():
        if isinstance(module, OnlineHadamard):
            module.packed = True
    model.execution = "int4"
    if not floats:
        return []
    return [
        f"{len(floats)} linears have 16-bit weights and no integer product: their quantised inputs are "
        f"simulated ({floats[0]}, ...)"
    ]
