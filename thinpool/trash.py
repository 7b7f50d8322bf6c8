"""Layers that were removed by hand, and can be had back for a while.

A layer in the trash has the label :data:`~thinpool.catalog.TRASH_LABEL`, the time when it goes for good, and another name, so that its own is free. It goes
earlier where its space is needed (:meth:`thinpool.commits.Committer.empty_trash`). What programs delete does not come here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .catalog import TRASH_LABEL
from .errors import LayerBusy, LayerDeleted, LayerNotFound

if TYPE_CHECKING:
    from .api import LayerAPI, PoolAPI

NAME_LABEL = "thinpool.trash.name"
KEEP_HOURS = 24.0
_NAME_MAX = 255


def throw_away(pool: PoolAPI, layer: LayerAPI, keep_hours: float) -> None:
    """Puts a layer into the trash; its name is free then. Raises LayerBusy where it is attached, mounted or running."""
    name = layer.name
    for use in pool.attachments():
        if use.layer == name:
            where = f"container {use.container}" if use.container else f"mount on {use.mountpoint}" if use.mountpoint else f"block device {use.device}"
            raise LayerBusy(f"cannot delete layer {name}: used by {where}", (where,))
    # In one step, so that there is nothing in between, whatever happens to this process or to the pool's server.
    labels = {**layer.labels, TRASH_LABEL: str(int(time.time() + keep_hours * 3600)), NAME_LABEL: name}
    layer.rename(f"trash/{layer.id}/{name}"[:_NAME_MAX], labels=labels)


@dataclass(frozen=True, slots=True)
class Thrown:
    """A layer in the trash: the name that it had, and when it goes for good, in seconds since 1970."""

    layer: LayerAPI
    name: str
    until: float


def thrown_away(layers: Iterable[LayerAPI]) -> list[Thrown]:
    """Those of the layers that are in the trash, the one that goes last first."""
    found = []
    for layer in layers:
        with suppress(LayerDeleted):  # by somebody else, since they were listed
            labels = layer.labels  # once: it may be taken back meanwhile
            if TRASH_LABEL in labels:
                found.append(Thrown(layer, labels.get(NAME_LABEL) or layer.name, float(labels[TRASH_LABEL])))
    return sorted(found, key=lambda one: one.until, reverse=True)


def take_back(layers: Iterable[LayerAPI], name: str, new_name: str | None = None) -> LayerAPI:
    """The layer that was thrown away last under that name, out of the trash. Raises LayerNotFound; LayerExists where the name is taken."""
    for thrown in thrown_away(layers):
        with suppress(LayerDeleted):
            layer = thrown.layer
            if name in (thrown.name, layer.name):
                labels = {key: value for key, value in layer.labels.items() if key not in (TRASH_LABEL, NAME_LABEL)}
                if layer.name != (back := new_name or thrown.name):
                    layer.rename(back, labels=labels)
                else:  # it was renamed in the trash
                    layer.set_labels(labels)
                return layer
    raise LayerNotFound(f"no layer named {name!r} in the trash")
