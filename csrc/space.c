/* space.c - chunk space: values of chunks with their totals, taking and freeing. The window is in window.c. */
#include "space.h"

#include "pool.h"

static unsigned place(uint64_t chunk) { return (unsigned)(chunk % PAGE_VALUES); }

static void set_busy(struct page *page, unsigned i) {
  assert(!bit_get(page->busy, i));
  bit_set(page->busy, i);
  if (page->busy_count++ == 0) page->rec.pins++;
}

static void clear_busy(struct page *page, unsigned i) {
  assert(bit_get(page->busy, i));
  bit_clear(page->busy, i);
  if (--page->busy_count == 0) page->rec.pins--;
}

static void set_free(struct tp_pool *pool, struct page *page, unsigned i) {
  assert(page->value[i] < CHUNK_ONE && !bit_get(page->busy, i)); /* I3, I4 */
  if (!page->in_window || bit_get(page->free, i)) return;
  if (!space_is_below_ceiling(&pool->space, page->rec.key * PAGE_VALUES + i)) return;
  bit_set(page->free, i);
  page->free_count++;
  pool->space.window_free++;
}

static void clear_free(struct tp_pool *pool, struct page *page, unsigned i) {
  assert(bit_get(page->free, i));
  bit_clear(page->free, i);
  page->free_count--;
  pool->space.window_free--;
}

/* The totals and the summary follow from the values; this is the one place that changes a value from or to free. */
void space_set_value(struct tp_pool *pool, struct page *page, unsigned i, uint32_t value) {
  struct space *space = &pool->space;
  uint32_t old = page->value[i];
  record_touch(pool, &page->rec);
  page->value[i] = value;
  uint32_t *summary = &page->summary->value[page->rec.key % PAGE_VALUES];
  record_touch(pool, &page->summary->rec);
  if (old == CHUNK_CLEAN) *summary -= 1;
  if (old == CHUNK_DIRTY) *summary -= 1u << 16, space->dirty--;
  if (old >= CHUNK_ONE) space->allocated--;
  if (value == CHUNK_CLEAN) *summary += 1;
  if (value == CHUNK_DIRTY) *summary += 1u << 16, space->dirty++;
  if (value >= CHUNK_ONE) space->allocated++;
  pool->state_dirty = true;
}

/* The first chunk of a run of 16 free ones, aligned, so that layers written side by side do not interleave; in the
 * second round, any free one. Returns PAGE_VALUES if the page has none. */
static unsigned find_free(const struct page *page, bool whole_groups) {
  for (unsigned word = 0; word < PAGE_WORDS; word++) {
    if (page->free[word] == 0) continue;
    if (!whole_groups) return word * 64 + (unsigned)__builtin_ctzll(page->free[word]);
    for (unsigned group = 0; group < 64; group += 16) {
      if ((page->free[word] >> group & 0xffff) == 0xffff) return word * 64 + group;
    }
  }
  return PAGE_VALUES;
}

static bool may_take(const struct space *space, uint32_t value) {
  if (space->capacity == 0) return true;
  if (space->allocated + space->taken >= space->capacity) return false;
  /* A dirty chunk takes host space already; a clean one must fit beside all that do. */
  return value == CHUNK_DIRTY || space->allocated + space->taken + space->dirty < space->capacity;
}

static struct page *find_run(struct tp_pool *pool, unsigned *i) {
  struct space *space = &pool->space;
  for (int round = 0; round < 2; round++) {
    for (size_t step = 0; step < space->window_count; step++) {
      size_t at = (space->cursor + step) % space->window_count;
      struct page *page = space->window[at];
      if (page->free_count == 0) continue;
      *i = find_free(page, round == 0);
      if (*i < PAGE_VALUES) {
        space->cursor = at;
        return page;
      }
    }
  }
  return NULL;
}

/* With the capacity nearly reached, clean chunks may not be taken, dirty ones may. */
static struct page *find_dirty(struct tp_pool *pool, unsigned *i) {
  struct space *space = &pool->space;
  for (size_t at = 0; at < space->window_count; at++) {
    struct page *page = space->window[at];
    if (page->free_count == 0) continue;
    for (*i = 0; *i < PAGE_VALUES; (*i)++) {
      if (bit_get(page->free, *i) && page->value[*i] == CHUNK_DIRTY) return page;
    }
  }
  return NULL;
}

static void take(struct tp_pool *pool, struct page *page, unsigned i) {
  clear_free(pool, page, i);
  set_busy(page, i);
  pool->space.taken++;
}

bool space_take_exactly(struct tp_pool *pool, uint64_t chunk) {
  struct page *page = as_page(cache_find(pool, TP_CHUNK_PAGE, chunk / PAGE_VALUES));
  if (page == NULL || !page->in_window || !bit_get(page->free, place(chunk))) return false;
  if (!may_take(&pool->space, page->value[place(chunk)])) return false;
  take(pool, page, place(chunk));
  return true;
}

int space_take(struct tp_pool *pool, uint64_t hint, uint64_t *chunk, bool *dirty) {
  struct space *space = &pool->space;
  unsigned i = place(hint);
  struct page *page = as_page(cache_find(pool, TP_CHUNK_PAGE, hint / PAGE_VALUES));
  if (page == NULL || !page->in_window || !bit_get(page->free, i)) page = find_run(pool, &i);
  if (page != NULL && !may_take(space, page->value[i])) page = find_dirty(pool, &i);
  if (page == NULL || !may_take(space, page->value[i])) return TP_NEED_WINDOW;
  take(pool, page, i);
  *chunk = page->rec.key * PAGE_VALUES + i;
  *dirty = page->value[i] == CHUNK_DIRTY;
  if (space_window_is_low(pool)) pthread_cond_signal(&pool->work);
  return TP_OK;
}

void space_map(struct tp_pool *pool, uint64_t chunk) {
  struct page *page = page_loaded(pool, TP_CHUNK_PAGE, chunk);
  assert(page->value[place(chunk)] < CHUNK_ONE);
  space_set_value(pool, page, place(chunk), CHUNK_ONE);
  clear_busy(page, place(chunk));
  pool->space.taken--;
}

void space_untake(struct tp_pool *pool, uint64_t chunk) {
  struct page *page = page_loaded(pool, TP_CHUNK_PAGE, chunk);
  if (page->value[place(chunk)] == CHUNK_CLEAN) space_set_value(pool, page, place(chunk), CHUNK_DIRTY);
  clear_busy(page, place(chunk));
  pool->space.taken--;
  set_free(pool, page, place(chunk));
}

static void run_add(struct run_list *list, uint64_t chunk) {
  struct run *last = list->count ? &list->items[list->count - 1] : NULL;
  if (last != NULL && chunk == last->first + last->count) {
    last->count++;
    return;
  }
  if (list->count == list->capacity) {
    list->capacity = list->capacity ? list->capacity * 2 : 64;
    list->items = tp_realloc(list->items, list->capacity * sizeof *list->items);
  }
  list->items[list->count++] = (struct run){chunk, 1};
}

void space_freed(struct tp_pool *pool, struct page *page, unsigned i) {
  space_set_value(pool, page, i, CHUNK_DIRTY);
  set_busy(page, i);
  pool->space.pending++;
  pool->space.freed_now++;
  run_add(bit_get(page->moving, i) ? &pool->space.moved : &pool->space.freed[pool->txn & 1], page->rec.key * PAGE_VALUES + i);
}

void space_begin_move(struct tp_pool *pool, uint64_t chunk) {
  struct page *page = page_loaded(pool, TP_CHUNK_PAGE, chunk);
  assert(page->value[place(chunk)] >= CHUNK_ONE && !bit_get(page->moving, place(chunk)));
  bit_set(page->moving, place(chunk));
  page->rec.pins++;
}

void space_end_move(struct tp_pool *pool, uint64_t chunk) {
  struct page *page = page_loaded(pool, TP_CHUNK_PAGE, chunk);
  assert(bit_get(page->moving, place(chunk)));
  bit_clear(page->moving, place(chunk));
  page->rec.pins--;
}

void space_release_moved(struct tp_pool *pool) {
  struct run_list *moved = &pool->space.moved;
  for (size_t k = 0; k < moved->count; k++) {
    for (uint64_t n = 0; n < moved->items[k].count; n++) run_add(&pool->space.freed[pool->txn & 1], moved->items[k].first + n);
    pool->state_dirty = true; /* a transaction that is stored, or its number would say nothing of readers */
  }
  free(moved->items);
  *moved = (struct run_list){0};
}

static void release_runs(struct tp_pool *pool, struct run_list *runs) {
  if (runs->count > 0) pthread_cond_broadcast(&pool->room);
  for (size_t k = 0; k < runs->count; k++) {
    for (uint64_t n = 0; n < runs->items[k].count; n++) {
      uint64_t chunk = runs->items[k].first + n;
      struct page *page = page_loaded(pool, TP_CHUNK_PAGE, chunk); /* busy pages are pinned */
      clear_busy(page, place(chunk));
      set_free(pool, page, place(chunk));
    }
    pool->space.pending -= runs->items[k].count;
  }
  free(runs->items);
  *runs = (struct run_list){0};
}

/* I4: what was freed in the transaction that the store numbers store_txn is reusable once no reader looks at an
 * older state. */
void space_release(struct tp_pool *pool, unsigned parity, uint64_t store_txn, uint64_t oldest_reader) {
  struct space *space = &pool->space;
  size_t kept = 0;
  for (size_t k = 0; k < space->held_count; k++) {
    if (space->held[k].store_txn <= oldest_reader) release_runs(pool, &space->held[k].runs);
    else space->held[kept++] = space->held[k];
  }
  space->held_count = kept;
  struct run_list *freed = &space->freed[parity];
  if (store_txn <= oldest_reader) {
    release_runs(pool, freed);
  } else if (freed->count > 0) {
    space->held = tp_realloc(space->held, (kept + 1) * sizeof *space->held);
    space->held[space->held_count++] = (struct held_runs){store_txn, *freed};
    *freed = (struct run_list){0};
  }
  space->pinned = 0;
  for (size_t k = 0; k < space->held_count; k++) {
    const struct run_list *runs = &space->held[k].runs;
    for (size_t r = 0; r < runs->count; r++) space->pinned += runs->items[r].count;
  }
}

/* --- giving space back to the host --- */

/* The next run of dirty chunks that nobody uses, in pages that the summaries point to; marks it busy. */
static int next_dirty_run(struct tp_pool *pool, uint64_t limit, struct run *run) {
  struct space *space = &pool->space;
  for (uint64_t seen = 0; seen < space->pages; seen++, space->punch_cursor++) {
    if (space->punch_cursor >= space->pages) space->punch_cursor = 0;
    uint64_t index = space->punch_cursor;
    struct page *page;
    int rc = page_get(pool, TP_SUMMARY, index / PAGE_VALUES, &page);
    if (rc != TP_OK) return rc;
    if (page->value[index % PAGE_VALUES] >> 16 == 0) continue;
    if ((rc = page_get(pool, TP_CHUNK_PAGE, index, &page)) != TP_OK) return rc;
    unsigned i = 0;
    while (i < PAGE_VALUES && (page->value[i] != CHUNK_DIRTY || bit_get(page->busy, i))) i++;
    if (i == PAGE_VALUES) continue;
    *run = (struct run){index * PAGE_VALUES + i, 0};
    for (; i < PAGE_VALUES && run->count < limit && page->value[i] == CHUNK_DIRTY && !bit_get(page->busy, i); i++) {
      if (bit_get(page->free, i)) clear_free(pool, page, i);
      set_busy(page, i);
      run->count++;
    }
    return TP_OK;
  }
  return TP_ENOENT;
}

static void end_punch(struct tp_pool *pool, struct run run, bool punched) {
  struct page *page = page_loaded(pool, TP_CHUNK_PAGE, run.first);
  for (uint64_t n = 0; n < run.count; n++) {
    unsigned i = place(run.first + n);
    /* The commit that stores "clean" syncs the data file first, and with it this punch. */
    if (punched) space_set_value(pool, page, i, CHUNK_CLEAN);
    clear_busy(page, i);
    set_free(pool, page, i);
  }
}

int tp_punch(tp_pool *pool, uint64_t budget) {
  int rc = TP_OK;
  uint64_t left = max_u64(budget >> pool->chunk_shift, 1);
  pthread_mutex_lock(&pool->mutex);
  while (left > 0 && rc == TP_OK) {
    struct run run = {0, 0};
    if (pool->closed) rc = tp_error_set(TP_ECLOSED);
    else if (pool->failed) rc = tp_error_set(TP_EFAILED);
    else if (pool->space.dirty <= pool->space.pending) rc = TP_ENOENT;
    else rc = next_dirty_run(pool, left, &run);
    if (rc == TP_ENOENT && pool->punching > 0) { /* the rest is done once the others are; what they fail at is left to us */
      pthread_cond_wait(&pool->committed, &pool->mutex);
      rc = TP_OK;
      continue;
    }
    if (rc != TP_OK) break;
    pool->punching++;
    pthread_mutex_unlock(&pool->mutex);
    int result = pool->disk.punch(pool->disk.ctx, run.first << pool->chunk_shift, run.count << pool->chunk_shift);
    pool_mark_unsynced(pool);
    pthread_mutex_lock(&pool->mutex);
    end_punch(pool, run, result >= 0);
    if (--pool->punching == 0) pthread_cond_broadcast(&pool->committed);
    if (result >= 0) {
      pool->metrics.punched_bytes += run.count << pool->chunk_shift;
      pool->refused = false;
    }
    if (result < 0) rc = tp_error_os(result);
    left -= run.count;
  }
  cache_trim(pool, NULL);
  pthread_mutex_unlock(&pool->mutex);
  if (rc == TP_ENOENT) return 0;
  return rc == TP_OK ? 1 : rc;
}

int tp_pool_set_capacity(tp_pool *pool, uint64_t capacity) {
  pthread_mutex_lock(&pool->mutex);
  pool->space.capacity = capacity >> pool->chunk_shift;
  pthread_cond_broadcast(&pool->room);
  pthread_mutex_unlock(&pool->mutex);
  return TP_OK;
}

void space_free(struct tp_pool *pool) {
  struct space *space = &pool->space;
  free(space->freed[0].items);
  free(space->freed[1].items);
  free(space->moved.items);
  for (size_t k = 0; k < space->held_count; k++) free(space->held[k].runs.items);
  free(space->held);
  free(space->window);
  free(space->planned);
  bytes_free(&space->plan_record);
}
