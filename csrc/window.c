/* window.c - the allocation window: planning, storing and activating it, and what a crash makes of it; and how the data file gets shorter. */
#include "pool.h"

#define WINDOW_BYTES ((uint64_t)1 << 30)
#define WINDOW_PAGES_MIN 2u

/* Chunks that the window should offer. */
static uint64_t window_target(const struct tp_pool *pool) {
  uint64_t bytes = pool->options.window_bytes ? pool->options.window_bytes : WINDOW_BYTES;
  return max_u64(bytes >> pool->chunk_shift, WINDOW_PAGES_MIN * PAGE_VALUES);
}

/* Half of what there was is gone. Where a nearly full pool has no more to give, that half shrinks. */
bool space_window_is_low(const struct tp_pool *pool) {
  return pool->space.window_free < min_u64(window_target(pool), pool->space.window_full) / 2;
}

static void plan_add(struct space *space, struct page *page) {
  space->planned = tp_realloc(space->planned, (space->planned_count + 1) * sizeof *space->planned);
  space->planned[space->planned_count++] = page;
  page->rec.pins++;
}

static bool is_planned(const struct space *space, const struct page *page) {
  for (size_t k = 0; k < space->planned_count; k++) {
    if (space->planned[k] == page) return true;
  }
  return false;
}

static bool is_usable(const struct space *space, const struct page *page, unsigned i) {
  return page->value[i] < CHUNK_ONE && !bit_get(page->busy, i) && space_is_below_ceiling(space, page->rec.key * PAGE_VALUES + i);
}

static unsigned page_usable(const struct space *space, const struct page *page) {
  unsigned usable = 0;
  for (unsigned i = 0; i < PAGE_VALUES; i++) usable += is_usable(space, page, i);
  return usable;
}

/* Adds a page that lost chunks since it left the window, if at least `least` of it can be used. */
static int plan_old_pages(struct tp_pool *pool, uint64_t target, unsigned least, uint64_t *planned_free) {
  struct space *space = &pool->space;
  for (uint64_t seen = 0; seen < space->pages && *planned_free < target; seen++, space->scan_cursor++) {
    if (space->scan_cursor >= space->pages) space->scan_cursor = 0;
    uint64_t index = space->scan_cursor;
    struct page *page;
    if (!space_is_below_ceiling(space, index * PAGE_VALUES)) continue;
    int rc = page_get(pool, TP_SUMMARY, index / PAGE_VALUES, &page);
    if (rc != TP_OK) return rc;
    uint32_t summary = page->value[index % PAGE_VALUES];
    if ((summary & 0xffff) + (summary >> 16) < least) continue;
    if ((rc = page_get(pool, TP_CHUNK_PAGE, index, &page)) != TP_OK) return rc;
    if (is_planned(space, page)) continue;
    unsigned usable = page_usable(space, page);
    if (usable < least) continue;
    plan_add(space, page);
    *planned_free += usable;
  }
  return TP_OK;
}

/* Pages never used: their values are clean without having been stored; from now on their summary says so. `refused`: why the data file may
 * not become larger, in which case what is left in it must do. */
static int plan_new_pages(struct tp_pool *pool, uint64_t target, uint64_t *planned_free, int *refused) {
  struct space *space = &pool->space;
  uint64_t limit = space->capacity == 0 ? UINT64_MAX : (space->capacity + PAGE_VALUES - 1) / PAGE_VALUES;
  while (*planned_free < target && space->pages < limit) {
    struct page *page;
    int rc = page_get(pool, TP_CHUNK_PAGE, space->pages, &page);
    if (rc != TP_OK) return rc;
    uint64_t length = (space->pages + 1) * PAGE_VALUES << pool->chunk_shift;
    *refused = pool->disk.resize(pool->disk.ctx, length);
    pool_mark_unsynced(pool);
    if (*refused < 0) return TP_OK;
    record_touch(pool, &page->summary->rec);
    page->summary->value[page->rec.key % PAGE_VALUES] = PAGE_VALUES;
    pool->state_dirty = true;
    space->pages++;
    plan_add(space, page);
    *planned_free += PAGE_VALUES;
  }
  return TP_OK;
}

/* Nothing is free below the ceiling: somebody needs the room that a compaction wants to give up. */
static int plan_higher(struct tp_pool *pool, uint64_t target, uint64_t *planned_free, int *refused) {
  struct space *space = &pool->space;
  space->ceiling += WINDOW_PAGES_MIN * PAGE_VALUES;
  if (space->ceiling >= space->pages * PAGE_VALUES) space->ceiling = 0;
  for (size_t k = 0; k < space->planned_count; k++) *planned_free += page_usable(space, space->planned[k]);
  int rc = plan_old_pages(pool, target, 1, planned_free);
  return rc == TP_OK && space->ceiling == 0 ? plan_new_pages(pool, target, planned_free, refused) : rc;
}

static void drop_plan(struct space *space) {
  for (size_t k = 0; k < space->planned_count; k++) space->planned[k]->rec.pins--;
  free(space->planned);
  space->planned = NULL;
  space->planned_count = 0;
}

int tp_window_plan(tp_pool *pool, const uint8_t **record, uint64_t *length) {
  struct space *space = &pool->space;
  pthread_mutex_lock(&pool->mutex);
  drop_plan(space);
  uint64_t planned_free = 0, target = window_target(pool);
  /* A page leaves once all it has handed out is committed, and nothing is left in it. */
  for (size_t k = 0; k < space->window_count; k++) {
    struct page *page = space->window[k];
    if (page->free_count == 0 && page->busy_count == 0 && !record_is_newer(&page->rec)) {
      page->in_window = false; /* what is freed in it from now on is not covered by the record that will be stored */
      continue;
    }
    plan_add(space, page);
    planned_free += page->free_count;
  }
  int refused = 0, rc = plan_old_pages(pool, target, PAGE_VALUES / 8, &planned_free);
  if (rc == TP_OK && space->ceiling == 0) rc = plan_new_pages(pool, target, &planned_free, &refused);
  if (rc == TP_OK && planned_free < target) rc = plan_old_pages(pool, target, 1, &planned_free);
  while (rc == TP_OK && planned_free == 0 && space->ceiling != 0) rc = plan_higher(pool, target, &planned_free, &refused);
  if (rc == TP_OK && planned_free == 0) {
    rc = refused < 0 ? tp_error_os(refused) : tp_error_set(TP_ENOSPC);
    if (refused < 0 && rc == TP_ENOSPC) pool->refused = true;
  }
  if (rc == TP_OK) {
    struct bytes *out = &space->plan_record;
    out->length = 0;
    size_t begin = record_begin(out, TP_STATE, 2, false);
    codec_put_varint(out, space->planned_count);
    for (size_t k = 0; k < space->planned_count; k++) codec_put_varint(out, space->planned[k]->rec.key);
    record_end(out, begin);
    *record = out->data;
    *length = out->length;
  } else {
    drop_plan(space);
  }
  cache_trim(pool, NULL);
  pthread_mutex_unlock(&pool->mutex);
  return rc;
}

/* What of the page may be handed out. */
static void offer(struct space *space, struct page *page) {
  space->window_free -= page->free_count;
  page->free_count = 0;
  memset(page->free, 0, sizeof page->free);
  for (unsigned i = 0; i < PAGE_VALUES; i++) {
    if (is_usable(space, page, i)) bit_set(page->free, i), page->free_count++;
  }
  space->window_free += page->free_count;
}

void space_set_ceiling(struct tp_pool *pool, uint64_t ceiling) {
  struct space *space = &pool->space;
  space->ceiling = ceiling;
  for (size_t k = 0; k < space->window_count; k++) {
    if (space->window[k]->in_window) offer(space, space->window[k]); /* else it is about to leave */
  }
  space->window_full = space->window_free;
  space->cursor = 0;
}

/* Makes the planned pages the window. The stored record covers them already. */
static void activate(struct tp_pool *pool) {
  struct space *space = &pool->space;
  struct page **old = space->window;
  size_t old_count = space->window_count;
  for (size_t k = 0; k < old_count; k++) {
    old[k]->in_window = false;
    old[k]->free_count = 0;
    memset(old[k]->free, 0, sizeof old[k]->free);
  }
  space->window = space->planned;
  space->window_count = space->planned_count;
  space->planned = NULL;
  space->planned_count = 0;
  space->window_free = 0;
  space->cursor = 0;
  for (size_t k = 0; k < space->window_count; k++) {
    struct page *page = space->window[k];
    page->in_window = true;
    offer(space, page);
  }
  space->window_full = space->window_free;
  for (size_t k = 0; k < old_count; k++) old[k]->rec.pins--;
  free(old);
}

int tp_window_activate(tp_pool *pool) {
  pthread_mutex_lock(&pool->mutex);
  activate(pool);
  pool->window_waits++;
  pthread_mutex_unlock(&pool->mutex);
  return TP_OK;
}

/* What is clean in a page of the window becomes dirty. A page that was new in it has no summary yet. */
static int adopt_page(struct tp_pool *pool, uint64_t index) {
  struct page *page;
  int rc = page_get(pool, TP_CHUNK_PAGE, index, &page);
  if (rc != TP_OK) return rc;
  if (is_planned(&pool->space, page)) return tp_error_record(TP_ECORRUPT, TP_STATE, 2);
  uint32_t *summary = &page->summary->value[index % PAGE_VALUES];
  if (index >= pool->space.pages) {
    pool->space.pages = index + 1;
    record_touch(pool, &page->summary->rec);
    *summary = PAGE_VALUES;
  }
  for (unsigned i = 0; i < PAGE_VALUES; i++) {
    if (page->value[i] == CHUNK_CLEAN) space_set_value(pool, page, i, CHUNK_DIRTY);
  }
  plan_add(&pool->space, page);
  return TP_OK;
}

/* After a crash, chunks of the stored window may hold bytes of a transaction that was lost, although their values say
 * clean. It becomes the window of this session too, so that it stays stored until they are committed as dirty. A
 * clean close stores no window. */
int space_open_window(struct tp_pool *pool) {
  struct reader in;
  int rc = record_fetch(pool, TP_STATE, 2, &in);
  if (rc != TP_OK) return rc == TP_ENOENT ? TP_OK : rc;
  uint64_t count = codec_get_varint(&in);
  if (in.bad || count > in.length) return tp_error_record(TP_ECORRUPT, TP_STATE, 2);
  uint64_t *pages = tp_alloc((count + 1) * sizeof *pages); /* fetching pages overwrites what `in` reads */
  for (uint64_t k = 0; k < count; k++) pages[k] = codec_get_varint(&in);
  if (in.bad) rc = tp_error_record(TP_ECORRUPT, TP_STATE, 2);
  for (uint64_t k = 0; k < count && rc == TP_OK; k++) rc = adopt_page(pool, pages[k]);
  free(pages);
  if (rc == TP_OK && count > 0) {
    int resized = pool->disk.resize(pool->disk.ctx, pool->space.pages * PAGE_VALUES << pool->chunk_shift);
    pool_mark_unsynced(pool);
    if (resized < 0) rc = tp_error_os(resized);
  }
  if (rc == TP_OK) activate(pool);
  else drop_plan(&pool->space);
  return rc;
}

/* --- a shorter file --- */

/* All of the page is clean, as the store has it; and nobody needs it, so that no stored window names it either. */
static bool is_unused(struct tp_pool *pool, uint64_t index, struct page *summary) {
  if (summary->value[index % PAGE_VALUES] != PAGE_VALUES) return false;
  struct page *page = as_page(cache_find(pool, TP_CHUNK_PAGE, index));
  return page == NULL || (page->rec.pins == 0 && !record_is_newer(&page->rec));
}

static uint64_t length_in_use(const struct tp_pool *pool) { return pool->space.pages * PAGE_VALUES << pool->chunk_shift; }

/* What is clean reads as zeros, on the disk too. So it does not matter whether the file is cut, now, later or never: whoever uses these pages
 * again finds zeros. */
int tp_shrink(tp_pool *pool) {
  struct space *space = &pool->space;
  uint64_t before;
  pthread_mutex_lock(&pool->mutex);
  int rc = pool_check_change(pool);
  for (before = space->pages; rc == TP_OK && space->pages > 0; space->pages--) {
    struct page *summary;
    uint64_t last = space->pages - 1;
    rc = page_get(pool, TP_SUMMARY, last / PAGE_VALUES, &summary);
    if (rc != TP_OK || !is_unused(pool, last, summary)) break;
    record_touch(pool, &summary->rec);
    summary->value[last % PAGE_VALUES] = 0;
  }
  int64_t size = rc == TP_OK ? pool->disk.size(pool->disk.ctx) : 0;
  if (rc == TP_OK && size < 0) rc = tp_error_os(size);
  if (rc == TP_OK && (uint64_t)size > length_in_use(pool)) {
    space->cut_txn = pool->txn, space->cut_store = 0;
    pool->state_dirty = true;
  }
  bool shrunk = space->pages < before;
  pthread_mutex_unlock(&pool->mutex);
  return rc == TP_OK ? shrunk : rc;
}

/* Mutex held. Should it fail, the file is longer than it need be. */
void space_cut_file(struct tp_pool *pool, uint64_t txn, uint64_t store_txn, uint64_t oldest_reader) {
  struct space *space = &pool->space;
  if (space->cut_txn == 0 || space->cut_txn > txn) return;
  if (space->cut_store == 0) space->cut_store = store_txn;
  if (space->cut_store > oldest_reader) return;
  space->cut_txn = 0;
  (void)pool->disk.cut(pool->disk.ctx, length_in_use(pool));
}
