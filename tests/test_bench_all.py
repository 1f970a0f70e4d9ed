"""What the run of all benchmarks takes from each, and what it calls moved."""

from __future__ import annotations

from scripts import bench_all


def test_ratios_are_found_where_the_benchmarks_put_them() -> None:
    step = {
        "threads": 1,
        "tables": [
            {
                "title": "tiny, N=3",
                "floor": 0.1,
                "results": {"bare": {"seconds": 2.0, "ratio": 1.0}, "ours": {"ratio": 1.25}},
            }
        ],
    }
    assert dict(bench_all.ratios(step, "step")) == {
        "step/tiny, N=3/bare": 1.0,
        "step/tiny, N=3/ours": 1.25,
    }
    many = {"rows": [{"way": "one by one", "ratio": 1.0}, {"way": "batches", "ratio": 0.61239}]}
    assert dict(bench_all.ratios(many, "many")) == {
        "many/one by one": 1.0,
        "many/batches": 0.612,
    }
    switch = {"tiny": {"layers": 26, "ratio": {"warm": 1.0, "cold": 9.5}}}
    assert dict(bench_all.ratios(switch, "switch")) == {
        "switch/tiny/warm": 1.0,
        "switch/tiny/cold": 9.5,
    }


def test_what_moved_is_told_the_largest_first() -> None:
    before = {"a": 1.0, "b": 2.0, "c": 1.0, "gone": 1.0}
    after = {"a": 1.05, "b": 1.0, "c": 1.2, "new": 3.0}
    assert bench_all.moved(before, after, 0.1) == [("b", 2.0, 1.0), ("c", 1.0, 1.2)]


def test_every_benchmark_is_there() -> None:
    for script, *_ in bench_all.BENCHMARKS.values():
        assert (bench_all.ROOT / "scripts" / script).is_file()
