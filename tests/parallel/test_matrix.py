"""Every family in every kind of parallelism: losses and every gradient of three steps are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import golden_dir
from tests.parallel.matrix import BEGIN, COLUMNS, DEEP, END, FAMILIES, SMALL, case_of
from tests.parallel.parity import expect

DOCS = Path(__file__).resolve().parents[2] / "docs" / "layouts.md"


@pytest.mark.parametrize("family", FAMILIES)  # varies fastest: the processes of a layout stay as they are
@pytest.mark.parametrize("column", COLUMNS)
def test_cell(family: str, column: str) -> None:
    case = case_of(family, column)
    if case is None:
        pytest.skip(f"{family} has no experts")
    if column in DEEP and family not in SMALL:
        pytest.skip("not in every run: `python -m tests.parallel.matrix docs/layouts.md` has it")
    golden_dir(family)
    expect(case)


def test_the_printed_matrix_has_every_cell() -> None:
    printed = DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [line.strip("| ").split(" | ") for line in printed.strip().splitlines()]
    assert rows[0] == ["family", *COLUMNS]
    assert [row[0] for row in rows[2:]] == list(FAMILIES)
    for row in rows[2:]:
        for column, text in zip(COLUMNS, row[1:], strict=True):
            assert text == "no experts" if case_of(row[0], column) is None else float(text) < 1e-5, (
                row[0],
                column,
                text,
            )
