/* memory_store.c - records in a hash table; a commit is one critical section. */
#include "memory_store.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define BUCKETS 65536u

struct item {
  struct item *next;
  uint32_t kind;
  uint64_t key, length;
  uint8_t value[];
};

struct store {
  pthread_mutex_t mutex;        /* of the table; taken with the core's locks held, so nothing else is taken under it */
  pthread_mutex_t window_mutex; /* one extension at a time */
  tp_pool *pool;
  uint64_t commits;
  bool readers;
  struct item *buckets[BUCKETS];
};

struct store *store_new(void) {
  struct store *store = calloc(1, sizeof *store);
  pthread_mutex_init(&store->mutex, NULL);
  pthread_mutex_init(&store->window_mutex, NULL);
  return store;
}

void store_free(struct store *store) {
  for (unsigned b = 0; b < BUCKETS; b++) {
    for (struct item *item = store->buckets[b], *next; item != NULL; item = next) {
      next = item->next;
      free(item);
    }
  }
  free(store);
}

void store_attach(struct store *store, tp_pool *pool) { store->pool = pool; }

static struct item **find(struct store *store, uint32_t kind, uint64_t key) {
  struct item **link = &store->buckets[(key * 8 + kind) * 0x9E3779B97F4A7C15u >> 48];
  while (*link != NULL && ((*link)->kind != kind || (*link)->key != key)) link = &(*link)->next;
  return link;
}

static void put(struct store *store, uint32_t kind, uint64_t key, const uint8_t *value, uint64_t length) {
  struct item **link = find(store, kind, key), *old = *link;
  if (old != NULL) {
    *link = old->next;
    free(old);
  }
  if (value == NULL) return;
  struct item *item = malloc(sizeof *item + length);
  *item = (struct item){.kind = kind, .key = key, .length = length};
  memcpy(item->value, value, length);
  link = find(store, kind, key);
  item->next = *link;
  *link = item;
}

static int fetch(void *ctx, uint32_t kind, uint64_t key, void *buf, uint64_t capacity, uint64_t *length) {
  struct store *store = ctx;
  pthread_mutex_lock(&store->mutex);
  struct item *item = *find(store, kind, key);
  int rc = item == NULL ? TP_ENOENT : item->length > capacity ? TP_ERANGE : TP_OK;
  if (item != NULL) *length = item->length;
  if (rc == TP_OK) memcpy(buf, item->value, item->length);
  pthread_mutex_unlock(&store->mutex);
  return rc;
}

/* Puts a run of records as tp_encode gives them. */
static void put_records(struct store *store, const uint8_t *p, uint64_t length) {
  for (const uint8_t *end = p + length; p < end;) {
    uint32_t size;
    uint64_t key = 0;
    memcpy(&size, p + 4, 4);
    for (int i = 0; i < 8; i++) key = key << 8 | p[8 + i];
    put(store, p[0], key, p[1] ? NULL : p + 16, size);
    p += 16 + (p[1] ? 0 : size);
  }
}

static int commit(void *ctx) {
  struct store *store = ctx;
  uint64_t txn, length;
  const uint8_t *records;
  int rc = tp_freeze(store->pool, &txn);
  if (rc < 0) return rc;
  if ((rc = tp_sync(store->pool)) < 0) return rc;
  /* Encoding takes the core's mutex, which a fetch has before the store's: gather first, then store at once. */
  uint8_t *all = NULL;
  uint64_t total = 0;
  for (;;) {
    tp_encode(store->pool, &records, &length);
    if (length == 0) break;
    all = realloc(all, total + length);
    memcpy(all + total, records, length);
    total += length;
  }
  pthread_mutex_lock(&store->mutex);
  put_records(store, all, total);
  store->commits++;
  uint64_t oldest = store->readers && store->commits % 4 == 0 ? store->commits - 2 : UINT64_MAX;
  pthread_mutex_unlock(&store->mutex);
  free(all);
  return tp_release(store->pool, store->commits, oldest);
}

static int extend_window(void *ctx) {
  struct store *store = ctx;
  const uint8_t *record;
  uint64_t length;
  pthread_mutex_lock(&store->window_mutex);
  int rc = tp_window_plan(store->pool, &record, &length);
  if (rc == TP_OK) {
    pthread_mutex_lock(&store->mutex);
    put_records(store, record, length);
    pthread_mutex_unlock(&store->mutex);
    rc = tp_window_activate(store->pool);
  }
  pthread_mutex_unlock(&store->window_mutex);
  return rc;
}

void store_options(struct store *store, tp_options *options) {
  options->ctx = store;
  options->fetch = fetch;
  options->commit = commit;
  options->extend_window = extend_window;
}

void store_drop_window(struct store *store) { put(store, TP_STATE, 2, NULL, 0); }

void store_pretend_readers(struct store *store, bool pretend) { store->readers = pretend; }

uint64_t store_count(struct store *store, uint32_t kind) {
  uint64_t count = 0;
  for (unsigned b = 0; b < BUCKETS; b++) {
    for (struct item *item = store->buckets[b]; item != NULL; item = item->next) count += item->kind == kind;
  }
  return count;
}
