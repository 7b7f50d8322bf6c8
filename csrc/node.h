/* node.h - nodes of block maps: 256 entries each, shared between layers by reference count.
 *
 * A leaf (level 0) maps 256 chunks of a layer. An entry is 0 (nothing mapped), a chunk number + 1 ("whole"), or a
 * split: one such number per 4 KiB block. An entry of an inner node is a child's node id, or 0.
 * What a node maps changes only while one layer owns it: its count is 1, and so is that of each node above it. The owner's
 * lock and the pool's mutex are both held then, so either is enough for reading. In which chunks the bytes lie may change under the mutex
 * alone (pool.h).
 */
#ifndef TP_NODE_H
#define TP_NODE_H

#include "table.h"

#define FANOUT 256u
#define MAX_HEIGHT 7u /* 256^7 chunks */
#define TP_BLOCKS_MAX 1024u /* blocks of the largest chunk */
#define SPLIT_BIT ((uint64_t)1 << 63)

struct split {
  uint64_t own;     /* chunk + 1 that takes new blocks, if it is ours: verified through node.mine */
  uint64_t block[]; /* chunk + 1, or 0: hole; chunk_size / 4096 of them */
};

struct node {
  struct record rec;
  unsigned level;
  /* Leaves: entries that their layer may overwrite in place, as of its epoch (epochs are unique in the pool). */
  uint64_t mine_epoch;
  uint64_t mine[FANOUT / 64];
  uint64_t entry[FANOUT];
};

/* An entry of a leaf, or a number in a split, where the mutex is not held. */
static inline uint64_t entry_read(const uint64_t *entry) { return __atomic_load_n(entry, __ATOMIC_ACQUIRE); }

static inline bool entry_is_split(uint64_t entry) { return (entry & SPLIT_BIT) != 0; }
static inline struct split *entry_split(uint64_t entry) { return (struct split *)(uintptr_t)(entry & ~SPLIT_BIT); }
static inline uint64_t split_entry(struct split *split) { return (uint64_t)(uintptr_t)split | SPLIT_BIT; }

int node_get(struct tp_pool *pool, uint64_t id, struct node **out);
/* To look at it once: where it is not in memory it does not come there, and *temporary says that the caller frees it. */
int node_look(struct tp_pool *pool, uint64_t id, struct node **out, bool *temporary);
struct node *node_create(struct tp_pool *pool, unsigned level); /* a new id, count 1, dirty */
/* A copy with an id of its own: every child or chunk gets one reference more, and src one less. */
int node_copy(struct tp_pool *pool, struct node *src, struct node **out);
/* Gives up one reference: the last one puts the node on the reclaim queue. Its count page must be loaded. */
void node_drop(struct tp_pool *pool, uint64_t id);
bool node_is_empty(const struct node *node);
void node_encode(struct tp_pool *pool, struct node *node);
void node_free(struct node *node);

/* The chunks that an entry names, each once; chunks has room for chunk_size / 4096 (at least 1). Returns how many. */
unsigned entry_chunks(const struct tp_pool *pool, uint64_t entry, uint64_t *chunks);
/* Loads the count pages of all that the node (or the entry) names, so that counts can change without failing. */
int node_load_counts(struct tp_pool *pool, const struct node *node);
int entry_load_counts(struct tp_pool *pool, uint64_t entry);
/* The entry once more: one reference more for each of its chunks, a split is copied. Counts loaded. */
uint64_t entry_copy(struct tp_pool *pool, uint64_t entry);
/* One reference less for each chunk of the entry; frees a split. Counts loaded. */
void entry_release(struct tp_pool *pool, uint64_t entry);

#endif
