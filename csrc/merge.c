/* merge.c - split entries that are spread over several chunks of their own are put together.
 *
 * A layer that was written between its snapshots names, in one entry, blocks in one chunk after the other. Once the snapshots are gone each of these
 * is its own alone, for a few blocks. All their blocks go into one fresh chunk, as if the layer had written them anew: fewer chunks
 * are allocated, and no more bytes. What others share with it stays where it is: taking that along would cost as much as it frees.
 *
 * Only in leaves that one layer alone has, under its lock.
 */
#include "checksum.h"
#include "io.h"
#include "redo.h"

#define LEAVES_PER_CALL 64u
#define MERGES_PER_CALL 16u

struct merge {
  struct node *leaf; /* pinned by its slot */
  uint64_t index;    /* of the entry's chunk in the layer */
  uint64_t chunk;    /* where the blocks go */
  bool *taken;       /* by block */
};

/* The blocks that lie in chunks which only this entry names. Returns how many chunks these are, or an error. */
static int take_blocks(struct tp_pool *pool, uint64_t entry, bool *taken) {
  uint64_t chunks[pool->blocks], count;
  unsigned named = entry_chunks(pool, entry, chunks);
  int own = 0;
  memset(taken, 0, pool->blocks * sizeof *taken);
  for (unsigned k = 0; k < named; k++) {
    int rc = load_count(pool, TP_CHUNK_PAGE, chunks[k], &count);
    if (rc != TP_OK) return rc;
    if (count > 1) continue;
    own++;
    for (unsigned b = 0; b < pool->blocks; b++) taken[b] |= split_chunk_at(entry, b) == chunks[k] + 1;
  }
  return own;
}

/* From `first` on: a run of taken blocks in one chunk, or of blocks that are not taken. */
static unsigned run_end(const struct tp_pool *pool, const struct merge *m, uint64_t entry, unsigned first) {
  unsigned end = first + 1;
  while (end < pool->blocks && m->taken[end] == m->taken[first] && (!m->taken[first] || split_chunk_at(entry, end) == split_chunk_at(entry, first))) end++;
  return end;
}

/* Returns 1 if all are copied, 0 where some cannot be read or do not match their chunk's checksum. */
static int copy_blocks(struct tp_pool *pool, const struct merge *m, uint64_t entry, uint8_t *buffer) {
  for (unsigned first = 0, end; first < pool->blocks; first = end) {
    end = run_end(pool, m, entry, first);
    if (!m->taken[first]) continue;
    uint64_t at = (uint64_t)first * TP_BLOCK, length = (uint64_t)(end - first) * TP_BLOCK;
    uint64_t chunk = split_chunk_at(entry, first) - 1;
    int whole = checksum_verify(pool, chunk, buffer);
    if (whole < 0 || (whole == 0 && disk_read(pool, buffer + at, length, (chunk << pool->chunk_shift) + at) != TP_OK)) return 0;
    int rc = disk_write(pool, buffer + at, length, (m->chunk << pool->chunk_shift) + at);
    if (rc != TP_OK) return rc;
  }
  return 1;
}

static uint64_t merged_entry(const struct tp_pool *pool, const struct merge *m, uint64_t entry) {
  struct split *split = tp_alloc(sizeof *split + pool->blocks * sizeof(uint64_t));
  bool whole = true;
  split->own = m->chunk + 1;
  for (unsigned b = 0; b < pool->blocks; b++) {
    split->block[b] = m->taken[b] ? split->own : split_chunk_at(entry, b);
    if (split->block[b] != split->own) whole = false;
  }
  if (!whole) return split_entry(split);
  free(split);
  return m->chunk + 1;
}

/* Mutex held. Until here the entry is what it was, but for where its chunks lie (compact.c). */
static int name_merged(tp_layer *layer, const struct merge *m) {
  struct tp_pool *pool = layer->pool;
  uint64_t entry = m->leaf->entry[m->index % FANOUT];
  int rc = pool_check_change(pool);
  if (rc == TP_OK) rc = entry_load_counts(pool, entry);
  if (rc != TP_OK) return rc;
  space_map(pool, m->chunk);
  for (unsigned first = 0, end; first < pool->blocks; first = end) {
    end = run_end(pool, m, entry, first);
    if (m->taken[first] && layer->state == LAYER_WRITABLE) redo_note(layer, REDO_CHUNKS, m->index * pool->blocks + first, end - first, m->chunk);
  }
  replace_entry(layer, m->leaf, m->index % FANOUT, merged_entry(pool, m, entry));
  return TP_OK;
}

/* Mutex held on entry and return. Returns 1 if the entry was merged; TP_NEED_WINDOW goes to *starved. */
static int merge_entry(tp_layer *layer, struct merge *m, uint8_t *buffer, bool *starved) {
  struct tp_pool *pool = layer->pool;
  uint64_t entry = m->leaf->entry[m->index % FANOUT];
  bool dirty;
  int rc = entry_is_split(entry) ? take_blocks(pool, entry, m->taken) : 0;
  if (rc < 2) return rc < 0 ? rc : 0;
  if ((rc = space_take(pool, layer->next_chunk, &m->chunk, &dirty)) != TP_OK) {
    *starved = rc == TP_NEED_WINDOW;
    return *starved ? 0 : rc;
  }
  layer->next_chunk = m->chunk + 1;
  pthread_mutex_unlock(&pool->mutex);
  int copied = copy_blocks(pool, m, entry, buffer);
  pthread_mutex_lock(&pool->mutex);
  rc = copied == 1 ? name_merged(layer, m) : copied;
  if (copied != 1 || rc != TP_OK) space_untake(pool, m->chunk);
  return rc == TP_OK ? copied : rc;
}

/* Mutex held. Returns how many entries of the leaf were merged, or an error. */
static int merge_leaf(tp_layer *layer, uint64_t leaf_index, struct merge *m, uint8_t *buffer, bool *starved) {
  bool mine;
  int merged = 0, rc = map_find_own(layer, leaf_index, &m->leaf);
  if (rc == TP_OK && m->leaf != NULL) rc = map_own_leaf(layer, leaf_index, &m->leaf, &mine);
  for (unsigned i = 0; rc >= 0 && m->leaf != NULL && i < FANOUT && !*starved; i++) {
    m->index = leaf_index * FANOUT + i;
    rc = merge_entry(layer, m, buffer, starved);
    if (rc > 0) merged += rc;
  }
  return rc < 0 ? rc : merged;
}

/* Lock held exclusively, mutex held. Returns 1 if there is more to do. */
static int merge_some(tp_layer *layer, uint64_t *cursor, uint64_t *merged, bool *starved) {
  struct tp_pool *pool = layer->pool;
  bool taken[TP_BLOCKS_MAX];
  struct merge m = {.taken = taken};
  uint8_t *buffer = tp_alloc(chunk_size(pool));
  unsigned budget = MERGES_PER_CALL;
  int rc = 1;
  for (unsigned n = 0; rc > 0 && n < LEAVES_PER_CALL && budget > 0 && !pool_is_overdue(pool) && !*starved; n++) {
    uint64_t leaf_index;
    rc = map_next_leaf(layer, *cursor, &leaf_index);
    if (rc != TP_OK || leaf_index == UINT64_MAX) break;
    rc = merge_leaf(layer, leaf_index, &m, buffer, starved);
    if (rc < 0) break;
    budget -= (unsigned)min_u64((uint64_t)rc, budget);
    *merged += (uint64_t)rc;
    *cursor = *starved ? leaf_index : leaf_index + 1;
    rc = 1;
  }
  free(buffer);
  return rc;
}

int tp_layer_merge(tp_layer *layer, uint64_t *cursor, uint64_t *merged) {
  tp_pool *pool = layer->pool;
  bool starved = false, overdue = false;
  pthread_rwlock_wrlock(&layer->lock);
  int rc = layer_check(layer, false);
  if (rc == TP_OK) {
    pthread_mutex_lock(&pool->mutex);
    rc = pool_check_change(pool);
    if (rc == TP_OK) rc = merge_some(layer, cursor, merged, &starved);
    overdue = pool_is_overdue(pool);
    cache_trim(pool, layer);
    pthread_cond_signal(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
  }
  pthread_rwlock_unlock(&layer->lock);
  int next = TP_OK;
  if (rc == 1 && starved) next = pool->options.extend_window(pool->options.ctx);
  if (next == TP_ENOSPC) return 0; /* without a free chunk nothing can be merged */
  if (rc == 1 && next == TP_OK && overdue) next = tp_flush(pool);
  return next == TP_OK ? rc : next;
}
