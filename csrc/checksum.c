/* checksum.c - checksums of chunks: loading, making, giving up, verifying, and healing by them. */
#include "checksum.h"

#include "io.h"

#define PIECE (64u * 1024) /* bytes read at a time */

/* 0 stands for no checksum. */
static uint32_t finished(uint32_t crc) { return crc != 0 ? crc : 1; }

/* --- records --- */

static int decode(struct tp_pool *pool, uint64_t key, struct checksums **out) {
  struct reader in;
  *out = NULL;
  int rc = record_fetch(pool, TP_CHECKSUM, key, &in);
  if (rc == TP_ENOENT) return TP_OK; /* no chunk of these has any */
  if (rc != TP_OK) return rc;
  uint64_t values[CHECKSUM_VALUES];
  codec_get_array(&in, values, CHECKSUM_VALUES);
  for (unsigned k = 0; k < CHECKSUM_VALUES && !in.bad; k++) in.bad = values[k] > UINT32_MAX;
  if (in.bad) return tp_error_record(TP_ECORRUPT, TP_CHECKSUM, key);
  struct checksums *sums = *out = tp_alloc_zero(sizeof *sums);
  sums->rec.kind = TP_CHECKSUM;
  sums->rec.key = key;
  for (unsigned k = 0; k < CHECKSUM_VALUES; k++) sums->value[k] = (uint32_t)values[k];
  return TP_OK;
}

static uint64_t key_of(const struct page *page, unsigned i) { return (page->rec.key * PAGE_VALUES + i) / CHECKSUM_VALUES; }

int checksum_load(struct tp_pool *pool, struct page *page, unsigned i) {
  unsigned at = i / CHECKSUM_VALUES;
  if (checksum_is_loaded(page, i)) return TP_OK;
  int rc = decode(pool, key_of(page, i), &page->sums[at]);
  if (rc != TP_OK) return rc;
  page->sums_loaded |= (uint8_t)(1u << at);
  if (page->sums[at] != NULL) pool->cache.bytes += sizeof(struct checksums);
  return TP_OK;
}

uint32_t checksum_get(const struct page *page, unsigned i) {
  assert(page->rec.kind == TP_CHUNK_PAGE && checksum_is_loaded(page, i));
  const struct checksums *sums = page->sums[i / CHECKSUM_VALUES];
  return sums == NULL ? 0 : sums->value[i % CHECKSUM_VALUES];
}

void checksum_set(struct tp_pool *pool, struct page *page, unsigned i, uint32_t value) {
  if (checksum_get(page, i) == value) return;
  struct checksums **sums = &page->sums[i / CHECKSUM_VALUES];
  if (*sums == NULL) {
    *sums = tp_alloc_zero(sizeof **sums);
    (*sums)->rec.kind = TP_CHECKSUM;
    (*sums)->rec.key = key_of(page, i);
    pool->cache.bytes += sizeof **sums;
  }
  record_touch(pool, &page->rec); /* so that it stays in memory as long as its checksums must */
  record_touch(pool, &(*sums)->rec);
  (*sums)->value[i % CHECKSUM_VALUES] = value;
}

void checksums_encode(struct tp_pool *pool, struct checksums *sums) {
  uint64_t values[CHECKSUM_VALUES];
  bool empty = true;
  for (unsigned k = 0; k < CHECKSUM_VALUES; k++) {
    values[k] = sums->value[k];
    if (values[k] != 0) empty = false;
  }
  size_t begin = record_begin(&pool->out, TP_CHECKSUM, sums->rec.key, empty);
  if (empty) return;
  codec_put_array(&pool->out, values, CHECKSUM_VALUES);
  record_end(&pool->out, begin);
}

void checksums_free(struct page *page) {
  for (unsigned at = 0; at < CHECKSUM_RECORDS; at++) free(page->sums[at]);
}

size_t checksums_bytes(const struct page *page) {
  size_t bytes = 0;
  for (unsigned at = 0; at < CHECKSUM_RECORDS; at++) bytes += page->sums[at] != NULL ? sizeof(struct checksums) : 0;
  return bytes;
}

/* A chunk's page, with its checksum loaded. Fails where a map names a chunk that has no count. */
static int page_of(struct tp_pool *pool, uint64_t chunk, struct page **page) {
  uint64_t count;
  int rc = load_count(pool, TP_CHUNK_PAGE, chunk, &count);
  if (rc == TP_OK) *page = page_loaded(pool, TP_CHUNK_PAGE, chunk);
  return rc;
}

/* With a checksum; a chunk that has none is not asked about. */
static bool has_one_owner(const struct page *page, uint64_t chunk) {
  return page->value[chunk % PAGE_VALUES] == CHUNK_ONE && checksum_get(page, chunk % PAGE_VALUES) != 0;
}

void checksums_give_up(struct tp_layer *layer, const struct node *leaf, uint64_t chunk) {
  struct tp_pool *pool = layer->pool;
  if (!has_one_owner(page_loaded(pool, TP_CHUNK_PAGE, chunk), chunk)) return;
  for (unsigned k = 0; k < FANOUT; k++) {
    uint64_t own = entry_is_split(leaf->entry[k]) ? entry_split(leaf->entry[k])->own : leaf->entry[k];
    struct page *page;
    if (own == 0 || page_of(pool, own - 1, &page) != TP_OK) continue; /* whoever writes to that chunk will be told */
    if (!has_one_owner(page, own - 1)) continue;
    checksum_set(pool, page, (own - 1) % PAGE_VALUES, 0);
    page_set_unshared(pool, page, (own - 1) % PAGE_VALUES);
  }
}

/* --- making --- */

static int crc_of_chunk(struct tp_pool *pool, uint64_t chunk, uint32_t *crc) {
  uint8_t bytes[PIECE] __attribute__((aligned(4096)));
  uint64_t at = chunk << pool->chunk_shift, end = at + chunk_size(pool);
  *crc = 0;
  while (at < end) {
    uint64_t length = min_u64(end - at, sizeof bytes);
    int rc = disk_read(pool, bytes, length, at);
    if (rc != TP_OK) return rc;
    *crc = tp_crc32c(*crc, bytes, length);
    at += length;
  }
  *crc = finished(*crc);
  return TP_OK;
}

/* The chunks of an entry that have no checksum. */
static int without_checksum(tp_layer *layer, uint64_t index, uint64_t *chunks, unsigned *count) {
  struct tp_pool *pool = layer->pool;
  struct node *leaf;
  uint64_t named[pool->blocks];
  *count = 0;
  int rc = map_find(layer, index / FANOUT, &leaf);
  if (rc != TP_OK || leaf == NULL) return rc;
  unsigned n = entry_chunks(pool, leaf->entry[index % FANOUT], named);
  for (unsigned k = 0; k < n; k++) {
    struct page *page;
    if ((rc = page_of(pool, named[k], &page)) != TP_OK) return rc;
    if (checksum_get(page, named[k] % PAGE_VALUES) == 0) chunks[(*count)++] = named[k];
  }
  return TP_OK;
}

/* The bytes stand still: the layer is sealed, so nobody changes them in place (I7), and its lock is held, so that where they lay is not used anew.
 * Returns 1 if the chunk has moved meanwhile (compact.c). */
static int make_checksum(tp_layer *layer, uint64_t index, uint64_t chunk) {
  struct tp_pool *pool = layer->pool;
  struct node *leaf;
  struct page *page;
  uint64_t named[pool->blocks];
  uint32_t crc;
  int rc = crc_of_chunk(pool, chunk, &crc);
  if (rc != TP_OK) return rc;
  pthread_mutex_lock(&pool->mutex);
  assert(layer->state == LAYER_SEALED);
  rc = map_find(layer, index / FANOUT, &leaf);
  if (rc == TP_OK) {
    unsigned n = entry_chunks(pool, leaf->entry[index % FANOUT], named);
    while (n > 0 && named[n - 1] != chunk) n--;
    rc = n == 0 ? 1 : page_of(pool, chunk, &page);
  }
  if (rc == TP_OK) {
    uint32_t known = checksum_get(page, chunk % PAGE_VALUES);
    if (known == 0) checksum_set(pool, page, chunk % PAGE_VALUES, crc); /* nobody takes the chunk for his own from here on */
    else if (known != crc) rc = tp_error_record(TP_ECHECKSUM, 0, chunk); /* somebody else has made it meanwhile */
  }
  pthread_mutex_unlock(&pool->mutex);
  return rc;
}

static int make_checksums(tp_layer *layer, uint64_t index) {
  struct tp_pool *pool = layer->pool;
  uint64_t chunks[pool->blocks];
  unsigned count;
  int rc = 1;
  while (rc == 1) {
    pthread_mutex_lock(&pool->mutex);
    rc = pool_check_change(pool);
    if (rc == TP_OK) rc = without_checksum(layer, index, chunks, &count);
    cache_trim(pool, layer);
    pthread_mutex_unlock(&pool->mutex);
    for (unsigned k = 0; rc == TP_OK && k < count; k++) rc = make_checksum(layer, index, chunks[k]);
  }
  return rc;
}

int tp_layer_checksum(tp_layer *layer, uint64_t offset, uint64_t length) {
  struct tp_pool *pool = layer->pool;
  struct io io;
  int rc = io_begin(&io, layer, offset, length, false);
  if (rc == TP_OK && layer->state != LAYER_SEALED) rc = tp_error_set(TP_EINVAL);
  uint64_t index = offset >> pool->chunk_shift;
  for (; rc == TP_OK && index << pool->chunk_shift < offset + length; index++) {
    rc = make_checksums(layer, index);
    if (rc != TP_OK) rc = tp_error_where(rc, layer->rec.key, index << pool->chunk_shift, chunk_size(pool));
  }
  io_end(&io);
  pthread_mutex_lock(&pool->mutex);
  bool overdue = pool_is_overdue(pool);
  pthread_mutex_unlock(&pool->mutex);
  return rc == TP_OK && overdue ? tp_flush(pool) : rc;
}

/* --- using --- */

/* 0: none, or the chunk has just moved, and whoever moved it has compared. */
static int checksum_of(struct tp_pool *pool, uint64_t chunk, uint32_t *value) {
  struct page *page;
  *value = 0;
  pthread_mutex_lock(&pool->mutex);
  int rc = page_get(pool, TP_CHUNK_PAGE, chunk / PAGE_VALUES, &page);
  if (rc == TP_OK && (page->value[chunk % PAGE_VALUES] >= CHUNK_ONE || !bit_get(page->moving, chunk % PAGE_VALUES))) {
    rc = page_of(pool, chunk, &page);
    if (rc == TP_OK) *value = checksum_get(page, chunk % PAGE_VALUES);
  }
  pthread_mutex_unlock(&pool->mutex);
  return rc;
}

/* While a layer that names the chunk is locked, the caller's, nobody can take it away, nor what it holds. */
int checksum_verify(struct tp_pool *pool, uint64_t chunk, uint8_t *bytes) {
  uint32_t expected;
  int rc = checksum_of(pool, chunk, &expected);
  if (rc != TP_OK || expected == 0) return rc;
  rc = disk_read(pool, bytes, chunk_size(pool), chunk << pool->chunk_shift);
  if (rc != TP_OK) return rc;
  if (finished(tp_crc32c(0, bytes, chunk_size(pool))) == expected) return 1;
  pool->metrics.corrupt_reads++;
  return tp_error_record(TP_ECHECKSUM, 0, chunk);
}

static bool names_chunk(tp_layer *layer, uint64_t index, uint64_t chunk) {
  struct tp_pool *pool = layer->pool;
  struct node *leaf;
  uint64_t named[pool->blocks];
  pthread_mutex_lock(&pool->mutex);
  bool found = map_find(layer, index / FANOUT, &leaf) == TP_OK && leaf != NULL;
  unsigned n = found ? entry_chunks(pool, leaf->entry[index % FANOUT], named) : 0;
  pthread_mutex_unlock(&pool->mutex);
  while (n > 0 && named[n - 1] != chunk) n--;
  return n > 0;
}

int tp_layer_heal(tp_layer *layer, uint64_t index, uint64_t chunk, const void *bytes) {
  struct tp_pool *pool = layer->pool;
  struct io io;
  uint32_t expected = 0;
  int rc = io_begin(&io, layer, 0, 0, false);
  pthread_mutex_lock(&pool->mutex);
  if (rc == TP_OK) rc = pool_check_change(pool);
  pthread_mutex_unlock(&pool->mutex);
  if (rc == TP_OK && names_chunk(layer, index, chunk)) rc = checksum_of(pool, chunk, &expected);
  if (rc == TP_OK && expected != 0 && finished(tp_crc32c(0, bytes, chunk_size(pool))) == expected) {
    rc = disk_write(pool, bytes, chunk_size(pool), chunk << pool->chunk_shift);
    if (rc == TP_OK) rc = 1;
  }
  io_end(&io);
  return rc;
}
