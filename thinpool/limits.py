"""Limits of layers: kept with their records, in force in the core (csrc/throttle.h) as long as the pool is open.

A handle on each limited layer is kept: the core forgets what it knows of layers that nobody has one on.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from .api import Limits
from .errors import BadSize

if TYPE_CHECKING:
    from .layer import Layer
    from .pool import Pool

_MAX = (1 << 63) - 1


def set_limits(pool: Pool, layer: Layer, limits: Limits) -> None:
    """Replaces a layer's limits. Raises BadSize for one that cannot be."""
    for name, value in asdict(limits).items():
        if type(value) is not int or not 0 <= value <= _MAX:
            raise BadSize(f"{name} is a whole number from 0 (no limit) on, not {value!r}")
    with pool.changing_record(layer) as catalog:
        catalog.set_limits(layer.id, {name: value for name, value in asdict(limits).items() if value})
        layer.handle.set_limits(limits)
        pool.limited[layer.id] = layer.handle


def enforce_limits(pool: Pool, layer_ids: list[int]) -> None:
    """Puts the limits that layers have in force."""
    for layer_id in layer_ids:
        layer = pool.layer_by_id(layer_id)
        layer.handle.set_limits(layer.limits)
        pool.limited[layer_id] = layer.handle
