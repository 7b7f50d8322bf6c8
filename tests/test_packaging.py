"""From the source distribution to a wheel to a fresh environment: what users install is whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent

TRIAL = """
import pathlib, sys, thinpool
assert (pathlib.Path(thinpool.__file__).parent / "server" / "page" / "index.html").stat().st_size > 1000
with thinpool.Pool.create(sys.argv[1]) as pool:
    pool.create_layer("base", "1G").pwrite(b"hello", 1 << 20)
    print(pool.layer("base").pread(5, 1 << 20).decode())
"""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_from_the_source_distribution(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    source = archive.with_name(archive.name.removesuffix(".tar.gz"))
    assert {"py.typed", "_core.pyi"} <= {path.name for path in (source / "thinpool").iterdir()}

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", source, cwd=tmp_path)
    assert run(python, "-c", TRIAL, tmp_path / "pool", cwd=tmp_path) == "hello\n"
    assert "Usage" in run(tmp_path / "venv" / "bin" / "thinpool", "--help", cwd=tmp_path)
