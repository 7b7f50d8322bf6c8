"""Images in a pool: what is stored once, what removal gives back, what an interrupted import leaves, and out again as it came."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import needs_tool
from imageworld import ImageWorld
from invariants import check_invariants
from registryworld import RegistryWorld

import thinpool
from thinpool.images.importer import Importer

pytestmark = needs_tool("umoci", "skopeo")


def names(pool: thinpool.Pool) -> set[str]:
    return {layer.name for layer in pool.layers()}


def test_an_image_is_a_stack_of_layers_named_by_chain_ids(pool: thinpool.Pool, images: ImageWorld) -> None:
    image = pool.images.load(images.oci_layout(layers=5))
    assert len(image.layers) == 5
    layers = [pool.layer(name) for name in image.layers]
    assert all(layer.sealed and layer.digests["chain"] == layer.name for layer in layers)
    assert [layer.parent for layer in layers[1:]] == layers[:-1]


def test_an_image_that_is_there_brings_no_layer(pool: thinpool.Pool, images: ImageWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pool.images.load(images.oci_layout(layers=5))
    before, usage = names(pool), pool.usage().allocated
    monkeypatch.setattr(Importer, "_apply", lambda *_: pytest.fail("applied a layer that is there"))
    again = pool.images.load(images.oci_layout(layers=5), "other/name:1")
    assert (again.id, names(pool), pool.usage().allocated) == (first.id, before, usage)
    assert "docker.io/other/name:1" in again.references
