/* node.c - map nodes: loading, copying, giving up, and their stored form. */
#include "node.h"

#include "pool.h"

/* --- split entries --- */

static size_t split_bytes(const struct tp_pool *pool) {
  return sizeof(struct split) + pool->blocks * sizeof(uint64_t);
}

unsigned entry_chunks(const struct tp_pool *pool, uint64_t entry, uint64_t *chunks) {
  if (entry == 0) return 0;
  if (!entry_is_split(entry)) {
    chunks[0] = entry - 1;
    return 1;
  }
  const struct split *split = entry_split(entry);
  unsigned count = 0;
  uint64_t previous = 0;
  for (unsigned b = 0; b < pool->blocks; b++) {
    uint64_t value = split->block[b];
    if (value == 0 || value == previous) continue;
    previous = value;
    unsigned k = count;
    while (k > 0 && chunks[k - 1] != value - 1) k--;
    if (k == 0) chunks[count++] = value - 1;
  }
  return count;
}

int entry_load_counts(struct tp_pool *pool, uint64_t entry) {
  uint64_t chunks[pool->blocks], ignored;
  unsigned count = entry_chunks(pool, entry, chunks);
  for (unsigned k = 0; k < count; k++) {
    int rc = load_count(pool, TP_CHUNK_PAGE, chunks[k], &ignored);
    if (rc != TP_OK) return rc;
  }
  return TP_OK;
}

void entry_release(struct tp_pool *pool, uint64_t entry) {
  uint64_t chunks[pool->blocks];
  unsigned count = entry_chunks(pool, entry, chunks);
  for (unsigned k = 0; k < count; k++) count_down(pool, TP_CHUNK_PAGE, chunks[k]);
  if (entry_is_split(entry)) free(entry_split(entry));
}

uint64_t entry_copy(struct tp_pool *pool, uint64_t entry) {
  uint64_t chunks[pool->blocks];
  unsigned count = entry_chunks(pool, entry, chunks);
  for (unsigned k = 0; k < count; k++) count_up(pool, TP_CHUNK_PAGE, chunks[k]);
  if (!entry_is_split(entry)) return entry;
  struct split *split = tp_alloc(split_bytes(pool));
  memcpy(split, entry_split(entry), split_bytes(pool));
  return split_entry(split);
}

/* --- nodes --- */

void node_free(struct node *node) {
  for (unsigned i = 0; node->level == 0 && i < FANOUT; i++) {
    if (entry_is_split(node->entry[i])) free(entry_split(node->entry[i]));
  }
  free(node);
}

bool node_is_empty(const struct node *node) {
  for (unsigned i = 0; i < FANOUT; i++) {
    if (node->entry[i] != 0) return false;
  }
  return true;
}

static void decode_splits(struct tp_pool *pool, struct reader *in, struct node *node) {
  uint64_t count = codec_get_varint(in), at = 0;
  if (count > FANOUT) in->bad = true;
  for (uint64_t k = 0; k < count && !in->bad; k++) {
    at += codec_get_varint(in);
    if (at >= FANOUT || node->entry[at] != 0 || pool->blocks < 2) {
      in->bad = true;
      break;
    }
    struct split *split = tp_alloc_zero(split_bytes(pool));
    node->entry[at] = split_entry(split);
    split->own = codec_get_varint(in);
    codec_get_array(in, split->block, pool->blocks);
  }
}

static int decode(struct tp_pool *pool, uint64_t id, struct node *node) {
  struct reader in;
  int rc = record_fetch(pool, TP_NODE, id, &in);
  if (rc == TP_ENOENT) return tp_error_record(TP_ECORRUPT, TP_NODE, id); /* a map names it */
  if (rc != TP_OK) return rc;
  uint64_t level = codec_get_varint(&in);
  if (level >= MAX_HEIGHT) in.bad = true;
  node->level = (unsigned)level;
  codec_get_array(&in, node->entry, FANOUT);
  if (!in.bad && level == 0) decode_splits(pool, &in, node);
  return in.bad || in.position != in.length ? tp_error_record(TP_ECORRUPT, TP_NODE, id) : TP_OK;
}

static struct node *node_alloc(uint64_t id, unsigned level) {
  struct node *node = tp_alloc_zero(sizeof *node);
  node->rec.kind = TP_NODE;
  node->rec.key = id;
  node->level = level;
  return node;
}

int node_look(struct tp_pool *pool, uint64_t id, struct node **out, bool *temporary) {
  struct node *node = as_node(cache_find(pool, TP_NODE, id));
  *temporary = node == NULL;
  if (node == NULL) {
    node = node_alloc(id, 0);
    int rc = decode(pool, id, node);
    if (rc != TP_OK) {
      node_free(node);
      return rc;
    }
  }
  *out = node;
  return TP_OK;
}

int node_get(struct tp_pool *pool, uint64_t id, struct node **out) {
  bool temporary;
  int rc = node_look(pool, id, out, &temporary);
  if (rc == TP_OK && temporary) cache_insert(pool, &(*out)->rec);
  return rc;
}

void node_encode(struct tp_pool *pool, struct node *node) {
  uint64_t entries[FANOUT];
  unsigned splits = 0;
  for (unsigned i = 0; i < FANOUT; i++) {
    bool split = node->level == 0 && entry_is_split(node->entry[i]);
    entries[i] = split ? 0 : node->entry[i];
    splits += split;
  }
  size_t begin = record_begin(&pool->out, TP_NODE, node->rec.key, false);
  codec_put_varint(&pool->out, node->level);
  codec_put_array(&pool->out, entries, FANOUT);
  if (node->level == 0) {
    codec_put_varint(&pool->out, splits);
    unsigned last = 0;
    for (unsigned i = 0; i < FANOUT; i++) {
      if (!entry_is_split(node->entry[i])) continue;
      const struct split *split = entry_split(node->entry[i]);
      codec_put_varint(&pool->out, i - last);
      codec_put_varint(&pool->out, split->own);
      codec_put_array(&pool->out, split->block, pool->blocks);
      last = i;
    }
  }
  record_end(&pool->out, begin);
}

/* The first id of a count page brings that page in; ids only grow, so it is new, and creating cannot fail later. */
static struct page *count_page_of_new(struct tp_pool *pool, uint64_t id) {
  struct page *page = as_page(cache_find(pool, TP_NODE_PAGE, id / PAGE_VALUES));
  assert(page != NULL);
  return page;
}

struct node *node_create(struct tp_pool *pool, unsigned level) {
  struct node *node = node_alloc(pool->next_node++, level);
  struct page *page = count_page_of_new(pool, node->rec.key);
  record_touch(pool, &page->rec);
  page->value[node->rec.key % PAGE_VALUES] = 1;
  pool->state_dirty = true;
  cache_insert(pool, &node->rec);
  record_touch(pool, &node->rec);
  return node;
}

int node_load_counts(struct tp_pool *pool, const struct node *node) {
  for (unsigned i = 0; i < FANOUT; i++) {
    if (node->entry[i] == 0) continue;
    uint64_t ignored;
    int rc = node->level == 0 ? entry_load_counts(pool, node->entry[i])
                              : load_count(pool, TP_NODE_PAGE, node->entry[i], &ignored);
    if (rc != TP_OK) return rc;
  }
  return TP_OK;
}

int node_copy(struct tp_pool *pool, struct node *src, struct node **out) {
  int rc = node_load_counts(pool, src);
  if (rc != TP_OK) return rc;
  struct node *copy = node_create(pool, src->level);
  for (unsigned i = 0; i < FANOUT; i++) {
    uint64_t entry = src->entry[i];
    if (entry == 0) continue;
    if (src->level > 0) count_up(pool, TP_NODE_PAGE, entry);
    copy->entry[i] = src->level > 0 ? entry : entry_copy(pool, entry);
  }
  uint64_t left = count_down(pool, TP_NODE_PAGE, src->rec.key);
  assert(left > 0); /* only shared nodes are copied */
  (void)left;
  *out = copy;
  return TP_OK;
}

void node_drop(struct tp_pool *pool, uint64_t id) {
  struct page *page = page_loaded(pool, TP_NODE_PAGE, id);
  assert(page->value[id % PAGE_VALUES] > 0); /* I2 */
  if (page->value[id % PAGE_VALUES] > 1) {
    count_down(pool, TP_NODE_PAGE, id);
    return;
  }
  /* The queue takes over the last reference. */
  if (pool->reclaim.count == pool->reclaim.capacity) {
    pool->reclaim.capacity = pool->reclaim.capacity ? pool->reclaim.capacity * 2 : 64;
    pool->reclaim.ids = tp_realloc(pool->reclaim.ids, pool->reclaim.capacity * sizeof *pool->reclaim.ids);
  }
  pool->reclaim.ids[pool->reclaim.count++] = id;
  pool->reclaim.changed = true;
  pool->state_dirty = true;
}
