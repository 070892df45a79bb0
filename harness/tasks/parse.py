"""Strict parsers of the benchmark files: each row becomes the document that lm-eval's own task would see.

The files store choices as one text ("A. first\\nB. second") and the answer as one of them ("B. second"). A
parser accepts exactly that and nothing else; a row that differs stops the run with the file and the row,
because a benchmark that drops or mends rows in silence measures something else than it says. The six rows
of CommonsenseQA that are known to be malformed are mended by the rule in `commonsense_qa`.

The functions named in the YAML files (`custom_dataset: !function harness.tasks.parse.piqa`) take lm-eval's
task metadata, which they do not need, and return {"test": Dataset}, in memory, in the order of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import datasets

from methods import assets
from methods.errors import UserError

Row = dict[str, str]
Document = dict[str, Any]

# Rows of each file, which is pinned by its sha256: fewer or more mean that a parser is wrong.
FILE_ROWS = {
    "ASDiv/test.jsonl": 2305,
    "BoolQ/dev.jsonl": 3270,
    "CommonsenseQA/validation.jsonl": 1221,
    "MMLU/test.jsonl": 2850,
    "OpenBookQA/test.jsonl": 500,
    "PIQA/validation.jsonl": 1500,
    "SIQA/test.jsonl": 1954,
}

# Zero-based rows of CommonsenseQA whose question runs into the options (see `commonsense_qa`).
COMMONSENSE_QA_MALFORMED = frozenset({102, 116, 362, 363, 633, 1207})

# One number, then perhaps its unit ("9 apples", "1,250 km/hour"). Not: "3:30 p.m.", "5; 15", "2/3".
QUANTITY = re.compile(r"(-?\d[\d,]*(?:\.\d+)?)(?: [^\d:;]+)?")


class RowError(ValueError):
    """Why one row does not parse; `_documents` adds the file and the row."""


def boolq(**_: object) -> dict[str, datasets.Dataset]:
    """Documents of lm-eval's boolq: question, passage, label (0 no, 1 yes)."""

    def convert(_: int, row: Row) -> Document:
        labels = {"False": 0, "True": 1}
        if row["answer"] not in labels:
            raise RowError(f"answer {row['answer']!r} is neither 'True' nor 'False'")
        return {"question": row["question"], "passage": row["passage"], "label": labels[row["answer"]]}

    return _documents("BoolQ/dev.jsonl", ("question", "title", "answer", "passage"), convert)


def piqa(**_: object) -> dict[str, datasets.Dataset]:
    """Documents of lm-eval's piqa: goal, sol1, sol2, label. Solutions keep their white space, as upstream."""

    def convert(_: int, row: Row) -> Document:
        first, second = options = split_options(row["options"], "AB")
        label = answer_index(row["answer"], options)
        return {"goal": row["question"], "sol1": first, "sol2": second, "label": label}

    return _documents("PIQA/validation.jsonl", ("question", "options", "answer"), convert)


def openbookqa(**_: object) -> dict[str, datasets.Dataset]:
    """Documents of lm-eval's openbookqa: question_stem, choices, answerKey.

    The file ends each stem with a space that upstream's data does not have; it is taken off.
    """

    def convert(_: int, row: Row) -> Document:
        stem = row["question"].removesuffix(" ")
        if stem == row["question"] or stem != stem.strip():
            raise RowError("the question does not end with exactly one space")
        options = split_options(row["options"], "ABCD")
        return {"question_stem": stem, **lettered(options, row["answer"])}

    return _documents("OpenBookQA/test.jsonl", ("question", "options", "answer"), convert)


def commonsense_qa(**_: object) -> dict[str, datasets.Dataset]:
    """Documents of lm-eval's commonsense_qa: question, choices, answerKey.

    The file was made by cutting "question? options" after the first question mark. Where a question has none
    (or has a full stop after it), the cut fell elsewhere: there, question and options are joined again, the
    options begin at the first "A. " on a line of its own, and a last option loses the question mark which the
    cutting put at the end.
    """

    def convert(index: int, row: Row) -> Document:
        question, options_text = row["question"], row["options"]
        if index in COMMONSENSE_QA_MALFORMED:
            question, mark, options_text = (question + options_text).partition("\nA. ")
            options_text = (mark + options_text).removesuffix("?")
        if not options_text.startswith("\n"):
            raise RowError("the options do not begin on a line of their own")
        options = split_options(options_text[1:], "ABCDE")
        return {"question": question, **lettered(options, row["answer"])}

    return _documents("CommonsenseQA/validation.jsonl", ("question", "options", "answer"), convert)


def social_iqa(**_: object) -> dict[str, datasets.Dataset]:
    """Documents of lm-eval's social_iqa: context, question, answerA, answerB, answerC, label ("1" to "3")."""

    def convert(_: int, row: Row) -> Document:
        options = split_options(row["options"], "ABC")
        answers = dict(zip(("answerA", "answerB", "answerC"), options, strict=True))
        label = str(answer_index(row["answer"], options) + 1)
        return {"context": row["passage"], "question": row["question"], **answers, "label": label}

    return _documents("SIQA/test.jsonl", ("passage", "question", "options", "answer"), convert)


def mmlu(**_: object) -> dict[str, datasets.Dataset]:
    """Documents of lm-eval's mmlu: question, choices, answer (0 to 3). The file names no subjects."""

    def convert(_: int, row: Row) -> Document:
        options = split_options(row["options"], "ABCD")
        answer = answer_index(row["answer"], options)
        return {"question": row["question"], "choices": options, "answer": answer}

    return _documents("MMLU/test.jsonl", ("question", "options", "answer"), convert)


def asdiv(**_: object) -> dict[str, datasets.Dataset]:
    """Documents of lm-eval's asdiv: body, question, answer; only problems whose answer is one number.

    `answer` is that number without unit, thousands separators and trailing zeros. Answers that are a name, a
    time, a ratio, a fraction or several numbers are left out: no number can be compared with them.
    """

    def convert(_: int, row: Row) -> Document | None:
        quantity = QUANTITY.fullmatch(row["answer"])
        if quantity is None:
            return None
        number = Decimal(quantity[1].replace(",", "")).normalize()
        return {"body": row["passage"], "question": row["question"], "answer": f"{number:f}"}

    return _documents("ASDiv/test.jsonl", ("passage", "question", "answer"), convert)


def split_options(text: str, letters: str) -> list[str]:
    """Texts of the options in "A. first\\nB. second", which must be lettered as `letters` in that order.

    Raises:
        RowError: other letters, text before the first option, or an empty option.
    """
    before, *pieces = re.split(r"(?:\A|\n)([A-Z])\. ", text)
    found, options = "".join(pieces[::2]), pieces[1::2]
    if before or found != letters:
        raise RowError(f"options {text!r} are not lettered {', '.join(letters)}")
    if not all(option.strip() for option in options):
        raise RowError(f"options {text!r} contain an empty one")
    return options


def answer_index(answer: str, options: list[str]) -> int:
    """Index of an answer such as "B. second", which must repeat letter and text of one option.

    Raises:
        RowError: it repeats none.
    """
    lettered_options = [f"{letter}. {option}" for letter, option in zip("ABCDE", options, strict=False)]
    if answer not in lettered_options:
        raise RowError(f"answer {answer!r} is none of the options")
    return lettered_options.index(answer)


def lettered(options: list[str], answer: str) -> Document:
    """The fields `choices` and `answerKey` that several data sets of multiple-choice questions share."""
    letters = list("ABCDE"[: len(options)])
    key = letters[answer_index(answer, options)]
    return {"choices": {"label": letters, "text": options}, "answerKey": key}


def _documents(
    member: str, fields: tuple[str, ...], convert: Callable[[int, Row], Document | None]
) -> dict[str, datasets.Dataset]:
    """Parse every row of a file: a JSON object with exactly the `fields`, all of them non-empty texts.

    `convert` gets the zero-based row and returns its document, or None for one that the task leaves out.

    Raises:
        UserError: a row that does not parse (named with its one-based number), or another number of rows.
    """
    documents: list[Document] = []
    lines = assets.benchmark_file(member).read_text("utf-8").removesuffix("\n").split("\n")
    for index, line in enumerate(lines):
        try:
            document = convert(index, _row(line, fields))
        except RowError as error:
            raise UserError(f"{member} row {index + 1}: {error}") from error
        if document is not None:
            documents.append(document)
    if len(lines) != FILE_ROWS[member]:
        raise UserError(f"{member} has {len(lines)} rows, expected {FILE_ROWS[member]}")
    return {"test": datasets.Dataset.from_list(documents)}


def _row(line: str, fields: tuple[str, ...]) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RowError(f"not JSON ({error})") from error
    if not isinstance(row, dict) or set(row) != set(fields):
        raise RowError(f"expected an object with the fields {', '.join(sorted(fields))}")
    for name, value in row.items():
        if not isinstance(value, str) or not value.strip():
            raise RowError(f"field {name!r} is not a non-empty text")
    return row
