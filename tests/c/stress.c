/* stress.c - many threads on one pool, for the sanitizers and for the invariants: stress [seed] [seconds]
 *
 * Per chunk size: threads run for a while, the pool is stopped under them as a closing program does it, committed and
 * closed; a second pool over the same records and file must then hold every byte that is known. At last all maps go,
 * and no chunk and no node may be left over (I1 to I3). A seed fixes each thread's choices, not how they interleave.
 */
#include "stress.h"

#include <fcntl.h>
#include <unistd.h>

uint64_t random_next(struct random *random) {
  uint64_t x = random->state += 0x9E3779B97F4A7C15u; /* splitmix64 */
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

uint64_t random_below(struct random *random, uint64_t limit) { return random_next(random) % limit; }
uint64_t region_start(unsigned region) { return (region + 1) * STRIDE - REGION_BYTES / 2; }
bool is_over(int rc) { return rc == TP_ECLOSED; }

tp_layer *slot_take(struct scenario *scenario, struct slot *slot, struct slot *copy) {
  tp_layer *layer = NULL;
  pthread_mutex_lock(&slot->lock);
  *copy = *slot;
  if (slot->id != 0 && tp_layer_get(scenario->pool, slot->id, &layer) != TP_OK) layer = NULL;
  pthread_mutex_unlock(&slot->lock);
  return layer;
}

static void open_pool(struct scenario *scenario) {
  tp_options options = {.chunk_size = scenario->chunk_size, .capacity = scenario->capacity, .data_fd = scenario->fd,
                        .window_bytes = 1, .verify_reads = scenario->chunk_size < 1 << 20, .cache_bytes = 256 << 10}; /* so little that records are dropped all the time */
  store_options(scenario->store, &options);
  int rc = tp_pool_open(&options, &scenario->pool);
  CHECK(rc == TP_OK, "open: %d", rc);
  store_attach(scenario->store, scenario->pool);
}

static void *(*const ROLES[])(void *) = {run_writer, run_writer, run_reader,  run_reader,  run_brancher,
                                         run_changer, run_walker, run_importer, run_merger, run_flusher, run_housekeeper,
                                         run_compactor, run_putter_together};
enum { ROLE_COUNT = sizeof ROLES / sizeof *ROLES };

static void run_threads(struct scenario *scenario, struct owner **owners, unsigned seconds) {
  pthread_t threads[OWNERS + ROLE_COUNT];
  struct worker workers[ROLE_COUNT];
  for (unsigned k = 0; k < OWNERS; k++) pthread_create(&threads[k], NULL, owner_run, owners[k]);
  for (unsigned k = 0; k < ROLE_COUNT; k++) {
    workers[k] = (struct worker){scenario, {scenario->seed * 1000 + k}, k};
    pthread_create(&threads[OWNERS + k], NULL, ROLES[k], &workers[k]);
  }
  sleep(seconds);
  tp_pool_stop(scenario->pool);
  scenario->stop = true;
  for (unsigned k = 0; k < OWNERS + ROLE_COUNT; k++) pthread_join(threads[k], NULL);
}

static void close_pool(struct scenario *scenario, struct owner **owners) {
  tp_pool_stop(scenario->pool);
  int rc = tp_flush(scenario->pool);
  CHECK(rc == TP_OK, "last flush: %d", rc);
  store_drop_window(scenario->store);
  tp_pool_close(scenario->pool);
  for (unsigned k = 0; k < OWNERS; k++) owner_put(owners[k]);
  shared_put(scenario);
  tp_pool_put(scenario->pool);
}

/* Every layer that the store has goes; what is left of the counts then is a leak. */
static void delete_all(struct scenario *scenario) {
  for (uint64_t id = 1; id < scenario->next_id; id++) {
    tp_layer *layer;
    if (tp_layer_get(scenario->pool, id, &layer) != TP_OK) continue;
    (void)tp_layer_delete(layer);
    tp_layer_put(layer);
  }
  int rc = 1;
  while (rc == 1) {
    rc = tp_reclaim(scenario->pool, 1000);
    CHECK(rc >= 0 && tp_flush(scenario->pool) == TP_OK, "reclaim: %d", rc);
  }
  while (tp_punch(scenario->pool, UINT64_MAX) == 1) continue;
  CHECK(tp_flush(scenario->pool) == TP_OK, "flush");
  tp_pool_info info;
  tp_pool_get_info(scenario->pool, &info);
  CHECK(info.allocated_chunks == 0, "%lu chunks leaked", info.allocated_chunks);
  CHECK(info.dirty_chunks == 0 && info.pending_chunks == 0, "%lu dirty, %lu pending", info.dirty_chunks, info.pending_chunks);
  for (uint32_t kind = TP_NODE; kind <= TP_MAP; kind++) {
    if (kind == TP_CHUNK_PAGE || kind == TP_SUMMARY) continue; /* they say what is clean */
    CHECK(store_count(scenario->store, kind) == 0, "records of kind %u left", kind);
  }
  CHECK(store_count(scenario->store, TP_CHECKSUM) == 0, "checksums left");
}

static void run(uint64_t chunk_size, uint64_t capacity, uint64_t seed, unsigned seconds) {
  static struct scenario scenario;
  struct owner *owners[OWNERS];
  char path[] = "/tmp/thinpool-stress-XXXXXX";
  scenario = (struct scenario){.chunk_size = chunk_size, .capacity = capacity, .seed = seed, .next_id = 1};
  scenario.fd = mkstemp(path);
  CHECK(scenario.fd >= 0, "cannot make %s", path);
  unlink(path);
  scenario.store = store_new();
  store_pretend_readers(scenario.store, true);
  for (unsigned k = 0; k < OWNERS; k++) pthread_mutex_init(&scenario.owned[k].lock, NULL);
  for (unsigned k = 0; k < SHARED; k++) pthread_mutex_init(&scenario.shared[k].lock, NULL);
  open_pool(&scenario);
  for (unsigned k = 0; k < OWNERS; k++) owners[k] = owner_new(&scenario, k, seed * 77 + k);
  shared_init(&scenario);
  run_threads(&scenario, owners, seconds);
  close_pool(&scenario, owners);
  store_pretend_readers(scenario.store, false);
  open_pool(&scenario);
  for (unsigned k = 0; k < OWNERS; k++) owner_reopen(owners[k], scenario.pool);
  shared_verify(&scenario, scenario.pool);
  delete_all(&scenario);
  close_pool(&scenario, owners);
  for (unsigned k = 0; k < OWNERS; k++) owner_free(owners[k]);
  store_free(scenario.store);
  close(scenario.fd);
  printf("stress: chunks of %lu bytes, %lu operations; %lu chunks moved, %lu entries merged\n", chunk_size, (uint64_t)scenario.operations,
         (uint64_t)scenario.moved, (uint64_t)scenario.merged);
}

int main(int argc, char **argv) {
  uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
  unsigned seconds = argc > 2 ? (unsigned)atoi(argv[2]) : 10;
  printf("stress: seed %lu\n", seed);
  fflush(stdout);
  run(64 << 10, 0, seed, (seconds + 2) / 3);
  run(4 << 10, 0, seed, (seconds + 2) / 3);
  run(1 << 20, 160 << 20, seed, (seconds + 2) / 3); /* runs out of space now and then */
  return 0;
}
