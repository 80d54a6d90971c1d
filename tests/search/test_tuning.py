"""The cheapest effort that reaches a recall, against trying all of them."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_retrieval.errors import RecipeError
from ray_retrieval.search.approximate import ApproximateConfig
from ray_retrieval.search.effort import Effort
from ray_retrieval.search.tuning import Tried, cheapest, ladders, raised, settle


@dataclass
class Fake:
    """A structure without rows."""

    cells: int = 0
    graph: bool = False
    compares: bool = False
    weight: float = 1.0

    def cost(self, effort, hits):
        return effort.nprobe + effort.ef_search + self.weight * hits * (effort.k_factor or 0)


def recall_of(effort):
    """Grows with all that an effort says."""
    return 1 - 1 / (effort.nprobe * effort.ef_search / 64) ** 0.3 - 1 / (effort.k_factor or 10**6)


def test_what_is_tried():
    cells, graph = Fake(cells=12), Fake(graph=True)
    assert [effort.nprobe for effort in ladders(cells, Effort())[0]] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]
    assert [effort.nprobe for effort in ladders(Fake(cells=1), Effort())[0]] == [1]
    lists = [effort.ef_search for effort in ladders(graph, Effort())[0]]
    assert lists[:6] == [16, 20, 24, 28, 32, 40]
    assert lists[-2:] == [896, 1024]
    assert ladders(Fake(), Effort()) == [(Effort(),)]
    compared = ladders(Fake(cells=2, compares=True), Effort())
    assert [[effort.k_factor for effort in ladder] for ladder in compared] == [[4, 4], [16, 16], [64, 64]]
    assert ladders(cells, Effort(nprobe=3), {"nprobe"}) == [(Effort(nprobe=3),)]
    harder = ladders(Fake(cells=12, compares=True), Effort(nprobe=3), harder=True)
    assert [effort.nprobe for effort in harder[0]] == [3, 4, 5, 6, 7, 8, 10, 12]
    assert [ladder[0].k_factor for ladder in harder] == [16, 64]


@given(
    cells=st.integers(1, 5000),
    graph=st.booleans(),
    compares=st.booleans(),
    weight=st.sampled_from([0.01, 1.0, 100.0]),
    target=st.floats(0.01, 1),
)
def test_it_is_the_cheapest_that_reaches_the_target(cells, graph, compares, weight, target):
    structure = Fake(0 if graph else cells, graph, compares, weight)
    efforts = ladders(structure, Effort())
    found = cheapest(efforts, [structure] * 2, recall_of, target, 10)
    reaching = [effort for ladder in efforts for effort in ladder if recall_of(effort) >= target]
    if not reaching:
        assert found is None
        return
    assert found.recall == recall_of(found.effort) >= target
    assert structure.cost(found.effort, 10) == min(structure.cost(effort, 10) for effort in reaching)


def test_auto_measures_and_keeps_what_is_stated():
    structure = Fake(cells=1024, compares=True)
    auto = ApproximateConfig(search="auto")
    found = settle(auto, 0.8, [structure], recall_of, 10)
    assert found.recall >= 0.8
    assert found.effort.nprobe != 64
    stated = ApproximateConfig(search="auto", nprobe=700)
    assert settle(stated, 0.8, [structure], recall_of, 10).effort.nprobe == 700
    with pytest.raises(RecipeError, match=r"finds 0\.\d{4} of the 10 nearest, 0\.9 is asked for") as caught:
        settle(ApproximateConfig(search="auto", nprobe=8), 0.9, [structure], recall_of, 10)
    assert "even nprobe=8" in caught.value.mend


def test_a_stated_kind_is_measured_and_refused_with_a_hint():
    structure = Fake(cells=1024)
    config = ApproximateConfig(search="IVF1024,Flat")
    assert settle(config, None, [structure], recall_of, 10) == (Effort(), recall_of(Effort()))
    with pytest.raises(RecipeError) as caught:
        settle(config, 0.8, [structure], recall_of, 10)
    harder = (80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
    needed = next(nprobe for nprobe in harder if recall_of(Effort(nprobe=nprobe)) >= 0.8)
    assert caught.value.mend == f"nprobe={needed} finds {recall_of(Effort(nprobe=needed)):.4f}"
    assert caught.value.where == "recall_target"
    with pytest.raises(RecipeError) as caught:
        settle(config, 0.999, [structure], recall_of, 10)
    assert "even nprobe=1024" in caught.value.mend
    assert "search exactly" in caught.value.mend


def test_an_effort_is_raised_where_rows_have_changed():
    structure = Fake(cells=1024)
    before = Tried(Effort(), 0.5)
    assert raised(Tried(Effort(), 0.9), 0.8, [structure], recall_of, 10).effort == Effort()
    assert raised(before, 0.8, [structure], recall_of, 10).recall >= 0.8
    assert raised(before, 0.999, [structure], recall_of, 10) == before
