/* map.c - block maps: finding, owning by copying the path, setting, cutting. */
#include "map.h"

static unsigned digit(uint64_t leaf_index, unsigned level) {
  /* The entry of a node of `level` (>= 1) on the way to the leaf. */
  return (unsigned)(leaf_index >> (8 * (level - 1)) & (FANOUT - 1));
}

static bool covers(unsigned height, uint64_t leaf_index) {
  return height >= MAX_HEIGHT || (height > 0 && leaf_index >> (8 * (height - 1)) == 0);
}

/* Loads a node that must be of that level: anything else is damage. */
static int get_level(tp_layer *layer, uint64_t id, unsigned level, uint64_t leaf_index, struct node **out) {
  int rc = node_get(layer->pool, id, out);
  if (rc == TP_OK && (*out)->level != level) rc = tp_error_record(TP_ECORRUPT, TP_NODE, id);
  if (rc == TP_OK) return TP_OK;
  uint64_t span = FANOUT * chunk_size(layer->pool);
  for (unsigned k = 0; k < level && span <= UINT64_MAX / FANOUT; k++) span *= FANOUT;
  uint64_t offset = leaf_index * FANOUT * chunk_size(layer->pool);
  return tp_error_where(rc, layer->rec.key, offset / span * span, span);
}

static int find(tp_layer *layer, uint64_t leaf_index, bool own, struct node **out) {
  *out = NULL;
  if (!covers(layer->height, leaf_index)) return TP_OK;
  uint64_t id = layer->root, count;
  for (unsigned level = layer->height - 1;; level--) {
    struct node *node;
    int rc = get_level(layer, id, level, leaf_index, &node);
    if (rc == TP_OK && own) rc = load_count(layer->pool, TP_NODE_PAGE, id, &count);
    if (rc != TP_OK || (own && count > 1)) return rc;
    if (level == 0) {
      *out = node;
      return TP_OK;
    }
    id = node->entry[digit(leaf_index, level)];
    if (id == 0) return TP_OK;
  }
}

int map_find(tp_layer *layer, uint64_t leaf_index, struct node **out) { return find(layer, leaf_index, false, out); }

int map_find_own(tp_layer *layer, uint64_t leaf_index, struct node **out) { return find(layer, leaf_index, true, out); }

/* Room for the counts of the nodes that one path can need. Whose count is there already has not got a new id: the pool's state is damaged. */
static int load_new_count_pages(struct tp_pool *pool) {
  struct page *first, *last;
  uint64_t begin = pool->next_node, end = begin + 2 * MAX_HEIGHT;
  int rc = page_get(pool, TP_NODE_PAGE, begin / PAGE_VALUES, &first);
  if (rc == TP_OK) rc = page_get(pool, TP_NODE_PAGE, end / PAGE_VALUES, &last);
  for (uint64_t id = begin; rc == TP_OK && id <= end; id++) {
    const struct page *page = id / PAGE_VALUES == first->rec.key ? first : last;
    if (page->value[id % PAGE_VALUES] != 0) rc = tp_error_record(TP_ECORRUPT, TP_STATE, 0);
  }
  return rc;
}

static void grow_to(tp_layer *layer, uint64_t leaf_index) {
  struct tp_pool *pool = layer->pool;
  if (layer->root == 0) {
    record_touch(pool, &layer->rec);
    layer->height = 1;
    while (!covers(layer->height, leaf_index)) layer->height++;
    layer->root = node_create(pool, layer->height - 1)->rec.key;
  }
  while (!covers(layer->height, leaf_index)) {
    struct node *root = node_create(pool, layer->height);
    record_touch(pool, &layer->rec);
    root->entry[0] = layer->root;
    layer->root = root->rec.key;
    layer->height++;
  }
}

int map_own(tp_layer *layer, uint64_t leaf_index, unsigned level, struct node **out, bool *mine) {
  struct tp_pool *pool = layer->pool;
  int rc = load_new_count_pages(pool);
  if (rc != TP_OK) return rc;
  grow_to(layer, leaf_index);
  assert(level < layer->height);
  *mine = true;
  struct node *parent = NULL;
  uint64_t id = layer->root;
  for (unsigned at = layer->height - 1;; at--) {
    struct node *node;
    if (id == 0) { /* only below a parent: the root was made above */
      node = node_create(pool, at);
      record_touch(pool, &parent->rec);
      parent->entry[digit(leaf_index, at + 1)] = node->rec.key;
    } else {
      uint64_t count;
      rc = get_level(layer, id, at, leaf_index, &node);
      if (rc == TP_OK) rc = load_count(pool, TP_NODE_PAGE, id, &count);
      if (rc == TP_OK && count > 1) {
        rc = node_copy(pool, node, &node);
        if (rc == TP_OK && parent == NULL) {
          record_touch(pool, &layer->rec);
          layer->root = node->rec.key;
        } else if (rc == TP_OK) {
          record_touch(pool, &parent->rec);
          parent->entry[digit(leaf_index, at + 1)] = node->rec.key;
        }
      } else if (rc == TP_OK && !count_is_mine(pool, TP_NODE_PAGE, id)) {
        *mine = false;
      }
      if (rc != TP_OK) return rc;
    }
    if (at == level) {
      *out = node;
      return TP_OK;
    }
    parent = node;
    id = node->entry[digit(leaf_index, at)];
  }
}

/* --- slots --- */

static void set_slot(tp_layer *layer, uint64_t leaf_index, struct node *leaf) {
  if (layer->slots == NULL) layer->slots = tp_alloc_zero(SLOT_COUNT * sizeof *layer->slots);
  struct slot *slot = layer_slot(layer, leaf_index);
  if (leaf != NULL) leaf->rec.pins++;
  if (slot->leaf != NULL) slot->leaf->rec.pins--;
  *slot = (struct slot){leaf_index + 1, leaf};
}

int map_fill_slot(tp_layer *layer, uint64_t leaf_index) {
  struct node *leaf;
  int rc = map_find(layer, leaf_index, &leaf);
  if (rc != TP_OK) return rc;
  set_slot(layer, leaf_index, leaf);
  cache_trim(layer->pool, layer);
  return TP_OK;
}

int map_own_leaf(tp_layer *layer, uint64_t leaf_index, struct node **out, bool *mine) {
  struct slot *slot = layer_slot(layer, leaf_index);
  if (slot != NULL && slot->tag == leaf_index + 1 && slot->leaf != NULL && slot->leaf->mine_epoch == layer->epoch) {
    *out = slot->leaf; /* nothing of the path was shared since this was found out */
    *mine = true;
    return TP_OK;
  }
  int rc = map_own(layer, leaf_index, 0, out, mine);
  if (rc != TP_OK) return rc;
  set_slot(layer, leaf_index, *out);
  if (*mine) {
    (*out)->mine_epoch = layer->epoch;
    memset((*out)->mine, 0, sizeof (*out)->mine);
  }
  return TP_OK;
}

/* --- changing --- */

void map_set_entry(tp_layer *layer, struct node *leaf, unsigned i, uint64_t entry) {
  struct tp_pool *pool = layer->pool;
  uint64_t chunks[pool->blocks];
  uint64_t old = leaf->entry[i];
  record_touch(pool, &leaf->rec);
  record_touch(pool, &layer->rec);
  layer->mapped_refs += entry_chunks(pool, entry, chunks);
  layer->mapped_refs -= entry_chunks(pool, old, chunks);
  bit_clear(leaf->mine, i);
  leaf->entry[i] = entry;
}

static uint64_t leaf_refs(struct tp_pool *pool, const struct node *leaf) {
  uint64_t chunks[pool->blocks], refs = 0;
  for (unsigned i = 0; i < FANOUT; i++) refs += entry_chunks(pool, leaf->entry[i], chunks);
  return refs;
}

static void cut_root(tp_layer *layer) {
  record_touch(layer->pool, &layer->rec);
  node_drop(layer->pool, layer->root);
  layer->root = 0;
  layer->height = 0;
}

/* Owns the parent, and unhooks the child on the way to the leaf from it. */
static int cut_child(tp_layer *layer, uint64_t leaf_index, unsigned level, bool *parent_empty) {
  struct tp_pool *pool = layer->pool;
  struct node *parent;
  bool mine;
  uint64_t ignored;
  int rc = map_own(layer, leaf_index, level + 1, &parent, &mine);
  if (rc != TP_OK) return rc;
  uint64_t *entry = &parent->entry[digit(leaf_index, level + 1)];
  if ((rc = load_count(pool, TP_NODE_PAGE, *entry, &ignored)) != TP_OK) return rc;
  record_touch(pool, &parent->rec);
  node_drop(pool, *entry);
  *entry = 0;
  *parent_empty = node_is_empty(parent);
  return TP_OK;
}

int map_cut_leaf(tp_layer *layer, uint64_t leaf_index) {
  struct tp_pool *pool = layer->pool;
  struct node *leaf;
  uint64_t ignored;
  int rc = map_find(layer, leaf_index, &leaf);
  if (rc != TP_OK || leaf == NULL) return rc;
  uint64_t refs = leaf_refs(pool, leaf);
  bool empty = true;
  for (unsigned level = 0; empty && level + 1 < layer->height; level++) {
    if ((rc = cut_child(layer, leaf_index, level, &empty)) != TP_OK) return rc;
    if (level == 0) {
      record_touch(pool, &layer->rec);
      layer->mapped_refs -= refs;
      set_slot(layer, leaf_index, NULL);
      refs = 0;
    }
  }
  if (empty) {
    if ((rc = load_count(pool, TP_NODE_PAGE, layer->root, &ignored)) != TP_OK) return rc;
    cut_root(layer);
    layer->mapped_refs -= refs;
    set_slot(layer, leaf_index, NULL);
  }
  return TP_OK;
}

int map_share_leaf(tp_layer *layer, uint64_t leaf_index, struct node *leaf) {
  struct tp_pool *pool = layer->pool;
  struct node *old, *parent;
  uint64_t ignored, *place = &layer->root;
  bool mine;
  int rc = map_find(layer, leaf_index, &old);
  if (rc == TP_OK && layer->height > 1) {
    rc = map_own(layer, leaf_index, 1, &parent, &mine);
    place = &parent->entry[digit(leaf_index, 1)];
  }
  if (rc == TP_OK) rc = load_count(pool, TP_NODE_PAGE, old->rec.key, &ignored);
  if (rc == TP_OK) rc = load_count(pool, TP_NODE_PAGE, leaf->rec.key, &ignored);
  if (rc != TP_OK) return rc;
  assert(old->level == 0 && leaf->level == 0 && *place == old->rec.key);
  record_touch(pool, layer->height > 1 ? &parent->rec : &layer->rec);
  record_touch(pool, &layer->rec);
  layer->mapped_refs += leaf_refs(pool, leaf) - leaf_refs(pool, old);
  count_up(pool, TP_NODE_PAGE, leaf->rec.key);
  node_drop(pool, old->rec.key);
  *place = leaf->rec.key;
  set_slot(layer, leaf_index, leaf);
  return TP_OK;
}

int map_next_leaf(tp_layer *layer, uint64_t from, uint64_t *leaf_index) {
  *leaf_index = UINT64_MAX;
  while (covers(layer->height, from)) {
    uint64_t id = layer->root;
    unsigned level = layer->height - 1;
    struct node *node;
    for (;; level--) {
      int rc = get_level(layer, id, level, from, &node);
      if (rc != TP_OK) return rc;
      if (level == 0) {
        *leaf_index = from;
        return TP_OK;
      }
      unsigned i = digit(from, level), start = i;
      while (i < FANOUT && node->entry[i] == 0) i++;
      if (i == FANOUT) { /* nothing more under this node: go on behind it, from the root */
        from = ((from >> (8 * level)) + 1) << (8 * level);
        break;
      }
      if (i > start) from = (from >> (8 * level) << (8 * level)) | (uint64_t)i << (8 * (level - 1));
      id = node->entry[i];
    }
  }
  return TP_OK;
}
