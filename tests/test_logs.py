"""The server's log: a JSON object a line for programs, and files that are rotated."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import Command

import thinpool
from thinpool.server.logs import JsonLines

WRITE_MUCH = """
import logging, sys
from pathlib import Path
from thinpool.server.logs import LogFile, log_to
log_to(LogFile(Path(sys.argv[1]), size=2000), "json")
for number in range(100):
    logging.getLogger("x").info("line %d", number)
print("to standard output", flush=True)
print("to standard error", file=sys.stderr, flush=True)
"""


def logged(record: logging.LogRecord) -> dict[str, object]:
    line = JsonLines().format(record)
    assert "\n" not in line
    found: dict[str, object] = json.loads(line)
    return found


def test_a_line_says_when_how_bad_and_what() -> None:
    record = logging.makeLogRecord({"name": "thinpool.events", "levelno": 30, "levelname": "WARNING", "msg": "%d left", "args": (3,), "created": 1e9 + 0.25})
    record.event, record.fields = "low-water", {"free": 3}
    found = logged(record)
    assert found.pop("pid") == record.process
    assert found == {"time": "2001-09-09T01:46:40.250+00:00", "level": "warning", "event": "low-water", "message": "3 left", "fields": {"free": 3}}


def test_a_traceback_stays_on_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.makeLogRecord({"name": "thinpool.server", "msg": "failed", "exc_info": sys.exc_info()})
    found = logged(record)
    assert found["event"] == "thinpool.server" and "ValueError: two\nlines" in str(found["exception"])


def test_a_full_file_is_kept_beside_the_next(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    subprocess.run([sys.executable, "-c", WRITE_MUCH, log], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["server.log", "server.log.1", "server.log.2", "server.log.3"]
    assert all(path.stat().st_mode & 0o777 == 0o600 and path.stat().st_size <= 2100 for path in tmp_path.iterdir())
    last = log.read_text().splitlines()
    assert last[-2:] == ["to standard output", "to standard error"]  # what is not logged is there, too
    assert json.loads(last[-3])["message"] == "line 99"
    assert json.loads((tmp_path / "server.log.1").read_text().splitlines()[-1])["message"] < json.loads(last[0])["message"]


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_server_logs_as_it_was_asked_to(tmp_path: Path, form: str) -> None:
    command = Command(tmp_path)
    thinpool.Pool.create(command.pool).close()
    command("serve", "--log-format", form)
    line = (command.pool / "server.log").read_text().splitlines()[0]
    assert f"serving {command.pool}" in line
    assert (form == "json") == (line[0] == "{" and json.loads(line)["level"] == "info")
