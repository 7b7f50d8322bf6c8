/* record.h - what nodes, pages and layers have in common: each is the memory form of one stored record.
 *
 * Life of a record (all flags are under the pool's mutex):
 *
 *            record_touch            tp_freeze             tp_encode          tp_release
 *   clean ----------------> dirty -------------> frozen -------------> storing ---------> clean
 *                             ^                    | record_touch: encoded at once, then dirty again
 *                             +--------------------+
 *
 * A record that is dirty, frozen or storing is newer than the store's copy, so it stays in memory; so does a
 * pinned one. Everything else may be dropped by cache_trim and fetched again: shared nodes never change, and the
 * rest changes only here.
 */
#ifndef TP_RECORD_H
#define TP_RECORD_H

#include "common.h"

struct record {
  uint32_t kind; /* tp_kind */
  uint32_t pins; /* slots, handles and window places that point here */
  uint64_t key;
  struct record *hash_next;
  bool dirty, frozen, storing;
  bool dead;       /* its stored form is to be deleted; no longer in the cache */
  bool referenced; /* used since the trimmer's hand last passed */
};

struct record_list {
  struct record **items;
  size_t count, capacity;
};

struct cache {
  struct record **buckets;
  size_t bucket_count, record_count, hand;
  size_t inserted;       /* since the last trim: what it should at least make up for */
  unsigned trims;        /* since the slots were last looked at */
  uint64_t bytes, limit; /* of the records in the cache */
};

struct tp_pool;

static inline bool record_is_newer(const struct record *r) { return r->dirty || r->frozen || r->storing; }

void record_list_push(struct record_list *list, struct record *record);

/* Call before changing a record: it will be part of the open transaction. Mutex held. */
void record_touch(struct tp_pool *pool, struct record *record);
/* The record is no more: its stored form goes with the next commit, its memory with tp_release. Mutex held. */
void record_kill(struct tp_pool *pool, struct record *record);

struct record *cache_find(struct tp_pool *pool, uint32_t kind, uint64_t key);
void cache_insert(struct tp_pool *pool, struct record *record);
void cache_remove(struct tp_pool *pool, struct record *record);
/* Brings the cache below its limit, as far as unpinned clean records allow. Only between operations: a pointer to
 * an unpinned record does not survive it. Mutex held; `holding`: the layer whose lock the caller has, or NULL. */
struct tp_layer;
void cache_trim(struct tp_pool *pool, struct tp_layer *holding);
void cache_free_all(struct tp_pool *pool);

/* Fetches a stored value into pool->fetched and checks its CRC; returns a reader on what follows it. TP_ENOENT
 * where there is none. Mutex held. */
struct reader;
int record_fetch(struct tp_pool *pool, uint32_t kind, uint64_t key, struct reader *out);
/* The checksum of a stored record; key as stored. */
uint32_t record_crc(uint32_t kind, const uint8_t key[8], const uint8_t *body, size_t length);
/* Frames a value for the store: begin, append the body to pool->out, end fills in length and CRC. */
size_t record_begin(struct bytes *out, uint32_t kind, uint64_t key, bool deleted);
void record_end(struct bytes *out, size_t begin);
void record_encode(struct tp_pool *pool, struct record *record);

#endif
