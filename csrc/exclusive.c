/* exclusive.c - what deleting layers would free: done in thought, on a copy of the counts.
 *
 * Deleting a layer drops its root; a node whose last reference is dropped drops all it names; a chunk whose last reference is dropped is
 * free. So each reference that would be dropped is tallied, and what comes to its count is gone on with. A part is done at a
 * time under the mutex; what other threads delete or change in between makes the figure that of no one moment, and does no harm: ids of
 * nodes are never used again, and one that is gone has the count 0.
 */
#include "map.h"

#define NODES_PER_CALL 1024u

struct tally { /* references dropped, by chunk or node */
  uint64_t *keys; /* + 1; 0: empty place */
  uint32_t *seen;
  size_t used, capacity; /* a power of two */
};

struct stack { /* nodes whose last reference is dropped, and which are not walked yet */
  uint64_t *ids;
  size_t count, capacity;
};

struct exclusive {
  struct tally nodes, shared_chunks;
  struct stack stack;
  uint64_t chunks;
};

static size_t tally_place(const struct tally *t, uint64_t key) {
  size_t at = (size_t)(key * 0x9E3779B97F4A7C15u >> 32) & (t->capacity - 1);
  while (t->keys[at] != 0 && t->keys[at] != key + 1) at = (at + 1) & (t->capacity - 1);
  return at;
}

static void tally_grow(struct tally *t) {
  struct tally old = *t;
  t->capacity = old.capacity ? old.capacity * 2 : 1024;
  t->keys = tp_alloc_zero(t->capacity * sizeof *t->keys);
  t->seen = tp_alloc_zero(t->capacity * sizeof *t->seen);
  for (size_t k = 0; k < old.capacity; k++) {
    if (old.keys[k] == 0) continue;
    size_t at = tally_place(t, old.keys[k] - 1);
    t->keys[at] = old.keys[k], t->seen[at] = old.seen[k];
  }
  free(old.keys);
  free(old.seen);
}

/* True when this was the last of its `count` references. */
static bool tally_drop(struct tally *t, uint64_t key, uint64_t count) {
  if (count <= 1) return count == 1;
  if (t->used * 2 >= t->capacity) tally_grow(t);
  size_t at = tally_place(t, key);
  if (t->keys[at] == 0) t->used++;
  t->keys[at] = key + 1;
  return ++t->seen[at] == count;
}

static void push(struct stack *s, uint64_t id) {
  if (s->count == s->capacity) {
    struct stack old = *s;
    s->capacity = old.capacity ? old.capacity * 2 : 256;
    s->ids = tp_alloc_zero(s->capacity * sizeof *s->ids);
    for (size_t k = 0; k < old.count; k++) s->ids[k] = old.ids[k];
    free(old.ids);
  }
  s->ids[s->count++] = id;
}

static int drop_node(struct tp_pool *pool, struct exclusive *x, uint64_t id) {
  uint64_t count;
  int rc = load_count(pool, TP_NODE_PAGE, id, &count);
  if (rc == TP_OK && tally_drop(&x->nodes, id, count)) push(&x->stack, id);
  return rc;
}

static int drop_entry(struct tp_pool *pool, struct exclusive *x, uint64_t entry) {
  uint64_t chunks[pool->blocks], count;
  unsigned named = entry_chunks(pool, entry, chunks);
  for (unsigned k = 0; k < named; k++) {
    int rc = load_count(pool, TP_CHUNK_PAGE, chunks[k], &count);
    if (rc != TP_OK) return rc;
    x->chunks += tally_drop(&x->shared_chunks, chunks[k], count);
  }
  return TP_OK;
}

static int walk_node(struct tp_pool *pool, struct exclusive *x, uint64_t id) {
  struct page *page;
  struct node *node;
  int rc = page_get(pool, TP_NODE_PAGE, id / PAGE_VALUES, &page);
  if (rc != TP_OK || page->value[id % PAGE_VALUES] == 0) return rc; /* gone since it was tallied */
  if ((rc = node_get(pool, id, &node)) != TP_OK) return rc;
  if ((rc = node_load_counts(pool, node)) != TP_OK) return rc;
  for (unsigned i = 0; rc == TP_OK && i < FANOUT; i++)
    if (node->entry[i] != 0) rc = node->level == 0 ? drop_entry(pool, x, node->entry[i]) : drop_node(pool, x, node->entry[i]);
  return rc;
}

static int drop_layer(struct tp_pool *pool, struct exclusive *x, tp_layer *layer) {
  pthread_rwlock_rdlock(&layer->lock);
  int rc = layer_check(layer, false);
  if (rc == TP_OK && layer->root != 0) {
    pthread_mutex_lock(&pool->mutex);
    rc = drop_node(pool, x, layer->root);
    pthread_mutex_unlock(&pool->mutex);
  }
  pthread_rwlock_unlock(&layer->lock);
  return rc;
}

int tp_exclusive(tp_layer **layers, uint64_t count, uint64_t *chunks) {
  struct exclusive x = {0};
  int rc = TP_OK;
  for (uint64_t i = 0; rc == TP_OK && i < count; i++) rc = drop_layer(layers[0]->pool, &x, layers[i]);
  while (rc == TP_OK && x.stack.count > 0) {
    struct tp_pool *pool = layers[0]->pool;
    pthread_mutex_lock(&pool->mutex);
    for (unsigned n = 0; rc == TP_OK && n < NODES_PER_CALL && x.stack.count > 0; n++) rc = walk_node(pool, &x, x.stack.ids[--x.stack.count]);
    cache_trim(pool, NULL);
    pthread_mutex_unlock(&pool->mutex);
  }
  *chunks = x.chunks;
  free(x.nodes.keys);
  free(x.nodes.seen);
  free(x.shared_chunks.keys);
  free(x.shared_chunks.seen);
  free(x.stack.ids);
  return rc;
}
