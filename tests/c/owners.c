/* owners.c - threads that own a layer each: every byte is known, so every read is compared, also the last ones after
 * the pool was opened anew. Other threads read, snapshot and clone these layers meanwhile, but do not change them. */
#include "stress.h"

enum { MODEL_BYTES = REGIONS * REGION_BYTES, KEPT_SNAPSHOTS = 3, IO_MAX = 96 << 10, EXTENTS = 64 };

struct model {
  tp_layer *layer; /* NULL: unused */
  uint64_t id, size;
  uint8_t *bytes;  /* the regions, one after the other; zeros behind the size */
};

struct range { /* addresses */
  uint64_t start, end;
};

struct owner {
  struct scenario *scenario;
  struct random random;
  struct slot *slot; /* where it publishes its layer */
  struct model live, snapshots[KEPT_SNAPSHOTS];
  struct range doubt; /* the pool was stopped in the midst of changing it: holds old or new */
  uint8_t *buf;
};

/* --- the model --- */

/* The part of a region that lies in the range: false if there is none. */
static bool region_part(unsigned region, struct range range, uint64_t *model_at, uint64_t *length) {
  uint64_t first = region_start(region), end = first + REGION_BYTES;
  if (range.start > first) first = range.start;
  if (range.end < end) end = range.end;
  if (first >= end) return false;
  *model_at = (uint64_t)region * REGION_BYTES + (first - region_start(region));
  *length = end - first;
  return true;
}

static void model_zero(struct model *model, struct range range) {
  uint64_t at, length;
  for (unsigned r = 0; r < REGIONS; r++) {
    if (region_part(r, range, &at, &length)) memset(model->bytes + at, 0, length);
  }
}

static bool model_is_zero(const struct model *model, struct range range) {
  uint64_t at, length;
  for (unsigned r = 0; r < REGIONS; r++) {
    if (region_part(r, range, &at, &length) && !tp_is_zero(model->bytes + at, length)) return false;
  }
  return true;
}

static struct model model_copy(const struct model *model, tp_layer *layer, uint64_t id) {
  struct model copy = {layer, id, model->size, malloc(MODEL_BYTES)};
  if (copy.bytes == NULL) abort();
  memcpy(copy.bytes, model->bytes, MODEL_BYTES);
  return copy;
}

static void model_drop(struct model *model) {
  tp_layer_put(model->layer);
  free(model->bytes);
  *model = (struct model){0};
}

/* --- comparing --- */

static void compare(struct owner *owner, const struct model *model, struct range range) {
  uint64_t at, length;
  for (unsigned r = 0; r < REGIONS; r++) {
    if (!region_part(r, range, &at, &length)) continue;
    uint64_t address = region_start(r) + at % REGION_BYTES;
    int rc = tp_read(model->layer, owner->buf, length, address);
    if (is_over(rc)) return;
    CHECK(rc == TP_OK, "read of layer %lu at %lu: %d", model->id, address, rc);
    for (uint64_t k = 0; k < length; k++) {
      if (owner->buf[k] == model->bytes[at + k]) continue;
      uint64_t byte = address + k;
      if (model->layer == owner->live.layer && byte >= owner->doubt.start && byte < owner->doubt.end) continue;
      CHECK(false, "layer %lu at %lu: read %02x, expected %02x", model->id, byte, owner->buf[k], model->bytes[at + k]);
    }
  }
}

/* A change that ran out of space half-way: each byte is the old or the new one, and stays so. */
static void adopt(struct owner *owner, const uint8_t *wanted, uint64_t at, uint64_t address, uint64_t length) {
  uint8_t now[IO_MAX];
  int rc = tp_read(owner->live.layer, now, length, address);
  CHECK(rc == TP_OK || is_over(rc), "read after running out of space: %d", rc);
  for (uint64_t k = 0; rc == TP_OK && k < length; k++) {
    uint8_t new_byte = wanted == NULL ? 0 : wanted[k];
    CHECK(now[k] == owner->live.bytes[at + k] || now[k] == new_byte, "neither old nor new at %lu", address + k);
    owner->live.bytes[at + k] = now[k];
  }
}

/* --- steps --- */

/* A range within a region; offset and length are any, or whole blocks. */
static uint64_t pick_range(struct owner *owner, uint64_t *at, uint64_t *length) {
  uint64_t unit = random_below(&owner->random, 2) ? 4096 : 1;
  uint64_t limit = random_below(&owner->random, 4) ? 12 << 10 : IO_MAX;
  unsigned region = (unsigned)random_below(&owner->random, REGIONS);
  *length = (1 + random_below(&owner->random, limit - 1) + unit - 1) / unit * unit;
  uint64_t within = random_below(&owner->random, REGION_BYTES - *length + 1) / unit * unit;
  *at = (uint64_t)region * REGION_BYTES + within;
  return region_start(region) + within;
}

static void step_write(struct owner *owner) {
  uint64_t at, length, address = pick_range(owner, &at, &length);
  for (uint64_t k = 0; k < length; k += 8) {
    uint64_t value = random_next(&owner->random);
    memcpy(owner->buf + k, &value, 8);
  }
  int rc = tp_write(owner->live.layer, owner->buf, length, address);
  if (address + length > owner->live.size) {
    CHECK(rc == TP_ERANGE || is_over(rc), "write past the end: %d", rc);
  } else if (rc == TP_OK) {
    memcpy(owner->live.bytes + at, owner->buf, length);
  } else if (rc == TP_ENOSPC) {
    adopt(owner, owner->buf, at, address, length);
  } else {
    CHECK(is_over(rc), "write: %d", rc);
    owner->doubt = (struct range){address, address + length};
  }
}

static void step_discard(struct owner *owner) {
  uint64_t at, length, address = pick_range(owner, &at, &length);
  bool wide = random_below(&owner->random, 4) == 0; /* across regions, and whole leaves between them */
  struct range range = {address, wide ? address + random_below(&owner->random, 3 * STRIDE) : address + length};
  if (range.end > owner->live.size) range.end = owner->live.size;
  if (range.start >= range.end) return;
  int rc = tp_discard(owner->live.layer, range.start, range.end - range.start);
  if (rc == TP_OK) {
    model_zero(&owner->live, range);
  } else if (rc == TP_ENOSPC) { /* of the ragged ends: what is whole is discarded by trying without them */
    range = (struct range){(range.start + 4095) & ~4095ul, range.end & ~4095ul};
    if (range.start >= range.end) return;
    rc = tp_discard(owner->live.layer, range.start, range.end - range.start);
    CHECK(rc == TP_OK || is_over(rc), "a discard of whole blocks needs no space: %d", rc);
    if (rc == TP_OK) model_zero(&owner->live, range);
    else owner->doubt = range;
  } else {
    CHECK(is_over(rc), "discard: %d", rc);
    owner->doubt = range;
  }
}

static void step_resize(struct owner *owner) {
  uint64_t size = LAYER_BYTES;
  if (random_below(&owner->random, 2)) {
    size = region_start((unsigned)random_below(&owner->random, REGIONS)) + random_below(&owner->random, REGION_BYTES);
  }
  int rc = tp_layer_resize(owner->live.layer, size);
  if (rc == TP_OK) {
    model_zero(&owner->live, (struct range){size, UINT64_MAX});
    owner->live.size = size;
  } else if (rc == TP_ENOSPC) { /* the block that the new end cuts; behind it all is as it was */
    CHECK(size < owner->live.size, "growing needs no space");
  } else {
    CHECK(is_over(rc), "resize: %d", rc);
    uint64_t now = tp_layer_size(owner->live.layer); /* a stop may come after a smaller size was set */
    CHECK(now == owner->live.size || now == size, "size %lu, neither the old nor the new one", now);
    owner->live.size = now;
    owner->doubt = (struct range){size, UINT64_MAX};
  }
}

static void publish(struct owner *owner) {
  pthread_mutex_lock(&owner->slot->lock);
  owner->slot->id = owner->live.id;
  pthread_mutex_unlock(&owner->slot->lock);
}

static struct model *pick_snapshot(struct owner *owner) {
  return &owner->snapshots[random_below(&owner->random, KEPT_SNAPSHOTS)];
}

static bool delete_model(struct model *model) {
  int rc = tp_layer_delete(model->layer);
  CHECK(rc == TP_OK || is_over(rc), "delete: %d", rc);
  if (rc == TP_OK) model_drop(model);
  return rc == TP_OK;
}

static void step_snapshot(struct owner *owner) {
  struct model *kept = pick_snapshot(owner);
  if (kept->layer != NULL && !delete_model(kept)) return;
  uint64_t id = owner->scenario->next_id++;
  tp_layer *layer;
  int rc = tp_layer_branch(owner->live.layer, id, owner->live.size, true, &layer);
  CHECK(rc == TP_OK || is_over(rc), "snapshot: %d", rc);
  if (rc != TP_OK) return;
  *kept = model_copy(&owner->live, layer, id);
  checksum_regions(layer);
}

static void step_reset(struct owner *owner) {
  const struct model *kept = pick_snapshot(owner);
  if (kept->layer == NULL) return;
  int rc = tp_layer_reset(owner->live.layer, kept->layer);
  CHECK(rc == TP_OK || is_over(rc), "reset: %d", rc);
  if (rc != TP_OK) return;
  memcpy(owner->live.bytes, kept->bytes, MODEL_BYTES);
  if (kept->size > owner->live.size) owner->live.size = kept->size;
}

/* Goes on with a clone of a snapshot, and deletes the layer it had. */
static void step_clone(struct owner *owner) {
  const struct model *kept = pick_snapshot(owner);
  uint64_t id = owner->scenario->next_id++;
  tp_layer *layer;
  if (kept->layer == NULL) return;
  int rc = tp_layer_branch(kept->layer, id, kept->size, false, &layer);
  CHECK(rc == TP_OK || is_over(rc), "clone: %d", rc);
  if (rc != TP_OK) return;
  struct model old = owner->live;
  owner->live = model_copy(kept, layer, id);
  publish(owner);
  if (!delete_model(&old)) model_drop(&old); /* deleted later, with all that is left */
}

static void step_extents(struct owner *owner) {
  tp_extent extents[EXTENTS];
  uint64_t cursor = 0, at = 0;
  int64_t count;
  while ((count = tp_extents(owner->live.layer, &cursor, extents, EXTENTS)) > 0 || cursor < owner->live.size) {
    if (is_over((int)count)) return;
    CHECK(count >= 0, "extents: %ld", count);
    for (int64_t k = 0; k < count; k++) {
      CHECK(extents[k].offset == at, "a gap in the extents at %lu", at);
      at += extents[k].length;
      struct range range = {extents[k].offset, at};
      CHECK(extents[k].data || model_is_zero(&owner->live, range), "a hole with data in it at %lu", range.start);
    }
  }
  if (count == 0) CHECK(at == owner->live.size, "extents end at %lu of %lu", at, owner->live.size);
}

/* What the difference leaves out must be the same in both. */
static void step_diff(struct owner *owner) {
  const struct model *kept = pick_snapshot(owner);
  if (kept->layer == NULL) return;
  tp_extent extents[EXTENTS];
  uint64_t cursor = 0, end = kept->size > owner->live.size ? kept->size : owner->live.size, same_from = 0;
  int64_t count = 0;
  while (count > 0 || cursor < end) {
    count = tp_diff(kept->layer, owner->live.layer, &cursor, extents, EXTENTS);
    if (is_over((int)count)) return;
    CHECK(count >= 0, "diff: %ld", count);
    for (int64_t k = 0; k <= count; k++) {
      struct range same = {same_from, k < count ? extents[k].offset : cursor};
      uint64_t at, length;
      for (unsigned r = 0; r < REGIONS; r++) {
        if (!region_part(r, same, &at, &length)) continue;
        bool equal = memcmp(kept->bytes + at, owner->live.bytes + at, length) == 0;
        CHECK(equal, "a difference that diff does not show, %lu to %lu", same.start, same.end);
      }
      same_from = k < count ? extents[k].offset + extents[k].length : cursor;
    }
  }
}

static void step_exclusive(struct owner *owner) {
  uint64_t chunks;
  tp_layer_info info;
  int rc = tp_exclusive(&owner->live.layer, 1, &chunks);
  if (rc == TP_OK) rc = tp_layer_get_info(owner->live.layer, &info);
  CHECK(rc == TP_OK || is_over(rc), "exclusive: %d", rc);
  if (rc != TP_OK) return;
  CHECK(chunks <= info.mapped_refs, "%lu exclusive of %lu", chunks, info.mapped_refs);
}

static void step_compare(struct owner *owner) {
  const struct model *model = random_below(&owner->random, 3) ? &owner->live : pick_snapshot(owner);
  unsigned region = (unsigned)random_below(&owner->random, REGIONS);
  if (model->layer == NULL) return;
  struct range range = {region_start(region), region_start(region) + REGION_BYTES};
  if (range.end > model->size) range.end = model->size;
  compare(owner, model, range);
}

/* --- life --- */

struct owner *owner_new(struct scenario *scenario, unsigned number, uint64_t seed) {
  struct owner *owner = calloc(1, sizeof *owner);
  if (owner == NULL) abort();
  owner->scenario = scenario;
  owner->random.state = seed;
  owner->slot = &scenario->owned[number];
  owner->buf = malloc(REGION_BYTES);
  owner->live = (struct model){.id = scenario->next_id++, .size = LAYER_BYTES, .bytes = calloc(1, MODEL_BYTES)};
  if (owner->buf == NULL || owner->live.bytes == NULL) abort();
  int rc = tp_layer_create(scenario->pool, owner->live.id, LAYER_BYTES, &owner->live.layer);
  CHECK(rc == TP_OK, "create: %d", rc);
  publish(owner);
  return owner;
}

void *owner_run(void *argument) {
  static void (*const STEPS[])(struct owner *) = {
      step_write,   step_write,   step_write,    step_write, step_write,   step_write, step_write, step_write,  step_compare,
      step_compare, step_compare, step_snapshot, step_reset, step_discard, step_clone, step_diff,  step_resize, step_extents,
      step_exclusive};
  struct owner *owner = argument;
  while (!owner->scenario->stop && owner->doubt.end == 0) {
    STEPS[random_below(&owner->random, sizeof STEPS / sizeof *STEPS)](owner);
    owner->scenario->operations++;
  }
  return NULL;
}

static void reopen(struct owner *owner, struct model *model, tp_pool *pool) {
  if (model->id == 0) return;
  int rc = tp_layer_get(pool, model->id, &model->layer);
  CHECK(rc == TP_OK, "layer %lu is gone: %d", model->id, rc);
  CHECK(tp_layer_size(model->layer) == model->size, "size of layer %lu", model->id);
  compare(owner, model, (struct range){0, model->size});
}

void owner_reopen(struct owner *owner, tp_pool *pool) {
  reopen(owner, &owner->live, pool);
  for (unsigned k = 0; k < KEPT_SNAPSHOTS; k++) reopen(owner, &owner->snapshots[k], pool);
}

void owner_put(struct owner *owner) {
  tp_layer_put(owner->live.layer);
  owner->live.layer = NULL;
  for (unsigned k = 0; k < KEPT_SNAPSHOTS; k++) {
    tp_layer_put(owner->snapshots[k].layer);
    owner->snapshots[k].layer = NULL;
  }
}

void owner_free(struct owner *owner) {
  model_drop(&owner->live);
  for (unsigned k = 0; k < KEPT_SNAPSHOTS; k++) model_drop(&owner->snapshots[k]);
  free(owner->buf);
  free(owner);
}
