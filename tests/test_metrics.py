"""What a pool counts and times: by the library, through the server, and as Prometheus reads it."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import needs_tool
from prometheus_client.parser import text_string_to_metric_families
from test_server_same import open_pool

import thinpool
from thinpool.api import PoolAPI
from thinpool.metrics import LATENCY_BOUNDS, NO_TIMES, Histogram
from thinpool.server.transport import _Connection

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples" / "prometheus"
KIB, MIB = 1 << 10, 1 << 20
PENDING_MOST = 32  # small operations that no timed one stands for yet


@pytest.fixture(params=["local", "remote"])
def either(request: pytest.FixtureRequest, pool_path: Path) -> Iterator[PoolAPI]:
    """A pool opened here, and one through its server."""
    opened = open_pool(pool_path, request.param)
    yield opened
    opened.close()


# --- counting ---


def test_operations_are_counted_by_layer_and_kind(either: PoolAPI) -> None:
    one, two, _idle = (either.create_layer(name, "16M") for name in ("one", "two", "idle"))
    for number in range(500):
        one.pwrite(bytes(4 * KIB), number * 4 * KIB)
    one.pread(10, 0)
    two.discard(0, MIB)
    with pytest.raises(thinpool.OutOfRange):
        two.pread(1, 16 * MIB)
    found = either.metrics()
    layers = {layer.layer: layer.operations for layer in found.layers}
    assert set(layers) == {"one", "two"}
    assert (layers["one"]["write"].count, layers["one"]["write"].bytes, layers["one"]["read"].bytes) == (500, 2000 * KIB, 10)
    assert (layers["two"]["read"].count, layers["two"]["read"].errors, layers["two"]["read"].bytes) == (1, 1, 0)
    assert layers["two"]["discard"].bytes == found.operations["discard"].bytes == MIB
    assert (found.operations["read"].count, found.operations["write"].count) == (2, 500)


def test_large_operations_are_all_timed_and_small_ones_stand_for_others(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("a", "64M")
    for number in range(5000):
        layer.pread(512, number * 512)
    for number in range(40):
        layer.pwrite(bytes(64 * KIB), number * 64 * KIB)
    kinds = pool.metrics().operations
    assert kinds["write"].latency.count == 40
    assert 5000 - PENDING_MOST <= kinds["read"].latency.count <= 5000
    assert kinds["read"].count == 5000
    assert kinds["read"].latency.seconds > 0


def test_a_deleted_layer_stays_in_the_sums(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("a", "1M")
    layer.pwrite(b"x", 0)
    layer.rename("b")
    assert [one.layer for one in pool.metrics().layers] == ["b"]
    layer.delete()
    pool.reclaim()
    pool.create_layer("c", "1M").pwrite(b"x", 0)
    found = pool.metrics()
    assert [(one.layer, one.operations["write"].count) for one in found.layers] == [("c", 1)]
    assert found.operations["write"].count == 2
    del layer  # the last handle, which lets go of the memory
    assert pool.metrics().operations["write"].count == 2


def test_counts_outlive_what_the_cache_drops(pool_path: Path) -> None:
    thinpool.Pool.create(pool_path).close()
    with thinpool.Pool.open(pool_path, cache_size="64K") as pool:
        for number in range(300):
            pool.create_layer(f"layer{number}", "1M").pwrite(b"x" * 5000, 0)  # no handle is kept
        pool.commit()
        found = pool.metrics()
        assert found.cache_misses > 0
        assert {one.operations["write"].bytes for one in found.layers} == {5000}
        assert len(found.layers) == 300


def test_nothing_is_lost_or_goes_back_while_threads_write(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("a", "16M")
    seen = [pool.metrics().operations["write"]]

    def write(thread: int) -> None:
        for number in range(3000):
            layer.pwrite(b"x" * 100, (thread * 3000 + number) * 1000)

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.append(pool.metrics().operations["write"])
    for thread in threads:
        thread.join()
    seen.append(pool.metrics().operations["write"])
    for name in ("count", "bytes"):
        values = [getattr(one, name) for one in seen]
        assert values == sorted(values)
    assert (seen[-1].count, seen[-1].bytes) == (12_000, 1_200_000)


def test_the_cores_own_ends_are_no_operations(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("a", "4M")
    layer.pwrite(b"x" * MIB, 0)
    layer.discard(100, MIB // 2)  # which zeroes a ragged end
    layer.resize(2 * MIB, allow_shrink=True)
    counts = {kind: operations.count for kind, operations in pool.metrics().operations.items()}
    assert counts == {"read": 0, "write": 1, "discard": 1}


def test_commits_and_their_phases(pool: thinpool.Pool) -> None:
    layer = pool.create_layer("a", "4M")
    before = pool.metrics()
    for _ in range(3):
        layer.pwrite(b"x", 0)
        layer.snapshot(f"s{len(layer.children)}")
        pool.commit()
    found = pool.metrics()
    commits = found.commits - before.commits
    assert commits.count >= 3 and (found.flushes - before.flushes).count >= 3
    assert {phase: (times - before.phases[phase]).count for phase, times in found.phases.items()} == dict.fromkeys(
        ("freeze", "sync", "store", "release"), commits.count
    )
    assert sum(times.seconds for times in found.phases.values()) == pytest.approx(found.commits.seconds)


def test_where_space_goes(pool_path: Path) -> None:
    with thinpool.Pool.create(pool_path, capacity="16M") as pool:
        layer = pool.create_layer("a", "16M")
        layer.pwrite(b"x" * MIB, 0)
        layer.snapshot("s").clone("c").pwrite(b"y" * 4096, 0)
        found = pool.metrics()
        assert (found.mode, found.capacity, found.allocated, found.free) == ("writable", 16 * MIB, MIB + 64 * KIB, 15 * MIB - 64 * KIB)
        assert (found.splits, found.first_writes, found.layer_count, found.punched) == (1, 16, 3, 0)
        pool.layer("c").delete()
        pool.reclaim()
        layer.discard(0, MIB)
        found = pool.metrics()
        assert (found.punched, found.dirty, found.free) == (64 * KIB, 0, 15 * MIB)


def test_what_imports_did_not_store(pool: thinpool.Pool, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"".join(bytes([number]) * (64 * KIB) for number in range(1, 11)))
    pool.import_raw(image, "one")
    assert pool.metrics().deduplicated == 0
    pool.import_raw(image, "two")
    assert pool.metrics().deduplicated == 640 * KIB


def test_what_layers_found_equal_share(pool: thinpool.Pool) -> None:
    for name in ("one", "two"):
        layer = pool.create_layer(name, "4M")
        layer.pwrite(b"x" * MIB, MIB)
        layer.seal()
    pool.compute_digests()
    assert pool.metrics().deduplicated == pool.layer("two").usage().shared == MIB


def test_the_mode(pool_path: Path) -> None:
    with thinpool.Pool.create(pool_path) as pool:
        assert pool.metrics().mode == "writable"
        pool.engine.fail()
        assert pool.metrics().mode == "failed"
    with thinpool.Pool.open(pool_path, read_only=True) as pool:
        assert pool.metrics().mode == "read-only"


def test_a_closed_pool_has_no_metrics(pool: thinpool.Pool) -> None:
    pool.close()
    with pytest.raises(thinpool.PoolClosed):
        pool.metrics()


def test_quantiles_lie_within_their_bucket() -> None:
    times = Histogram(1.0, (0, 98, 0, 1, *[0] * 21, 1))
    assert NO_TIMES.quantile(0.5) is None
    median, slow, slowest = (times.quantile(share) for share in (0.5, 0.985, 1.0))
    assert median is not None and LATENCY_BOUNDS[0] < median < LATENCY_BOUNDS[1]
    assert slow is not None and LATENCY_BOUNDS[2] < slow < LATENCY_BOUNDS[3]
    assert slowest == LATENCY_BOUNDS[-1]


# --- Prometheus ---


def scrape(directory: Path) -> str:
    """``/metrics`` on the pool's socket."""
    connection: http.client.HTTPConnection = _Connection(directory)
    connection.request("GET", "/metrics")
    with connection.getresponse() as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = response.read().decode()
    connection.close()
    return text


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What Prometheus reads of a pool that has done a bit of everything."""
    path = tmp_path_factory.mktemp("scraped") / "pool"
    with closing(open_pool(path, "remote")) as pool:
        layer = pool.create_layer("os/debian:12@1+x", "16M")
        layer.pwrite(b"x" * 10_000, 0)
        layer.pread(100, 0)
        layer.snapshot("s")
        pool.commit()
        return scrape(path)


def test_a_scrape_says_what_the_library_says(scraped: str) -> None:
    samples = {(sample.name, *sample.labels.values()): sample.value for family in text_string_to_metric_families(scraped) for sample in family.samples}
    assert samples["thinpool_layers",] == 2
    assert samples["thinpool_mode", "writable"] == 1 and samples["thinpool_mode", "failed"] == 0
    assert samples["thinpool_operation_bytes_total", "write"] == 10_000
    assert samples["thinpool_layer_operations_total", "os/debian:12@1+x", "read"] == 1
    assert samples["thinpool_layer_operation_seconds_count", "os/debian:12@1+x", "write"] == 1
    assert samples["thinpool_commit_phase_seconds_count", "sync"] == samples["thinpool_commit_seconds_count",] >= 1
    assert not [key for key in samples if "s" in key[1:]]  # a layer without traffic


def buckets_of(text: str) -> dict[tuple[str, ...], list[tuple[float, float]]]:
    found: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                others = {name: value for name, value in sample.labels.items() if name != "le"}
                found.setdefault((sample.name, *others.values()), []).append((float(sample.labels["le"]), sample.value))
    return found


def test_buckets_add_up_and_grow(scraped: str) -> None:
    histograms = buckets_of(scraped)
    assert len(histograms) >= 10
    for series, buckets in histograms.items():
        assert buckets == sorted(buckets), series
        assert [count for _, count in buckets] == sorted(count for _, count in buckets), series


@needs_tool("promtool")
def test_promtool_finds_nothing_to_complain_about(scraped: str) -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=scraped, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- the examples ---


def dashboard_expressions() -> list[str]:
    dashboard: dict[str, Any] = json.loads((EXAMPLES / "dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


@needs_tool("promtool")
def test_the_alert_rules_fire_when_they_should() -> None:
    done = subprocess.run(["promtool", "test", "rules", ROOT / "tests" / "alerts_test.yml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_tool("promtool")
def test_the_dashboards_expressions_are_promql(tmp_path: Path) -> None:
    filled = [expr.replace("$__rate_interval", "5m").replace("$instance", ".*") for expr in dashboard_expressions()]
    rules = {"groups": [{"name": "dashboard", "rules": [{"record": f"r{k}", "expr": expr} for k, expr in enumerate(filled)]}]}
    (tmp_path / "rules.yml").write_text(json.dumps(rules))  # JSON is YAML
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_examples_ask_for_is_there(scraped: str) -> None:
    there = {sample.name for family in text_string_to_metric_families(scraped) for sample in family.samples}
    asked = {name for text in (*dashboard_expressions(), (EXAMPLES / "alerts.yml").read_text()) for name in re.findall(r"\bthinpool_[a-z_]+", text)}
    asked -= {"thinpool_commit_phase_seconds"}  # named in words, without its suffix
    assert len(asked) > 20
    assert asked <= there
