/* pool.h - the pool and the layer in memory, and the locks.
 *
 * Locks, in the order they are taken:
 *   1. layer.lock (rwlock). Shared: I/O that changes no map (reads, overwriting in place), for as long as the I/O
 *      lasts. Exclusive: everything that changes the layer's map or state. So whoever holds it exclusively knows
 *      that no I/O on what the map named before is under way any more (I4). Two at once: in the order of addresses.
 *   2. pool.mutex: counts, space, cache, nodes, transactions. Never held during data I/O or a sync.
 * Callbacks: fetch is called under both; commit and extend_window under none of them.
 *
 * One thing about a map changes under the mutex alone: in which chunk its bytes lie (compact.c). Who looks at an entry without the mutex
 * reads each number in it once (entry_read, split_chunk_at), and what it finds holds the bytes until its layer's lock is given up.
 */
#ifndef TP_POOL_H
#define TP_POOL_H

#include <pthread.h>
#include <stdatomic.h>

#include "codec.h"
#include "metrics.h"
#include "throttle.h"
#include "node.h"
#include "space.h"

#define SLOT_COUNT 512u

enum layer_state { LAYER_WRITABLE, LAYER_SEALED, LAYER_DELETED, LAYER_CLOSED };

struct slot { /* a leaf of the layer, found without the mutex */
  uint64_t tag; /* leaf index + 1; 0: empty */
  struct node *leaf; /* pinned; NULL: the map has no leaf there */
};

struct tp_layer {
  struct record rec; /* key: layer id; pins: handles */
  struct tp_pool *pool;
  pthread_rwlock_t lock;
  enum layer_state state;
  _Atomic uint64_t size; /* bytes; changed under lock */
  uint64_t root;         /* node id, or 0 */
  unsigned height;       /* levels below and with the root; 0: no root */
  uint64_t mapped_refs;
  uint64_t epoch;        /* unique in the pool; a new one whenever something of the layer may have become shared */
  uint64_t next_chunk;   /* where to go on allocating */
  /* Bytes behind the end are zero in every committed state (I6), or growing would show them. So in the chunk in which the
   * durable size ends, nothing behind that is overwritten in place until the larger size is durable too. */
  _Atomic uint64_t durable_size;
  uint64_t stored_size;  /* as in the record that was encoded last */
  uint64_t tail_chunk;   /* chunk + 1 that takes what lies behind the end meanwhile: no committed state names it */
  _Atomic(struct limits *) limits; /* throttle.h; NULL: none was ever set */
  _Atomic uint64_t quota_chunks;   /* UINT64_MAX: none */
  struct slot *slots;    /* SLOT_COUNT, or NULL while unused */
  _Atomic(struct layer_metrics *) metrics; /* NULL: no traffic since it was opened */
};

struct tp_pool {
  pthread_mutex_t mutex; /* recursive: what the fetch callback sets free may be handles of this pool (tp_layer_put). Waited with only where it is taken once */
  pthread_mutex_t resizing; /* one tp_layer_resize at a time; taken before all others */
  pthread_mutex_t compacting; /* a step of a compaction: taken before all others, and by whoever stops or closes the pool */
  bool compacted;             /* there is a compaction; under the mutex */
  pthread_cond_t committed; /* a commit ended; or, of a pool that is being closed, a punch */
  pthread_cond_t work;      /* for tp_wait_work */
  pthread_cond_t room;      /* there may be some, for who waits for it */
  _Atomic uint64_t patience_ns; /* how long writers of devices do; 0: not at all */
  uint64_t waiting_writers;     /* that wait there; under the mutex */
  tp_options options;
  tp_disk disk;
  struct file_disk { int fd; } file_disk;
  _Atomic bool unsynced;    /* the data file has changed since the last sync began; set once a change is done */
  pthread_mutex_t syncing;  /* one sync at a time: who waits for it may find that it was his too. Taken with no other lock held */
  unsigned chunk_shift;     /* log2 of chunk_size */
  unsigned blocks;          /* per chunk */
  uint64_t handles;         /* of the pool and its layers: the memory goes with the last one */
  _Atomic int failed;       /* tp_error of the error mode; 0: none */
  int failed_errno;         /* of the host, where that was it */
  _Atomic bool stopped;     /* about to close: no more changes, commits go on */
  _Atomic bool closed;
  _Atomic bool refused;     /* the host had no room for the last bytes that needed some, by its disk or a quota on it, and has not got any back since */
  bool awake;               /* tp_wake was called */

  struct cache cache;
  struct space space;
  uint64_t next_node;       /* id */
  uint64_t next_epoch;
  struct { uint64_t *ids; size_t count, capacity; bool changed; } reclaim; /* a stack of nodes with count 1, ours */

  uint64_t txn, durable_txn;  /* the open one; the last durable one */
  bool committing;            /* somebody leads a commit */
  unsigned punching;          /* so many are at it, without the mutex */
  bool freezing;              /* frozen records wait for tp_release */
  bool state_dirty;           /* counters changed without a record */
  struct record_list dirty, frozen;
  size_t encoded;             /* how many of frozen tp_encode has done */
  struct bytes out, handed;   /* records encoded; given to the store */
  struct bytes fetched;
  pthread_mutex_t limiting; /* of all layers' limits; taken with no other lock held */
  pthread_cond_t limits_changed;
  _Atomic bool unlimited;   /* about to close */
  struct redo *redo; /* redo.h; NULL: none */
  bool noting;       /* changes are noted in it */

  _Atomic uint64_t splits, in_place, first_writes, window_waits, fetches;
  struct pool_metrics metrics;
};

static inline uint64_t chunk_size(const struct tp_pool *pool) { return (uint64_t)1 << pool->chunk_shift; }

/* After each change of the data file. A sync that began meanwhile has covered it, or finds the mark. */
static inline void pool_mark_unsynced(struct tp_pool *pool) {
  if (!pool->unsynced) pool->unsynced = true;
}

/* A record is the head of its struct. */
static inline struct page *as_page(struct record *r) { return (struct page *)r; }
static inline struct node *as_node(struct record *r) { return (struct node *)r; }
static inline struct tp_layer *as_layer(struct record *r) { return (struct tp_layer *)r; }

void pool_unref(struct tp_pool *pool); /* mutex held on entry, not on return */
static inline bool pool_is_dirty(const struct tp_pool *pool) { return pool->dirty.count > 0 || pool->state_dirty; }
/* More is dirty than memory should hold, or freed than tp_release should do at once: commit before going on. */
#define FREED_PER_COMMIT ((uint64_t)1 << 17)
bool redo_is_full(const struct tp_pool *pool); /* redo.c */
static inline bool pool_is_overdue(const struct tp_pool *pool) {
  return pool->dirty.count * sizeof(struct node) > pool->cache.limit / 2 || pool->space.freed_now > FREED_PER_COMMIT ||
         redo_is_full(pool);
}

/* The piece of a chunk reaches behind the durable end of the layer. */
static inline bool layer_is_past_end(const struct tp_layer *layer, uint64_t index, uint64_t offset, uint64_t length) {
  uint64_t end = layer->durable_size;
  return index == end >> layer->pool->chunk_shift && (index << layer->pool->chunk_shift) + offset + length > end;
}

/* The counts cannot be right: error mode, so that the transaction that this came up in is never stored. Mutex held. Returns TP_ECORRUPT, set. */
int pool_damaged(struct tp_pool *pool, uint32_t kind, uint64_t key); /* txn.c */

/* layer.c */
void layer_free(struct tp_layer *layer);
void layer_encode(struct tp_pool *pool, struct tp_layer *layer);
void layer_release(struct tp_layer *layer); /* its stored record is durable */
void layer_drop_slots(struct tp_layer *layer); /* mutex held; lock held exclusively, or no handle is left */
int layer_check(const struct tp_layer *layer, bool writing); /* lock held: TP_OK, or why not */
int pool_check_change(const struct tp_pool *pool); /* mutex held: TP_OK, or why no map may change */

#endif
