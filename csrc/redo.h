/* redo.h - what changed maps since the last commit, kept in memory that outlives the process.
 *
 * A flush makes writes durable against power cuts. A process that is killed loses less: the bytes it wrote are in the
 * page cache, and only the map changes of the open transaction go with its memory. Who is mounted on a layer does not know
 * that anything was lost, and cannot do it again. So these changes are noted in a memory file (memfd_create(2)) that another process
 * keeps open too, and whoever opens the pool next does them again (tp_redo_open). After a power cut there is no such
 * file, and nothing that it could make wrong.
 *
 * Notes are of layers that existed at the last commit: blocks that name a chunk from now on, holes, sizes. They say what
 * an entry became, not how: doing them in order on the committed maps gives the maps that were lost, but for what layers were
 * created, branched, sealed or deleted. Where a note cannot be done, all later ones of its layer are left out.
 */
#ifndef TP_REDO_H
#define TP_REDO_H

#include "io.h"

enum redo_kind {
  REDO_CHUNKS = 1, /* blocks [block, block + count) lie in chunk, and on into those behind it, at their own positions */
  REDO_HOLE = 2,   /* those blocks are holes */
  REDO_SHARED = 3, /* entry `block / blocks per chunk` names chunk, which has other owners */
  REDO_SIZE = 4,   /* the layer has `count` bytes */
  REDO_STOP = 5,   /* the layer became something that notes do not tell */
};

/* Mutex held, and the layer's lock exclusively. Nothing where the pool has no such file. */
void redo_note(tp_layer *layer, enum redo_kind kind, uint64_t block, uint64_t count, uint64_t chunk);
void redo_freeze(struct tp_pool *pool);                /* a transaction was opened: pool->txn */
void redo_release(struct tp_pool *pool, uint64_t txn); /* it is durable */
void redo_fail(struct tp_pool *pool); /* error mode: what the notes name may never have reached the disk, so that nobody may do them again */
void redo_close(struct tp_pool *pool);

#endif
