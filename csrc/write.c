/* write.c - writes that change a map: first writes, writes to what is shared, split entries.
 *
 * For one chunk's piece, with the layer's lock held exclusively:
 *   1. under the mutex: own the leaf, look at the entry, choose the target: the chunk in place if it is ours alone, the
 *      split's own chunk, or a fresh one;
 *   2. without the mutex: write the bytes to the target. No map names these blocks of it yet (or they are ours);
 *   3. under the mutex: let the entry name them.
 */
#include "checksum.h"
#include "io.h"
#include "redo.h"

struct target {
  struct node *leaf;
  unsigned i;          /* entry in the leaf */
  uint64_t entry;      /* as it is */
  uint64_t chunk;
  bool mine;           /* the path is ours alone */
  bool fresh, dirty;   /* taken from free space; holds old bytes */
  bool in_place;       /* the entry names chunk for these blocks already */
};

/* The piece writes the layer's last block, ragged, where its own chunk does not hold that now. A committed state may say that it does, with zeros
 * behind the end, and a block that is not named is written whole. */
static bool renames_end(const tp_layer *layer, uint64_t index, unsigned offset, unsigned length, uint64_t entry) {
  uint64_t end = layer->durable_size, first = index << layer->pool->chunk_shift;
  if (!entry_is_split(entry) || end % TP_BLOCK == 0 || index != end >> layer->pool->chunk_shift) return false;
  unsigned block = (unsigned)(end - first) / TP_BLOCK;
  const struct split *split = entry_split(entry);
  return block >= offset / TP_BLOCK && block <= (offset + length - 1) / TP_BLOCK && split->block[block] != split->own;
}

static int choose(tp_layer *layer, uint64_t index, unsigned offset, unsigned length, struct target *t) {
  struct tp_pool *pool = layer->pool;
  bool past_end = layer_is_past_end(layer, index, offset, length);
  t->i = index % FANOUT;
  int rc = map_own_leaf(layer, index / FANOUT, &t->leaf, &t->mine);
  if (rc != TP_OK) return rc;
  t->entry = t->leaf->entry[t->i];
  past_end = past_end || renames_end(layer, index, offset, length, t->entry);
  if ((rc = entry_load_counts(pool, t->entry)) != TP_OK) return rc;
  uint64_t own = entry_is_split(t->entry) ? entry_split(t->entry)->own : t->entry;
  if (own != 0 && t->mine && (!past_end || own == layer->tail_chunk)) {
    uint64_t ignored;
    if ((rc = load_count(pool, TP_CHUNK_PAGE, own - 1, &ignored)) != TP_OK) return rc;
    if (count_is_mine(pool, TP_CHUNK_PAGE, own - 1)) {
      bit_set(t->leaf->mine, t->i);
      t->chunk = own - 1;
      t->in_place = !entry_is_split(t->entry);
      return TP_OK;
    }
    checksums_give_up(layer, t->leaf, own - 1);
  }
  bool adds = t->entry == 0 || length < chunk_size(pool); /* what is written whole names one chunk less, or none more */
  if (adds && layer->mapped_refs >= layer->quota_chunks) return tp_error_set(TP_EQUOTA);
  rc = space_take(pool, layer->next_chunk, &t->chunk, &t->dirty);
  if (rc == TP_OK) {
    t->fresh = true;
    layer->next_chunk = t->chunk + 1;
    if (past_end) layer->tail_chunk = t->chunk + 1;
  }
  return rc;
}

/* A block that is written in part: what the map names there now, with the new bytes laid over it. If that is the target
 * already, only the new bytes: what is durable beside them must not be at stake again. */
static int write_merged(struct tp_pool *pool, const struct target *t, unsigned block, unsigned from, unsigned length,
                        const uint8_t *buf) {
  uint8_t bytes[TP_BLOCK] __attribute__((aligned(64))) = {0};
  uint64_t old = split_chunk_at(t->entry, block);
  uint64_t at = (uint64_t)block * TP_BLOCK;
  if (old == t->chunk + 1) return disk_write(pool, buf, length, (t->chunk << pool->chunk_shift) + at + from);
  int rc = old == 0 ? TP_OK : chunk_read(pool, old - 1, bytes, TP_BLOCK, at);
  if (rc != TP_OK) return rc;
  memcpy(bytes + from, buf, length);
  return disk_write(pool, bytes, TP_BLOCK, (t->chunk << pool->chunk_shift) + at);
}

/* Whole blocks directly, ragged ends merged: afterwards the target holds right all blocks that the piece touches. */
static int write_blocks(struct tp_pool *pool, const struct target *t, unsigned offset, unsigned length,
                        const uint8_t *buf) {
  unsigned head = offset % TP_BLOCK == 0 ? 0 : (unsigned)min_u64(length, TP_BLOCK - offset % TP_BLOCK);
  unsigned tail = (length - head) % TP_BLOCK, middle = length - head - tail;
  int rc = TP_OK;
  if (head > 0) rc = write_merged(pool, t, offset / TP_BLOCK, offset % TP_BLOCK, head, buf);
  if (rc == TP_OK && middle > 0) {
    rc = disk_write(pool, buf + head, middle, (t->chunk << pool->chunk_shift) + offset + head);
  }
  if (rc == TP_OK && tail > 0) {
    rc = write_merged(pool, t, (offset + head + middle) / TP_BLOCK, 0, tail, buf + head + middle);
  }
  return rc;
}

static int write_data(struct tp_pool *pool, const struct target *t, unsigned offset, unsigned length,
                      const uint8_t *buf) {
  uint64_t at = t->chunk << pool->chunk_shift;
  if (t->in_place) return disk_write(pool, buf, length, at + offset);
  if (t->entry != 0) return write_blocks(pool, t, offset, length, buf);
  unsigned end = offset + length;
  int rc = TP_OK;
  if (t->dirty && offset > 0) rc = disk_write_zeros(pool, offset, at);
  if (rc == TP_OK && t->dirty && end < chunk_size(pool)) rc = disk_write_zeros(pool, chunk_size(pool) - end, at + end);
  return rc == TP_OK ? disk_write(pool, buf, length, at + offset) : rc;
}

/* The entry that names target.chunk for blocks first..last, and for the others what the old one named. */
static uint64_t make_entry(struct tp_pool *pool, const struct target *t, unsigned first, unsigned last) {
  uint64_t own = t->chunk + 1;
  bool whole = t->entry == 0;
  if (!whole) {
    whole = true;
    for (unsigned b = 0; b < pool->blocks && whole; b++) {
      whole = (b >= first && b <= last) || split_chunk_at(t->entry, b) == own;
    }
  }
  if (whole) return own;
  struct split *split = tp_alloc(sizeof *split + pool->blocks * sizeof(uint64_t));
  split->own = own;
  for (unsigned b = 0; b < pool->blocks; b++) {
    split->block[b] = b >= first && b <= last ? own : split_chunk_at(t->entry, b);
  }
  return split_entry(split);
}

static bool names(const uint64_t *chunks, unsigned count, uint64_t chunk) {
  for (unsigned k = 0; k < count; k++) {
    if (chunks[k] == chunk) return true;
  }
  return false;
}

unsigned replace_entry(tp_layer *layer, struct node *leaf, unsigned i, uint64_t entry) {
  struct tp_pool *pool = layer->pool;
  uint64_t before[pool->blocks], after[pool->blocks], old = leaf->entry[i];
  unsigned freed = 0;
  unsigned before_count = entry_chunks(pool, old, before), after_count = entry_chunks(pool, entry, after);
  map_set_entry(layer, leaf, i, entry);
  for (unsigned k = 0; k < before_count; k++) {
    if (!names(after, after_count, before[k]) && count_down(pool, TP_CHUNK_PAGE, before[k]) == 0) freed++;
  }
  if (entry_is_split(old)) free(entry_split(old));
  return freed;
}

static int name_target(tp_layer *layer, uint64_t index, struct target *t, unsigned offset, unsigned length) {
  struct tp_pool *pool = layer->pool;
  t->entry = t->leaf->entry[t->i]; /* its chunks may have moved meanwhile (compact.c); never the target, which is ours alone */
  int rc = entry_load_counts(pool, t->entry); /* they may have been trimmed */
  if (rc != TP_OK) return rc;
  unsigned first = offset / TP_BLOCK, last = (offset + length - 1) / TP_BLOCK;
  if (t->fresh) {
    space_map(pool, t->chunk);
    pool->refused = false;
  }
  uint64_t entry = make_entry(pool, t, first, last);
  if (entry_is_split(entry) && t->fresh) pool->splits++;
  if (t->entry == 0) pool->first_writes++;
  bool whole = !entry_is_split(entry);
  uint64_t block = index * pool->blocks;
  redo_note(layer, REDO_CHUNKS, whole ? block : block + first, whole ? pool->blocks : last - first + 1, t->chunk);
  replace_entry(layer, t->leaf, t->i, entry);
  if (t->mine) bit_set(t->leaf->mine, t->i);
  return TP_OK;
}

int write_chunk(tp_layer *layer, uint64_t index, unsigned offset, unsigned length, const uint8_t *buf, bool *overdue) {
  struct tp_pool *pool = layer->pool;
  struct target t = {0};
  pthread_mutex_lock(&pool->mutex);
  int rc = choose(layer, index, offset, length, &t);
  pthread_mutex_unlock(&pool->mutex);
  if (rc != TP_OK) return rc;
  rc = write_data(pool, &t, offset, length, buf);
  if (t.in_place) {
    pool->in_place++;
    return rc;
  }
  pthread_mutex_lock(&pool->mutex);
  if (rc == TP_OK) rc = name_target(layer, index, &t, offset, length);
  if (rc != TP_OK && t.fresh) space_untake(pool, t.chunk);
  cache_trim(pool, layer);
  *overdue = pool_is_overdue(pool);
  pthread_mutex_unlock(&pool->mutex);
  return rc;
}

/* Holes in a row, in this layer's own leaf. */
static unsigned holes_at(const struct node *leaf, unsigned i, unsigned count) {
  unsigned n = 0;
  while (n < count && leaf->entry[i + n] == 0) n++;
  return n;
}

int write_run(tp_layer *layer, uint64_t index, unsigned count, const uint8_t *buf, unsigned *done, bool *overdue) {
  struct tp_pool *pool = layer->pool;
  struct node *leaf;
  bool mine, dirty;
  uint64_t first;
  unsigned i = index % FANOUT, n = 1;
  pthread_mutex_lock(&pool->mutex);
  int rc = map_own_leaf(layer, index / FANOUT, &leaf, &mine);
  if (rc == TP_OK && (count = holes_at(leaf, i, count)) == 0) {
    pthread_mutex_unlock(&pool->mutex); /* somebody was quicker: *done is 0, and the caller looks again */
    return TP_OK;
  }
  if (rc == TP_OK && layer->mapped_refs >= layer->quota_chunks) rc = tp_error_set(TP_EQUOTA);
  if (rc == TP_OK) count = (unsigned)min_u64(count, layer->quota_chunks - layer->mapped_refs);
  if (rc == TP_OK) rc = space_take(pool, layer->next_chunk, &first, &dirty);
  while (rc == TP_OK && n < count && space_take_exactly(pool, first + n)) n++;
  pthread_mutex_unlock(&pool->mutex);
  if (rc != TP_OK) return rc;
  rc = disk_write(pool, buf, (uint64_t)n << pool->chunk_shift, first << pool->chunk_shift);
  pthread_mutex_lock(&pool->mutex);
  for (unsigned k = 0; k < n; k++) {
    if (rc != TP_OK) {
      space_untake(pool, first + k);
      continue;
    }
    space_map(pool, first + k);
    map_set_entry(layer, leaf, i + k, first + k + 1);
    if (mine) bit_set(leaf->mine, i + k);
  }
  if (rc == TP_OK) {
    redo_note(layer, REDO_CHUNKS, index * pool->blocks, (uint64_t)n * pool->blocks, first);
    layer->next_chunk = first + n;
    pool->first_writes += n;
    pool->refused = false;
    *done = n;
  }
  cache_trim(pool, layer);
  *overdue = pool_is_overdue(pool);
  pthread_mutex_unlock(&pool->mutex);
  return rc;
}
