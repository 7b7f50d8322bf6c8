/* checksum.h - checksums of chunks: what their bytes were when they were whole.
 *
 * Some time after a layer was sealed, each chunk that it names gets the CRC-32C of all its bytes (tp_layer_checksum). From then on nobody
 * overwrites it in place, whatever its count: in every committed state, a chunk that has a checksum is allocated, and holds the
 * bytes that the checksum is of (I9). A layer that has such a chunk for itself again, and writes, gives up the checksums of its leaf;
 * until that is durable the chunks pass for shared, as what has just lost its other owner does. A checksum goes when its chunk's count
 * falls to 0.
 *
 * Records of 128 checksums belong to the page of the counts of these chunks: they are loaded into it on demand, changed only together with
 * it, and leave memory with it.
 */
#ifndef TP_CHECKSUM_H
#define TP_CHECKSUM_H

#include "pool.h"

struct checksums {
  struct record rec; /* key: chunk number / CHECKSUM_VALUES. In no cache of its own */
  uint32_t value[CHECKSUM_VALUES]; /* 0: none */
};

static inline struct checksums *as_checksums(struct record *r) { return (struct checksums *)r; }

/* All with the mutex held, where not said otherwise; `i`: the chunk's place in the page of counts. */
int checksum_load(struct tp_pool *pool, struct page *page, unsigned i); /* may fail; the next two need it done */
static inline bool checksum_is_loaded(const struct page *page, unsigned i) { return page->sums_loaded >> i / CHECKSUM_VALUES & 1; }
uint32_t checksum_get(const struct page *page, unsigned i); /* 0: none */
void checksum_set(struct tp_pool *pool, struct page *page, unsigned i, uint32_t value);

/* The layer, which has this leaf for itself, is about to write where `chunk` is. If that is its own but for a checksum, all such chunks of the leaf
 * lose theirs: it will write to others soon. The chunk's count is loaded. Layer's lock held exclusively. */
void checksums_give_up(struct tp_layer *layer, const struct node *leaf, uint64_t chunk);

/* Reads the whole chunk if it has a checksum, and compares. 1: bytes are right; 0: it has none, and nothing was read; or an error. Without the
 * mutex; the lock of a layer that names the chunk is held, or the chunk is moving. */
int checksum_verify(struct tp_pool *pool, uint64_t chunk, uint8_t *bytes);

void checksums_encode(struct tp_pool *pool, struct checksums *sums);
void checksums_free(struct page *page);
size_t checksums_bytes(const struct page *page); /* memory */

#endif
