"""Containers: commands that run on thin clones of layers.

``run`` runs a command on a clone, through ``container_init``, a process of its own.
"""
