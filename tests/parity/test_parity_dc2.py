"""DC2's clustering of four quarters against its official code (scipy's average linkage)."""

from tests.parity.vectors import each_case

from vispress.methods._parts.geometry.quadtree import average_linkage
from vispress.methods._parts.scoring.cosines import unit


@each_case("dc2", having="in/quarters")
def test_quarters_are_clustered_as_in_the_official_code(case):
    towards = unit(case["in/quarters"].double())
    label = average_linkage(1 - towards @ towards.mT, case["param/theta"])
    official = case["out/labels"]
    same = official[:, :, None] == official[:, None, :]
    assert ((label[:, :, None] == label[:, None, :]) == same).all()
    assert [len(row.unique()) for row in label] == case["out/groups"].tolist()
