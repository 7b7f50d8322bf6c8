/* share.c - entries made without writing: chunks shared by content, and unwritten ones for tests and benchmarks.
 *
 * Sharing a chunk that some layer may be overwriting in place: first let the entry name it (its count goes up, so that
 * whoever looks at the counts from now on writes elsewhere), then revoke what layers know already (tp_revoke drains
 * what is under way), and only then compare. On a difference the importer writes its own bytes over the entry. Until
 * the comparison is done the importing layer is not to be read by anybody else.
 */
#include "io.h"
#include "redo.h"

int tp_map_shared(tp_layer *layer, uint64_t index, uint64_t chunk) {
  tp_pool *pool = layer->pool;
  struct io io;
  int rc = io_begin(&io, layer, index << pool->chunk_shift, 1, true);
  if (rc == TP_OK) rc = io_upgrade(&io, index << pool->chunk_shift, 1, true);
  if (rc == TP_OK) {
    pthread_mutex_lock(&pool->mutex);
    struct page *page;
    struct node *leaf;
    bool mine, known = chunk / PAGE_VALUES < pool->space.pages;
    if (known) rc = page_get(pool, TP_CHUNK_PAGE, chunk / PAGE_VALUES, &page);
    if (known && rc == TP_OK && page->value[chunk % PAGE_VALUES] >= CHUNK_ONE) {
      rc = map_own_leaf(layer, index / FANOUT, &leaf, &mine);
      unsigned i = index % FANOUT;
      if (rc == TP_OK) rc = entry_load_counts(pool, leaf->entry[i]);
      if (rc == TP_OK && leaf->entry[i] != chunk + 1) {
        count_up(pool, TP_CHUNK_PAGE, chunk);
        uint64_t old = leaf->entry[i];
        map_set_entry(layer, leaf, i, chunk + 1);
        entry_release(pool, old);
        redo_note(layer, REDO_SHARED, index * pool->blocks, pool->blocks, chunk);
      }
      if (rc == TP_OK) rc = 1;
    }
    cache_trim(pool, layer);
    pthread_mutex_unlock(&pool->mutex);
  }
  io_end(&io);
  return rc;
}

int64_t tp_chunk_at(tp_layer *layer, uint64_t index) {
  tp_pool *pool = layer->pool;
  struct node *leaf;
  int64_t chunk = -1;
  pthread_rwlock_rdlock(&layer->lock);
  pthread_mutex_lock(&pool->mutex);
  if (layer_check(layer, false) == TP_OK && map_find(layer, index / FANOUT, &leaf) == TP_OK && leaf != NULL) {
    uint64_t entry = leaf->entry[index % FANOUT];
    if (entry != 0 && !entry_is_split(entry)) chunk = (int64_t)(entry - 1);
  }
  pthread_mutex_unlock(&pool->mutex);
  pthread_rwlock_unlock(&layer->lock);
  return chunk;
}

/* One chunk without its data. Lock held exclusively. */
static int map_one(tp_layer *layer, uint64_t index, bool *overdue) {
  tp_pool *pool = layer->pool;
  struct node *leaf;
  bool mine, dirty;
  uint64_t chunk;
  int rc = map_own_leaf(layer, index / FANOUT, &leaf, &mine);
  if (rc == TP_OK) rc = entry_load_counts(pool, leaf->entry[index % FANOUT]);
  if (rc == TP_OK) rc = space_take(pool, layer->next_chunk, &chunk, &dirty);
  if (rc != TP_OK) return rc;
  layer->next_chunk = chunk + 1;
  space_map(pool, chunk);
  replace_entry(layer, leaf, index % FANOUT, chunk + 1);
  redo_note(layer, REDO_CHUNKS, index * pool->blocks, pool->blocks, chunk);
  *overdue = pool_is_overdue(pool);
  return TP_OK;
}

int tp_map_unwritten(tp_layer *layer, uint64_t index, uint64_t count) {
  tp_pool *pool = layer->pool;
  int attempt = 0;
  while (count > 0) {
    struct io io;
    bool overdue = false;
    int rc = io_begin(&io, layer, index << pool->chunk_shift, count << pool->chunk_shift, true);
    if (rc == TP_OK) rc = io_upgrade(&io, index << pool->chunk_shift, 1, true);
    pthread_mutex_lock(&pool->mutex);
    while (rc == TP_OK && count > 0 && !overdue) {
      rc = map_one(layer, index, &overdue);
      if (rc == TP_OK) index++, count--, attempt = 0;
    }
    cache_trim(pool, layer);
    pthread_mutex_unlock(&pool->mutex);
    io_end(&io);
    if (rc == TP_OK && overdue) rc = tp_flush(pool);
    if (rc == TP_NEED_WINDOW) rc = make_room(pool, rc, attempt++);
    if (rc != TP_OK) return rc;
  }
  return TP_OK;
}
