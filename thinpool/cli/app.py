"""The command line put together: the verbs, the options before them, and the way out for every exception."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from . import containers, devices, images, layers, listings, metadata, options, snapshots, space, top, transfer, trust
from .exits import INTERRUPTED, USAGE, code_of, message_of

app = typer.Typer(
    name="thinpool",
    help="Thin-provisioned, copy-on-write layers: snapshots and clones in no time, one copy of what they share.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_VERBS: dict[str, dict[str, Callable[..., None]]] = {
    "Layers": {
        "init": layers.init,
        "create": layers.create,
        "snapshot": layers.snapshot,
        "clone": layers.clone,
        "seal": layers.seal,
        "reset": layers.reset,
        "resize": layers.resize,
        "rename": layers.rename,
        "rm": layers.rm,
        "undelete": layers.undelete,
        "digest": layers.digest,
    },
    "Files": {"import": transfer.import_file, "export": transfer.export},
    "Listings": {
        "ls": listings.ls,
        "df": listings.df,
        "diff": listings.diff,
        "delta": listings.delta,
        "map": listings.show_map,
        "ps": listings.ps,
        "top": top.top,
    },
    "Trust": {
        "check": trust.check,
        "repair": trust.repair,
        "restore-metadata": trust.restore_metadata,
        "trim": trust.trim,
        "compact": space.compact,
        "dump": metadata.dump,
        "restore": metadata.restore,
        "pack": metadata.pack,
        "rmap": metadata.rmap,
    },
    "Space and speed": {"sparsify": space.sparsify, "limit": space.limit, "policy": space.policy, "events": space.events},
    "Images": {
        "load": images.load,
        "pull": images.pull,
        "push": images.push,
        "save": images.save,
        "images": images.images,
        "history": images.history,
        "inspect": images.inspect,
        "tag": images.tag,
        "untag": images.untag,
        "commit": images.commit,
        "rmi": images.rmi,
        "gc": images.gc,
    },
    "Containers": {"run": containers.run, "cp": containers.cp},
    "Devices and mounts": {
        "attach": devices.attach,
        "detach": devices.detach,
        "mount": devices.mount,
        "umount": devices.umount,
        "serve": devices.serve,
        "snapshotter": snapshots.snapshotter,
    },
}

_CLASSES: dict[str, type[options.UsageCode]] = {"run": containers.Run, "check": trust.Check}

for _panel, _verbs in _VERBS.items():
    for _name, _verb in _verbs.items():
        app.command(_name, rich_help_panel=_panel, cls=_CLASSES.get(_name))(_verb)
app.add_typer(containers.app, rich_help_panel="Containers")


def _show_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"thinpool {__version__}")
        raise typer.Exit


@app.callback()
def _before_the_verb(
    ctx: typer.Context,
    pool: Annotated[Path | None, typer.Option("--pool", metavar="DIR", envvar="THINPOOL_POOL", help="The pool's directory.", show_default=False)] = None,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    ctx.obj = pool


def report(error: BaseException) -> None:
    """One line on standard error; the traceback too when THINPOOL_DEBUG asks for it."""
    if os.environ.get("THINPOOL_DEBUG"):
        traceback.print_exception(error)
    print(f"thinpool: {message_of(error)}", file=sys.stderr)


def main() -> None:
    """Runs the command and exits with the code of ``exits``."""
    try:
        status = app(prog_name="thinpool", standalone_mode=False) or 0
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:  # the reader of a listing has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:
        if hasattr(error, "format_message"):  # click's, which typer does not export
            _report_usage(error, error.format_message())
            status = getattr(error, "exit_code", USAGE)
        else:
            status = code_of(error)
            report(error)
    sys.exit(status)


def _report_usage(error: Exception, message: str) -> None:
    ctx = getattr(error, "ctx", None)
    if message:  # none when typer has shown the help instead
        print(f"thinpool: {message} (see {ctx.command_path if ctx else 'thinpool'} --help)", file=sys.stderr)
