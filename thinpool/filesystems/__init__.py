"""File systems in layers: empty ones to begin with, and trees put into them from tarballs.

``blank`` keeps one empty, formatted file system per type and size; ``tarball`` unpacks a tarball into a mounted one;
``rootfs`` puts the two together.
"""
