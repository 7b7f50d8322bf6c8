"""containerd's snapshotter on a pool, as a proxy plugin: the service ``containerd.services.snapshots.v1`` over gRPC.

``service`` answers the calls, in the messages of ``messages``; ``snapshotter`` does what they ask, by the library's interface alone; ``records`` says
what is kept of a snapshot and where, ``bases`` makes the file systems to begin with, ``filters`` reads containerd's filters.
"""
