"""Verbs that put layers to use: block devices, mounts, and the server that keeps them up."""

from __future__ import annotations

from contextlib import closing, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ..api import Via as ViaName
from ..errors import LayerState
from ..server.wire import LogFormat
from . import options, service
from .options import attached, opened, pool_path
from .show import print_json
from .snapshots import snapshots_served

User = Annotated[str, typer.Argument(metavar="LAYER", help="A layer's name, its device or its mountpoint.", show_default=False)]
Via = Annotated[ViaName, typer.Option(help="A loop device, or an nbd device where the kernel has them.")]


def attach(
    ctx: typer.Context,
    layer: options.Layer,
    sector_size: Annotated[int, typer.Option(help="The device's logical block size: 512 or 4096.")] = 512,
    via: Via = "loop",
    as_json: options.AsJson = False,
    pool: options.Pool = None,
) -> None:
    """Make a layer a block device, and print its path. Needs root."""
    with opened(ctx, pool, server=True) as p:
        attachment = p.layer(layer).attach(sector_size=sector_size, via=via)
    if as_json:
        print_json({"layer": attachment.layer, "device": attachment.device})
    else:
        print(attachment.device)


def detach(ctx: typer.Context, layer: User, pool: options.Pool = None) -> None:
    """Take a layer's block device away."""
    with opened(ctx, pool) as p:
        attached(p, layer)[0].detach()


def mount(
    ctx: typer.Context,
    layer: options.Layer,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to.", show_default=False)],
    read_only: Annotated[bool, typer.Option("--read-only", help="Also for a writable layer.")] = False,
    via: Via = "loop",
    pool: options.Pool = None,
) -> None:
    """Mount a layer's file system. Needs root."""
    with opened(ctx, pool, server=True) as p:
        p.layer(layer).mount(directory, read_only=True if read_only else None, via=via)


def umount(ctx: typer.Context, layer: User, pool: options.Pool = None) -> None:
    """Unmount a layer's file system."""
    with opened(ctx, pool) as p:
        found, attachment = attached(p, layer)
        if attachment is None or attachment.mountpoint is None:
            raise LayerState(f"{layer} is not mounted")
        found.unmount()


def serve(
    ctx: typer.Context,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, and serve until a signal comes.")] = False,
    takeover: Annotated[bool, typer.Option("--takeover", help="In place of the server that runs: what is attached and mounted stays.")] = False,
    nbd: Annotated[list[str] | None, typer.Option("--nbd", metavar="ADDRESS", help="Serve NBD too: unix:/path or host:port.", show_default=False)] = None,
    http: Annotated[list[str] | None, typer.Option("--http", metavar="HOST:PORT", help="Serve the HTTP interface over TCP too.", show_default=False)] = None,
    print_token: Annotated[bool, typer.Option("--print-token", help="Print the token that HTTP over TCP needs, and do nothing else.")] = False,
    tls_certificates: Annotated[Path | None, typer.Option(metavar="DIR", help="server-cert.pem, server-key.pem, ca-cert.pem.", show_default=False)] = None,
    tls_keys: Annotated[Path | None, typer.Option(metavar="FILE", help="For NBD, pre-shared keys: lines user:hex.", show_default=False)] = None,
    tls_verify_peer: Annotated[bool, typer.Option("--tls-verify-peer", help="Only clients with a certificate of ca-cert.pem.")] = False,
    containerd: Annotated[Path | None, typer.Option(metavar="SOCKET", help="Be containerd's snapshotter too.", show_default=False)] = None,
    verify_reads: Annotated[
        bool, typer.Option("--verify-reads", help="Compare chunks that have a checksum with it when they are read; takes over from a server that runs.")
    ] = False,
    log_format: Annotated[LogFormat, typer.Option(help="How it logs: lines for people, or a JSON object a line.")] = "text",
    pool: options.Pool = None,
) -> None:
    """Start the pool's server; it stops when nothing is attached or served by NBD or TCP and nobody connected.

    The verbs that need it start it by themselves. With --foreground it stays, as under systemd. A server that was killed is
    started anew; devices, mounts and what was written through them are still there.
    """
    path = pool_path(ctx, pool)
    if containerd is not None and not foreground:
        raise typer.BadParameter("it needs --foreground: say thinpool snapshotter beside a server in the background", param_hint="--containerd")
    if print_token:
        from ..poolfiles import PoolFiles
        from ..server.tcp import token_of

        PoolFiles(path).require_pool()
        print(token_of(path))
        return

    if not foreground:
        from ..server.client import RemotePool
        from ..server.connect import connect, take_over

        anew = takeover or verify_reads
        with closing(take_over(path, log_format, verify_reads=verify_reads) if anew else connect(path, server=True, log_format=log_format)) as remote:
            assert isinstance(remote, RemotePool)
            for address in nbd or ():
                print(remote.serve_nbd(address, certificates=tls_certificates, keys=tls_keys, verify_peer=tls_verify_peer), flush=True)
            for address in http or ():
                print(remote.serve_http(address, certificates=tls_certificates, verify_peer=tls_verify_peer), flush=True)
        return
    import logging

    from ..server.daemon import Addresses
    from ..server.daemon import serve as serve_pool
    from ..server.logs import log_to
    from ..server.survival import kept_pool

    log_to(logging.StreamHandler(), log_format)
    listener = service.listener()
    addresses = Addresses(nbd or (), http or (), tls_certificates, tls_keys, tls_verify_peer)
    if takeover:
        addresses.check()  # before the server that runs has left
    with kept_pool(path, takeover=takeover, verify_reads=verify_reads) as (opened_pool, keeper):
        listeners = addresses.listen(opened_pool, keeper, lambda address: print(address, flush=True))
        with snapshots_served(lambda: nullcontext(opened_pool), containerd) if containerd is not None else nullcontext():
            serve_pool(opened_pool, keeper, stays=True, listener=listener, tcp=listeners, on_ready=service.say_ready)
