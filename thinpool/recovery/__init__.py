"""Trust: pools are checked and repaired, metadata is kept in backups, written out and brought back.

Everything here reads the metadata file by itself (:mod:`.lmdbfile`, :mod:`.records`), so that it also works where neither LMDB nor the
engine would open it, and on a pool that another process has open.
"""
