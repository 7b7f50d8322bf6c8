/* redo.c - noting map changes in a memory file, and doing them again after the process that made them was killed.
 *
 * The file: a page with two heads, then two halves of notes. A transaction's notes are in the half of its parity, for at most one
 * is frozen besides the open one. A kill may come between any two instructions: a note counts once `used` covers it.
 */
#include "redo.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define HEAD_BYTES 4096u
#define HALF_BYTES ((uint64_t)16 << 20)
#define NEARLY_FULL (HALF_BYTES / 4 * 3)

struct head {
  _Atomic uint64_t txn;
  _Atomic uint64_t used; /* bytes */
  _Atomic uint64_t cut;  /* there was no room for all notes */
};
struct redo {
  struct head head[2];
  _Atomic uint64_t began; /* 0: a new file; 1: notes are being taken; 2: void, the pool went into error mode */
};
struct note {
  uint64_t kind, layer_id, block, count, chunk;
};

static struct note *notes(struct redo *redo, unsigned parity) {
  return (struct note *)((uint8_t *)redo + HEAD_BYTES + parity * HALF_BYTES);
}

/* --- noting --- */

void redo_note(tp_layer *layer, enum redo_kind kind, uint64_t block, uint64_t count, uint64_t chunk) {
  struct tp_pool *pool = layer->pool;
  if (!pool->noting) return;
  unsigned parity = pool->txn & 1;
  struct head *head = &pool->redo->head[parity];
  uint64_t used = head->used;
  /* Whoever changes maps without looking whether a commit is due fills it: what came until here still holds, and nothing after it. */
  if (used + sizeof(struct note) > HALF_BYTES) {
    head->cut = 1;
    return;
  }
  notes(pool->redo, parity)[used / sizeof(struct note)] = (struct note){kind, layer->rec.key, block, count, chunk};
  head->used = used + sizeof(struct note);
}

void redo_freeze(struct tp_pool *pool) {
  if (!pool->noting) return;
  struct head *head = &pool->redo->head[pool->txn & 1];
  head->used = 0;
  head->cut = 0;
  head->txn = pool->txn;
}

void redo_release(struct tp_pool *pool, uint64_t txn) {
  if (pool->noting) pool->redo->head[txn & 1].used = 0;
}

bool redo_is_full(const struct tp_pool *pool) {
  return pool->noting && pool->redo->head[pool->txn & 1].used > NEARLY_FULL;
}

void redo_fail(struct tp_pool *pool) {
  if (pool->redo != NULL) pool->redo->began = 2;
}

void redo_close(struct tp_pool *pool) {
  if (pool->redo == NULL) return;
  pool->noting = false;
  munmap(pool->redo, HEAD_BYTES + 2 * HALF_BYTES);
  pool->redo = NULL;
}

/* --- doing them again --- */

struct again {
  struct tp_pool *pool;
  uint64_t *stopped; /* layer ids */
  size_t stopped_count;
  uint64_t done;
};

static bool is_stopped(const struct again *again, uint64_t layer_id) {
  for (size_t k = 0; k < again->stopped_count; k++) {
    if (again->stopped[k] == layer_id) return true;
  }
  return false;
}

static void stop(struct again *again, uint64_t layer_id) {
  again->stopped = tp_realloc(again->stopped, (again->stopped_count + 1) * sizeof(uint64_t));
  again->stopped[again->stopped_count++] = layer_id;
}

/* The entry in which blocks [first, end) are `value` (a chunk + 1, or 0), and the others what they were. */
static uint64_t changed_entry(const struct tp_pool *pool, uint64_t entry, unsigned first, unsigned end, uint64_t value, uint64_t own) {
  struct split *split = tp_alloc(sizeof *split + pool->blocks * sizeof(uint64_t));
  bool same = true, own_named = false;
  for (unsigned b = 0; b < pool->blocks; b++) {
    split->block[b] = b >= first && b < end ? value : split_chunk_at(entry, b);
    if (split->block[b] != split->block[0]) same = false;
    if (split->block[b] == own) own_named = true;
  }
  split->own = own_named ? own : 0;
  uint64_t whole = split->block[0];
  if (!same || (whole != 0 && whole != own)) return split_entry(split);
  free(split);
  return whole;
}

/* Returns 1 where the note cannot be done. */
static int change_blocks(tp_layer *layer, uint64_t index, unsigned first, unsigned end, uint64_t value) {
  struct tp_pool *pool = layer->pool;
  struct node *leaf;
  bool mine;
  int rc = map_own_leaf(layer, index / FANOUT, &leaf, &mine);
  unsigned i = index % FANOUT;
  if (rc == TP_OK) rc = entry_load_counts(pool, leaf->entry[i]);
  if (rc != TP_OK) return rc;
  uint64_t entry = leaf->entry[i], own = entry_is_split(entry) ? entry_split(entry)->own : entry;
  if (value != 0 && value != own) {
    if (!space_take_exactly(pool, value - 1)) return 1;
    space_map(pool, value - 1);
    own = value;
  }
  replace_entry(layer, leaf, i, changed_entry(pool, entry, first, end, value, own));
  return TP_OK;
}

/* A note's blocks, the part that lies in one leaf: whole leaves of holes are cut. */
static int redo_blocks(tp_layer *layer, const struct note *note) {
  struct tp_pool *pool = layer->pool;
  uint64_t at = note->block, end = note->block + note->count, per_leaf = (uint64_t)FANOUT * pool->blocks;
  int rc = TP_OK;
  while (at < end && rc == TP_OK) {
    uint64_t index = at / pool->blocks, next = min_u64(end, (index + 1) * pool->blocks), base = index * pool->blocks;
    if (note->kind == REDO_HOLE && at % per_leaf == 0 && end - at >= per_leaf) {
      rc = map_cut_leaf(layer, index / FANOUT);
      next = at + per_leaf;
    } else {
      uint64_t chunk = note->chunk + index - note->block / pool->blocks;
      rc = change_blocks(layer, index, (unsigned)(at - base), (unsigned)(next - base), note->kind == REDO_HOLE ? 0 : chunk + 1);
    }
    at = next;
  }
  return rc;
}

static int redo_shared(tp_layer *layer, const struct note *note) {
  struct tp_pool *pool = layer->pool;
  uint64_t index = note->block / pool->blocks, count;
  struct node *leaf;
  bool mine;
  if (note->chunk / PAGE_VALUES >= pool->space.pages) return 1;
  int rc = load_count(pool, TP_CHUNK_PAGE, note->chunk, &count);
  if (rc == TP_OK && count == 0) return 1;
  if (rc == TP_OK) rc = map_own_leaf(layer, index / FANOUT, &leaf, &mine);
  if (rc == TP_OK) rc = entry_load_counts(pool, leaf->entry[index % FANOUT]);
  if (rc == TP_OK) rc = load_count(pool, TP_CHUNK_PAGE, note->chunk, &count);
  if (rc != TP_OK || leaf->entry[index % FANOUT] == note->chunk + 1) return rc;
  uint64_t old = leaf->entry[index % FANOUT];
  count_up(pool, TP_CHUNK_PAGE, note->chunk);
  map_set_entry(layer, leaf, index % FANOUT, note->chunk + 1);
  entry_release(pool, old);
  return TP_OK;
}

static int redo_size(tp_layer *layer, uint64_t size) {
  record_touch(layer->pool, &layer->rec);
  layer->size = size;
  layer->durable_size = min_u64(layer->durable_size, size);
  return TP_OK;
}

static int redo_on(tp_layer *layer, const struct note *note) {
  if (layer->state != LAYER_WRITABLE) return 1;
  switch (note->kind) {
    case REDO_CHUNKS:
    case REDO_HOLE: return redo_blocks(layer, note);
    case REDO_SHARED: return redo_shared(layer, note);
    case REDO_SIZE: return redo_size(layer, note->count);
    default: return 1;
  }
}

static int redo_one(struct again *again, const struct note *note) {
  tp_layer *layer;
  if (is_stopped(again, note->layer_id)) return TP_OK;
  int rc = tp_layer_get(again->pool, note->layer_id, &layer);
  if (rc == TP_ENOENT) { /* it was made after the commit */
    stop(again, note->layer_id);
    return TP_OK;
  }
  if (rc != TP_OK) return rc;
  pthread_rwlock_wrlock(&layer->lock);
  pthread_mutex_lock(&again->pool->mutex);
  rc = redo_on(layer, note);
  if (rc == TP_OK) again->done++;
  if (rc == 1) stop(again, note->layer_id);
  cache_trim(again->pool, layer);
  pthread_mutex_unlock(&again->pool->mutex);
  pthread_rwlock_unlock(&layer->lock);
  tp_layer_put(layer);
  return rc == 1 ? TP_OK : rc;
}

static int redo_half(struct again *again, unsigned parity) {
  struct redo *redo = again->pool->redo;
  uint64_t used = min_u64(redo->head[parity].used, HALF_BYTES);
  int rc = TP_OK;
  for (uint64_t k = 0; k < used / sizeof(struct note) && rc == TP_OK; k++) rc = redo_one(again, &notes(redo, parity)[k]);
  return rc;
}

int64_t tp_redo_open(tp_pool *pool, int fd) {
  struct stat found;
  uint64_t length = HEAD_BYTES + 2 * HALF_BYTES;
  if (pool->redo != NULL || pool->options.read_only || fstat(fd, &found) < 0) return tp_error_set(TP_EINVAL);
  if ((uint64_t)found.st_size < length && ftruncate(fd, (off_t)length) < 0) return tp_error_set(TP_ENOMEM);
  struct redo *redo = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (redo == MAP_FAILED) return tp_error_set(TP_ENOMEM);
  bool began = redo->began != 0;
  if (redo->began == 2) {
    munmap(redo, length);
    return tp_error_set(TP_EFAILED);
  }
  pool->redo = redo; /* nothing is noted of what is done again: until that is committed, the old notes stand */
  uint64_t last = pool->txn - 1; /* the last transaction that the store has */
  struct again again = {.pool = pool};
  int rc = TP_OK;
  unsigned older = redo->head[0].txn <= redo->head[1].txn ? 0 : 1;
  for (unsigned k = 0; k < 2 && began && rc == TP_OK; k++) {
    unsigned parity = older ^ k;
    if (redo->head[parity].txn <= last) continue;
    rc = redo_half(&again, parity);
    pool->txn = max_u64(redo->head[0].txn, redo->head[1].txn); /* what is stored says that all are done */
    if (redo->head[parity].cut) break;
  }
  free(again.stopped);
  if (rc != TP_OK) redo_close(pool);
  return rc == TP_OK ? (int64_t)again.done : rc;
}

int tp_redo_begin(tp_pool *pool) {
  pthread_mutex_lock(&pool->mutex);
  assert(pool->redo != NULL);
  pool->redo->head[0].used = pool->redo->head[1].used = 0;
  pool->noting = true;
  redo_freeze(pool);
  pool->redo->began = 1;
  pthread_mutex_unlock(&pool->mutex);
  return TP_OK;
}
