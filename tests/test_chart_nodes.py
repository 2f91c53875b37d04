"""An engine of the chart on two nodes really runs: two pods, which serve and end as one."""

from __future__ import annotations

from pathlib import Path

from tests.chart import render, values_file
from tests.pods import running

TWO_NODES = {"dataPlane": {"nodes": 2, "tensorParallel": 2, "startupSeconds": 600}}


def test_an_engine_of_two_nodes_serves_and_ends_as_one(tmp_path: Path) -> None:
    with running(render(values_file("values-laptop.yaml"), TWO_NODES), tmp_path) as cluster:
        pods = {pod.name: pod for pod in cluster.pods}
        first, worker = pods["quire-engine-0"], pods["quire-engine-0-1"]
        assert "serving" in first.log() and "serving" not in worker.log()
        # A real request, of which half of each layer was computed on either node.
        test = cluster.create("Pod", "quire-test")
        assert cluster.complete(test) == 0, test.log()
        for which in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert cluster.probe(first, which)
        # Whichever pod is told to end, both do, in good order and in time.
        assert cluster.delete(worker) == 0, worker.log()
        assert cluster.complete(first) == 0, first.log()
