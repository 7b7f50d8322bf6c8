"""What outlives the pool's process: a small process, the keeper, that takes down what is left, or keeps it for a successor.

``keeper`` is that process's program, ``takedown`` what it does at the end, and ``link`` a pool's line to it. The program imports
nothing but the standard library and this package, which it is given as a top-level one.
"""
