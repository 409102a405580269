"""docs/families.md says what the code does: same families, parts and names, and errors within the bound."""

import re

from tests.model.families_page import PAGE, page

NUMBER = re.compile(r"\b\de-\d\d\b|\b0e\+00\b")


def test_the_page_is_what_the_tests_measure() -> None:
    """Machines round differently, so the errors may differ; everything else may not."""
    written, fresh = PAGE.read_text(encoding="utf-8"), page()
    assert NUMBER.sub("#", written) == NUMBER.sub("#", fresh), "run: python -m tests.model.families_page"
    assert all(float(number) < 1e-4 for number in NUMBER.findall(written))
