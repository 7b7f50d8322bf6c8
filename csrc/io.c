/* io.c - reading and writing layers: the paths that need no change of a map, and the way into write.c for the rest. */
#define _GNU_SOURCE 1
#include "io.h"

#include "checksum.h"

#include <errno.h>
#include <fcntl.h>
#include <stdalign.h>
#include <sys/uio.h>

/* --- the data file --- */

static int disk_error(int64_t result) {
  if (result < 0) return tp_error_os(result);
  return tp_error_set(TP_ECORRUPT); /* ends before what the map names: cut short */
}

static int read_all(struct tp_pool *pool, uint8_t *buf, uint64_t length, uint64_t at) {
  while (length > 0) {
    int64_t n = pool->disk.pread(pool->disk.ctx, buf, length, at);
    if (n <= 0) return disk_error(n);
    buf += n, at += (uint64_t)n, length -= (uint64_t)n;
  }
  return TP_OK;
}

/* The kernel copies to a target that is off a multiple of 32 bytes at a fifth of the speed; memcpy does not mind. */
__attribute__((noinline)) static int read_bounced(struct tp_pool *pool, uint8_t *buf, uint64_t length, uint64_t at) {
  alignas(4096) uint8_t bounce[64 * 1024];
  while (length > 0) {
    uint64_t n = min_u64(length, sizeof bounce);
    int rc = read_all(pool, bounce, n, at);
    if (rc != TP_OK) return rc;
    memcpy(buf, bounce, n);
    buf += n, at += n, length -= n;
  }
  return TP_OK;
}

int disk_read(struct tp_pool *pool, void *buf, uint64_t length, uint64_t at) {
  if (((uintptr_t)buf & 31) != 0 && length >= TP_BLOCK) return read_bounced(pool, buf, length, at);
  return read_all(pool, buf, length, at);
}

int disk_write(struct tp_pool *pool, const void *buf, uint64_t length, uint64_t at) {
  const uint8_t *p = buf;
  while (length > 0) {
    int64_t n = pool->disk.pwrite(pool->disk.ctx, p, min_u64(length, WRITE_MAX), at);
    if (n <= 0) {
      int rc = tp_error_os(n);
      if (rc == TP_ENOSPC) pool->refused = true;
      return rc;
    }
    pool_mark_unsynced(pool);
    p += n, at += (uint64_t)n, length -= (uint64_t)n;
  }
  return TP_OK;
}

int disk_write_zeros(struct tp_pool *pool, uint64_t length, uint64_t at) {
  static const uint8_t zeros[64 * 1024];
  while (length > 0) {
    uint64_t n = min_u64(length, sizeof zeros);
    int rc = disk_write(pool, zeros, n, at);
    if (rc != TP_OK) return rc;
    at += n, length -= n;
  }
  return TP_OK;
}

/* By reference, as far as the pipe has room without waiting. */
static int disk_splice(struct tp_pool *pool, int pipe_fd, uint64_t length, uint64_t at) {
  loff_t from = (loff_t)at;
  while (length > 0) {
    ssize_t n = splice(pool->file_disk.fd, &from, pipe_fd, NULL, length, SPLICE_F_NONBLOCK);
    if (n <= 0) return disk_error(n < 0 ? -errno : 0);
    length -= (uint64_t)n;
  }
  return TP_OK;
}

static int splice_zeros(int pipe_fd, uint64_t length) {
  static alignas(4096) const uint8_t zeros[64 * 1024];
  while (length > 0) {
    struct iovec part = {(void *)(uintptr_t)zeros, min_u64(length, sizeof zeros)};
    ssize_t n = vmsplice(pipe_fd, &part, 1, SPLICE_F_NONBLOCK);
    if (n <= 0) return disk_error(n < 0 ? -errno : 0);
    length -= (uint64_t)n;
  }
  return TP_OK;
}

/* --- locks and leaves --- */

static int check(const struct io *io, uint64_t offset, uint64_t length, bool writing) {
  int rc = layer_check(io->layer, writing);
  if (rc != TP_OK) return rc;
  uint64_t size = io->layer->size;
  return offset > size || length > size - offset ? tp_error_set(TP_ERANGE) : TP_OK;
}

int io_begin(struct io *io, tp_layer *layer, uint64_t offset, uint64_t length, bool writing) {
  *io = (struct io){.layer = layer};
  pthread_rwlock_rdlock(&layer->lock);
  return check(io, offset, length, writing);
}

int io_upgrade(struct io *io, uint64_t offset, uint64_t length, bool writing) {
  if (io->exclusive) return TP_OK;
  pthread_rwlock_unlock(&io->layer->lock);
  pthread_rwlock_wrlock(&io->layer->lock);
  io->exclusive = true;
  return check(io, offset, length, writing);
}

void io_end(struct io *io) { pthread_rwlock_unlock(&io->layer->lock); }

int io_find_leaf(struct io *io, uint64_t index, uint64_t offset, uint64_t length, bool writing, struct node **out) {
  uint64_t leaf_index = index / FANOUT;
  const struct slot *slot = layer_slot(io->layer, leaf_index);
  if (slot != NULL && slot->tag == leaf_index + 1) {
    *out = slot->leaf;
    return TP_OK;
  }
  int rc = io_upgrade(io, offset, length, writing);
  if (rc != TP_OK) return rc;
  pthread_mutex_lock(&io->layer->pool->mutex);
  rc = map_fill_slot(io->layer, leaf_index);
  pthread_mutex_unlock(&io->layer->pool->mutex);
  *out = rc == TP_OK ? layer_slot(io->layer, leaf_index)->leaf : NULL;
  return rc;
}

/* --- reading --- */

/* A read that is being put together from neighbouring pieces: into memory, or by reference into a pipe. Pieces of chunks that are verified
 * are copied from `verified` at once. */
struct gather {
  struct tp_pool *pool;
  uint64_t layer_id, offset; /* of what is read */
  uint8_t *buf; /* NULL: the pipe */
  int pipe_fd;
  uint64_t to, at, length; /* a piece: where in buf, where in the data file */
  uint8_t *verified;       /* NULL: nothing is verified; else the chunk that was verified last, of the entry that is read */
  uint64_t verified_chunk; /* its number + 1; 0: none */
};

static int gather_flush(struct gather *g) {
  uint64_t length = g->length;
  g->length = 0;
  if (length == 0) return TP_OK;
  int rc = g->buf != NULL ? disk_read(g->pool, g->buf + g->to, length, g->at) : disk_splice(g->pool, g->pipe_fd, length, g->at);
  return rc == TP_OK ? rc : tp_error_where(rc, g->layer_id, g->offset + g->to, length);
}

static int gather_add(struct gather *g, uint64_t to, uint64_t at, uint64_t length) {
  if (g->length > 0 && g->at + g->length == at) {
    g->length += length;
    return TP_OK;
  }
  int rc = gather_flush(g);
  g->to = to, g->at = at, g->length = length;
  return rc;
}

static int gather_hole(struct gather *g, uint64_t to, uint64_t length) {
  int rc = gather_flush(g);
  if (rc != TP_OK || g->buf == NULL) return rc != TP_OK ? rc : splice_zeros(g->pipe_fd, length);
  memset(g->buf + to, 0, length);
  return TP_OK;
}

static int gather_chunk(struct gather *g, uint64_t chunk, uint64_t to, uint64_t offset, uint64_t length) {
  if (g->verified == NULL) return gather_add(g, to, (chunk << g->pool->chunk_shift) + offset, length);
  if (g->verified_chunk != chunk + 1) {
    g->verified_chunk = 0;
    int rc = checksum_verify(g->pool, chunk, g->verified);
    if (rc < 0) return tp_error_where(rc, g->layer_id, g->offset + to, length);
    if (rc == 0) return gather_add(g, to, (chunk << g->pool->chunk_shift) + offset, length);
    g->verified_chunk = chunk + 1;
  }
  int rc = gather_flush(g); /* the next piece does not go on from the last one */
  memcpy(g->buf + to, g->verified + offset, length);
  return rc;
}

/* A piece within one chunk, block by block where the entry is split. */
static int read_entry(struct gather *g, uint64_t entry, uint64_t to, uint64_t offset, uint64_t length) {
  if (entry == 0) return gather_hole(g, to, length);
  g->verified_chunk = 0;
  if (!entry_is_split(entry)) return gather_chunk(g, entry - 1, to, offset, length);
  int rc = TP_OK;
  while (length > 0 && rc == TP_OK) {
    uint64_t n = min_u64(length, TP_BLOCK - offset % TP_BLOCK);
    uint64_t chunk = split_chunk_at(entry, (unsigned)(offset / TP_BLOCK));
    rc = chunk == 0 ? gather_hole(g, to, n) : gather_chunk(g, chunk - 1, to, offset, n);
    to += n, offset += n, length -= n;
  }
  return rc;
}

static int read_locked(struct io *io, struct gather *g, uint64_t length, uint64_t offset) {
  struct tp_pool *pool = io->layer->pool;
  uint64_t mask = chunk_size(pool) - 1, to = 0;
  while (length > 0) {
    uint64_t index = offset >> pool->chunk_shift;
    const struct slot *slot = layer_slot(io->layer, index / FANOUT);
    int rc = TP_OK;
    /* What was gathered is only good under the lock it was looked up under. */
    if (!io->exclusive && (slot == NULL || slot->tag != index / FANOUT + 1)) rc = gather_flush(g);
    struct node *leaf;
    if (rc != TP_OK) return rc;
    uint64_t n = min_u64(length, chunk_size(pool) - (offset & mask));
    rc = io_find_leaf(io, index, offset, length, false, &leaf);
    if (rc != TP_OK) return tp_error_where(rc, io->layer->rec.key, offset, n);
    rc = read_entry(g, leaf == NULL ? 0 : entry_read(&leaf->entry[index % FANOUT]), to, offset & mask, n);
    if (rc != TP_OK) return rc;
    to += n, offset += n, length -= n;
  }
  return gather_flush(g);
}

/* Whoever only reads sees checksums of the state that it found, and a writable layer's chunks as they are by now. */
static bool verifies(const tp_layer *layer) {
  const tp_options *options = &layer->pool->options;
  return options->verify_reads && (!options->read_only || layer->state == LAYER_SEALED);
}

int io_read(struct io *io, void *buf, uint64_t length, uint64_t offset) {
  struct gather g = {.pool = io->layer->pool, .layer_id = io->layer->rec.key, .offset = offset, .buf = buf};
  if (verifies(io->layer)) g.verified = tp_alloc(chunk_size(g.pool));
  int rc = read_locked(io, &g, length, offset);
  free(g.verified);
  return rc;
}

int layer_read(tp_layer *layer, void *buf, uint64_t length, uint64_t offset) {
  struct io io;
  int rc = io_begin(&io, layer, offset, length, false);
  if (rc == TP_OK) rc = io_read(&io, buf, length, offset);
  io_end(&io);
  return rc;
}

int chunk_read(struct tp_pool *pool, uint64_t chunk, void *buf, uint64_t length, uint64_t within) {
  if (!pool->options.verify_reads) return disk_read(pool, buf, length, (chunk << pool->chunk_shift) + within);
  uint8_t *bytes = tp_alloc(chunk_size(pool));
  int rc = checksum_verify(pool, chunk, bytes);
  if (rc == 1) memcpy(buf, bytes + within, length);
  free(bytes);
  if (rc == 0) return disk_read(pool, buf, length, (chunk << pool->chunk_shift) + within);
  return rc == 1 ? TP_OK : rc;
}

/* Whether reading there needs no change of the lock, between which a chunk in the pipe could get another owner. */
static bool in_slots(const struct io *io, uint64_t length, uint64_t offset) {
  unsigned shift = io->layer->pool->chunk_shift;
  for (uint64_t leaf = (offset >> shift) / FANOUT; leaf <= ((offset + length - 1) >> shift) / FANOUT; leaf++) {
    const struct slot *slot = layer_slot(io->layer, leaf);
    if (slot == NULL || slot->tag != leaf + 1) return false;
  }
  return true;
}

int tp_splice(tp_layer *layer, int pipe_fd, uint64_t length, uint64_t offset, int (*send)(void *ctx), void *ctx) {
  struct io io;
  struct gather g = {.pool = layer->pool, .layer_id = layer->rec.key, .offset = offset, .pipe_fd = pipe_fd};
  if (layer->pool->options.disk != NULL || layer->pool->options.verify_reads || length == 0) return TP_EINVAL;
  struct probe probe = metrics_begin(&layer->metrics, TP_READ, length);
  int rc = io_begin(&io, layer, offset, length, false);
  if (rc == TP_OK) rc = in_slots(&io, length, offset) ? read_locked(&io, &g, length, offset) : TP_EINVAL;
  if (rc == TP_OK) rc = send(ctx);
  io_end(&io);
  if (rc == TP_OK) metrics_end(&probe, length, rc); /* else it is read, and counted there */
  return rc;
}

int tp_read_admitted(tp_layer *layer, void *buf, uint64_t length, uint64_t offset) {
  struct probe probe = metrics_begin(&layer->metrics, TP_READ, length);
  int rc = layer_read(layer, buf, length, offset);
  metrics_end(&probe, length, rc);
  return rc;
}

int tp_read(tp_layer *layer, void *buf, uint64_t length, uint64_t offset) {
  if (layer->limits != NULL) limits_wait(layer, false, length);
  return tp_read_admitted(layer, buf, length, offset);
}

int tp_readv(tp_layer *layer, const tp_vec *vecs, uint64_t count) {
  for (uint64_t k = 0; k < count; k++) {
    int rc = tp_read(layer, vecs[k].buf, vecs[k].length, vecs[k].offset);
    if (rc != TP_OK) return rc;
  }
  return TP_OK;
}

/* --- writing --- */

/* Where the piece may be overwritten in place: its place in the data file, or UINT64_MAX. */
static uint64_t place_in_place(const tp_layer *layer, const struct node *leaf, uint64_t index, unsigned offset,
                               unsigned length) {
  unsigned i = index % FANOUT;
  if (leaf == NULL || leaf->mine_epoch != layer->epoch || !bit_get(leaf->mine, i)) return UINT64_MAX;
  if (layer_is_past_end(layer, index, offset, length)) return UINT64_MAX;
  uint64_t entry = entry_read(&leaf->entry[i]);
  if (entry_is_split(entry)) {
    const struct split *split = entry_split(entry);
    uint64_t own = entry_read(&split->own);
    for (unsigned b = offset / TP_BLOCK; b <= (offset + length - 1) / TP_BLOCK; b++) {
      if (entry_read(&split->block[b]) != own) return UINT64_MAX;
    }
    entry = own;
  }
  return ((entry - 1) << layer->pool->chunk_shift) + offset;
}

struct progress {
  const uint8_t *buf;
  uint64_t offset, length;
  bool overdue;
};

static void advance(struct progress *p, uint64_t n) { p->buf += n, p->offset += n, p->length -= n; }

/* As much as may be overwritten in place in one go: *n, found to be more than one chunk's piece where chunks are neighbours. */
static uint64_t extend_in_place(struct io *io, const struct progress *p, uint64_t at, uint64_t *n) {
  const tp_layer *layer = io->layer;
  uint64_t size = chunk_size(layer->pool);
  while (*n < p->length && *n < WRITE_MAX && (p->offset + *n) % size == 0) {
    uint64_t index = (p->offset + *n) >> layer->pool->chunk_shift;
    const struct slot *slot = layer_slot(layer, index / FANOUT);
    unsigned piece = (unsigned)min_u64(size, p->length - *n);
    if (slot == NULL || slot->tag != index / FANOUT + 1) break;
    if (place_in_place(layer, slot->leaf, index, 0, piece) != at + *n) break;
    *n += piece;
  }
  return *n;
}

/* How many whole chunks the write goes on for, within one leaf. */
static unsigned whole_chunks(const struct tp_pool *pool, const struct progress *p) {
  if (p->offset % chunk_size(pool) != 0) return 0;
  uint64_t count = min_u64(p->length, WRITE_MAX) >> pool->chunk_shift;
  return (unsigned)min_u64(count, FANOUT - (p->offset >> pool->chunk_shift) % FANOUT);
}

static int write_slowly(struct io *io, struct progress *p, uint64_t n, bool hole) {
  struct tp_pool *pool = io->layer->pool;
  int rc = io_upgrade(io, p->offset, p->length, true);
  if (rc != TP_OK) return rc;
  uint64_t index = p->offset >> pool->chunk_shift;
  unsigned count = hole ? whole_chunks(pool, p) : 0, done = 0;
  if (count > 1) {
    rc = write_run(io->layer, index, count, p->buf, &done, &p->overdue);
    advance(p, (uint64_t)done << pool->chunk_shift);
    return rc;
  }
  unsigned offset = (unsigned)(p->offset & (chunk_size(pool) - 1));
  rc = write_chunk(io->layer, index, offset, (unsigned)n, p->buf, &p->overdue);
  if (rc == TP_OK) advance(p, n);
  return rc;
}

static int write_locked(struct io *io, struct progress *p) {
  struct tp_pool *pool = io->layer->pool;
  while (p->length > 0 && !p->overdue) {
    uint64_t index = p->offset >> pool->chunk_shift;
    unsigned offset = (unsigned)(p->offset & (chunk_size(pool) - 1));
    uint64_t n = min_u64(p->length, chunk_size(pool) - offset);
    struct node *leaf;
    int rc = io_find_leaf(io, index, p->offset, p->length, true, &leaf);
    if (rc != TP_OK) return tp_error_where(rc, io->layer->rec.key, p->offset, n);
    uint64_t at = place_in_place(io->layer, leaf, index, offset, (unsigned)n);
    if (at != UINT64_MAX) {
      rc = disk_write(pool, p->buf, extend_in_place(io, p, at, &n), at);
      if (rc == TP_OK) advance(p, n);
    } else {
      rc = write_slowly(io, p, n, leaf == NULL || entry_read(&leaf->entry[index % FANOUT]) == 0);
    }
    if (rc == TP_NEED_WINDOW) return rc;
    if (rc != TP_OK) return tp_error_where(rc, io->layer->rec.key, p->offset, n);
  }
  return TP_OK;
}

int layer_write(tp_layer *layer, const void *buf, uint64_t length, uint64_t offset) {
  struct progress p = {.buf = buf, .offset = offset, .length = length};
  tp_pool *pool = layer->pool;
  for (int attempt = 0;;) {
    struct io io;
    int rc = io_begin(&io, layer, p.offset, p.length, true);
    uint64_t before = p.length;
    if (rc == TP_OK) rc = write_locked(&io, &p);
    io_end(&io);
    if (p.overdue && rc == TP_OK) rc = tp_flush(pool);
    p.overdue = false;
    if (rc == TP_OK && p.length == 0) return TP_OK;
    if (rc == TP_OK) continue;
    if (p.length < before) attempt = 0;
    if (rc != TP_NEED_WINDOW && rc != TP_ENOSPC) return rc;
    rc = make_room(pool, rc, attempt++);
    if (rc != TP_OK) return tp_error_where(rc, layer->rec.key, p.offset, p.length);
  }
}

int tp_write_admitted(tp_layer *layer, const void *buf, uint64_t length, uint64_t offset) {
  struct probe probe = metrics_begin(&layer->metrics, TP_WRITE, length);
  int rc = layer_write(layer, buf, length, offset);
  bool again = rc == TP_ENOSPC && layer->pool->patience_ns != 0; /* by tp_write_patient, and counted there */
  if (!again) metrics_end(&probe, length, rc);
  return rc;
}

static inline int write_waiting(tp_layer *layer, const void *buf, uint64_t length, uint64_t offset, bool for_room) {
  if (layer->limits != NULL) limits_wait(layer, true, length);
  struct probe probe = metrics_begin(&layer->metrics, TP_WRITE, length);
  uint64_t end_ns = 0;
  int rc = layer_write(layer, buf, length, offset);
  while (for_room && rc == TP_ENOSPC && room_wait(layer->pool, &end_ns)) rc = layer_write(layer, buf, length, offset);
  metrics_end(&probe, length, rc);
  return rc;
}

int tp_write(tp_layer *layer, const void *buf, uint64_t length, uint64_t offset) { return write_waiting(layer, buf, length, offset, false); }
int tp_write_patient(tp_layer *layer, const void *buf, uint64_t length, uint64_t offset) { return write_waiting(layer, buf, length, offset, true); }

int tp_writev(tp_layer *layer, const tp_vec *vecs, uint64_t count) {
  for (uint64_t k = 0; k < count; k++) {
    int rc = tp_write(layer, vecs[k].buf, vecs[k].length, vecs[k].offset);
    if (rc != TP_OK) return rc;
  }
  return TP_OK;
}

int tp_equal(tp_layer *layer, const void *buf, uint64_t length, uint64_t offset) {
  alignas(4096) uint8_t mine[64 * 1024];
  const uint8_t *theirs = buf;
  while (length > 0) {
    uint64_t n = min_u64(length, sizeof mine);
    int rc = layer_read(layer, mine, n, offset);
    if (rc != TP_OK) return rc;
    if (memcmp(mine, theirs, n) != 0) return 0;
    theirs += n, offset += n, length -= n;
  }
  return 1;
}
