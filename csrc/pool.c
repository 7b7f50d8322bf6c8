/* pool.c - opening and closing a pool, its figures, and waiting for background work. */
#define _GNU_SOURCE /* fallocate */
#include "pool.h"
#include "redo.h"

#include <errno.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

/* --- the plain data file --- */

static int64_t file_pread(void *ctx, void *buf, uint64_t length, uint64_t offset) {
  int fd = ((struct file_disk *)ctx)->fd;
  ssize_t n;
  do n = pread(fd, buf, length, (off_t)offset);
  while (n < 0 && errno == EINTR);
  return n < 0 ? -errno : n;
}

static int64_t file_pwrite(void *ctx, const void *buf, uint64_t length, uint64_t offset) {
  int fd = ((struct file_disk *)ctx)->fd;
  ssize_t n;
  do n = pwrite(fd, buf, length, (off_t)offset);
  while (n < 0 && errno == EINTR);
  return n < 0 ? -errno : n;
}

static int file_punch(void *ctx, uint64_t offset, uint64_t length) {
  int fd = ((struct file_disk *)ctx)->fd, rc;
  do rc = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length);
  while (rc < 0 && errno == EINTR);
  return rc < 0 ? -errno : 0;
}

/* A signal ended the wait, not the write-back: what went wrong with that is still to be told. */
static int file_sync(void *ctx) {
  int fd = ((struct file_disk *)ctx)->fd, rc;
  do rc = fdatasync(fd);
  while (rc < 0 && errno == EINTR);
  return rc < 0 ? -errno : 0;
}

static int64_t file_size(void *ctx) {
  off_t end = lseek(((struct file_disk *)ctx)->fd, 0, SEEK_END);
  return end < 0 ? -errno : end;
}

static int file_resize(void *ctx, uint64_t length) {
  int64_t now = file_size(ctx);
  if (now < 0 || (uint64_t)now >= length) return now < 0 ? (int)now : 0;
  int fd = ((struct file_disk *)ctx)->fd, rc;
  do rc = ftruncate(fd, (off_t)length);
  while (rc < 0 && errno == EINTR);
  return rc < 0 ? -errno : 0;
}

static int file_cut(void *ctx, uint64_t length) {
  int64_t now = file_size(ctx);
  if (now < 0 || (uint64_t)now <= length) return now < 0 ? (int)now : 0;
  int fd = ((struct file_disk *)ctx)->fd, rc;
  do rc = ftruncate(fd, (off_t)length);
  while (rc < 0 && errno == EINTR);
  return rc < 0 ? -errno : 0;
}

static const tp_disk file_disk = {NULL, file_pread, file_pwrite, file_punch, file_sync, file_resize, file_size, file_cut};

/* --- opening --- */

static bool valid(const tp_options *o) {
  uint64_t size = o->chunk_size;
  return size >= TP_BLOCK && size <= (4u << 20) && (size & (size - 1)) == 0 && o->fetch != NULL;
}

static int load_state(tp_pool *pool) {
  struct reader in;
  int rc = record_fetch(pool, TP_STATE, 0, &in);
  if (rc == TP_ENOENT) return TP_OK; /* a new pool */
  if (rc != TP_OK) return rc;
  pool->next_node = codec_get_varint(&in);
  pool->space.pages = codec_get_varint(&in);
  pool->space.allocated = codec_get_varint(&in);
  pool->space.dirty = codec_get_varint(&in);
  if (in.position < in.length) pool->txn = codec_get_varint(&in) + 1; /* earlier versions did not store it */
  if (in.bad) return tp_error_record(TP_ECORRUPT, TP_STATE, 0);
  pool->durable_txn = pool->txn - 1;
  int64_t size = pool->disk.size(pool->disk.ctx);
  if (size < 0) return tp_error_os(size);
  if ((uint64_t)size < pool->space.pages * PAGE_VALUES << pool->chunk_shift) return tp_error_set(TP_ECORRUPT);
  rc = record_fetch(pool, TP_STATE, 1, &in);
  if (rc != TP_OK) return rc == TP_ENOENT ? TP_OK : rc;
  uint64_t count = codec_get_varint(&in);
  if (count > in.length) in.bad = true;
  if (!in.bad) {
    pool->reclaim.ids = tp_alloc(count * sizeof *pool->reclaim.ids);
    pool->reclaim.capacity = count;
    while (pool->reclaim.count < count) pool->reclaim.ids[pool->reclaim.count++] = codec_get_varint(&in);
  }
  return in.bad ? tp_error_record(TP_ECORRUPT, TP_STATE, 1) : TP_OK;
}

static void destroy(tp_pool *pool) {
  free(pool->dirty.items);
  free(pool->frozen.items);
  free(pool->reclaim.ids);
  bytes_free(&pool->out);
  bytes_free(&pool->handed);
  bytes_free(&pool->fetched);
  pthread_cond_destroy(&pool->committed);
  pthread_cond_destroy(&pool->work);
  pthread_cond_destroy(&pool->room);
  pthread_mutex_destroy(&pool->mutex);
  pthread_mutex_destroy(&pool->resizing);
  pthread_mutex_destroy(&pool->compacting);
  pthread_mutex_destroy(&pool->syncing);
  pthread_mutex_destroy(&pool->limiting);
  pthread_cond_destroy(&pool->limits_changed);
  free(pool);
}

static void init_locks(tp_pool *pool) {
  pthread_mutexattr_t recursive;
  pthread_mutexattr_init(&recursive);
  pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
  pthread_mutex_init(&pool->mutex, &recursive);
  pthread_mutexattr_destroy(&recursive);
  pthread_mutex_init(&pool->resizing, NULL);
  pthread_mutex_init(&pool->compacting, NULL);
  pthread_mutex_init(&pool->syncing, NULL);
  pthread_mutex_init(&pool->limiting, NULL);
  pthread_cond_init(&pool->committed, NULL);
  pthread_condattr_t attr;
  pthread_condattr_init(&attr);
  pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
  pthread_cond_init(&pool->work, &attr);
  pthread_cond_init(&pool->room, &attr);
  pthread_cond_init(&pool->limits_changed, &attr);
  pthread_condattr_destroy(&attr);
}

int tp_pool_open(const tp_options *options, tp_pool **out) {
  if (!valid(options)) return tp_error_set(TP_EINVAL);
  tp_pool *pool = tp_alloc_zero(sizeof *pool);
  init_locks(pool);
  pool->options = *options;
  pool->file_disk.fd = options->data_fd;
  pool->disk = options->disk != NULL ? *options->disk : file_disk;
  if (options->disk == NULL) pool->disk.ctx = &pool->file_disk;
  pool->chunk_shift = (unsigned)__builtin_ctzll(options->chunk_size);
  pool->blocks = (unsigned)(options->chunk_size / TP_BLOCK);
  pool->space.capacity = options->capacity >> pool->chunk_shift;
  pool->cache.limit = options->cache_bytes ? options->cache_bytes : 64u << 20;
  pool->next_node = 1;
  pool->txn = 1;
  pool->handles = 1;
  pool->unsynced = true; /* by a process that was killed, say */
  pthread_mutex_lock(&pool->mutex);
  int rc = load_state(pool);
  if (rc == TP_OK && !options->read_only) rc = space_open_window(pool);
  pthread_mutex_unlock(&pool->mutex);
  if (rc != TP_OK) {
    tp_error_info why;
    tp_last_error(&why);
    tp_pool_close(pool);
    tp_pool_put(pool);
    if (why.kind != 0) return tp_error_record(rc, why.kind, why.key);
    return why.code == rc && why.os_error != 0 ? tp_error_os(-why.os_error) : tp_error_set(rc);
  }
  /* Small writes into what a large readahead brought in as one large folio are several times dearer. */
  if (options->disk == NULL) (void)posix_fadvise(options->data_fd, 0, 0, POSIX_FADV_RANDOM);
  *out = pool;
  return TP_OK;
}

/* --- closing --- */

/* All layers in memory, with a handle each, so that they can be locked in order without the mutex. */
static tp_layer **all_layers(tp_pool *pool, size_t *count) {
  tp_layer **layers = tp_alloc((pool->cache.record_count + 1) * sizeof(tp_layer *));
  *count = 0;
  for (size_t i = 0; i < pool->cache.bucket_count; i++) {
    for (struct record *r = pool->cache.buckets[i]; r != NULL; r = r->hash_next) {
      if (r->kind != TP_MAP) continue;
      r->pins++;
      pool->handles++;
      layers[(*count)++] = as_layer(r);
    }
  }
  return layers;
}

/* Takes each layer's lock once: whatever was under way before is done, and sees the flag or the state from then on. */
static void drain(tp_pool *pool, tp_layer **layers, size_t count, bool closing) {
  for (size_t k = 0; k < count; k++) {
    pthread_rwlock_wrlock(&layers[k]->lock);
    pthread_mutex_lock(&pool->mutex);
    if (closing && layers[k]->state != LAYER_CLOSED) {
      layer_drop_slots(layers[k]);
      layers[k]->state = LAYER_CLOSED;
    }
    pthread_mutex_unlock(&pool->mutex);
    pthread_rwlock_unlock(&layers[k]->lock);
  }
}

/* Once it sees that the pool stops it changes nothing more, and ends; until then it needs the pool as it is. */
static void await_compaction(tp_pool *pool) {
  pthread_mutex_lock(&pool->compacting);
  pthread_mutex_unlock(&pool->compacting);
}

/* The same for what needs the records, the store or the data file without the mutex, and no layer's lock. The pool is closed: nobody begins any more. */
static void await_background(tp_pool *pool) {
  await_compaction(pool);
  pthread_mutex_lock(&pool->syncing);
  pthread_mutex_unlock(&pool->syncing);
  pthread_mutex_lock(&pool->mutex);
  while (pool->committing || pool->punching > 0) pthread_cond_wait(&pool->committed, &pool->mutex);
  pthread_mutex_unlock(&pool->mutex);
}

static void put_all(tp_layer **layers, size_t count) {
  for (size_t k = 0; k < count; k++) tp_layer_put(layers[k]);
  free(layers);
}

void tp_pool_stop(tp_pool *pool) {
  size_t count;
  tp_limits_end(pool);
  pthread_mutex_lock(&pool->mutex);
  pool->stopped = true;
  tp_layer **layers = all_layers(pool, &count);
  pthread_cond_broadcast(&pool->work);
  pthread_mutex_unlock(&pool->mutex);
  await_compaction(pool);
  drain(pool, layers, count, false);
  put_all(layers, count);
}

/* Records deleted but never stored are in no cache. */
static void free_dead(tp_pool *pool) {
  for (int which = 0; which < 2; which++) {
    struct record_list *list = which ? &pool->frozen : &pool->dirty;
    for (size_t k = 0; k < list->count; k++) {
      struct record *r = list->items[k];
      if (!r->dead || (which == 1 && r->dirty)) continue; /* dirty ones were in the first list */
      if (r->kind == TP_NODE) node_free(as_node(r));
      else if (r->kind == TP_MAP && r->pins == 0) layer_free(as_layer(r));
    }
    list->count = 0;
  }
}

void tp_pool_close(tp_pool *pool) {
  size_t count;
  tp_limits_end(pool);
  pthread_mutex_lock(&pool->mutex);
  bool was_closed = pool->closed;
  pool->closed = true; /* no new layer comes into memory from here on */
  tp_layer **layers = all_layers(pool, &count);
  pthread_cond_broadcast(&pool->work);
  pthread_cond_broadcast(&pool->committed);
  pthread_mutex_unlock(&pool->mutex);
  await_background(pool);
  if (!was_closed) {
    drain(pool, layers, count, true);
    pthread_mutex_lock(&pool->mutex);
    redo_close(pool);
    free_dead(pool);
    cache_free_all(pool);
    space_free(pool);
    pool->space = (struct space){0};
    pthread_mutex_unlock(&pool->mutex);
  }
  put_all(layers, count);
}

void pool_unref(tp_pool *pool) {
  bool last = --pool->handles == 0;
  pthread_mutex_unlock(&pool->mutex);
  if (last) destroy(pool);
}

void tp_pool_put(tp_pool *pool) {
  if (pool == NULL) return;
  pthread_mutex_lock(&pool->mutex);
  pool_unref(pool);
}

/* --- figures and background work --- */

int tp_pool_get_info(tp_pool *pool, tp_pool_info *out) {
  pthread_mutex_lock(&pool->mutex);
  const struct space *space = &pool->space;
  *out = (tp_pool_info){
      .chunk_size = chunk_size(pool),
      .capacity_chunks = space->capacity,
      .allocated_chunks = space->allocated,
      .dirty_chunks = space->dirty,
      .pending_chunks = space->pending,
      .pinned_chunks = space->pinned,
      .data_bytes = space->pages * PAGE_VALUES << pool->chunk_shift,
      .reclaim_nodes = pool->reclaim.count,
      .txn = pool->txn,
      .durable_txn = pool->durable_txn,
      .dirty = pool_is_dirty(pool),
      .failed = pool->failed,
      .failed_errno = pool->failed_errno,
      .refused = pool->refused,
      .waiting_writers = pool->waiting_writers,
      .cached_bytes = pool->cache.bytes,
      .splits = pool->splits,
      .in_place = pool->in_place,
      .first_writes = pool->first_writes,
      .window_waits = pool->window_waits,
      .fetches = pool->fetches,
  };
  pthread_mutex_unlock(&pool->mutex);
  return TP_OK;
}

static int work_to_do(const tp_pool *pool) {
  int work = 0;
  if (pool->failed) return 0;
  if (space_window_is_low(pool)) work |= TP_WORK_WINDOW;
  if (pool->reclaim.count > 0 && !pool_is_overdue(pool)) work |= TP_WORK_RECLAIM;
  if (pool->space.dirty > pool->space.pending) work |= TP_WORK_PUNCH;
  if (pool_is_dirty(pool)) work |= TP_WORK_COMMIT;
  if (pool_is_overdue(pool)) work |= TP_WORK_OVERDUE;
  return work;
}

int tp_wait_work(tp_pool *pool, int timeout_ms) {
  struct timespec until;
  clock_gettime(CLOCK_MONOTONIC, &until);
  until.tv_sec += timeout_ms / 1000;
  until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
  if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
  pthread_mutex_lock(&pool->mutex);
  int rc = 0;
  /* Commits and punches wait for the timer: they get cheaper by the batch. */
  while (rc == 0 && !pool->stopped && !pool->closed && !pool->awake &&
         (work_to_do(pool) & (TP_WORK_WINDOW | TP_WORK_RECLAIM | TP_WORK_OVERDUE)) == 0) {
    rc = pthread_cond_timedwait(&pool->work, &pool->mutex, &until);
  }
  pool->awake = false;
  int work = pool->stopped || pool->closed ? tp_error_set(TP_ECLOSED) : work_to_do(pool);
  pthread_mutex_unlock(&pool->mutex);
  return work;
}

void tp_wake(tp_pool *pool) {
  pthread_mutex_lock(&pool->mutex);
  pool->awake = true;
  pthread_cond_broadcast(&pool->work);
  pthread_mutex_unlock(&pool->mutex);
}
