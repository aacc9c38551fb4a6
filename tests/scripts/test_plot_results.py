"""The figures of docs/experiments: each finds its rows, each belongs to a page."""

from __future__ import annotations

import pytest

import plot_results


@pytest.mark.parametrize("name", plot_results.FIGURES)
def test_a_figure_finds_its_rows_and_is_drawn(name, tmp_path):
    _, files = plot_results.FIGURES[name]
    for file in files:
        assert plot_results.read(file)
    assert plot_results.draw(name, tmp_path).read_bytes()[:4] == b"\x89PNG"


def test_every_page_shows_its_figure_below_its_answer():
    pages = {path.stem for path in plot_results.PAGES.glob("*.md")}
    assert pages == set(plot_results.FIGURES)
    for name in pages:
        text = (plot_results.PAGES / f"{name}.md").read_text(encoding="utf-8")
        heading, answer, figure = text.split("\n\n")[:3]
        assert heading.startswith("# ") and heading.endswith("?")
        assert answer.startswith("**") and answer.endswith("**")
        assert figure.startswith("![") and figure.endswith(f"]({name}.png)")
        assert (plot_results.PAGES / f"{name}.png").stat().st_size < 100_000


def test_an_unknown_figure_is_one_line(capsys):
    with pytest.raises(SystemExit):
        plot_results.main(["nothing"])
    assert "there is no figure 'nothing': choose from " in capsys.readouterr().err
