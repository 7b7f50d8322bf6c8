"""What all tests share: pools in temporary directories, skips that say what is missing, and a check that nothing leaks.

Where ``CI`` is set everything that a test can need is there, so a skip counts as a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import applied
import damagedpool
import hypothesis
import pytest
from guesttests import pytest_configure, pytest_runtest_protocol  # noqa: F401

import thinpool

CI = bool(os.environ.get("CI"))

hypothesis.settings.register_profile("thinpool", deadline=None, print_blob=True)
hypothesis.settings.load_profile("thinpool")


def missing(*tools: str, root: bool = False) -> str | None:
    """What of it this machine lacks, in words; ``None``: nothing."""
    lacking = [tool for tool in tools if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None]
    if root and os.geteuid() != 0:
        lacking.insert(0, "root")
    return f"needs {', '.join(lacking)}" if lacking else None


def needs_root() -> pytest.MarkDecorator:
    """Skips a test without root, which loop devices, mounts and namespaces want."""
    return pytest.mark.skipif(missing(root=True) is not None, reason="needs root")


def needs_tool(*tools: str) -> pytest.MarkDecorator:
    """Skips a test where a program of the host is not installed."""
    lacking = missing(*tools)
    return pytest.mark.skipif(lacking is not None, reason=lacking or "")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--crash-cuts", type=int, default=2400, help="power cuts in tests/test_crash.py")
    parser.addoption("--power-cuts", type=int, default=3, help="power cuts of a guest in tests/test_power_cut.py")
    parser.addoption("--logged-cuts", type=int, default=6, help="marks, and as many other entries, that tests/test_log_writes.py replays the log to")
    parser.addoption("--decoder-examples", type=int, default=200, help="changed inputs in tests/test_decoders.py, and fewer where one takes longer")
    parser.addoption("--server-kills", type=int, default=6, help="kills of the server in each test of tests/test_survival.py that loads it")
    parser.addoption("--damage-rounds", type=int, default=1, help="times that each kind of damage is done, from another seed each")
    parser.addoption("--api-examples", type=int, default=6, help="requests of each kind to each route in tests/test_api_schema.py")
    parser.addoption("--compact-rounds", type=int, default=300, help="operations of each thread in tests/test_compact.py while all chunks move")
    parser.addoption("--fuzz-examples", type=int, default=200, help="conversations in tests/test_nbd_negotiation.py, twice")


@pytest.fixture
def decoder_examples(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--decoder-examples"))


@pytest.fixture
def crash_cuts(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--crash-cuts"))


@pytest.fixture
def damage_rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--damage-rounds"))


@pytest.fixture
def compact_rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--compact-rounds"))


@pytest.fixture
def api_examples(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--api-examples"))


@pytest.fixture
def pool_path(tmp_path: Path) -> Path:
    """Where a test may make its pool."""
    return tmp_path / "pool"


@pytest.fixture
def pool(pool_path: Path) -> Iterator[thinpool.Pool]:
    """An open pool of 64 KiB chunks."""
    with thinpool.Pool.create(pool_path) as pool:
        yield pool


@pytest.fixture(scope="session")
def sound_pool(tmp_path_factory: pytest.TempPathFactory) -> damagedpool.World:
    """A pool with all kinds of records, of which each test damages a copy."""
    return damagedpool.build(tmp_path_factory.mktemp("sound"))


@pytest.fixture(params=["mounted", "ext4"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Where layers are applied to."""
    if request.param == "mounted":
        yield applied.Mounted(tmp_path / "tree")
    else:
        with thinpool.Pool.create(tmp_path / "pool") as pool:
            yield applied.InExt4(pool, tmp_path / "mounted")


@pytest.fixture(params=["builtin", "crun", "runc"])
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What containers run under: in this process by default, and by the environment in commands."""
    if request.param != "builtin" and (lacking := missing(request.param)):
        pytest.skip(lacking)
    monkeypatch.setattr("thinpool.containers.bundle._RUNTIMES", (request.param,) if request.param != "builtin" else ())
    monkeypatch.setenv("THINPOOL_RUNTIME", request.param)
    return str(request.param)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped in CI, where nothing may be missing: {reason}"
    return report


def _leftovers(root: str) -> list[str]:
    """Mounts and loop devices over files below ``root``."""
    found = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if root in line]
    loops = subprocess.run(["losetup", "-nO", "NAME,BACK-FILE"], capture_output=True, text=True, check=False)
    return found + [line for line in loops.stdout.splitlines() if root in line]


@pytest.fixture(scope="session", autouse=True)
def _nothing_leaks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root = str(tmp_path_factory.getbasetemp())
    yield
    deadline = time.monotonic() + 15  # servers that the last tests have let go of end by themselves
    while (left := _leftovers(root)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"left behind by the tests: {left}"


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and a server and a client that it vouches for."""
    directory = tmp_path_factory.mktemp("certificates")

    def openssl(*words: object) -> None:
        subprocess.run([str(word) for word in words], check=True, capture_output=True)

    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    openssl(*new, "-subj", "/CN=authority", "-addext", "keyUsage=critical,keyCertSign", "-keyout", directory / "ca-key.pem", "-out", directory / "ca-cert.pem")
    for name in ("server", "client"):
        signed = ["-CA", directory / "ca-cert.pem", "-CAkey", directory / "ca-key.pem", "-addext", "basicConstraints=critical,CA:false"]
        signed += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        openssl(*new, "-subj", "/CN=localhost", *signed, "-keyout", directory / f"{name}-key.pem", "-out", directory / f"{name}-cert.pem")
    return directory
