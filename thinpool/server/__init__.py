"""The pool's server and its client: how several programs share one pool.

``connect`` gives a program the pool, through the server when one runs (``client``, ``remote`` for images and containers, ``transport``),
else by opening it in this process. ``daemon`` is the server's life from start to end; ``app`` and the ``*_routes`` are what it answers;
``wire`` is the JSON both sides speak.
"""
