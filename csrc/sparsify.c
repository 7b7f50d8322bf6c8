/* sparsify.c - what reads as zeros becomes a hole: compare and discard, a chunk at a time.
 *
 * Each chunk is looked at with the layer's lock held shared, so that nobody waits while one without zeros is read; where there are
 * some it is looked at once more with the lock held exclusively, for a write may have come in between. A whole entry
 * goes whole or not at all: a split in its place would cost more than a few zeros do. No byte that anybody reads changes.
 */
#include "io.h"

struct zeros { /* of one chunk */
  uint64_t zero[TP_BLOCKS_MAX / 64];   /* blocks that read as zeros, holes too */
  uint64_t mapped[TP_BLOCKS_MAX / 64]; /* those of them that are mapped */
  uint64_t bytes;                      /* in these */
};

/* Lock held, shared or exclusively. */
static int find_zeros(struct io *io, uint64_t index, uint8_t *buf, struct zeros *found) {
  const struct tp_pool *pool = io->layer->pool;
  struct node *leaf;
  *found = (struct zeros){0};
  int rc = io_find_leaf(io, index, 0, 0, true, &leaf);
  uint64_t offset = index << pool->chunk_shift, size = io->layer->size;
  uint64_t entry = rc != TP_OK || leaf == NULL ? 0 : entry_read(&leaf->entry[index % FANOUT]);
  if (rc != TP_OK || entry == 0 || offset >= size) return rc;
  uint64_t length = min_u64(chunk_size(pool), size - offset);
  if ((rc = io_read(io, buf, length, offset)) != TP_OK) return rc;
  for (unsigned b = 0; b < pool->blocks; b++) {
    uint64_t at = (uint64_t)b * TP_BLOCK, visible = at < length ? min_u64(TP_BLOCK, length - at) : 0;
    bool zero = tp_is_zero(buf + at, visible);
    if (!zero && !entry_is_split(entry)) {
      *found = (struct zeros){0};
      return TP_OK;
    }
    if (!zero) continue;
    bit_set(found->zero, b);
    if (split_chunk_at(entry, b) == 0) continue;
    bit_set(found->mapped, b);
    found->bytes += visible;
  }
  return TP_OK;
}

/* Lock held exclusively since they were found. */
static int drop_zeros(tp_layer *layer, uint64_t index, const struct zeros *found, uint64_t *freed) {
  struct tp_pool *pool = layer->pool;
  int rc = TP_OK;
  for (unsigned b = 0, end; b < pool->blocks && rc == TP_OK; b = end + 1) {
    bool some = false;
    for (end = b; end < pool->blocks && bit_get(found->zero, end); end++) some = some || bit_get(found->mapped, end);
    if (some) rc = discard_blocks(layer, index, b, end, freed);
  }
  const struct slot *slot = layer_slot(layer, index / FANOUT);
  return rc == TP_OK && node_is_empty(slot->leaf) ? map_cut_leaf(layer, index / FANOUT) : rc;
}

/* Moves *index to the next chunk that is mapped, if there is one in this leaf or the next, else to where to go on. Lock and mutex held. */
static int next_mapped(tp_layer *layer, uint64_t *index) {
  uint64_t leaf_index;
  struct node *leaf;
  int rc = map_next_leaf(layer, *index / FANOUT, &leaf_index);
  if (rc != TP_OK || leaf_index == UINT64_MAX) {
    *index = UINT64_MAX;
    return rc;
  }
  *index = max_u64(*index, leaf_index * FANOUT);
  rc = map_find(layer, leaf_index, &leaf);
  while (rc == TP_OK && *index < (leaf_index + 1) * FANOUT && leaf->entry[*index % FANOUT] == 0) ++*index;
  return rc;
}

/* One chunk from the cursor on. Returns 1 if there may be more. */
static int sparsify_next(tp_layer *layer, tp_sparsified *done, uint8_t *buf) {
  struct tp_pool *pool = layer->pool;
  uint64_t index = done->cursor >> pool->chunk_shift;
  struct zeros found = {0};
  struct io io;
  bool overdue = false;
  int rc = io_begin(&io, layer, 0, 0, true);
  if (rc != TP_OK) {
    io_end(&io);
    return rc;
  }
  pthread_mutex_lock(&pool->mutex);
  rc = next_mapped(layer, &index);
  cache_trim(pool, NULL);
  pthread_mutex_unlock(&pool->mutex);
  uint64_t end = (layer->size + chunk_size(pool) - 1) >> pool->chunk_shift;
  if (rc == TP_OK && index < end) rc = find_zeros(&io, index, buf, &found);
  if (rc == TP_OK && found.bytes > 0 && !io.exclusive) {
    rc = io_upgrade(&io, 0, 0, true);
    if (rc == TP_OK) rc = find_zeros(&io, index, buf, &found);
  }
  if (rc == TP_OK && found.bytes > 0) {
    pthread_mutex_lock(&pool->mutex);
    rc = drop_zeros(layer, index, &found, &done->freed);
    cache_trim(pool, layer);
    overdue = pool_is_overdue(pool);
    pthread_cond_signal(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
  }
  io_end(&io);
  if (rc != TP_OK) return tp_error_where(rc, layer->rec.key, min_u64(index, end) << pool->chunk_shift, chunk_size(pool));
  done->zeros += found.bytes;
  done->cursor = (index < end ? index + 1 : end) << pool->chunk_shift;
  if (overdue) rc = tp_flush(pool);
  return rc == TP_OK ? index < end : rc;
}

int tp_sparsify(tp_layer *layer, tp_sparsified *done, uint64_t chunks) {
  uint8_t *buf = aligned_alloc(TP_BLOCK, chunk_size(layer->pool));
  int rc = buf == NULL ? tp_error_set(TP_ENOMEM) : 1;
  while (rc == 1 && chunks-- > 0) rc = sparsify_next(layer, done, buf);
  free(buf);
  return rc;
}
