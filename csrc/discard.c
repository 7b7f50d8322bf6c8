/* discard.c - blocks become holes: whole leaves are cut off, whole blocks unmapped and punched, ragged ends zeroed. */
#include "io.h"
#include "redo.h"

int discard_blocks(tp_layer *layer, uint64_t index, unsigned first, unsigned end, uint64_t *freed) {
  struct tp_pool *pool = layer->pool;
  unsigned i = index % FANOUT;
  struct node *leaf;
  bool mine;
  int rc = map_own_leaf(layer, index / FANOUT, &leaf, &mine);
  if (rc != TP_OK) return rc;
  uint64_t entry = leaf->entry[i];
  if ((rc = entry_load_counts(pool, entry)) != TP_OK) return rc;
  struct split *split = tp_alloc(sizeof *split + pool->blocks * sizeof(uint64_t));
  uint64_t own = entry_is_split(entry) ? entry_split(entry)->own : entry;
  bool ours = mine && own != 0 && count_is_mine(pool, TP_CHUNK_PAGE, own - 1);
  bool empty = true, own_named = false;
  unsigned own_dropped = 0;
  for (unsigned b = 0; b < pool->blocks; b++) {
    bool dropped = b >= first && b < end;
    if (dropped && split_chunk_at(entry, b) == own) own_dropped++;
    split->block[b] = dropped ? 0 : split_chunk_at(entry, b);
    if (split->block[b] == 0) continue;
    empty = false;
    if (split->block[b] == own) own_named = true;
  }
  split->own = own_named ? own : 0;
  if (empty) free(split);
  *freed += (uint64_t)replace_entry(layer, leaf, i, empty ? 0 : split_entry(split)) << pool->chunk_shift;
  redo_note(layer, REDO_HOLE, index * pool->blocks + first, end - first, 0);
  if (!ours || !own_named) return TP_OK;
  bit_set(leaf->mine, i);
  pthread_mutex_unlock(&pool->mutex);
  /* Only a saving: the blocks are unmapped, and are written whole before they are mapped again. */
  uint64_t at = ((own - 1) << pool->chunk_shift) + (uint64_t)first * TP_BLOCK;
  uint64_t length = (uint64_t)(end - first) * TP_BLOCK;
  if (pool->disk.punch(pool->disk.ctx, at, length) >= 0) {
    pool->metrics.punched_bytes += length;
    *freed += (uint64_t)own_dropped * TP_BLOCK;
  }
  pool_mark_unsynced(pool);
  pthread_mutex_lock(&pool->mutex);
  return TP_OK;
}

/* The part of [offset, end) that lies in one leaf that is mapped. Lock held exclusively, mutex held. */
static int discard_in_leaf(tp_layer *layer, uint64_t offset, uint64_t end) {
  struct tp_pool *pool = layer->pool;
  uint64_t span = chunk_size(pool), ignored = 0;
  while (offset < end) {
    uint64_t index = offset / span, next = min_u64(end, (index + 1) * span);
    struct node *leaf;
    int rc = map_find(layer, index / FANOUT, &leaf);
    if (rc == TP_OK && leaf != NULL && leaf->entry[index % FANOUT] != 0) {
      unsigned last = (unsigned)((next - index * span + TP_BLOCK - 1) / TP_BLOCK);
      if (next == layer->size) last = pool->blocks;
      rc = discard_blocks(layer, index, (unsigned)(offset % span / TP_BLOCK), last, &ignored);
    }
    if (rc != TP_OK) return rc;
    offset = next;
  }
  return TP_OK;
}

/* Moves *offset over one leaf, or to the next leaf that is mapped. */
static int discard_step(tp_layer *layer, uint64_t *offset, uint64_t end) {
  struct tp_pool *pool = layer->pool;
  uint64_t span = FANOUT * chunk_size(pool), here = *offset / span, next_leaf;
  int rc = map_next_leaf(layer, here, &next_leaf);
  if (rc != TP_OK) return rc;
  if (next_leaf > here) {
    *offset = next_leaf >= (end + span - 1) / span ? end : next_leaf * span;
    return TP_OK;
  }
  uint64_t leaf_end = min_u64(end, (here + 1) * span);
  bool whole = *offset == here * span && (leaf_end == (here + 1) * span || leaf_end == layer->size);
  rc = whole ? map_cut_leaf(layer, here) : discard_in_leaf(layer, *offset, leaf_end);
  uint64_t leaf_blocks = (uint64_t)FANOUT * pool->blocks;
  if (whole && rc == TP_OK) redo_note(layer, REDO_HOLE, here * leaf_blocks, leaf_blocks, 0);
  if (rc == TP_OK) *offset = leaf_end;
  return rc;
}

/* A ragged end, within one block: zeros, unless it reads as zeros already. */
static int zero_within_block(tp_layer *layer, uint64_t offset, uint64_t length) {
  static const uint8_t zeros[TP_BLOCK];
  if (length == 0) return TP_OK;
  int equal = tp_equal(layer, zeros, length, offset);
  if (equal != 0) return equal < 0 ? equal : TP_OK;
  return layer_write(layer, zeros, length, offset);
}

/* Whole blocks, a leaf at a time, as long as the layer has that size. Returns 1 if it was resized meanwhile, with *first moved
 * to where to go on: where the last block ends is another question then. */
static int discard_whole(tp_layer *layer, uint64_t *first, uint64_t last, uint64_t size) {
  struct io io;
  int rc = TP_OK;
  while (rc == TP_OK && *first < last) {
    bool overdue = false;
    rc = io_begin(&io, layer, 0, 0, true);
    if (rc == TP_OK) rc = io_upgrade(&io, 0, 0, true);
    if (rc == TP_OK && layer->size != size) rc = 1;
    if (rc == TP_OK) {
      pthread_mutex_lock(&layer->pool->mutex);
      rc = discard_step(layer, first, last);
      cache_trim(layer->pool, layer);
      overdue = pool_is_overdue(layer->pool);
      pthread_cond_signal(&layer->pool->work);
      pthread_mutex_unlock(&layer->pool->mutex);
    }
    io_end(&io);
    if (rc == TP_OK && overdue) rc = tp_flush(layer->pool);
  }
  return rc;
}

static uint64_t block_up(uint64_t offset) { return (offset + TP_BLOCK - 1) / TP_BLOCK * TP_BLOCK; }

int discard_beyond(tp_layer *layer, uint64_t size, uint64_t old_size) {
  uint64_t first = block_up(size);
  int rc = discard_whole(layer, &first, block_up(old_size), size);
  return rc == 1 ? TP_OK : rc; /* a reset gave it another size: with another content, of which nothing is to be cut */
}

int layer_discard(tp_layer *layer, uint64_t offset, uint64_t length) {
  struct io io;
  int rc = io_begin(&io, layer, offset, length, true);
  uint64_t size = layer->size;
  io_end(&io);
  if (rc != TP_OK || length == 0) return rc;
  uint64_t end = offset + length, first = block_up(offset);
  uint64_t last = end == size ? end : end / TP_BLOCK * TP_BLOCK; /* behind the size there is nothing to keep */
  if (first >= last) {
    rc = zero_within_block(layer, offset, min_u64(end, first) - offset);
    return rc == TP_OK && end > first ? zero_within_block(layer, first, end - first) : rc;
  }
  rc = zero_within_block(layer, offset, first - offset);
  if (rc == TP_OK) rc = zero_within_block(layer, last, end - last);
  if (rc == TP_OK) rc = discard_whole(layer, &first, last, size);
  if (rc == 1) return layer_discard(layer, first, end - first);
  return rc == TP_OK ? rc : tp_error_where(rc, layer->rec.key, first, last - first);
}

int tp_discard(tp_layer *layer, uint64_t offset, uint64_t length) {
  struct probe probe = metrics_begin(&layer->metrics, TP_DISCARD, length);
  int rc = layer_discard(layer, offset, length);
  metrics_end(&probe, length, rc);
  return rc;
}
