"""File systems in layers: bases from root file system tarballs, and containers that run on clones of them.

``filesystems`` keeps one empty, formatted file system per type and size; ``tarball`` unpacks a tarball into a mounted one;
``rootfs`` puts the two together; ``container`` runs a command on a clone, through ``container_init``, a process of its own.
"""
