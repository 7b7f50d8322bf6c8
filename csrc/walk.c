/* walk.c - what is where: extents of a layer, and differences of two.
 *
 * Each call does a bounded part under the mutex and moves a cursor, so that long walks hold nobody up. Subtrees that
 * two layers share, or that a layer does not own, are skipped whole.
 */
#include "map.h"

#define LEAVES_PER_CALL 1024u

struct emit {
  tp_extent *out;
  uint64_t capacity, count;
  uint64_t from, end; /* bytes: nothing before `from` or from `end` on is wanted */
  unsigned leaves;    /* budget left */
};

/* Adds a piece, joined to the last where it goes on. False: full; the cursor stays before it. */
static bool emit(struct emit *e, uint64_t offset, uint64_t end, bool data) {
  offset = max_u64(offset, e->from);
  end = min_u64(end, e->end);
  if (offset >= end) return true;
  tp_extent *last = e->count ? &e->out[e->count - 1] : NULL;
  if (last != NULL && last->offset + last->length == offset && last->data == data) {
    last->length += end - offset;
  } else if (e->count < e->capacity) {
    e->out[e->count++] = (tp_extent){offset, end - offset, data};
  } else {
    return false;
  }
  e->from = end;
  return true;
}

/* --- extents --- */

static bool emit_leaf(struct tp_pool *pool, struct emit *e, const struct node *leaf, uint64_t start) {
  uint64_t size = chunk_size(pool);
  for (unsigned i = 0; i < FANOUT; i++) {
    uint64_t entry = leaf->entry[i], at = start + i * size;
    if (!entry_is_split(entry)) {
      if (!emit(e, at, at + size, entry != 0)) return false;
      continue;
    }
    for (unsigned b = 0; b < pool->blocks; b++) {
      if (!emit(e, at + b * TP_BLOCK, at + (b + 1) * TP_BLOCK, entry_split(entry)->block[b] != 0)) return false;
    }
  }
  return true;
}

static int walk_extents(tp_layer *layer, struct emit *e) {
  struct tp_pool *pool = layer->pool;
  uint64_t span = FANOUT * chunk_size(pool);
  bool room = true;
  while (room && e->from < e->end && e->leaves-- > 0) {
    uint64_t next;
    int rc = map_next_leaf(layer, e->from / span, &next);
    if (rc != TP_OK) return rc;
    uint64_t start = next >= e->end / span + 1 ? e->end : next * span;
    room = emit(e, e->from, start, false);
    if (!room || start == e->end) break;
    struct node *leaf;
    if ((rc = map_find(layer, next, &leaf)) != TP_OK) return rc;
    room = emit_leaf(pool, e, leaf, start);
  }
  return TP_OK;
}

int64_t tp_extents(tp_layer *layer, uint64_t *cursor, tp_extent *out, uint64_t capacity) {
  struct tp_pool *pool = layer->pool;
  pthread_rwlock_rdlock(&layer->lock);
  struct emit e = {.out = out, .capacity = capacity, .from = *cursor, .end = layer->size, .leaves = LEAVES_PER_CALL};
  int rc = layer_check(layer, false);
  if (rc == TP_OK) {
    pthread_mutex_lock(&pool->mutex);
    rc = walk_extents(layer, &e);
    cache_trim(pool, NULL);
    pthread_mutex_unlock(&pool->mutex);
  }
  pthread_rwlock_unlock(&layer->lock);
  if (rc != TP_OK) return rc;
  *cursor = e.from;
  return (int64_t)e.count;
}

/* --- differences --- */

struct ref { /* a subtree: a node of its own level; id 0: nothing there */
  uint64_t id;
  unsigned level;
};

/* Child i of a node of `level`. A tree that is not that high stands where child 0 of each level above it would. */
static struct ref child(struct ref ref, const struct node *node, unsigned level, unsigned i) {
  if (ref.id == 0) return ref;
  if (ref.level < level) return i == 0 ? ref : (struct ref){0, 0};
  return (struct ref){node->entry[i], level - 1};
}

static int load_at(struct tp_pool *pool, struct ref ref, unsigned level, struct node **out) {
  *out = NULL;
  if (ref.id == 0 || ref.level < level) return TP_OK;
  int rc = node_get(pool, ref.id, out);
  if (rc == TP_OK && (*out)->level != level) rc = tp_error_record(TP_ECORRUPT, TP_NODE, ref.id);
  return rc;
}

static bool emit_difference(struct tp_pool *pool, struct emit *e, const struct node *a, const struct node *b,
                            uint64_t start) {
  uint64_t size = chunk_size(pool);
  for (unsigned i = 0; i < FANOUT; i++) {
    uint64_t x = a == NULL ? 0 : a->entry[i], y = b == NULL ? 0 : b->entry[i], at = start + i * size;
    if (x == y) continue;
    if (!entry_is_split(x) && !entry_is_split(y)) {
      if (!emit(e, at, at + size, y != 0)) return false;
      continue;
    }
    for (unsigned k = 0; k < pool->blocks; k++) {
      uint64_t to = split_chunk_at(y, k);
      if (split_chunk_at(x, k) == to) continue;
      if (!emit(e, at + k * TP_BLOCK, at + (k + 1) * TP_BLOCK, to != 0)) return false;
    }
  }
  return true;
}

/* Returns 1 to go on, 0 when the caller's room or this call's budget is used up, or an error. */
static int walk_diff(struct tp_pool *pool, struct emit *e, struct ref a, struct ref b, unsigned level, uint64_t start) {
  if (a.id == b.id) return 1; /* shared, or both empty */
  struct node *x, *y;
  int rc = load_at(pool, a, level, &x);
  if (rc == TP_OK) rc = load_at(pool, b, level, &y);
  if (rc != TP_OK) return rc;
  uint64_t span = chunk_size(pool) << (8 * level); /* bytes under one entry */
  if (level == 0) {
    if (!emit_difference(pool, e, x, y, start)) return 0;
    e->from = max_u64(e->from, start + FANOUT * span);
    return --e->leaves > 0;
  }
  for (unsigned i = 0; i < FANOUT; i++) {
    uint64_t at = start + i * span;
    if (at >= e->end) break;
    if (at + span <= e->from) continue;
    rc = walk_diff(pool, e, child(a, x, level, i), child(b, y, level, i), level - 1, at);
    if (rc != 1) return rc;
  }
  return 1;
}

static void lock_shared(tp_layer *a, tp_layer *b) {
  pthread_rwlock_rdlock(a < b ? &a->lock : &b->lock);
  if (a != b) pthread_rwlock_rdlock(a < b ? &b->lock : &a->lock);
}

int64_t tp_diff(tp_layer *from, tp_layer *to, uint64_t *cursor, tp_extent *out, uint64_t capacity) {
  struct tp_pool *pool = from->pool;
  if (to->pool != pool) return tp_error_set(TP_EINVAL);
  lock_shared(from, to);
  struct emit e = {.out = out, .capacity = capacity, .from = *cursor, .leaves = LEAVES_PER_CALL};
  e.end = max_u64(from->size, to->size);
  int rc = layer_check(from, false);
  if (rc == TP_OK) rc = layer_check(to, false);
  if (rc == TP_OK) {
    pthread_mutex_lock(&pool->mutex);
    unsigned height = from->height > to->height ? from->height : to->height;
    struct ref a = {from->root, from->root ? from->height - 1 : 0}, b = {to->root, to->root ? to->height - 1 : 0};
    rc = height == 0 ? 1 : walk_diff(pool, &e, a, b, height - 1, 0);
    cache_trim(pool, NULL);
    pthread_mutex_unlock(&pool->mutex);
  }
  if (from != to) pthread_rwlock_unlock(&from->lock);
  pthread_rwlock_unlock(&to->lock);
  if (rc < 0) return rc;
  *cursor = rc == 1 ? e.end : e.from;
  return (int64_t)e.count;
}
