/* sharers.c - threads that change the same layers at once. Every aligned 8-byte word that they write says which family
 * of layers it belongs to and at which address it stands, so that foreign, moved or torn data shows in any read; sealed
 * layers keep a checksum. */
#include "stress.h"

#include <unistd.h>

#define WORD(family, sequence, address) \
  ((uint64_t)(family) << 48 | ((sequence)&0x3ffff) << 30 | (uint64_t)(address) / 8)

static bool is_expected(int rc) {
  return rc >= 0 || rc == TP_EDELETED || rc == TP_ESEALED || rc == TP_ERANGE || rc == TP_ENOSPC || is_over(rc);
}

static struct slot *any_slot(struct worker *worker) {
  uint64_t k = random_below(&worker->random, OWNERS + SHARED);
  return k < OWNERS ? &worker->scenario->owned[k] : &worker->scenario->shared[k - OWNERS];
}

static struct slot *any_shared(struct worker *worker) {
  return &worker->scenario->shared[random_below(&worker->random, SHARED)];
}

static uint64_t read_region(tp_layer *layer, const struct slot *slot, unsigned region, uint64_t sum, int *rc) {
  static _Thread_local uint64_t words[REGION_BYTES / 8];
  uint64_t start = region_start(region), size = tp_layer_size(layer);
  if (start >= size) return sum;
  uint64_t length = size - start < REGION_BYTES ? size - start : REGION_BYTES;
  *rc = tp_read(layer, words, length, start);
  CHECK(is_expected(*rc), "read of layer %lu: %d", slot->id, *rc);
  for (uint64_t k = 0; *rc == TP_OK && k < length / 8; k++) {
    sum = (sum ^ words[k]) * 0x9E3779B97F4A7C15u + 1;
    if (slot->family == 0 || words[k] == 0) continue;
    bool right = words[k] >> 48 == slot->family && (words[k] & 0x3fffffff) == start / 8 + k;
    CHECK(right, "layer %lu of family %u at %lu: %016lx", slot->id, slot->family, start + k * 8, words[k]);
  }
  return sum;
}

static uint64_t checksum(tp_layer *layer, const struct slot *slot, int *rc) {
  uint64_t sum = 1;
  *rc = TP_OK;
  for (unsigned r = 0; r < REGIONS && *rc == TP_OK; r++) sum = read_region(layer, slot, r, sum, rc);
  return sum;
}

void *run_reader(void *argument) {
  struct worker *worker = argument;
  while (!worker->scenario->stop) {
    struct slot copy, *slot = any_slot(worker);
    tp_layer *layer = slot_take(worker->scenario, slot, &copy);
    if (layer == NULL) continue;
    int rc = TP_OK;
    if (!copy.sealed) {
      read_region(layer, &copy, (unsigned)random_below(&worker->random, REGIONS), 1, &rc);
    } else {
      uint64_t sum = checksum(layer, &copy, &rc);
      pthread_mutex_lock(&slot->lock);
      if (rc == TP_OK && slot->id == copy.id) {
        CHECK(slot->checksum == 0 || slot->checksum == sum, "sealed layer %lu has changed", copy.id); /* I7 */
        slot->checksum = sum;
      }
      pthread_mutex_unlock(&slot->lock);
    }
    tp_layer_put(layer);
    worker->scenario->operations++;
  }
  return NULL;
}

void *run_writer(void *argument) {
  struct worker *worker = argument;
  uint64_t *words = malloc(REGION_BYTES);
  for (uint64_t sequence = 0; !worker->scenario->stop; sequence++) {
    struct slot copy;
    tp_layer *layer = slot_take(worker->scenario, any_shared(worker), &copy);
    if (layer == NULL) continue;
    uint64_t unit = random_below(&worker->random, 2) ? 4096 : 8;
    uint64_t length = (1 + random_below(&worker->random, (64 << 10) / unit)) * unit;
    uint64_t within = random_below(&worker->random, (REGION_BYTES - length) / unit + 1) * unit;
    uint64_t address = region_start((unsigned)random_below(&worker->random, REGIONS)) + within;
    for (uint64_t k = 0; k < length; k += 8) words[k / 8] = WORD(copy.family, sequence, address + k);
    bool discard = random_below(&worker->random, 8) == 0;
    int rc = discard || copy.family == 0 ? tp_discard(layer, address, length) : tp_write(layer, words, length, address);
    CHECK(is_expected(rc) && !(copy.sealed && rc == TP_OK), "write to layer %lu: %d", copy.id, rc);
    tp_layer_put(layer);
    worker->scenario->operations++;
  }
  free(words);
  return NULL;
}

/* Slot locked: deletes the occupant, which then must be gone for everybody, and puts in another. */
static void replace(struct scenario *scenario, struct slot *slot, tp_layer *layer, uint64_t id, uint32_t family, bool sealed) {
  if (slot->layer != NULL) {
    int rc = tp_layer_delete(slot->layer);
    CHECK(rc == TP_OK || is_over(rc), "delete: %d", rc);
    tp_layer *again;
    if (rc == TP_OK) CHECK(tp_layer_get(scenario->pool, slot->id, &again) < 0, "layer %lu is back", slot->id);
    tp_layer_put(slot->layer);
  }
  slot->layer = layer, slot->id = id, slot->family = family, slot->sealed = sealed, slot->checksum = 0;
}

void checksum_regions(tp_layer *layer) {
  for (unsigned region = 0; region < REGIONS; region++) {
    int rc = tp_layer_checksum(layer, region_start(region), REGION_BYTES);
    CHECK(rc == TP_OK || rc == TP_ERANGE || is_over(rc), "checksums: %d", rc);
  }
}

/* Snapshots, clones, new layers, and the deletion of what was there; snapshots get checksums. */
void *run_brancher(void *argument) {
  struct worker *worker = argument;
  struct scenario *scenario = worker->scenario;
  while (!scenario->stop) {
    struct slot copy = {0}, *to = any_shared(worker);
    bool fresh = random_below(&worker->random, 8) == 0, sealed = !fresh && random_below(&worker->random, 2);
    tp_layer *from = fresh ? NULL : slot_take(scenario, any_slot(worker), &copy), *layer = NULL;
    if (!fresh && from == NULL) continue;
    uint64_t id = scenario->next_id++;
    int rc = fresh ? tp_layer_create(scenario->pool, id, LAYER_BYTES, &layer)
                   : tp_layer_branch(from, id, LAYER_BYTES, sealed, &layer);
    CHECK(is_expected(rc), "branch: %d", rc);
    if (rc == TP_OK && sealed) checksum_regions(layer);
    tp_layer_put(from);
    if (rc == TP_OK) {
      pthread_mutex_lock(&to->lock);
      replace(scenario, to, layer, id, fresh ? (uint32_t)(id & 0xffff) | 1 : copy.family, sealed);
      pthread_mutex_unlock(&to->lock);
    }
    scenario->operations++;
    usleep(500);
  }
  return NULL;
}

/* Resizes, and resets to layers of the same family. */
void *run_changer(void *argument) {
  struct worker *worker = argument;
  while (!worker->scenario->stop) {
    struct slot one, other;
    tp_layer *layer = slot_take(worker->scenario, any_shared(worker), &one);
    tp_layer *source = slot_take(worker->scenario, any_shared(worker), &other);
    int rc = TP_OK;
    if (layer != NULL && !one.sealed) {
      if (source != NULL && one.id != other.id && one.family == other.family) rc = tp_layer_reset(layer, source);
      else rc = tp_layer_resize(layer, LAYER_BYTES - random_below(&worker->random, 2) * random_below(&worker->random, STRIDE));
    }
    CHECK(is_expected(rc), "reset or resize: %d", rc);
    tp_layer_put(layer);
    tp_layer_put(source);
    worker->scenario->operations++;
    usleep(1000);
  }
  return NULL;
}

void *run_walker(void *argument) {
  struct worker *worker = argument;
  tp_extent extents[64];
  while (!worker->scenario->stop) {
    struct slot one, other;
    tp_layer *layer = slot_take(worker->scenario, any_slot(worker), &one);
    tp_layer *to = slot_take(worker->scenario, any_slot(worker), &other);
    uint64_t cursor = 0, chunks;
    int64_t count = 1;
    if (layer != NULL && to != NULL) {
      for (cursor = 0; count > 0;) count = tp_diff(layer, to, &cursor, extents, 64);
      CHECK(is_expected((int)count), "diff: %ld", count);
    }
    for (cursor = 0, count = layer != NULL; count > 0;) count = tp_extents(layer, &cursor, extents, 64);
    CHECK(is_expected((int)count), "extents: %ld", count);
    if (layer != NULL) CHECK(is_expected(tp_exclusive(&layer, 1, &chunks)), "exclusive");
    tp_layer_put(layer);
    tp_layer_put(to);
    worker->scenario->operations++;
  }
  return NULL;
}

/* Shares chunks with layers that are being overwritten in place (thinpool.h: map, revoke, compare, write over it). */
void *run_importer(void *argument) {
  struct worker *worker = argument;
  struct scenario *scenario = worker->scenario;
  uint64_t size = scenario->chunk_size;
  uint8_t *buf = malloc(size);
  while (!scenario->stop) {
    struct slot copy;
    tp_layer *layer, *from = slot_take(scenario, any_slot(worker), &copy);
    uint64_t address = region_start((unsigned)random_below(&worker->random, REGIONS)) / size * size;
    if (from == NULL) continue;
    int rc = tp_read(from, buf, size, address);
    int64_t chunk = rc == TP_OK ? tp_chunk_at(from, address / size) : -1;
    tp_layer_put(from);
    if (chunk < 0 || tp_layer_create(scenario->pool, scenario->next_id++, size, &layer) != TP_OK) continue;
    rc = tp_map_shared(layer, 0, (uint64_t)chunk);
    if (rc == 1) rc = tp_revoke(scenario->pool);
    if (rc == TP_OK) rc = tp_equal(layer, buf, size, 0);
    if (rc == 0) rc = tp_write(layer, buf, size, 0);
    for (int k = 0; k < 3 && rc >= 0; k++) {
      rc = tp_equal(layer, buf, size, 0);
      CHECK(rc != 0, "an imported chunk has changed");
    }
    CHECK(is_expected(rc), "import: %d", rc);
    (void)tp_layer_delete(layer);
    tp_layer_put(layer);
    scenario->operations++;
  }
  free(buf);
  return NULL;
}

static int copy_regions(tp_layer *from, tp_layer *to) {
  static _Thread_local uint8_t buf[REGION_BYTES];
  int rc = TP_OK;
  for (unsigned r = 0; rc == TP_OK && r < REGIONS; r++) {
    uint64_t start = region_start(r), size = tp_layer_size(from);
    uint64_t length = start >= size ? 0 : size - start < REGION_BYTES ? size - start : REGION_BYTES;
    rc = tp_read(from, buf, length, start);
    if (rc == TP_OK && !tp_is_zero(buf, length)) rc = tp_write(to, buf, length, start);
  }
  return rc;
}

static int rebase(tp_layer *layer, tp_layer *from, tp_layer *to) {
  uint64_t cursor = 0;
  int rc = 1;
  while (rc == 1) rc = tp_layer_rebase(layer, from, to, &cursor);
  return rc;
}

/* Makes an equal layer, and something from that, and lets both name the chunks of the first. */
void *run_merger(void *argument) {
  struct worker *worker = argument;
  struct scenario *scenario = worker->scenario;
  while (!scenario->stop) {
    struct slot first;
    tp_layer *copy = NULL, *branch = NULL, *layer = slot_take(scenario, any_shared(worker), &first);
    if (layer != NULL && first.sealed && tp_layer_create(scenario->pool, scenario->next_id++, tp_layer_size(layer), &copy) == TP_OK) {
      int rc = copy_regions(layer, copy);
      if (rc == TP_OK) rc = tp_layer_seal(copy);
      if (rc == TP_OK) checksum_regions(copy);
      if (rc == TP_OK) rc = tp_layer_branch(copy, scenario->next_id++, tp_layer_size(copy), 0, &branch);
      uint64_t address = region_start((unsigned)random_below(&worker->random, REGIONS)), word = WORD(first.family, 1, address);
      if (rc == TP_OK && first.family != 0) rc = tp_write(branch, &word, sizeof word, address);
      uint64_t before = rc == TP_OK ? checksum(branch, &first, &rc) : 0;
      if (rc == TP_OK) rc = rebase(branch, copy, layer);
      if (rc == TP_OK) rc = rebase(copy, copy, layer);
      uint64_t after = rc == TP_OK ? checksum(branch, &first, &rc) : before;
      CHECK(rc != TP_OK || before == after, "a rebased layer has changed");
      CHECK(is_expected(rc), "rebase: %d", rc);
      (void)tp_layer_delete(copy);
      if (branch != NULL) (void)tp_layer_delete(branch);
      scenario->operations++;
    }
    tp_layer_put(branch);
    tp_layer_put(copy);
    tp_layer_put(layer);
    usleep(1000);
  }
  return NULL;
}

/* What is counted never goes back, whatever is deleted or dropped from memory meanwhile. */
static void check_metrics(tp_pool *pool, tp_metrics *before) {
  tp_metrics now;
  tp_layer_metrics layers[4];
  uint64_t count;
  if (tp_get_metrics(pool, &now, layers, 4, &count) != TP_OK) return;
  for (unsigned k = 0; k < TP_OPERATIONS; k++) {
    const tp_operation *was = &before->operation[k], *is = &now.operation[k];
    CHECK(is->count >= was->count && is->errors >= was->errors && is->bytes >= was->bytes, "metrics of kind %u went back", k);
  }
  *before = now;
}

void *run_flusher(void *argument) {
  struct worker *worker = argument;
  tp_metrics metrics = {0};
  while (!worker->scenario->stop) {
    int rc = tp_flush(worker->scenario->pool);
    CHECK(rc == TP_OK || is_over(rc), "flush: %d", rc);
    check_metrics(worker->scenario->pool, &metrics);
    usleep((useconds_t)random_below(&worker->random, 3000));
  }
  return NULL;
}

void *run_housekeeper(void *argument) {
  struct worker *worker = argument;
  struct scenario *scenario = worker->scenario;
  tp_options options = {0};
  store_options(scenario->store, &options);
  while (!scenario->stop) {
    int work = tp_wait_work(scenario->pool, 2), rc = TP_OK;
    if (work > 0 && work & TP_WORK_WINDOW) rc = options.extend_window(options.ctx);
    CHECK(is_expected(rc), "window: %d", rc);
    if (work > 0 && work & TP_WORK_RECLAIM) rc = tp_reclaim(scenario->pool, 1 + random_below(&worker->random, 64));
    CHECK(is_expected(rc), "reclaim: %d", rc);
    if (work > 0 && work & TP_WORK_PUNCH) rc = tp_punch(scenario->pool, random_below(&worker->random, 1 << 20));
    CHECK(is_expected(rc), "punch: %d", rc);
  }
  return NULL;
}

void shared_init(struct scenario *scenario) {
  for (unsigned k = 0; k < SHARED; k++) {
    struct slot *slot = &scenario->shared[k];
    slot->id = scenario->next_id++, slot->family = k + 1;
    int rc = tp_layer_create(scenario->pool, slot->id, LAYER_BYTES, &slot->layer);
    CHECK(rc == TP_OK, "create: %d", rc);
  }
}

void shared_verify(struct scenario *scenario, tp_pool *pool) {
  for (unsigned k = 0; k < SHARED; k++) {
    struct slot *slot = &scenario->shared[k];
    int rc = tp_layer_get(pool, slot->id, &slot->layer);
    CHECK(rc == TP_OK, "layer %lu is gone: %d", slot->id, rc);
    uint64_t sum = checksum(slot->layer, slot, &rc);
    CHECK(rc == TP_OK, "read: %d", rc);
    CHECK(!slot->sealed || slot->checksum == 0 || slot->checksum == sum, "sealed layer %lu has changed", slot->id);
  }
}

void shared_put(struct scenario *scenario) {
  for (unsigned k = 0; k < SHARED; k++) {
    tp_layer_put(scenario->shared[k].layer);
    scenario->shared[k].layer = NULL;
  }
}
