/* compact.c - chunks move down in the data file, so that its end can be given up (window.c), while I/O goes on.
 *
 * What moves is where bytes lie, never what they are: so it takes no layer's lock but to wait, and it does not matter how many layers share a
 * leaf that names a chunk. For some chunks at a time:
 *
 *   1. mark: nobody overwrites the chunk in place from now on (count_is_mine), and nobody gets it should it be freed;
 *   2. drain (tp_revoke): whoever knew it to be his own has done with it. Its bytes stand still, as far as any entry names them;
 *   3. copy it to a chunk below the ceiling;
 *   4. let those who name it name the copy, each reference with its count: so a commit may come at any moment (I1), and a reference that was not
 *      found keeps the old chunk, which then stays;
 *   5. drain: nobody reads the old chunk any more by an entry that he saw before 4. What of it is free is freed with the open transaction (I4);
 *   6. commit.
 *
 * Until the transaction of 4 is durable the copy passes for shared (page_set_unshared). A process that is killed before loses the move; what it wrote
 * in the meantime then lies in other chunks, of which there are notes (redo.h), and the old chunk still has the rest.
 *
 * Who names a chunk is found by reading every node once for a range of chunks, as many as have REFS_MAX references. A chunk with more
 * references than were found, since leaves have changed meanwhile, is left to the next round.
 */
#include "checksum.h"
#include "io.h"

#define REFS_MAX ((uint64_t)1 << 20)
#define PAGES_PER_RANGE 64u
#define ROUNDS_MAX 4u
#define NODES_PER_STEP 32u
#define IDS_PER_STEP (16 * PAGE_VALUES)
#define LEAVES_PER_HOLD 16u
#define BATCH_MAX 1024u
#define BATCH_BYTES ((uint64_t)32 << 20)
#define COPY_BYTES WRITE_MAX

struct ref {
  uint64_t chunk, leaf; /* leaf: a node id */
};

struct move {
  uint64_t from, to;
  bool dirty;  /* `to` holds old bytes */
  bool copied; /* it holds those of `from` */
  bool named;  /* an entry names it */
};

struct tp_compaction {
  tp_pool *pool;
  unsigned rounds_left;
  uint64_t top;        /* of this round: chunks from here on are dealt with */
  uint64_t first, end; /* the range that is dealt with now; none where equal */
  uint64_t next_chunk; /* of the range: this one and those above are dealt with */
  uint64_t next_node;  /* to be read */
  bool found_all;      /* all nodes are read for this range, and refs sorted */
  struct ref *refs;
  size_t ref_count, ref_capacity;
  uint32_t *found;     /* per chunk of the range: entries that name it */
  struct move *moves;
  unsigned move_count;
  uint64_t hint;       /* behind the last copy */
  uint64_t moved, moved_before; /* in all; before this round */
  bool starved;        /* there was no room the last time */
  uint8_t *buffer;
};

/* --- what is to move --- */

static uint64_t ceiling_of(const struct tp_pool *pool) { return pool->space.ceiling; }

/* Chunks of the page that are allocated. */
static int page_allocated(struct tp_pool *pool, uint64_t index, unsigned *allocated) {
  struct page *summary;
  int rc = page_get(pool, TP_SUMMARY, index / PAGE_VALUES, &summary);
  if (rc != TP_OK) return rc;
  uint32_t value = summary->value[index % PAGE_VALUES];
  *allocated = PAGE_VALUES - (value & 0xffff) - (value >> 16);
  return TP_OK;
}

static int count_above(struct tp_pool *pool, uint64_t *total) {
  uint64_t ceiling = ceiling_of(pool);
  *total = 0;
  for (uint64_t index = ceiling / PAGE_VALUES; index < pool->space.pages; index++) {
    struct page *page;
    unsigned allocated;
    int rc = page_allocated(pool, index, &allocated);
    if (rc == TP_OK && allocated > 0 && index * PAGE_VALUES < ceiling) {
      if ((rc = page_get(pool, TP_CHUNK_PAGE, index, &page)) != TP_OK) return rc;
      for (unsigned i = 0; i < ceiling % PAGE_VALUES; i++) allocated -= page->value[i] >= CHUNK_ONE;
    }
    if (rc != TP_OK) return rc;
    *total += allocated;
  }
  return TP_OK;
}

/* The next range, from the top down. Returns 1 if there is one. Mutex held. */
static int choose_range(struct tp_compaction *c) {
  struct tp_pool *pool = c->pool;
  uint64_t ceiling = ceiling_of(pool), refs = 0;
  uint64_t end = min_u64(c->top, pool->space.pages * PAGE_VALUES), first = end;
  unsigned pages = 0;
  while (ceiling != 0 && first > ceiling && refs < REFS_MAX && pages < PAGES_PER_RANGE) {
    uint64_t index = (first - 1) / PAGE_VALUES, begin = max_u64(index * PAGE_VALUES, ceiling);
    struct page *page;
    unsigned allocated;
    int rc = page_allocated(pool, index, &allocated);
    if (rc == TP_OK && allocated > 0) rc = page_get(pool, TP_CHUNK_PAGE, index, &page);
    if (rc != TP_OK) return rc;
    for (uint64_t chunk = begin; allocated > 0 && chunk < first; chunk++) {
      uint32_t value = page->value[chunk % PAGE_VALUES];
      if (value >= CHUNK_ONE) refs += value - 1;
    }
    if (allocated > 0) pages++;
    first = begin;
    if (refs == 0) end = begin;
  }
  c->top = first;
  if (refs == 0) return 0;
  c->first = first, c->end = end;
  c->next_chunk = end, c->next_node = 1, c->found_all = false, c->ref_count = 0;
  free(c->found);
  c->found = tp_alloc_zero((end - first) * sizeof *c->found);
  return 1;
}

/* Returns 1 if there is a range to go on with. */
static int next_range(struct tp_compaction *c) {
  int rc = choose_range(c);
  if (rc != 0 || c->moved == c->moved_before || c->rounds_left == 0) return rc;
  c->rounds_left--; /* what was missed, once more */
  c->moved_before = c->moved;
  c->top = UINT64_MAX;
  return choose_range(c);
}

/* --- who names it --- */

static void add_ref(struct tp_compaction *c, uint64_t chunk, uint64_t leaf) {
  c->found[chunk - c->first]++;
  struct ref *last = c->ref_count > 0 ? &c->refs[c->ref_count - 1] : NULL;
  if (last != NULL && last->chunk == chunk && last->leaf == leaf) return;
  if (c->ref_count == c->ref_capacity) {
    c->ref_capacity = c->ref_capacity ? c->ref_capacity * 2 : 1024;
    c->refs = tp_realloc(c->refs, c->ref_capacity * sizeof *c->refs);
  }
  c->refs[c->ref_count++] = (struct ref){chunk, leaf};
}

static void add_refs_of(struct tp_compaction *c, const struct node *leaf) {
  uint64_t chunks[c->pool->blocks];
  for (unsigned i = 0; i < FANOUT; i++) {
    unsigned count = entry_chunks(c->pool, leaf->entry[i], chunks);
    for (unsigned k = 0; k < count; k++) {
      if (chunks[k] >= c->first && chunks[k] < c->end) add_ref(c, chunks[k], leaf->rec.key);
    }
  }
}

static int by_chunk(const void *a, const void *b) {
  const struct ref *x = a, *y = b;
  if (x->chunk != y->chunk) return x->chunk < y->chunk ? -1 : 1;
  return x->leaf == y->leaf ? 0 : x->leaf < y->leaf ? -1 : 1;
}

/* Reads some nodes. Ids are never used again, so new nodes come last. Mutex held. */
static int find_some(struct tp_compaction *c) {
  struct tp_pool *pool = c->pool;
  unsigned nodes = 0;
  for (uint64_t ids = 0; nodes < NODES_PER_STEP && ids < IDS_PER_STEP && c->next_node < pool->next_node; ids++) {
    uint64_t id = c->next_node;
    struct page *page;
    struct node *node;
    bool temporary;
    int rc = page_get(pool, TP_NODE_PAGE, id / PAGE_VALUES, &page);
    if (rc != TP_OK) return rc;
    c->next_node++;
    if (page->value[id % PAGE_VALUES] == 0) continue;
    if ((rc = node_look(pool, id, &node, &temporary)) != TP_OK) return rc;
    if (node->level == 0) add_refs_of(c, node);
    if (temporary) node_free(node);
    nodes++;
  }
  c->found_all = c->next_node >= pool->next_node;
  if (c->found_all && c->ref_count > 0) qsort(c->refs, c->ref_count, sizeof *c->refs, by_chunk);
  return TP_OK;
}

static size_t first_ref(const struct tp_compaction *c, uint64_t chunk) {
  size_t low = 0, high = c->ref_count;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (c->refs[middle].chunk < chunk) low = middle + 1;
    else high = middle;
  }
  return low;
}

/* --- moving --- */

/* Chooses chunks, and takes a place for each. Mutex held. TP_NEED_WINDOW: there is no room for the next. */
static int mark_some(struct tp_compaction *c) {
  struct tp_pool *pool = c->pool;
  unsigned limit = (unsigned)max_u64(min_u64(BATCH_BYTES >> pool->chunk_shift, BATCH_MAX), 1);
  c->move_count = 0;
  while (c->move_count < limit && ceiling_of(pool) != 0 && c->next_chunk > max_u64(c->first, ceiling_of(pool))) {
    uint64_t chunk = c->next_chunk - 1;
    struct move move = {.from = chunk};
    struct page *page;
    int rc = page_get(pool, TP_CHUNK_PAGE, chunk / PAGE_VALUES, &page);
    if (rc != TP_OK) return rc;
    uint32_t value = page->value[chunk % PAGE_VALUES];
    if (value >= CHUNK_ONE && value - 1 == c->found[chunk - c->first]) {
      if ((rc = space_take(pool, c->hint, &move.to, &move.dirty)) != TP_OK) return rc;
      assert(move.to < ceiling_of(pool));
      c->hint = move.to + 1;
      space_begin_move(pool, chunk);
      c->moves[c->move_count++] = move;
    }
    c->next_chunk--;
  }
  if (ceiling_of(pool) == 0 || c->next_chunk <= max_u64(c->first, ceiling_of(pool))) c->end = c->first;
  return TP_OK;
}

/* Without the blocks of zeros, where zeros are already: holes stay holes. */
static int write_copy(struct tp_pool *pool, const uint8_t *buf, uint64_t length, uint64_t at, bool dirty) {
  if (dirty) return disk_write(pool, buf, length, at);
  for (uint64_t from = 0, to; from < length; from = to) {
    bool zeros = tp_is_zero(buf + from, TP_BLOCK) != 0;
    for (to = from + TP_BLOCK; to < length && (tp_is_zero(buf + to, TP_BLOCK) != 0) == zeros; to += TP_BLOCK) continue;
    int rc = zeros ? TP_OK : disk_write(pool, buf + from, to - from, at + from);
    if (rc != TP_OK) return rc;
  }
  return TP_OK;
}

/* What cannot be read, or does not match its checksum, stays where it is. */
static int copy_chunk(struct tp_compaction *c, struct move *move) {
  struct tp_pool *pool = c->pool;
  uint64_t from = move->from << pool->chunk_shift, to = move->to << pool->chunk_shift;
  int whole = checksum_verify(pool, move->from, c->buffer);
  if (whole < 0 || (whole == 0 && disk_read(pool, c->buffer, chunk_size(pool), from) != TP_OK)) return TP_OK;
  for (uint64_t done = 0, n; done < chunk_size(pool); done += n) {
    n = min_u64(chunk_size(pool) - done, COPY_BYTES);
    int rc = write_copy(pool, c->buffer + done, n, to + done, move->dirty);
    if (rc != TP_OK) return rc;
  }
  move->copied = true;
  return TP_OK;
}

static int copy_all(struct tp_compaction *c) {
  struct tp_pool *pool = c->pool;
  for (unsigned k = 0; k < c->move_count; k++) {
    if (pool->stopped || pool->closed) return tp_error_set(TP_ECLOSED);
    int rc = copy_chunk(c, &c->moves[k]);
    if (rc != TP_OK) return rc;
  }
  return TP_OK;
}

static bool names_chunk(const struct tp_pool *pool, uint64_t entry, uint64_t value) {
  if (!entry_is_split(entry)) return entry == value;
  for (unsigned b = 0; b < pool->blocks; b++) {
    if (entry_split(entry)->block[b] == value) return true;
  }
  return false;
}

/* In place, for others may be reading it without the mutex: they find either chunk. */
static void rename_chunk(const struct tp_pool *pool, uint64_t *entry, uint64_t from, uint64_t to) {
  if (!entry_is_split(*entry)) {
    __atomic_store_n(entry, to, __ATOMIC_RELEASE);
    return;
  }
  struct split *split = entry_split(*entry);
  for (unsigned b = 0; b < pool->blocks; b++) {
    if (split->block[b] == from) __atomic_store_n(&split->block[b], to, __ATOMIC_RELEASE);
  }
  if (split->own == from) __atomic_store_n(&split->own, to, __ATOMIC_RELEASE);
}

/* One reference goes from the old chunk to its copy: the one place where that happens. Counts and checksums loaded, mutex held. */
static void chunk_has_moved(struct tp_pool *pool, struct move *move) {
  struct page *from = page_loaded(pool, TP_CHUNK_PAGE, move->from), *to = page_loaded(pool, TP_CHUNK_PAGE, move->to);
  if (move->named) count_up(pool, TP_CHUNK_PAGE, move->to);
  else space_map(pool, move->to);
  move->named = true;
  page_set_unshared(pool, to, move->to % PAGE_VALUES);
  /* Both hold the bytes that it is of. The old one keeps it as long as others name it; it may have been made since the last reference. */
  uint32_t checksum = checksum_get(from, move->from % PAGE_VALUES);
  if (checksum != 0) checksum_set(pool, to, move->to % PAGE_VALUES, checksum);
  count_down(pool, TP_CHUNK_PAGE, move->from);
}

/* Mutex held. A leaf that is gone by now named it no more. */
static int move_in_leaf(struct tp_pool *pool, uint64_t id, struct move *move) {
  struct page *page, *target;
  struct node *leaf;
  uint64_t ignored;
  int rc = page_get(pool, TP_NODE_PAGE, id / PAGE_VALUES, &page);
  if (rc != TP_OK || page->value[id % PAGE_VALUES] == 0) return rc;
  if ((rc = node_get(pool, id, &leaf)) != TP_OK) return rc;
  if ((rc = page_get(pool, TP_CHUNK_PAGE, move->to / PAGE_VALUES, &target)) != TP_OK) return rc;
  if ((rc = checksum_load(pool, target, move->to % PAGE_VALUES)) != TP_OK) return rc;
  for (unsigned i = 0; i < FANOUT; i++) {
    if (!names_chunk(pool, leaf->entry[i], move->from + 1)) continue;
    if ((rc = load_count(pool, TP_CHUNK_PAGE, move->from, &ignored)) != TP_OK) return rc;
    record_touch(pool, &leaf->rec); /* a frozen state has the entry as it was */
    rename_chunk(pool, &leaf->entry[i], move->from + 1, move->to + 1);
    chunk_has_moved(pool, move);
  }
  return TP_OK;
}

static int move_refs(struct tp_compaction *c, struct move *move) {
  struct tp_pool *pool = c->pool;
  int rc = TP_OK;
  size_t at = first_ref(c, move->from);
  while (rc == TP_OK && at < c->ref_count && c->refs[at].chunk == move->from) {
    pthread_mutex_lock(&pool->mutex);
    rc = pool_check_change(pool);
    for (unsigned n = 0; rc == TP_OK && n < LEAVES_PER_HOLD && at < c->ref_count && c->refs[at].chunk == move->from; n++) {
      rc = move_in_leaf(pool, c->refs[at++].leaf, move);
    }
    cache_trim(pool, NULL);
    pthread_mutex_unlock(&pool->mutex);
  }
  return rc;
}

static void end_moves(struct tp_compaction *c) {
  struct tp_pool *pool = c->pool;
  pthread_mutex_lock(&pool->mutex);
  for (unsigned k = 0; k < c->move_count; k++) {
    space_end_move(pool, c->moves[k].from);
    if (c->moves[k].named) c->moved++;
    else space_untake(pool, c->moves[k].to);
  }
  space_release_moved(pool);
  pthread_mutex_unlock(&pool->mutex);
}

/* Marked chunks, from 2 on. */
static int move_marked(struct tp_compaction *c) {
  tp_revoke(c->pool);
  int rc = copy_all(c);
  for (unsigned k = 0; k < c->move_count; k++) {
    int moved = c->moves[k].copied ? move_refs(c, &c->moves[k]) : TP_OK;
    if (rc == TP_OK) rc = moved;
  }
  tp_revoke(c->pool);
  end_moves(c);
  return rc == TP_OK ? tp_flush(c->pool) : rc;
}

static int move_some(struct tp_compaction *c) {
  tp_pool *pool = c->pool;
  pthread_mutex_lock(&pool->mutex);
  int marked = pool_check_change(pool);
  if (marked == TP_OK) marked = mark_some(c);
  else c->move_count = 0;
  cache_trim(pool, NULL);
  pthread_mutex_unlock(&pool->mutex);
  int rc = c->move_count > 0 ? move_marked(c) : TP_OK;
  if (rc != TP_OK || marked == TP_OK) return rc;
  if (marked != TP_NEED_WINDOW) return marked;
  bool again = c->starved && c->move_count == 0;
  c->starved = true;
  rc = again ? TP_ENOSPC : pool->options.extend_window(pool->options.ctx);
  if (rc != TP_ENOSPC) return rc;
  c->top = c->first = c->end = 0, c->rounds_left = 0; /* no room below: that was all that can be gained */
  return TP_OK;
}

/* --- the whole --- */

/* As many pages as hold all that is allocated and a little more, so that whoever writes meanwhile has room. */
static uint64_t choose_ceiling(const struct tp_pool *pool) {
  uint64_t chunks = pool->space.allocated + pool->space.allocated / 32;
  return max_u64((chunks + PAGE_VALUES - 1) / PAGE_VALUES, 1) * PAGE_VALUES;
}

int tp_compact_begin(tp_pool *pool, uint64_t ceiling, tp_compaction **out, uint64_t *total) {
  pthread_mutex_lock(&pool->mutex);
  int rc = pool->compacted ? tp_error_set(TP_EINVAL) : pool_check_change(pool);
  if (rc == TP_OK) {
    space_set_ceiling(pool, ceiling != 0 ? ceiling : choose_ceiling(pool));
    rc = count_above(pool, total);
    if (rc != TP_OK) space_set_ceiling(pool, 0);
  }
  if (rc == TP_OK) {
    struct tp_compaction *c = tp_alloc_zero(sizeof *c);
    *c = (struct tp_compaction){.pool = pool, .top = UINT64_MAX, .rounds_left = ROUNDS_MAX - 1};
    c->moves = tp_alloc(BATCH_MAX * sizeof *c->moves);
    c->buffer = tp_alloc(chunk_size(pool));
    pool->compacted = true;
    pool->handles++;
    *out = c;
  }
  cache_trim(pool, NULL);
  pthread_mutex_unlock(&pool->mutex);
  return rc;
}

/* Returns 1 if there is a range. */
static int look_for_some(struct tp_compaction *c) {
  struct tp_pool *pool = c->pool;
  pthread_mutex_lock(&pool->mutex);
  int rc = pool_check_change(pool);
  if (rc == TP_OK && c->first == c->end) {
    rc = next_range(c);
  } else if (rc == TP_OK) {
    rc = find_some(c);
    if (rc == TP_OK) rc = 1;
  }
  cache_trim(pool, NULL);
  pthread_mutex_unlock(&pool->mutex);
  return rc;
}

int tp_compact_step(tp_compaction *c, uint64_t *moved) {
  pthread_mutex_lock(&c->pool->compacting);
  bool moving = c->first < c->end && c->found_all;
  int rc = moving ? move_some(c) : look_for_some(c);
  *moved = c->moved;
  pthread_mutex_unlock(&c->pool->compacting);
  return moving && rc == TP_OK ? 1 : rc;
}

void tp_compact_end(tp_compaction *c) {
  tp_pool *pool = c->pool;
  pthread_mutex_lock(&pool->mutex);
  if (!pool->closed) space_set_ceiling(pool, 0);
  pool->compacted = false;
  free(c->refs);
  free(c->found);
  free(c->moves);
  free(c->buffer);
  free(c);
  pool_unref(pool);
}
