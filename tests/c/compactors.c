/* compactors.c - a thread that moves chunks down and cuts the file off, and one that merges split entries, under all the others. */
#include "stress.h"

#include <unistd.h>

static bool may_fail(int rc) { return rc == TP_ENOSPC || rc == TP_EDELETED || is_over(rc); }

static void compact(struct worker *worker, tp_options *options) {
  struct scenario *scenario = worker->scenario;
  tp_pool_info info;
  tp_compaction *compaction;
  uint64_t total, moved = 0;
  tp_pool_get_info(scenario->pool, &info);
  uint64_t ceiling = 1 + random_below(&worker->random, info.allocated_chunks * 3 / 2 + 1); /* often too low for all that there is */
  if (random_below(&worker->random, 4) == 0) ceiling = 0;
  int rc = tp_compact_begin(scenario->pool, ceiling, &compaction, &total);
  CHECK(rc == TP_OK || is_over(rc), "begin to compact: %d", rc);
  if (rc != TP_OK) return;
  rc = 1;
  while (rc == 1 && !(random_below(&worker->random, 64) == 0)) rc = tp_compact_step(compaction, &moved);
  CHECK(rc >= 0 || may_fail(rc), "compact: %d", rc);
  scenario->moved += moved;
  if (rc >= 0) rc = options->extend_window(options->ctx);
  if (rc >= 0) rc = tp_shrink(scenario->pool);
  CHECK(rc >= 0 || may_fail(rc), "shrink: %d", rc);
  tp_compact_end(compaction);
}

void *run_compactor(void *argument) {
  struct worker *worker = argument;
  tp_options options = {0};
  store_options(worker->scenario->store, &options);
  while (!worker->scenario->stop) {
    compact(worker, &options);
    usleep(1000);
  }
  return NULL;
}

void *run_putter_together(void *argument) {
  struct worker *worker = argument;
  struct scenario *scenario = worker->scenario;
  while (!scenario->stop) {
    uint64_t k = random_below(&worker->random, OWNERS + SHARED), cursor = 0, merged = 0;
    struct slot copy;
    tp_layer *layer = slot_take(scenario, k < OWNERS ? &scenario->owned[k] : &scenario->shared[k - OWNERS], &copy);
    int rc = layer == NULL ? TP_OK : 1;
    while (rc == 1) rc = tp_layer_merge(layer, &cursor, &merged);
    CHECK(rc == TP_OK || may_fail(rc), "merge: %d", rc);
    tp_layer_put(layer);
    scenario->merged += merged;
    usleep(2000);
  }
  return NULL;
}
