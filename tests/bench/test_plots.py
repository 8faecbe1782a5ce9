"""The frontier's legend stays inside the picture, however many methods there are."""

import pytest
from matplotlib.figure import Figure
from tests.bench.stored import write_results

from vispress.bench.results import plots
from vispress.bench.results.summary import summarise


@pytest.mark.some(cases=1)
@pytest.mark.parametrize("count", [3, 12, 30])
def test_the_legend_is_inside_the_figure(tmp_path, monkeypatch, count):
    drawn = []
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path: drawn.append((figure, path)) or path
    )
    write_results(tmp_path / "run", {f"method{n}": 0.5 for n in range(count)}, questions=4)
    plots.write_plots(summarise(tmp_path / "run"), tmp_path)
    for figure, _ in drawn:
        figure.draw_without_rendering()
        for legend in _legends(figure):
            box = legend.get_window_extent()
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1


def _legends(figure: Figure):
    found = [*figure.legends, *(axes.legend_ for axes in figure.axes if axes.legend_)]
    assert found
    return found
