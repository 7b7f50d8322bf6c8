/* stress.c - threads on shared layers: stress [SEED] [SECONDS]. Made to run under the sanitizers; exit status 0: all was right.
 *
 * Each writer has a layer of its own, the head of a family. Every 8 bytes ever written say family, block and a serial number, so a
 * reader anywhere can tell what does not belong there (I6). Others take snapshots of the heads, clone them, write to the
 * clones, reset and delete them, and check that a snapshot never changes (I7), while everything else goes on: flushes,
 * window extensions, reclaiming, punching, walks, and a cache so small that it evicts all the time. At the end the pool is opened anew
 * over the stored records: the heads are as they were (I5), and after deleting all, nothing is left (I1 to I3).
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "memory_store.h"

#define FAMILIES 3u
#define BLOCK 4096u
#define LAYER_BYTES ((uint64_t)12 << 20)
#define WORDS (BLOCK / 8)

static struct {
  tp_pool *pool;
  struct store *store;
  tp_layer *heads[FAMILIES];
  atomic_bool stop;
  atomic_uint_fast64_t next_id, serial, operations;
} world;

#define MUST(call) must((call), #call, __LINE__)
static int must(int rc, const char *what, int line) {
  if (rc >= 0) return rc;
  fprintf(stderr, "line %d: %s: error %d\n", line, what, rc);
  abort();
}

struct role {
  pthread_t thread;
  unsigned seed, family;
};

static unsigned roll(struct role *role, unsigned n) { return (unsigned)rand_r(&role->seed) % n; }

static uint64_t word_at(unsigned family, uint64_t offset, uint64_t serial) {
  return (uint64_t)(family + 1) << 56 | (offset / BLOCK & 0xffffff) << 32 | (serial & 0xffffffff);
}

static void fill(uint64_t *words, unsigned family, uint64_t offset, uint64_t length) {
  uint64_t serial = atomic_fetch_add(&world.serial, 1);
  for (uint64_t k = 0; k < length / 8; k++) words[k] = word_at(family, offset + k * 8, serial);
}

static void verify(const uint64_t *words, unsigned family, uint64_t offset, uint64_t length) {
  for (uint64_t k = 0; k < length / 8; k++) {
    if (words[k] == 0 || words[k] >> 32 == word_at(family, offset + k * 8, 0) >> 32) continue;
    fprintf(stderr, "family %u, offset %llu: found %016llx\n", family, (unsigned long long)(offset + k * 8),
            (unsigned long long)words[k]);
    abort();
  }
}

/* A range of up to 40 KiB, of whole blocks or ragged. */
static uint64_t range(struct role *role, uint64_t *offset) {
  uint64_t unit = roll(role, 2) ? BLOCK : 8, length = unit * (1 + roll(role, (unsigned)(40960 / unit)));
  *offset = (uint64_t)roll(role, (unsigned)(LAYER_BYTES / unit)) * unit;
  return *offset + length > LAYER_BYTES ? LAYER_BYTES - *offset : length;
}

static _Thread_local uint64_t buffer[40960 / 8] __attribute__((aligned(4096)));

static void write_some(struct role *role, tp_layer *layer, unsigned family) {
  uint64_t offset, length = range(role, &offset);
  if (roll(role, 8) == 0) {
    MUST(tp_discard(layer, offset, length));
  } else {
    fill(buffer, family, offset, length);
    MUST(tp_write(layer, buffer, length, offset));
  }
}

static void read_some(struct role *role, tp_layer *layer, unsigned family) {
  uint64_t offset, length = range(role, &offset);
  MUST(tp_read(layer, buffer, length, offset));
  verify(buffer, family, offset, length);
}

static uint32_t checksum(tp_layer *layer, unsigned family) {
  uint32_t crc = 0;
  for (uint64_t offset = 0; offset < LAYER_BYTES; offset += 32768) {
    MUST(tp_read(layer, buffer, 32768, offset));
    verify(buffer, family, offset, 32768);
    crc = tp_crc32c(crc, buffer, 32768);
  }
  return crc;
}

static void *writer(void *arg) {
  struct role *role = arg;
  while (!world.stop) {
    write_some(role, world.heads[role->family], role->family);
    atomic_fetch_add(&world.operations, 1);
  }
  return NULL;
}

static void *reader(void *arg) {
  struct role *role = arg;
  while (!world.stop) {
    unsigned family = roll(role, FAMILIES);
    read_some(role, world.heads[family], family);
  }
  return NULL;
}

/* Snapshot, clone, write, compare, reset, delete: in either order. */
static void *brancher(void *arg) {
  struct role *role = arg;
  while (!world.stop) {
    unsigned family = roll(role, FAMILIES);
    tp_layer *head = world.heads[family], *snapshot, *clone;
    MUST(tp_layer_branch(head, world.next_id++, LAYER_BYTES, 1, &snapshot));
    uint32_t crc = checksum(snapshot, family);
    MUST(tp_layer_branch(roll(role, 2) ? snapshot : head, world.next_id++, LAYER_BYTES + roll(role, 2) * 100000, 0, &clone));
    for (unsigned n = roll(role, 60); n > 0; n--) {
      write_some(role, clone, family);
      read_some(role, clone, family);
    }
    if (roll(role, 2)) {
      MUST(tp_layer_reset(clone, snapshot));
      if (checksum(clone, family) != crc) abort();
    }
    if (roll(role, 3) == 0) MUST(tp_layer_resize(clone, LAYER_BYTES / 2 + roll(role, 9999)));
    if (tp_write(snapshot, buffer, 8, 0) != TP_ESEALED) abort();
    if (roll(role, 2)) MUST(tp_layer_delete(clone));
    if (checksum(snapshot, family) != crc) abort();
    MUST(tp_layer_delete(snapshot));
    tp_layer_delete(clone);
    if (tp_read(clone, buffer, 8, 0) != TP_EDELETED) abort();
    tp_layer_put(snapshot);
    tp_layer_put(clone);
  }
  return NULL;
}

static void *flusher(void *arg) {
  struct role *role = arg;
  while (!world.stop) {
    MUST(tp_flush(world.pool));
    usleep(roll(role, 20000));
    if (roll(role, 4) == 0) tp_revoke(world.pool);
  }
  return NULL;
}

static void *walker(void *arg) {
  struct role *role = arg;
  tp_extent extents[64];
  while (!world.stop) {
    tp_layer *a = world.heads[roll(role, FAMILIES)], *b = world.heads[roll(role, FAMILIES)];
    uint64_t cursor = 0, chunks;
    while (MUST((int)tp_extents(a, &cursor, extents, 64)) > 0) continue;
    cursor = 0;
    while (MUST((int)tp_diff(a, b, &cursor, extents, 64)) > 0) continue;
    MUST(tp_exclusive(a, &chunks));
    tp_layer_info info;
    MUST(tp_layer_get_info(b, &info));
  }
  return NULL;
}

static void *housekeeper(void *arg) {
  tp_options options = {0};
  store_options(world.store, &options);
  (void)arg;
  while (!world.stop) {
    int work = tp_wait_work(world.pool, 20);
    if (work & TP_WORK_WINDOW) options.extend_window(options.ctx);
    if (work & TP_WORK_RECLAIM) MUST(tp_reclaim(world.pool, 1000));
    if (work & TP_WORK_PUNCH) MUST(tp_punch(world.pool, 1 << 20));
    if (work & TP_WORK_OVERDUE) MUST(tp_flush(world.pool));
  }
  return NULL;
}

static void open_pool(int fd, uint64_t chunk_size) {
  tp_options options = {.chunk_size = chunk_size, .cache_bytes = 200000, .window_bytes = 1, .data_fd = fd};
  store_options(world.store, &options);
  MUST(tp_pool_open(&options, &world.pool));
  store_attach(world.store, world.pool);
}

static void close_pool(void) {
  tp_pool_stop(world.pool);
  MUST(tp_flush(world.pool));
  store_drop_window(world.store);
  tp_pool_close(world.pool);
  for (unsigned f = 0; f < FAMILIES; f++) tp_layer_put(world.heads[f]);
  tp_pool_put(world.pool);
}

static void run_threads(unsigned seed, unsigned seconds) {
  void *(*const roles[])(void *) = {writer, writer, writer, reader, reader, brancher, brancher, flusher, walker, housekeeper};
  struct role threads[sizeof roles / sizeof *roles];
  world.stop = false;
  for (unsigned k = 0; k < sizeof roles / sizeof *roles; k++) {
    threads[k] = (struct role){.seed = seed * 100 + k, .family = k % FAMILIES};
    pthread_create(&threads[k].thread, NULL, roles[k], &threads[k]);
  }
  sleep(seconds);
  world.stop = true;
  tp_wake(world.pool);
  for (unsigned k = 0; k < sizeof roles / sizeof *roles; k++) pthread_join(threads[k].thread, NULL);
}

static void empty_pool(void) {
  for (unsigned f = 0; f < FAMILIES; f++) MUST(tp_layer_delete(world.heads[f]));
  while (MUST(tp_reclaim(world.pool, 10000)) == 1) MUST(tp_flush(world.pool));
  MUST(tp_flush(world.pool));
  while (MUST(tp_punch(world.pool, UINT64_MAX)) == 1) continue;
  MUST(tp_flush(world.pool));
  tp_pool_info info;
  tp_pool_get_info(world.pool, &info);
  if (info.allocated_chunks || info.dirty_chunks || info.pending_chunks || info.reclaim_nodes ||
      store_count(world.store, TP_NODE) || store_count(world.store, TP_NODE_PAGE) || store_count(world.store, TP_MAP)) {
    fprintf(stderr, "left after deleting everything: %llu chunks, %llu dirty, %llu pending\n",
            (unsigned long long)info.allocated_chunks, (unsigned long long)info.dirty_chunks,
            (unsigned long long)info.pending_chunks);
    abort();
  }
}

static void scenario(unsigned seed, unsigned seconds, uint64_t chunk_size) {
  char path[] = "stress-XXXXXX";
  int fd = mkstemp(path);
  MUST(fd);
  unlink(path);
  world.store = store_new();
  world.next_id = 1;
  open_pool(fd, chunk_size);
  for (unsigned f = 0; f < FAMILIES; f++) MUST(tp_layer_create(world.pool, world.next_id++, LAYER_BYTES, &world.heads[f]));
  run_threads(seed, seconds);
  uint32_t crc[FAMILIES];
  for (unsigned f = 0; f < FAMILIES; f++) crc[f] = checksum(world.heads[f], f);
  close_pool();
  open_pool(fd, chunk_size);
  for (unsigned f = 0; f < FAMILIES; f++) {
    MUST(tp_layer_get(world.pool, f + 1, &world.heads[f]));
    if (checksum(world.heads[f], f) != crc[f]) abort();
  }
  empty_pool();
  close_pool();
  store_free(world.store);
  close(fd);
}

int main(int argc, char **argv) {
  unsigned seed = argc > 1 ? (unsigned)atoi(argv[1]) : (unsigned)time(NULL);
  unsigned seconds = argc > 2 ? (unsigned)atoi(argv[2]) : 10;
  static const uint64_t chunk_sizes[] = {16384, 65536, 4096};
  printf("seed %u\n", seed);
  for (unsigned k = 0; k < 3; k++) {
    world.operations = 0;
    scenario(seed + k, seconds / 3 + 1, chunk_sizes[k]);
    printf("chunks of %llu bytes: %llu writes, all well\n", (unsigned long long)chunk_sizes[k],
           (unsigned long long)world.operations);
  }
  return 0;
}
