/* rebase.c - two sealed layers were found to be equal: what names the one's chunks names the other's instead.
 *
 * Nothing that anybody reads changes, so sealed layers may be rebased too (I7). Where a layer has the same leaf as `from` it takes that
 * of `to`; where it has a leaf of its own, the entries in it that are still those of `from`. What lost its last reference is
 * freed with the transaction, as ever.
 */
#include "io.h"

#define LEAVES_PER_CALL 64u

static bool same_entry(const struct tp_pool *pool, uint64_t a, uint64_t b) {
  if (!entry_is_split(a) || !entry_is_split(b)) return a == b;
  return memcmp(entry_split(a)->block, entry_split(b)->block, pool->blocks * sizeof(uint64_t)) == 0;
}

static uint64_t entry_at(const struct node *leaf, unsigned i) { return leaf == NULL ? 0 : leaf->entry[i]; }

static bool to_be_replaced(const struct tp_pool *pool, const struct node *own, const struct node *from, const struct node *to, unsigned i) {
  return from->entry[i] != 0 && same_entry(pool, own->entry[i], from->entry[i]) && !same_entry(pool, own->entry[i], entry_at(to, i));
}

static int rebase_entries(tp_layer *layer, uint64_t leaf_index, struct node *own, const struct node *from, struct node *to) {
  struct tp_pool *pool = layer->pool;
  bool mine;
  unsigned i = 0;
  while (i < FANOUT && !to_be_replaced(pool, own, from, to, i)) i++;
  if (i == FANOUT) return TP_OK;
  int rc = map_own_leaf(layer, leaf_index, &own, &mine);
  for (; rc == TP_OK && i < FANOUT; i++) {
    if (!to_be_replaced(pool, own, from, to, i)) continue;
    rc = entry_load_counts(pool, own->entry[i]);
    if (rc == TP_OK) rc = entry_load_counts(pool, entry_at(to, i));
    if (rc != TP_OK) break;
    uint64_t old = own->entry[i];
    map_set_entry(layer, own, i, entry_copy(pool, entry_at(to, i)));
    entry_release(pool, old);
  }
  return rc == TP_OK && node_is_empty(own) ? map_cut_leaf(layer, leaf_index) : rc;
}

static int rebase_leaf(tp_layer *layer, uint64_t leaf_index, tp_layer *from, tp_layer *to) {
  struct node *own, *theirs, *target;
  int rc = map_find(layer, leaf_index, &own);
  if (rc == TP_OK) rc = map_find(from, leaf_index, &theirs);
  if (rc == TP_OK) rc = map_find(to, leaf_index, &target);
  if (rc != TP_OK || own == NULL || own == target) return rc;
  if (own != theirs) return rebase_entries(layer, leaf_index, own, theirs, target);
  return target == NULL ? map_cut_leaf(layer, leaf_index) : map_share_leaf(layer, leaf_index, target);
}

/* Mutex held. Returns 1 if there is more to do. */
static int rebase_some(tp_layer *layer, tp_layer *from, tp_layer *to, uint64_t *cursor) {
  for (unsigned n = 0; n < LEAVES_PER_CALL && !pool_is_overdue(layer->pool); n++) {
    uint64_t leaf_index;
    int rc = map_next_leaf(from, *cursor, &leaf_index);
    if (rc != TP_OK || leaf_index == UINT64_MAX) return rc;
    if ((rc = rebase_leaf(layer, leaf_index, from, to)) != TP_OK) return rc;
    *cursor = leaf_index + 1;
  }
  return 1;
}

/* `layer` exclusively, the others shared; each once, in the order of addresses. */
static void lock_three(tp_layer *layer, tp_layer *from, tp_layer *to, bool lock) {
  tp_layer *all[3] = {layer, from, to};
  for (int pass = 0; pass < 3; pass++) {
    for (int k = 0; k < 2; k++) {
      tp_layer *first = all[k];
      if (first > all[k + 1]) all[k] = all[k + 1], all[k + 1] = first;
    }
  }
  for (int k = 0; k < 3; k++) {
    if (k > 0 && all[k] == all[k - 1]) continue;
    if (!lock) pthread_rwlock_unlock(&all[k]->lock);
    else if (all[k] == layer) pthread_rwlock_wrlock(&all[k]->lock);
    else pthread_rwlock_rdlock(&all[k]->lock);
  }
}

int tp_layer_rebase(tp_layer *layer, tp_layer *from, tp_layer *to, uint64_t *cursor) {
  tp_pool *pool = layer->pool;
  if (from == to || layer == to || from->pool != pool || to->pool != pool) return tp_error_set(TP_EINVAL);
  lock_three(layer, from, to, true);
  int rc = layer_check(layer, false);
  if (rc == TP_OK) rc = layer_check(from, false);
  if (rc == TP_OK) rc = layer_check(to, false);
  if (rc == TP_OK && (from->state != LAYER_SEALED || to->state != LAYER_SEALED || from->size != to->size)) rc = tp_error_set(TP_EINVAL);
  pthread_mutex_lock(&pool->mutex);
  if (rc == TP_OK) rc = pool_check_change(pool);
  if (rc == TP_OK) {
    layer->epoch = ++pool->next_epoch; /* chunks of `to` are not its own, whatever it knew of that place */
    rc = rebase_some(layer, from, to, cursor);
    pthread_cond_signal(&pool->work);
  }
  bool overdue = pool_is_overdue(pool);
  cache_trim(pool, layer);
  pthread_mutex_unlock(&pool->mutex);
  lock_three(layer, from, to, false);
  if (rc == 1 && overdue) {
    int flushed = tp_flush(pool);
    if (flushed != TP_OK) rc = flushed;
  }
  return rc;
}
