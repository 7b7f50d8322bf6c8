"""What verbs have in common: which pool, how it is opened, and the options that several of them take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand

from ..api import Attachment, LayerAPI, PoolAPI
from ..errors import LayerNotFound
from .exits import USAGE

Pool = Annotated[
    Path | None,
    typer.Option("--pool", metavar="DIR", help="The pool's directory. Default: $THINPOOL_POOL.", show_default=False),
]
Layer = Annotated[str, typer.Argument(metavar="LAYER", help="A layer's name.", show_default=False)]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The new name.", show_default=False)]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="A label; may be given again.", show_default=False)]
Container = Annotated[str, typer.Argument(metavar="CONTAINER", help="A container's name.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON, sizes in bytes.")]
NoTrunc = Annotated[bool, typer.Option("--no-trunc", help="Digests and commands in full.")]


class UsageCode(TyperCommand):
    """A verb that has another program's exit codes, and that program's for being used wrongly: 2 may mean something else there."""

    usage_code: ClassVar[int] = USAGE

    def make_context(self, *args: Any, **options: Any) -> Any:
        with self._coded():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with self._coded():
            return super().invoke(ctx)

    @contextmanager
    def _coded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if hasattr(error, "format_message"):  # click's, which typer does not export
                error.exit_code = self.usage_code  # type: ignore[attr-defined]
            raise


def pool_path(ctx: typer.Context, given: Path | None) -> Path:
    """The pool meant: the verb's option, the command's, or the environment's."""
    path: Path | None = given or ctx.obj
    if path is None:
        raise typer.BadParameter("which pool? Say --pool DIR, or set THINPOOL_POOL")
    return path


@contextmanager
def opened(ctx: typer.Context, given: Path | None, *, server: bool = False, gives_back: bool = False) -> Iterator[PoolAPI]:
    """The pool, open; what the verb did is durable when it returns.

    ``server``: for verbs that outlive this process. ``gives_back``: for verbs that free space; the host has it back then.
    """
    from ..server.connect import connect

    with closing(connect(pool_path(ctx, given), server=server)) as pool:
        yield pool
        if gives_back:
            pool.reclaim()
        pool.commit()


def parse_labels(given: list[str] | None) -> dict[str, str] | None:
    """``KEY=VALUE`` options as a dictionary."""
    if not given:
        return None
    pairs = [label.partition("=") for label in given]
    if bad := next((pair[0] for pair in pairs if not pair[0] or not pair[1]), None):
        raise typer.BadParameter(f"a label is KEY=VALUE, not {bad!r}", param_hint="--label")
    return {key: value for key, _, value in pairs}


def attached(pool: PoolAPI, given: str) -> tuple[LayerAPI, Attachment | None]:
    """The layer that a name, a device or a mountpoint stands for, and its attachment. Raises LayerNotFound."""
    try:
        place = os.path.realpath(given)
    except OSError:  # the working directory is gone
        place = given
    for attachment in pool.attachments():
        if given == attachment.layer or place in (attachment.device, attachment.mountpoint):
            return pool.layer(attachment.layer), attachment
    try:
        return pool.layer(given), None
    except LayerNotFound:
        raise LayerNotFound(f"nothing here is named, attached at or mounted on {given!r}") from None
