/* txn.c - transactions: freezing, encoding, releasing; flushes that share commits; making room.
 *
 *   open --tp_freeze--> frozen --tp_sync--> (data durable) --tp_encode, store--> (durable) --tp_release--> done
 *              |                                   |
 *              +-- the next one opens at once      +-- any failure: tp_fail, error mode for good
 *
 * At most one transaction is frozen at a time. Its number's parity names what belongs to it.
 */
#include "io.h"
#include "redo.h"

#define ENCODE_BATCH 256u /* records encoded per hold of the mutex */

/* The pool's counters, as they are at the freeze: they belong to exactly that state. */
static void encode_state(tp_pool *pool) {
  struct bytes *out = &pool->out;
  size_t begin = record_begin(out, TP_STATE, 0, false);
  codec_put_varint(out, pool->next_node);
  codec_put_varint(out, pool->space.pages);
  codec_put_varint(out, pool->space.allocated);
  codec_put_varint(out, pool->space.dirty);
  codec_put_varint(out, pool->txn - 1); /* the frozen transaction */
  record_end(out, begin);
  if (!pool->reclaim.changed) return;
  begin = record_begin(out, TP_STATE, 1, pool->reclaim.count == 0);
  pool->reclaim.changed = false;
  if (pool->reclaim.count == 0) return;
  codec_put_varint(out, pool->reclaim.count);
  for (size_t k = 0; k < pool->reclaim.count; k++) codec_put_varint(out, pool->reclaim.ids[k]);
  record_end(out, begin);
}

int tp_freeze(tp_pool *pool, uint64_t *txn) {
  metrics_phase(&pool->metrics, TP_PHASE_FREEZE);
  pthread_mutex_lock(&pool->mutex);
  int rc = pool->failed ? tp_error_set(TP_EFAILED) : pool->closed ? tp_error_set(TP_ECLOSED) : TP_OK;
  assert(rc != TP_OK || !pool->freezing);
  if (rc == TP_OK) {
    *txn = pool->txn++;
    redo_freeze(pool);
    pool->freezing = true;
    rc = pool_is_dirty(pool);
    struct record_list empty = pool->frozen; /* keeps its memory */
    pool->frozen = pool->dirty;
    pool->dirty = empty;
    pool->dirty.count = 0;
    pool->encoded = 0;
    for (size_t k = 0; k < pool->frozen.count; k++) {
      struct record *record = pool->frozen.items[k];
      record->dirty = false;
      record->frozen = record->storing = true;
    }
    pool->space.freed_now = 0;
    pool->out.length = 0;
    if (rc) encode_state(pool);
    pool->state_dirty = false;
  }
  pthread_mutex_unlock(&pool->mutex);
  metrics_phase(&pool->metrics, TP_PHASE_SYNC);
  return rc;
}

int tp_encode(tp_pool *pool, const uint8_t **records, uint64_t *length) {
  pthread_mutex_lock(&pool->mutex);
  if (pool->metrics.began[TP_PHASE_STORE] == 0) metrics_phase(&pool->metrics, TP_PHASE_STORE);
  for (unsigned n = 0; n < ENCODE_BATCH && pool->encoded < pool->frozen.count;) {
    struct record *record = pool->frozen.items[pool->encoded++];
    if (!record->frozen) continue; /* changed since, and encoded then */
    record_encode(pool, record);
    record->frozen = false;
    n++;
  }
  struct bytes empty = pool->handed;
  pool->handed = pool->out;
  pool->out = empty;
  pool->out.length = 0;
  *records = pool->handed.data;
  *length = pool->handed.length;
  pthread_mutex_unlock(&pool->mutex);
  return TP_OK;
}

/* The host tells of a failure once: whoever waits here for a sync that fails must not try again, and find that all is well. */
int tp_sync(tp_pool *pool) {
  pthread_mutex_lock(&pool->syncing);
  int rc = pool->failed ? tp_error_set(TP_EFAILED) : pool->closed ? tp_error_set(TP_ECLOSED) : TP_OK;
  if (rc == TP_OK && atomic_exchange(&pool->unsynced, false)) {
    int result = pool->disk.sync(pool->disk.ctx);
    if (result < 0) {
      rc = tp_error_os(result);
      tp_fail(pool, rc);
    }
  }
  pthread_mutex_unlock(&pool->syncing);
  return rc;
}

static void release_record(struct record *record, unsigned parity) {
  assert(!record->frozen); /* the store has all of them */
  record->storing = false;
  if (record->kind == TP_CHUNK_PAGE || record->kind == TP_NODE_PAGE) page_release(as_page(record), parity);
  if (record->kind == TP_MAP && !record->dead) layer_release(as_layer(record));
  if (!record->dead || record->dirty) return;
  if (record->kind == TP_NODE) node_free(as_node(record));
  else if (record->kind == TP_MAP && record->pins == 0) layer_free(as_layer(record));
}

int tp_release(tp_pool *pool, uint64_t store_txn, uint64_t oldest_reader) {
  metrics_phase(&pool->metrics, TP_PHASE_RELEASE);
  pthread_mutex_lock(&pool->mutex);
  assert(pool->freezing && pool->encoded == pool->frozen.count);
  uint64_t txn = pool->txn - 1;
  for (size_t k = 0; k < pool->frozen.count; k++) release_record(pool->frozen.items[k], txn & 1);
  pool->frozen.count = 0;
  space_release(pool, txn & 1, store_txn, oldest_reader);
  space_cut_file(pool, txn, store_txn, oldest_reader);
  pool->durable_txn = txn;
  redo_release(pool, txn);
  pool->freezing = false;
  cache_trim(pool, NULL);
  pthread_cond_signal(&pool->work);
  pthread_mutex_unlock(&pool->mutex);
  metrics_committed(&pool->metrics);
  return TP_OK;
}

void tp_touch(tp_pool *pool) {
  pthread_mutex_lock(&pool->mutex);
  pool->state_dirty = true;
  pthread_mutex_unlock(&pool->mutex);
}

/* Mutex held. */
static void fail(tp_pool *pool, int error) {
  tp_error_info why;
  tp_last_error(&why);
  if (!pool->failed) {
    pool->failed_errno = why.code == error ? why.os_error : 0;
    pool->failed = error;
    redo_fail(pool);
  }
  pthread_cond_broadcast(&pool->committed);
  pthread_cond_signal(&pool->work);
}

void tp_fail(tp_pool *pool, int error) {
  pthread_mutex_lock(&pool->mutex);
  fail(pool, error);
  pthread_mutex_unlock(&pool->mutex);
}

int pool_damaged(tp_pool *pool, uint32_t kind, uint64_t key) {
  int rc = tp_error_record(TP_ECORRUPT, kind, key);
  fail(pool, rc);
  return rc;
}

/* --- flushes --- */

/* Waits until transaction `txn` is durable: by leading its commit, or by waiting for whoever does. Mutex held. */
static int await_durable(tp_pool *pool, uint64_t txn) {
  int rc = TP_OK;
  while (rc == TP_OK && pool->durable_txn < txn) {
    if (pool->failed) return tp_error_set(TP_EFAILED);
    if (pool->closed) return tp_error_set(TP_ECLOSED);
    if (pool->committing) {
      pthread_cond_wait(&pool->committed, &pool->mutex);
      continue;
    }
    pool->committing = true;
    pthread_mutex_unlock(&pool->mutex);
    rc = pool->options.commit(pool->options.ctx);
    pthread_mutex_lock(&pool->mutex);
    pool->committing = false;
    pthread_cond_broadcast(&pool->committed);
    if (rc != TP_OK) tp_error_set(rc);
  }
  return rc;
}

static int flush(tp_pool *pool) {
  pthread_mutex_lock(&pool->mutex);
  int rc = pool->failed ? tp_error_set(TP_EFAILED) : pool->closed ? tp_error_set(TP_ECLOSED) : TP_OK;
  bool open_is_dirty = pool_is_dirty(pool);
  bool sync_too = !open_is_dirty; /* a commit that begins from now on syncs the data itself */
  if (rc == TP_OK && open_is_dirty) rc = await_durable(pool, pool->txn);
  else if (rc == TP_OK && pool->freezing) rc = await_durable(pool, pool->txn - 1);
  pthread_mutex_unlock(&pool->mutex);
  if (rc != TP_OK || !sync_too || pool->options.read_only) return rc;
  rc = tp_sync(pool);
  /* The kernel may have dropped the pages: what was written since the last sync is in doubt, and asking again would
   * only hide it. */
  if (rc != TP_OK) tp_fail(pool, rc);
  return rc;
}

int tp_flush(tp_pool *pool) {
  uint64_t since = metrics_now();
  int rc = flush(pool);
  metrics_observe(&pool->metrics.flush, since);
  return rc;
}

/* --- reclaiming deleted maps, a bounded step at a time --- */

/* Walks one node of the queue: its children join the queue, its chunks lose a reference. Mutex held. Returns how many
 * entries that were, or an error, with the node back on the queue. */
static int64_t reclaim_node(tp_pool *pool) {
  uint64_t id = pool->reclaim.ids[pool->reclaim.count - 1], count;
  struct node *node;
  int rc = node_get(pool, id, &node);
  if (rc == TP_OK) rc = load_count(pool, TP_NODE_PAGE, id, &count);
  if (rc == TP_OK) rc = node_load_counts(pool, node);
  if (rc != TP_OK) return rc;
  if (count != 1 || node->rec.pins != 0) return pool_damaged(pool, TP_NODE_PAGE, id / PAGE_VALUES); /* I2: the queue's own reference; no layer looks at it any more */
  pool->reclaim.count--;
  pool->reclaim.changed = true;
  record_touch(pool, &node->rec); /* a frozen state may still have it: it is encoded before it is emptied */
  int64_t walked = 1;
  for (unsigned i = 0; i < FANOUT; i++) {
    uint64_t entry = node->entry[i];
    if (entry == 0) continue;
    if (node->level > 0) node_drop(pool, entry);
    else entry_release(pool, entry);
    node->entry[i] = 0;
    walked++;
  }
  count_down(pool, TP_NODE_PAGE, id);
  record_kill(pool, &node->rec);
  return walked;
}

int tp_reclaim(tp_pool *pool, uint64_t budget) {
  int64_t rc = TP_OK;
  pthread_mutex_lock(&pool->mutex);
  while (pool->reclaim.count > 0 && budget > 0 && !pool_is_overdue(pool)) {
    if (pool->failed || pool->closed) rc = tp_error_set(pool->failed ? TP_EFAILED : TP_ECLOSED);
    else rc = reclaim_node(pool);
    if (rc < 0) break;
    budget -= min_u64(budget, (uint64_t)rc);
    cache_trim(pool, NULL);
    pthread_mutex_unlock(&pool->mutex); /* whoever waits goes first */
    pthread_mutex_lock(&pool->mutex);
  }
  bool more = pool->reclaim.count > 0;
  pthread_mutex_unlock(&pool->mutex);
  return rc < 0 ? (int)rc : more;
}

/* --- making room --- */

#define ATTEMPTS_MAX 100

static int reclaim_all(tp_pool *pool) {
  int rc;
  do {
    rc = tp_reclaim(pool, 1 << 16);
    if (rc == 1) rc = tp_flush(pool) == TP_OK ? 1 : TP_EFAILED;
  } while (rc == 1);
  if (rc == TP_OK) rc = tp_flush(pool); /* what was freed may be reused now */
  while (rc == TP_OK && tp_punch(pool, UINT64_MAX) == 1) continue;
  return rc == TP_OK ? tp_flush(pool) : rc; /* nor is what is punched, before that is stored */
}

/* What a window offers others may take first, again and again; where there is more, that is no reason to give up. */
static bool may_try_again(tp_pool *pool, int reason, int attempt) {
  if (attempt <= 1) return true;
  if (reason != TP_NEED_WINDOW || attempt > ATTEMPTS_MAX) return false;
  const struct space *space = &pool->space;
  pthread_mutex_lock(&pool->mutex);
  bool is_room = space->capacity == 0 || space->allocated + space->taken + space->dirty < space->capacity;
  pthread_mutex_unlock(&pool->mutex);
  return is_room;
}

int make_room(tp_pool *pool, int reason, int attempt) {
  if (!may_try_again(pool, reason, attempt)) return reason == TP_NEED_WINDOW ? tp_error_set(TP_ENOSPC) : reason;
  bool refused = pool->refused;
  if (attempt == 1 || reason == TP_ENOSPC) {
    int rc = reclaim_all(pool);
    if (rc != TP_OK) return rc;
  }
  if (refused) pool->refused = true; /* what was punched may have been nothing: extend_window is to know */
  int rc = pool->options.extend_window(pool->options.ctx);
  return rc == TP_ENOSPC && attempt == 0 ? TP_OK : rc; /* the next attempt frees what it can first */
}
