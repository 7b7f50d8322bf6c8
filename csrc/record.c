/* record.c - the cache of records, and the frame of a stored one. */
#include "record.h"

#include "checksum.h"

void record_list_push(struct record_list *list, struct record *record) {
  if (list->count == list->capacity) {
    list->capacity = list->capacity ? list->capacity * 2 : 256;
    list->items = tp_realloc(list->items, list->capacity * sizeof *list->items);
  }
  list->items[list->count++] = record;
}

void record_touch(struct tp_pool *pool, struct record *record) {
  assert(!record->dead);
  if (record->frozen) { /* what is being committed is its form of now, before the change */
    record_encode(pool, record);
    record->frozen = false;
  }
  if (!record->dirty) {
    record->dirty = true;
    record_list_push(&pool->dirty, record);
  }
}

void record_kill(struct tp_pool *pool, struct record *record) {
  record_touch(pool, record);
  cache_remove(pool, record);
  record->dead = true;
}

/* --- cache --- */

#define SWEEP_BUCKETS 64u
#define TRIMS_PER_UNPIN 1024u

static size_t record_bytes(const struct record *record) {
  switch (record->kind) {
    case TP_NODE: return sizeof(struct node);
    case TP_MAP: return sizeof(struct tp_layer);
    default: return sizeof(struct page) + checksums_bytes((const struct page *)record);
  }
}

static size_t bucket_of(const struct cache *cache, uint32_t kind, uint64_t key) {
  uint64_t hash = (key * 8 + kind) * 0x9E3779B97F4A7C15u;
  return (size_t)(hash >> 20) & (cache->bucket_count - 1);
}

struct record *cache_find(struct tp_pool *pool, uint32_t kind, uint64_t key) {
  struct cache *cache = &pool->cache;
  if (cache->bucket_count == 0) return NULL;
  for (struct record *r = cache->buckets[bucket_of(cache, kind, key)]; r != NULL; r = r->hash_next) {
    if (r->key == key && r->kind == kind) {
      r->referenced = true;
      pool->metrics.cache_hits++;
      return r;
    }
  }
  return NULL;
}

static void grow(struct cache *cache) {
  struct cache bigger = *cache;
  bigger.bucket_count = cache->bucket_count ? cache->bucket_count * 2 : 1024;
  bigger.buckets = tp_alloc_zero(bigger.bucket_count * sizeof *bigger.buckets);
  for (size_t i = 0; i < cache->bucket_count; i++) {
    for (struct record *r = cache->buckets[i], *next; r != NULL; r = next) {
      next = r->hash_next;
      struct record **head = &bigger.buckets[bucket_of(&bigger, r->kind, r->key)];
      r->hash_next = *head;
      *head = r;
    }
  }
  free(cache->buckets);
  *cache = bigger;
}

void cache_insert(struct tp_pool *pool, struct record *record) {
  struct cache *cache = &pool->cache;
  if (cache->record_count >= cache->bucket_count) grow(cache);
  struct record **head = &cache->buckets[bucket_of(cache, record->kind, record->key)];
  record->hash_next = *head;
  record->referenced = true;
  *head = record;
  cache->record_count++;
  cache->inserted++;
  cache->bytes += record_bytes(record);
}

void cache_remove(struct tp_pool *pool, struct record *record) {
  struct cache *cache = &pool->cache;
  struct record **link = &cache->buckets[bucket_of(cache, record->kind, record->key)];
  while (*link != record) link = &(*link)->hash_next;
  *link = record->hash_next;
  record->hash_next = NULL;
  cache->record_count--;
  cache->bytes -= record_bytes(record);
}

static void record_free(struct record *record) {
  switch (record->kind) {
    case TP_NODE: node_free(as_node(record)); break;
    case TP_MAP: layer_free(as_layer(record)); break;
    default: page_free(as_page(record)); break;
  }
}

/* What a layer has counted is nowhere else. */
static bool must_stay(const struct record *r) {
  return r->pins > 0 || record_is_newer(r) || (r->kind == TP_MAP && ((const struct tp_layer *)r)->metrics != NULL);
}

/* Moves the clock's hand over that many buckets at most: a record used since it last passed gets another turn. */
static void sweep(struct tp_pool *pool, size_t buckets) {
  struct cache *cache = &pool->cache;
  for (size_t turn = 0; turn < buckets && cache->bytes > cache->limit; turn++) {
    struct record **link = &cache->buckets[cache->hand];
    cache->hand = (cache->hand + 1) & (cache->bucket_count - 1);
    while (*link != NULL) {
      struct record *r = *link;
      if (must_stay(r) || r->referenced) {
        r->referenced = false;
        link = &r->hash_next;
      } else {
        *link = r->hash_next;
        cache->record_count--;
        cache->bytes -= record_bytes(r);
        record_free(r);
      }
    }
  }
}

/* Takes the leaves from the slots of layers that nobody is using right now. */
static void unpin_slots(struct tp_pool *pool, struct tp_layer *holding) {
  struct cache *cache = &pool->cache;
  for (size_t i = 0; i < cache->bucket_count; i++) {
    for (struct record *r = cache->buckets[i]; r != NULL; r = r->hash_next) {
      struct tp_layer *layer = as_layer(r);
      if (r->kind != TP_MAP || layer == holding || layer->slots == NULL) continue;
      if (pthread_rwlock_trywrlock(&layer->lock) != 0) continue; /* against the lock order, so only if free */
      layer_drop_slots(layer);
      pthread_rwlock_unlock(&layer->lock);
    }
  }
}

/* Bounded work each time, or everybody would pay for what is dirty and cannot go before the next commit. */
void cache_trim(struct tp_pool *pool, struct tp_layer *holding) {
  struct cache *cache = &pool->cache;
  if (cache->bytes > cache->limit) {
    sweep(pool, SWEEP_BUCKETS + 4 * cache->inserted);
    /* If it is the slots that hold too much, they pay for it. */
    if (cache->bytes > cache->limit + cache->limit / 4 && ++cache->trims > TRIMS_PER_UNPIN) {
      cache->trims = 0;
      unpin_slots(pool, holding);
    }
  }
  cache->inserted = 0;
}

void cache_free_all(struct tp_pool *pool) {
  struct cache *cache = &pool->cache;
  for (size_t i = 0; i < cache->bucket_count; i++) {
    for (struct record *r = cache->buckets[i], *next; r != NULL; r = next) {
      next = r->hash_next;
      if (r->kind != TP_MAP) record_free(r);
      else if (r->pins == 0) record_free(r);
      else as_layer(r)->rec.hash_next = NULL; /* its handles free it */
    }
  }
  free(cache->buckets);
  *cache = (struct cache){0};
}

/* --- the frame of a stored record: docs/FORMAT.md, "Records" --- */

enum { HEAD = 16, CRC = 4 };

uint32_t record_crc(uint32_t kind, const uint8_t key[8], const uint8_t *body, size_t length) {
  uint8_t prefix[9] = {(uint8_t)kind};
  memcpy(prefix + 1, key, 8);
  return tp_crc32c(tp_crc32c(0, prefix, sizeof prefix), body, length);
}

int record_fetch(struct tp_pool *pool, uint32_t kind, uint64_t key, struct reader *out) {
  struct bytes *fetched = &pool->fetched;
  fetched->length = 0;
  bytes_reserve(fetched, 8192);
  uint64_t length = 0;
  pool->fetches++;
  int rc = pool->options.fetch(pool->options.ctx, kind, key, fetched->data, fetched->capacity, &length);
  if (rc == TP_ERANGE) {
    bytes_reserve(fetched, length);
    rc = pool->options.fetch(pool->options.ctx, kind, key, fetched->data, fetched->capacity, &length);
  }
  if (rc != TP_OK) return rc == TP_ENOENT ? TP_ENOENT : tp_error_record(rc, kind, key);
  uint8_t be[8];
  store_u64_be(be, key);
  if (length < CRC || load_u32(fetched->data) != record_crc(kind, be, fetched->data + CRC, length - CRC)) {
    return tp_error_record(TP_ECORRUPT, kind, key);
  }
  *out = (struct reader){.data = fetched->data, .length = length, .position = CRC};
  return TP_OK;
}

size_t record_begin(struct bytes *out, uint32_t kind, uint64_t key, bool deleted) {
  size_t begin = out->length;
  uint8_t *p = bytes_reserve(out, HEAD + CRC);
  memset(p, 0, HEAD + CRC);
  p[0] = (uint8_t)kind;
  p[1] = deleted;
  store_u64_be(p + 8, key);
  out->length += deleted ? HEAD : HEAD + CRC;
  return begin;
}

void record_end(struct bytes *out, size_t begin) {
  uint8_t *p = out->data + begin;
  size_t length = out->length - begin - HEAD;
  store_u32(p + 4, (uint32_t)length);
  store_u32(p + HEAD, record_crc(p[0], p + 8, p + HEAD + CRC, length - CRC));
}

void record_encode(struct tp_pool *pool, struct record *record) {
  if (record->dead) {
    record_begin(&pool->out, record->kind, record->key, true);
    return;
  }
  switch (record->kind) {
    case TP_NODE: node_encode(pool, as_node(record)); break;
    case TP_MAP: layer_encode(pool, as_layer(record)); break;
    case TP_CHECKSUM: checksums_encode(pool, as_checksums(record)); break;
    default: page_encode(pool, as_page(record)); break;
  }
}
