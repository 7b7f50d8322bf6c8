/* layer.c - layers as a whole: made, branched, sealed, resized, reset, deleted. Each is O(1) in what is mapped.
 *
 *                 tp_layer_seal
 *   WRITABLE ---------------------> SEALED
 *       |                              |
 *       +-------- tp_layer_delete -----+--> DELETED   (at once; its space comes back through tp_reclaim)
 *   any --- tp_pool_close --> CLOSED
 */
#include "io.h"
#include "redo.h"

#define SIZE_MAX_BYTES ((uint64_t)1 << 60)

/* --- handles --- */

static tp_layer *layer_alloc(tp_pool *pool, uint64_t id) {
  tp_layer *layer = tp_alloc_zero(sizeof *layer);
  layer->rec.kind = TP_MAP;
  layer->rec.key = id;
  layer->pool = pool;
  layer->epoch = ++pool->next_epoch;
  layer->quota_chunks = UINT64_MAX;
  pthread_rwlockattr_t attr;
  pthread_rwlockattr_init(&attr);
  /* Steady readers must not keep a snapshot waiting for ever. */
  pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
  pthread_rwlock_init(&layer->lock, &attr);
  pthread_rwlockattr_destroy(&attr);
  return layer;
}

void layer_free(tp_layer *layer) {
  assert(layer->rec.pins == 0);
  metrics_retire(&layer->pool->metrics, layer->metrics);
  metrics_free(layer->metrics);
  free(layer->slots);
  free(layer->limits);
  pthread_rwlock_destroy(&layer->lock);
  free(layer);
}

static tp_layer *handle(tp_layer *layer) {
  layer->rec.pins++;
  layer->pool->handles++;
  return layer;
}

void layer_drop_slots(tp_layer *layer) {
  for (unsigned k = 0; layer->slots != NULL && k < SLOT_COUNT; k++) {
    if (layer->slots[k].leaf != NULL) layer->slots[k].leaf->rec.pins--;
  }
  free(layer->slots);
  layer->slots = NULL;
}

void tp_layer_put(tp_layer *layer) {
  if (layer == NULL) return;
  tp_pool *pool = layer->pool;
  pthread_mutex_lock(&pool->mutex);
  if (--layer->rec.pins == 0) {
    if (!pool->closed) layer_drop_slots(layer);
    bool gone = pool->closed || (layer->rec.dead && !record_is_newer(&layer->rec));
    if (gone) layer_free(layer);
  }
  pool_unref(pool);
}

void layer_encode(tp_pool *pool, tp_layer *layer) {
  struct bytes *out = &pool->out;
  size_t begin = record_begin(out, TP_MAP, layer->rec.key, false);
  codec_put_varint(out, layer->root);
  codec_put_varint(out, layer->height);
  codec_put_varint(out, layer->size);
  layer->stored_size = layer->size;
  codec_put_varint(out, layer->mapped_refs);
  codec_put_varint(out, layer->state == LAYER_SEALED);
  record_end(out, begin);
}

/* Deleted, but the store does not know yet: its record there must not bring the layer back. */
static bool is_deleted(const tp_pool *pool, uint64_t id) {
  const struct record_list *lists[] = {&pool->dirty, &pool->frozen};
  for (int which = 0; which < 2; which++) {
    for (size_t k = 0; k < lists[which]->count; k++) {
      const struct record *r = lists[which]->items[k];
      if (r->kind == TP_MAP && r->key == id && r->dead) return true;
    }
  }
  return false;
}

static int layer_load(tp_pool *pool, uint64_t id, tp_layer **out) {
  *out = as_layer(cache_find(pool, TP_MAP, id));
  if (*out != NULL) return TP_OK;
  if (is_deleted(pool, id)) return tp_error_record(TP_ENOENT, TP_MAP, id);
  struct reader in;
  int rc = record_fetch(pool, TP_MAP, id, &in);
  if (rc == TP_ENOENT) return tp_error_record(TP_ENOENT, TP_MAP, id);
  if (rc != TP_OK) return rc;
  tp_layer *layer = layer_alloc(pool, id);
  layer->root = codec_get_varint(&in);
  uint64_t height = codec_get_varint(&in);
  layer->size = codec_get_varint(&in);
  layer->mapped_refs = codec_get_varint(&in);
  layer->state = codec_get_varint(&in) != 0 ? LAYER_SEALED : LAYER_WRITABLE;
  layer->height = (unsigned)height;
  if (in.bad || height > MAX_HEIGHT || layer->size > SIZE_MAX_BYTES || (height == 0) != (layer->root == 0)) {
    layer_free(layer);
    return tp_error_record(TP_ECORRUPT, TP_MAP, id);
  }
  layer->durable_size = layer->size;
  cache_insert(pool, &layer->rec);
  *out = layer;
  return TP_OK;
}

int tp_layer_get(tp_pool *pool, uint64_t id, tp_layer **out) {
  pthread_mutex_lock(&pool->mutex);
  int rc = pool->closed ? tp_error_set(TP_ECLOSED) : layer_load(pool, id, out);
  if (rc == TP_OK) handle(*out);
  pthread_mutex_unlock(&pool->mutex);
  return rc;
}

/* --- states --- */

int layer_check(const tp_layer *layer, bool writing) {
  switch (layer->state) {
    case LAYER_DELETED: return tp_error_set(TP_EDELETED);
    case LAYER_CLOSED: return tp_error_set(TP_ECLOSED);
    case LAYER_SEALED:
      if (writing) return tp_error_set(TP_ESEALED);
      break;
    case LAYER_WRITABLE: break;
  }
  if (writing && layer->pool->stopped) return tp_error_set(TP_ECLOSED);
  if (writing && layer->pool->options.read_only) return tp_error_set(TP_EREADONLY);
  if (writing && layer->pool->failed) return tp_error_set(TP_EFAILED);
  return TP_OK;
}

int pool_check_change(const tp_pool *pool) {
  if (pool->closed || pool->stopped) return tp_error_set(TP_ECLOSED);
  if (pool->options.read_only) return tp_error_set(TP_EREADONLY);
  if (pool->failed) return tp_error_set(TP_EFAILED);
  return TP_OK;
}

int tp_layer_create(tp_pool *pool, uint64_t id, uint64_t size, tp_layer **out) {
  if (size == 0 || size > SIZE_MAX_BYTES || id == 0) return tp_error_set(TP_EINVAL);
  pthread_mutex_lock(&pool->mutex);
  int rc = pool_check_change(pool);
  if (rc == TP_OK) {
    tp_layer *layer = layer_alloc(pool, id);
    layer->size = layer->durable_size = size;
    cache_insert(pool, &layer->rec);
    record_touch(pool, &layer->rec);
    *out = handle(layer);
  }
  pthread_mutex_unlock(&pool->mutex);
  return rc;
}

/* Whatever the layer has is shared from now on: what it knew to be its own, it must look up again. */
static void share(tp_pool *pool, tp_layer *layer) {
  if (layer->root != 0) count_up(pool, TP_NODE_PAGE, layer->root);
  layer->epoch = ++pool->next_epoch;
}

static int load_root_count(tp_layer *layer) {
  uint64_t ignored;
  return layer->root == 0 ? TP_OK : load_count(layer->pool, TP_NODE_PAGE, layer->root, &ignored);
}

int tp_layer_branch(tp_layer *source, uint64_t id, uint64_t size, int sealed, tp_layer **out) {
  tp_pool *pool = source->pool;
  pthread_rwlock_wrlock(&source->lock);
  int rc = layer_check(source, false);
  if (rc == TP_OK && (size < source->size || size > SIZE_MAX_BYTES || id == 0)) rc = tp_error_set(TP_EINVAL);
  pthread_mutex_lock(&pool->mutex);
  if (rc == TP_OK) rc = pool_check_change(pool);
  if (rc == TP_OK) rc = load_root_count(source);
  if (rc == TP_OK) {
    tp_layer *layer = layer_alloc(pool, id);
    layer->size = layer->durable_size = size;
    layer->state = sealed ? LAYER_SEALED : LAYER_WRITABLE;
    layer->root = source->root;
    layer->height = source->height;
    layer->mapped_refs = source->mapped_refs;
    share(pool, source);
    cache_insert(pool, &layer->rec);
    record_touch(pool, &layer->rec);
    *out = handle(layer);
  }
  cache_trim(pool, source);
  pthread_mutex_unlock(&pool->mutex);
  pthread_rwlock_unlock(&source->lock);
  return rc;
}

void layer_release(tp_layer *layer) {
  layer->durable_size = min_u64(layer->stored_size, layer->size);
  layer->tail_chunk = 0;
}

int tp_layer_seal(tp_layer *layer) {
  pthread_rwlock_wrlock(&layer->lock);
  int rc = layer_check(layer, true);
  if (rc == TP_OK) {
    pthread_mutex_lock(&layer->pool->mutex);
    record_touch(layer->pool, &layer->rec);
    layer->state = LAYER_SEALED;
    pthread_mutex_unlock(&layer->pool->mutex);
  }
  pthread_rwlock_unlock(&layer->lock);
  return rc;
}

static int set_size(tp_layer *layer, uint64_t size) {
  pthread_rwlock_wrlock(&layer->lock);
  int rc = layer_check(layer, true);
  if (rc == TP_OK) {
    pthread_mutex_lock(&layer->pool->mutex);
    record_touch(layer->pool, &layer->rec);
    layer->size = size;
    layer->durable_size = min_u64(layer->durable_size, size);
    redo_note(layer, REDO_SIZE, 0, size, 0);
    pthread_mutex_unlock(&layer->pool->mutex);
  }
  pthread_rwlock_unlock(&layer->lock);
  return rc;
}

/* What is cut off is zeroed and unmapped first, so that growing again shows zeros; and once more when nobody can write there
 * any longer. */
static int shrink(tp_layer *layer, uint64_t old, uint64_t size) {
  int rc = layer_discard(layer, size, old - size);
  if (rc == TP_OK) rc = set_size(layer, size);
  return rc == TP_OK ? discard_beyond(layer, size, old) : rc;
}

int tp_layer_resize(tp_layer *layer, uint64_t size) {
  if (size == 0 || size > SIZE_MAX_BYTES) return tp_error_set(TP_EINVAL);
  pthread_mutex_lock(&layer->pool->resizing);
  uint64_t old = tp_layer_size(layer);
  int rc = size < old ? shrink(layer, old, size) : set_size(layer, size);
  pthread_mutex_unlock(&layer->pool->resizing);
  return rc;
}

uint64_t tp_layer_size(tp_layer *layer) { return layer->size; }

/* Two layers at once, in the order of their addresses. */
static void lock_both(tp_layer *a, tp_layer *b) {
  pthread_rwlock_wrlock(a < b ? &a->lock : &b->lock);
  pthread_rwlock_wrlock(a < b ? &b->lock : &a->lock);
}

int tp_layer_reset(tp_layer *layer, tp_layer *source) {
  if (layer == source || layer->pool != source->pool) return tp_error_set(TP_EINVAL);
  tp_pool *pool = layer->pool;
  lock_both(layer, source);
  int rc = layer_check(layer, true);
  if (rc == TP_OK) rc = layer_check(source, false);
  pthread_mutex_lock(&pool->mutex);
  if (rc == TP_OK) rc = load_root_count(layer);
  if (rc == TP_OK) rc = load_root_count(source);
  if (rc == TP_OK) {
    layer_drop_slots(layer);
    record_touch(pool, &layer->rec);
    share(pool, source);
    if (layer->root != 0) node_drop(pool, layer->root);
    layer->root = source->root;
    layer->height = source->height;
    layer->mapped_refs = source->mapped_refs;
    layer->size = max_u64(layer->size, source->size);
    layer->epoch = ++pool->next_epoch;
    redo_note(layer, REDO_STOP, 0, 0, 0);
    pthread_cond_signal(&pool->work);
  }
  cache_trim(pool, layer);
  pthread_mutex_unlock(&pool->mutex);
  pthread_rwlock_unlock(&layer->lock);
  pthread_rwlock_unlock(&source->lock);
  return rc;
}

int tp_layer_delete(tp_layer *layer) {
  tp_pool *pool = layer->pool;
  pthread_rwlock_wrlock(&layer->lock);
  int rc = layer_check(layer, false);
  pthread_mutex_lock(&pool->mutex);
  if (rc == TP_OK) rc = pool_check_change(pool);
  if (rc == TP_OK) rc = load_root_count(layer);
  if (rc == TP_OK) {
    layer_drop_slots(layer);
    metrics_retire(&pool->metrics, layer->metrics);
    record_kill(pool, &layer->rec);
    layer->state = LAYER_DELETED;
    if (layer->root != 0) node_drop(pool, layer->root);
    pthread_cond_signal(&pool->work);
  }
  pthread_mutex_unlock(&pool->mutex);
  pthread_rwlock_unlock(&layer->lock);
  if (rc == TP_OK) limits_lift(layer);
  return rc;
}

int tp_layer_get_info(tp_layer *layer, tp_layer_info *out) {
  pthread_rwlock_rdlock(&layer->lock);
  int rc = layer_check(layer, false);
  if (rc == TP_OK) {
    pthread_mutex_lock(&layer->pool->mutex);
    *out = (tp_layer_info){.size = layer->size,
                           .mapped_refs = layer->mapped_refs,
                           .epoch = layer->epoch,
                           .sealed = layer->state == LAYER_SEALED};
    pthread_mutex_unlock(&layer->pool->mutex);
  }
  pthread_rwlock_unlock(&layer->lock);
  return rc;
}

/* No layer overwrites in place any more until it has looked at the counts again: chunks may be shared with others
 * from now on (tp_map_shared). Taking each lock exclusively drains what is on its way. All layers in memory are meant,
 * whether or not anybody has a handle: their leaves in the cache still say what they knew. One that is loaded later gets a
 * new epoch. */
int tp_revoke(tp_pool *pool) {
  pthread_mutex_lock(&pool->mutex);
  size_t count = 0;
  tp_layer **layers = tp_alloc((pool->cache.record_count + 1) * sizeof(tp_layer *));
  for (size_t i = 0; i < pool->cache.bucket_count; i++) {
    for (struct record *r = pool->cache.buckets[i]; r != NULL; r = r->hash_next) {
      if (r->kind == TP_MAP) layers[count++] = handle(as_layer(r));
    }
  }
  pthread_mutex_unlock(&pool->mutex);
  for (size_t k = 0; k < count; k++) {
    pthread_rwlock_wrlock(&layers[k]->lock);
    pthread_mutex_lock(&pool->mutex);
    layers[k]->epoch = ++pool->next_epoch;
    pthread_mutex_unlock(&pool->mutex);
    pthread_rwlock_unlock(&layers[k]->lock);
    tp_layer_put(layers[k]);
  }
  free(layers);
  return TP_OK;
}
