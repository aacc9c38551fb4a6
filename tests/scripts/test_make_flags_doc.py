"""docs/flags.md is what scripts/make_flags_doc.py makes of the table."""

from __future__ import annotations

import make_flags_doc
from flags import ARCHS, FLAGS


def test_the_page_is_that_of_the_table():
    """After a change of the table: `python scripts/make_flags_doc.py`."""
    assert make_flags_doc.PAGE.read_text(encoding="utf-8") == make_flags_doc.page()


def test_every_flag_stands_once_for_every_system_or_once_with_each_that_knows_it():
    rows = [line.split(" | ")[0].strip("| `-") for line in make_flags_doc.page().splitlines()
            if line.startswith("| `--")]
    for flag in FLAGS:
        assert rows.count(flag.name) == (1 if flag.archs == ARCHS else len(flag.archs)), flag.name
