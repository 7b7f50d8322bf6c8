/* stress.h - what the parts of the thread stress share: the layout of layers, slots, random numbers, checks.
 *
 * Layers are 2 GiB and nearly empty: bytes are only ever written in REGIONS short regions that lie across the borders
 * of chunks, leaves and inner nodes, whatever the chunk size, so that few bytes exercise whole trees.
 */
#ifndef STRESS_H
#define STRESS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory_store.h"

enum { REGIONS = 8, REGION_BYTES = 128 << 10, OWNERS = 3, SHARED = 10 };
#define STRIDE ((uint64_t)256 << 20)
#define LAYER_BYTES (REGIONS * STRIDE + REGION_BYTES)

struct random {
  uint64_t state;
};

/* A layer that any thread may take a handle on. Its occupant is deleted and replaced only under the lock. */
struct slot {
  pthread_mutex_t lock;
  uint64_t id;         /* 0: empty */
  tp_layer *layer;     /* the slot's own handle; NULL for a layer that an owner published */
  uint32_t family;     /* tag of all words in it; 0: no tags, an owner's layer */
  bool sealed;
  uint64_t checksum;   /* of a sealed layer once somebody has read it; 0: not yet */
};

struct scenario {
  uint64_t chunk_size, capacity, seed;
  struct store *store;
  tp_pool *pool;
  int fd;
  _Atomic bool stop;
  _Atomic uint64_t next_id;
  _Atomic uint64_t operations, moved, merged; /* moved, merged: by compactions */
  struct slot owned[OWNERS], shared[SHARED];
};

struct worker { /* argument of a thread */
  struct scenario *scenario;
  struct random random;
  unsigned number;
};

#define CHECK(condition, ...)                                        \
  do {                                                               \
    if (!(condition)) {                                              \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      fprintf(stderr, __VA_ARGS__);                                  \
      fputc('\n', stderr);                                           \
      abort();                                                       \
    }                                                                \
  } while (0)

uint64_t random_next(struct random *random);
uint64_t random_below(struct random *random, uint64_t limit);
uint64_t region_start(unsigned region); /* address of its first byte */
bool is_over(int rc);                   /* the pool was stopped or closed under the thread */

/* A handle on the slot's layer, to be put; NULL if it is empty. *copy: the slot as it was. */
tp_layer *slot_take(struct scenario *scenario, struct slot *slot, struct slot *copy);

/* owners.c: threads that own a layer each and know every byte of it. */
struct owner;
struct owner *owner_new(struct scenario *scenario, unsigned number, uint64_t seed);
void *owner_run(void *owner);
void owner_reopen(struct owner *owner, tp_pool *pool); /* takes handles in a pool opened anew, and compares every byte */
void owner_put(struct owner *owner);
void owner_free(struct owner *owner);

/* sharers.c: threads on layers that all of them change at once. */
void shared_init(struct scenario *scenario);
void shared_put(struct scenario *scenario);
void checksum_regions(tp_layer *layer); /* of a sealed layer */
void shared_verify(struct scenario *scenario, tp_pool *pool); /* in a pool opened anew */
void *run_writer(void *worker);
void *run_reader(void *worker);
void *run_brancher(void *worker);
void *run_changer(void *worker);
void *run_walker(void *worker);
void *run_importer(void *worker);
void *run_merger(void *worker);
void *run_flusher(void *worker);
void *run_housekeeper(void *worker);

/* compactors.c */
void *run_compactor(void *worker);
void *run_putter_together(void *worker);

#endif
