"""How containers are named when nobody names them."""

from __future__ import annotations


def layer_stem(image: str) -> str:
    """The part of an image's or layer's name to name containers after."""
    return image.rsplit("/", 1)[-1].replace(":", "-").replace("@", "-")[:40]
