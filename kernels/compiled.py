"""What the compiler makes of the Triton kernels, found without a GPU.

Triton compiles for sm_90 on any machine, and its package holds the assembler and the disassembler. So what
costs speed there (spilled registers, a loop that grew, a matrix instruction that was not chosen) is seen,
recorded and tested where there is no GPU at all:

    python -m kernels.compiled --out results/reference/kernels-sm90.json.xz

Every module of kernels/triton names the compilations that stand for it, in `compilations()`. This module
imports triton only where it compiles.
"""

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from kernels import recorded
from kernels.command import run_command
from kernels.sass import largest_loop, parse_sass

ARCH = 90
MAX_REGISTERS = 255
MAX_SHARED = 227 * 1024  # what one block of sm_90 can ask for

# Instructions on record, by the part of their names before the first dot: matrix products; memory and
# synchronisation; what unpacks, converts and computes.
_PRODUCTS = ("IGMMA", "HGMMA", "QGMMA", "IMMA", "HMMA")
_MEMORY = (
    *("LDG", "LDGSTS", "STG", "LDS", "LDSM", "STS", "STSM", "LDL", "STL"),
    *("UTMALDG", "UTMASTG", "ATOMG", "RED", "BAR", "SYNCS", "WARPGROUP", "DEPBAR", "SHFL", "ACQBULK"),
)
_ARITHMETIC = (
    *("LOP3", "SHF", "PRMT", "I2F", "I2FP", "F2I", "F2F", "F2FP", "FRND"),
    *("IMAD", "IDP", "FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2", "MUFU", "CALL"),
)


@dataclass(frozen=True)
class Compilation:
    """One compilation of a kernel that is launched.

    kernel: what triton.jit or gluon.jit made. signature: the type of each argument that is no constexpr, by
    name ("*i8", "i32", "fp32", "tensordesc<...>"); entries for constexprs may be left out. constexprs: their
    values, and those of arguments that the launcher specialises (None, or an integer that is 1).
    options: num_warps, num_stages, enable_fp_fusion, ...
    attrs: the launcher's specialisation, {(position,): [["tt.divisibility", 16]]}; None where pointers alone
    are divisible by 16 (see `divisible`).
    expect: beginnings of instruction names that must occur ("IGMMA.64x128", "LDG.E.128").
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    attrs: Mapping[tuple[int, ...], Any] | None = None
    expect: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What a compilation came to.

    registers: of a thread. stack: bytes of a thread. spill_loads, spill_stores: instructions that reach local
    memory. shared: bytes of a block. instructions: without padding. loop: instructions of the largest loop
    that has no other inside; loops that wait for a barrier do not count. mnemonics: of instructions that
    matter, how many there are, by name and without modifiers. missing: of `Compilation.expect`, what does
    not occur.
    """

    registers: int
    stack: int
    spill_loads: int
    spill_stores: int
    shared: int
    instructions: int
    loop: int
    mnemonics: dict[str, int]
    missing: tuple[str, ...] = ()


def divisible(
    kernel: Any, signature: Mapping[str, str], *names: str
) -> dict[tuple[int, ...], list[list[Any]]]:
    """The specialisation of a launch whose pointers, and the integers called `names`, are multiples of 16."""
    order = list(kernel.arg_names)
    pointers = {name for name, kind in signature.items() if kind.startswith("*")}
    return {(order.index(name),): [["tt.divisibility", 16]] for name in order if name in pointers | {*names}}


def launch(
    name: str, kernel: Any, *arguments: object, expect: tuple[str, ...] = (), **keywords: object
) -> Compilation:
    """The compilation that `kernel[grid](*arguments, **keywords)` would run, by the launcher's own rules.

    Tensors may lie on the device "meta", which counts as aligned; so may those of tensor descriptors.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", ARCH, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords.setdefault("debug", False)
    bound, specialisation, options = binder(*arguments, **keywords)
    parsed, signature, constexprs, attrs = kernel._pack_args(
        backend, keywords, bound, specialisation, options
    )
    values = {kernel.arg_names[path[0]]: value for path, value in constexprs.items() if len(path) == 1}
    if len(values) != len(constexprs):
        raise ValueError(f"{name}: tuples of arguments are not known here")
    used = {key: getattr(parsed, key) for key in options if hasattr(parsed, key)}
    return Compilation(name, kernel, signature, values, used, attrs, expect)


def facts(compilation: Compilation) -> Facts:
    """Compile for sm_90 and read what came out.

    Raises ValueError for a signature that does not fit and where the kernel is interpreted here
    (TRITON_INTERPRET), and triton's own errors for code that does not compile.
    """
    compiled = _compile(compilation)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(binary))
        code = parse_sass(_tool("nvdisasm", "-c", str(binary)))
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    names = Counter(line.name for line in code)
    short = Counter(name.split(".")[0] for name in names.elements())
    return Facts(
        registers=numbers["REG"],
        stack=numbers["STACK"],
        spill_loads=short["LDL"],
        spill_stores=short["STL"],
        shared=compiled.metadata.shared,
        instructions=len(code),
        loop=largest_loop(code),
        mnemonics={name: short[name] for name in (*_PRODUCTS, *_MEMORY, *_ARITHMETIC) if short[name]},
        missing=tuple(start for start in compilation.expect if not any(n.startswith(start) for n in names)),
    )


def _compile(c: Compilation) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    if not isinstance(c.kernel, triton.JITFunction):
        raise ValueError(f"{c.name}: the kernel is interpreted here; unset TRITON_INTERPRET to compile it")
    signature = {}
    for name in c.kernel.arg_names:
        if name in c.constexprs:
            signature[name] = "constexpr"
        elif c.signature.get(name, "constexpr") == "constexpr":
            raise ValueError(f"{c.name}: the argument {name} has neither a type nor a value")
        else:
            signature[name] = c.signature[name]
    if unknown := sorted({*c.signature, *c.constexprs} - {*signature}):
        raise ValueError(f"{c.name}: the kernel has no argument {', '.join(unknown)}")
    attrs = divisible(c.kernel, signature) if c.attrs is None else dict(c.attrs)
    source = GluonASTSource if c.kernel.is_gluon() else ASTSource
    built = source(c.kernel, signature, dict(c.constexprs), attrs)
    return triton.compile(built, target=GPUTarget("cuda", ARCH, 32), options=dict(c.options))


def _tool(name: str, *arguments: str) -> str:
    """What a program of triton's package prints."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout


def compilations() -> dict[str, Compilation]:
    """Those of every module of kernels/triton, by "<module> <name>"."""
    package = importlib.import_module("kernels.triton")
    found: dict[str, Compilation] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        listed: Iterator[Compilation] = getattr(
            importlib.import_module(f"kernels.triton.{module}"), "compilations", lambda: iter(())
        )()
        for compilation in listed:
            name = re.sub(f"^{module.replace('_', '[_-]')}", "", compilation.name).strip(" :_-")
            key = f"{module} {name}".strip()
            if key in found:
                raise ValueError(f"two compilations are called {key!r}")
            found[key] = compilation
    return found


def measure(names: Iterable[str], processes: int = 2) -> dict[str, Facts]:
    """The facts of these compilations, found in `processes` processes."""
    chosen = list(names)
    with ProcessPoolExecutor(
        max(min(processes, len(chosen)), 1), mp_context=get_context("spawn"), initializer=_compile_here
    ) as pool:
        return dict(zip(chosen, pool.map(_facts_of, chosen), strict=True))


def _compile_here() -> None:
    """A process that compiles must not interpret, whatever the process that started it does."""
    os.environ.pop("TRITON_INTERPRET", None)


def _facts_of(name: str) -> Facts:
    try:
        return facts(compilations()[name])
    except Exception as error:
        raise RuntimeError(f"{name} does not compile: {error}") from error


def triton_version() -> str | None:
    """The version of triton that can be imported here, or None."""
    if find_spec("triton") is None:
        return None
    version: str = importlib.import_module("triton").__version__
    return version


def record(
    found: Mapping[str, Facts], previous: Mapping[str, Any] | None = None, partial: bool = False
) -> dict[str, Any]:
    """What is kept of the facts: {"arch", "triton": {version: {"code", "kernels": {name: facts}}}}.

    previous: an earlier record, of which the other versions of triton stay that compiled the same code.
    partial: `found` is not all there is, so what `previous` has of this version stays beside it; raises
    ValueError where that is of other code.
    """
    kept = {name: asdict(value) for name, value in sorted(found.items())}
    for value in kept.values():
        del value["missing"]
    code = code_sha256()
    others = previous["triton"] if previous else {}
    versions = {version: entry for version, entry in others.items() if entry["code"] == code}
    if partial:
        if others and triton_version() not in versions:
            raise ValueError("the record is of other code or another triton: compile all, without --only")
        kept = (versions[triton_version()]["kernels"] if others else {}) | kept
    versions[triton_version()] = {"code": code, "kernels": dict(sorted(kept.items()))}
    return {"arch": f"sm_{ARCH}", "triton": dict(sorted(versions.items()))}


def read_record(path: Path) -> dict[str, Any]:
    """A record that `record` made. Raises ValueError for another file, OSError where it cannot be read."""
    try:
        found: dict[str, Any] = recorded.read(path)
        for entry in found["triton"].values():
            if not isinstance(entry["code"], str) or not isinstance(entry["kernels"], dict):
                raise TypeError("no code or no kernels")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of compilations: {error!r}") from None
    return found


def code_sha256() -> str:
    """The SHA-256 of the files of kernels/triton."""
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parent / "triton").glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def table(found: Mapping[str, Facts]) -> str:
    """The facts as a Markdown table."""
    rows = [
        "| kernel | registers | spills | shared | instructions | in the loop | of these kinds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, f in sorted(found.items()):
        kinds = ", ".join(f"{n} {kind}" for kind, n in f.mnemonics.items() if kind not in _ARITHMETIC)
        rows.append(
            f"| {name} | {f.registers} | {f.spill_loads + f.spill_stores} | {f.shared} | {f.instructions} "
            f"| {f.loop} | {kinds} |"
        )
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: compile what is listed, print the table, write the record."""
    parser = argparse.ArgumentParser(prog="python -m kernels.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the record here (JSON)")
    parser.add_argument("--only", default="", help="compilations whose name contains this")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)
    if triton_version() is None:
        print("quantgrid: triton is not installed: pip install --no-deps 'triton==3.6.*'", file=sys.stderr)
        return 2
    try:
        previous = read_record(options.out) if options.out is not None and options.out.exists() else None
        names = [name for name in compilations() if options.only in name]
        if not names:
            raise ValueError(f"--only {options.only}: no compilation has such a name")
        found = measure(names, options.processes)
    except RuntimeError as error:
        print(f"quantgrid: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"quantgrid: {error}", file=sys.stderr)
        return 2
    print(table(found))
    for name, f in found.items():
        if f.missing:
            print(f"quantgrid: {name}: no {', '.join(f.missing)}", file=sys.stderr)
    if options.out is not None:
        try:
            text = json.dumps(record(found, previous, partial=bool(options.only)), indent=1)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_bytes(recorded.encoded(options.out, text + "\n"))
        except (ValueError, OSError) as error:
            print(f"quantgrid: {error}", file=sys.stderr)
            return 2
    return 1 if any(f.missing for f in found.values()) else 0


if __name__ == "__main__":
    run_command(main)
