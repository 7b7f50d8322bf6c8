"""Test files that run in a guest (umlhost.py), for what the host's kernel need not have.

``pytestmark = in_guest("nbd")`` in a file does it: its tests, written as any others, run in one guest with these kernel modules when the
first of them is due, and are reported here one by one. conftest.py takes the hooks from here.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import umlhost

_HERE = os.environ.get("THINPOOL_GUEST") == "1"
_ROOT = Path(__file__).parent.parent
_SECONDS = 300.0
_Reports = dict[str, list[pytest.TestReport]]
_REPORTS = pytest.StashKey[_Reports]()


def in_guest(*modules: str) -> pytest.MarkDecorator:
    """The tests run in a guest with these kernel modules."""
    return pytest.mark.guest(*modules)


class _Teller:
    """In the guest: writes down what the tests came to."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with Path(umlhost.HOST, "reports").open("a") as file:
            file.write(json.dumps(data) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "guest(*modules): runs in a guest that has these kernel modules")
    config.stash[_REPORTS] = {}
    if _HERE:
        config.pluginmanager.register(_Teller(config))


def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    marker = item.get_closest_marker("guest")
    if marker is None or _HERE or any(skip.args[0] for skip in item.iter_markers("skipif")):
        return None
    reports = item.config.stash[_REPORTS]
    if item.nodeid not in reports:
        reports |= _run([one for one in item.session.items if one.path == item.path], marker.args)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports[item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run(items: Sequence[pytest.Item], modules: Sequence[str]) -> _Reports:
    """What tests came to in a guest. Those that it did not come to have failed."""
    config = items[0].config
    words = [sys.executable, "-B", "-m", "pytest", "-q", "--basetemp=/mnt/tmp", *(item.nodeid for item in items)]
    with tempfile.TemporaryDirectory() as directory:
        environment = ["env", "THINPOOL_GUEST=1", f"CI={os.environ.get('CI', '')}", f"PATH={os.environ['PATH']}:/usr/sbin:/sbin"]
        script = f"cd {shlex.quote(str(_ROOT))} && {shlex.join([*environment, *words])}"
        ended = umlhost.run(script, modules=modules, directory=Path(directory), seconds=_SECONDS)
        told = Path(directory, "reports")
        lines = told.read_text().splitlines() if told.exists() else []
    reports: _Reports = {item.nodeid: [] for item in items}
    for line in lines:
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        reports[report.nodeid].append(report)
    for item in items:
        if not any(report.when == "teardown" for report in reports[item.nodeid]):
            reports[item.nodeid].append(_failure(item, f"the guest did not come to its end: {ended}"))
    return reports


def _failure(item: pytest.Item, why: str) -> pytest.TestReport:
    keywords: dict[str, Any] = {}
    return pytest.TestReport(item.nodeid, item.location, keywords, outcome="failed", longrepr=why, when="call")
