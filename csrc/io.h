/* io.h - bytes to and from layers: the parts that reading, writing and discarding share. */
#ifndef TP_IO_H
#define TP_IO_H

#include "map.h"

/* A layer's lock during one operation: shared as long as no map changes, exclusive from then on. */
struct io {
  tp_layer *layer;
  bool exclusive;
};

/* Takes the lock and checks state and range (against the size as it is now). */
int io_begin(struct io *io, tp_layer *layer, uint64_t offset, uint64_t length, bool writing);
/* Makes the lock exclusive. Nothing that was looked up before holds: others may have come in between. */
int io_upgrade(struct io *io, uint64_t offset, uint64_t length, bool writing);
void io_end(struct io *io);

/* The leaf of a chunk from its slot, filled if need be (which makes the lock exclusive). *out NULL: a hole. */
int io_find_leaf(struct io *io, uint64_t index, uint64_t offset, uint64_t length, bool writing, struct node **out);

/* Reads what is within the range that was checked. The lock may become exclusive on the way. */
int io_read(struct io *io, void *buf, uint64_t length, uint64_t offset);

/* Whole transfers to and from the data file. Writes go out in pieces of at most WRITE_MAX: what a larger one brings into
 * the page cache as one folio makes each later small write into it several times dearer; what smaller pieces bring
 * in makes large writes dearer (docs/DESIGN.md, "I/O to the data file"). */
#define WRITE_MAX (512u * 1024)
int disk_read(struct tp_pool *pool, void *buf, uint64_t length, uint64_t at);
int disk_write(struct tp_pool *pool, const void *buf, uint64_t length, uint64_t at);
int chunk_read(struct tp_pool *pool, uint64_t chunk, void *buf, uint64_t length, uint64_t within); /* verified, if the pool does that */
int disk_write_zeros(struct tp_pool *pool, uint64_t length, uint64_t at);

/* One chunk's piece of a write that needs the map changed, or looked at more closely; lock held exclusively. May
 * return TP_NEED_WINDOW. *overdue: a commit should come first, before the next write. */
int write_chunk(tp_layer *layer, uint64_t index, unsigned offset, unsigned length, const uint8_t *buf, bool *overdue);

/* First writes of up to count whole chunks at once, as far as there are neighbouring holes in one leaf and neighbouring free
 * chunks: *done says how many. Otherwise as write_chunk. */
int write_run(tp_layer *layer, uint64_t index, unsigned count, const uint8_t *buf, unsigned *done, bool *overdue);

/* tp_read, tp_write and tp_discard for the core's own ends, which no limits hold up and no metrics count. */
int layer_read(tp_layer *layer, void *buf, uint64_t length, uint64_t offset);
int layer_write(tp_layer *layer, const void *buf, uint64_t length, uint64_t offset);
int layer_discard(tp_layer *layer, uint64_t offset, uint64_t length);

/* Blocks [first, end) of one chunk, of which one at least is mapped, become holes. Lock held exclusively, mutex held on entry and return. What is ours
 * alone is also punched, so that the host gets its blocks back at once. Adds to *freed the bytes that nobody needs any more. */
int discard_blocks(tp_layer *layer, uint64_t index, unsigned first, unsigned end, uint64_t *freed);

/* After the size went from old_size to size: nothing is mapped beyond it, whoever wrote there until then. */
int discard_beyond(tp_layer *layer, uint64_t size, uint64_t old_size);

/* Puts the new entry in place of the old one, a split of which is freed; chunks that only the old one named lose a
 * reference. Counts of both loaded, new chunks counted already; mutex and lock held. Returns how many chunks that frees. */
unsigned replace_entry(tp_layer *layer, struct node *leaf, unsigned i, uint64_t entry);

/* Gives way to whatever can free space; attempt counts from 0. The reason if there is nothing left to try. */
int make_room(struct tp_pool *pool, int reason, int attempt);

#endif
