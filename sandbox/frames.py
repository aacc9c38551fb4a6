"""Tracebacks without frames, which would lead to the tests: `traceback` prints what it always does."""

from __future__ import annotations

from types import SimpleNamespace, TracebackType


def walk(tb):
    """Takes the place of the walk over a traceback's frames: yields copies of what is printed of each.

    No frame leaves this function, so it alone may look at them. It knows nothing else: code can reach what it names.
    """
    while type(tb) is TracebackType:
        code = tb.tb_frame.f_code
        copied = SimpleNamespace(co_filename=code.co_filename, co_name=code.co_name, co_qualname=code.co_qualname)
        yield SimpleNamespace(f_code=copied, f_globals={}, f_locals={}), (tb.tb_lineno, None, None, None)
        tb = tb.tb_next


def hide() -> None:
    """Imports `traceback` and gives it that walk."""
    import traceback

    traceback._walk_tb_with_full_positions = walk
