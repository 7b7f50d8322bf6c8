/* table.c - paged counts: loading, counting up and down, and who is the only owner. */
#include "table.h"

#include "checksum.h"

static unsigned slot_in_page(uint64_t item) { return (unsigned)(item % PAGE_VALUES); }

static int decode(struct tp_pool *pool, uint32_t kind, uint64_t index, struct page *page) {
  struct reader in;
  int rc = record_fetch(pool, kind, index, &in);
  if (rc == TP_ENOENT) return TP_OK; /* never stored: all zeros */
  if (rc != TP_OK) return rc;
  uint64_t values[PAGE_VALUES];
  codec_get_array(&in, values, PAGE_VALUES);
  for (unsigned i = 0; i < PAGE_VALUES && !in.bad; i++) {
    if (values[i] > UINT32_MAX) in.bad = true;
    page->value[i] = (uint32_t)values[i];
  }
  return in.bad ? tp_error_record(TP_ECORRUPT, kind, index) : TP_OK;
}

/* The summary of a chunk page says how many of its chunks are free: a page that is lost, or an old one, is not what it says, and
 * nothing must be handed out by it. */
static bool fits_summary(const struct tp_pool *pool, const struct page *page) {
  uint32_t clean = 0, dirty = 0;
  for (unsigned i = 0; i < PAGE_VALUES; i++) {
    clean += page->value[i] == CHUNK_CLEAN;
    dirty += page->value[i] == CHUNK_DIRTY;
  }
  uint32_t summary = page->summary->value[page->rec.key % PAGE_VALUES];
  return page->rec.key < pool->space.pages ? summary == (clean | dirty << 16) : summary == 0 && clean == PAGE_VALUES;
}

int page_get(struct tp_pool *pool, uint32_t kind, uint64_t index, struct page **out) {
  struct page *page = as_page(cache_find(pool, kind, index));
  if (page == NULL) {
    struct page *summary = NULL;
    if (kind == TP_CHUNK_PAGE) {
      int rc = page_get(pool, TP_SUMMARY, index / PAGE_VALUES, &summary);
      if (rc != TP_OK) return rc;
    }
    page = tp_alloc_zero(sizeof *page);
    page->rec.kind = kind;
    page->rec.key = index;
    page->summary = summary;
    int rc = decode(pool, kind, index, page);
    if (rc == TP_OK && kind == TP_CHUNK_PAGE && !fits_summary(pool, page)) rc = tp_error_record(TP_ECORRUPT, kind, index);
    if (rc != TP_OK) {
      free(page);
      return rc;
    }
    if (kind == TP_SUMMARY) page->rec.pins = 1;
    cache_insert(pool, &page->rec);
  }
  *out = page;
  return TP_OK;
}

struct page *page_loaded(struct tp_pool *pool, uint32_t kind, uint64_t item) {
  struct page *page = as_page(cache_find(pool, kind, item / PAGE_VALUES));
  assert(page != NULL);
  return page;
}

int load_count(struct tp_pool *pool, uint32_t kind, uint64_t item, uint64_t *count) {
  struct page *page;
  int rc = page_get(pool, kind, item / PAGE_VALUES, &page);
  if (rc != TP_OK) return rc;
  uint32_t value = page->value[slot_in_page(item)];
  *count = kind == TP_CHUNK_PAGE ? (value < CHUNK_ONE ? 0 : value - 1) : value;
  /* Whoever asks holds a reference: a map that names what has none is damaged, and must not be built upon. */
  if (*count == 0) return tp_error_record(TP_ECORRUPT, kind, item / PAGE_VALUES);
  return kind == TP_CHUNK_PAGE ? checksum_load(pool, page, slot_in_page(item)) : TP_OK;
}

void count_up(struct tp_pool *pool, uint32_t kind, uint64_t item) {
  struct page *page = page_loaded(pool, kind, item);
  unsigned i = slot_in_page(item);
  assert(page->value[i] >= (kind == TP_CHUNK_PAGE ? (uint32_t)CHUNK_ONE : 1u)); /* I3 */
  assert(page->value[i] < UINT32_MAX);
  record_touch(pool, &page->rec);
  page->value[i]++;
}

void page_set_unshared(struct tp_pool *pool, struct page *page, unsigned i) {
  uint64_t **bits = &page->unshared[pool->txn & 1];
  if (*bits == NULL) *bits = tp_alloc_zero(PAGE_WORDS * sizeof **bits);
  bit_set(*bits, i);
}

uint64_t count_down(struct tp_pool *pool, uint32_t kind, uint64_t item) {
  struct page *page = page_loaded(pool, kind, item);
  unsigned i = slot_in_page(item);
  uint32_t floor = kind == TP_CHUNK_PAGE ? CHUNK_DIRTY : 0;
  if (page->value[i] <= floor) { /* named by more than it has references (I1, I2), which the load could not see */
    pool_damaged(pool, kind, item / PAGE_VALUES);
    return 1;
  }
  record_touch(pool, &page->rec);
  uint64_t left = page->value[i] - 1 - floor;
  if (left > 0) {
    page->value[i]--;
    page_set_unshared(pool, page, i);
  } else if (kind == TP_CHUNK_PAGE) {
    checksum_set(pool, page, i, 0); /* I9 */
    space_freed(pool, page, i);
  } else {
    page->value[i] = 0;
  }
  return left;
}

bool count_is_mine(struct tp_pool *pool, uint32_t kind, uint64_t item) {
  struct page *page = page_loaded(pool, kind, item);
  unsigned i = slot_in_page(item);
  if (page->value[i] != (kind == TP_CHUNK_PAGE ? (uint32_t)CHUNK_ONE : 1u) || bit_get(page->moving, i)) return false;
  if (kind == TP_CHUNK_PAGE && (!checksum_is_loaded(page, i) || checksum_get(page, i) != 0)) return false; /* not loaded: the split's record lies */
  for (int parity = 0; parity < 2; parity++) {
    if (page->unshared[parity] != NULL && bit_get(page->unshared[parity], i)) return false;
  }
  return true;
}

void page_encode(struct tp_pool *pool, struct page *page) {
  uint64_t values[PAGE_VALUES];
  bool empty = true;
  for (unsigned i = 0; i < PAGE_VALUES; i++) {
    values[i] = page->value[i];
    if (values[i] != 0) empty = false;
  }
  size_t begin = record_begin(&pool->out, page->rec.kind, page->rec.key, empty); /* absent means all zeros */
  if (empty) return;
  codec_put_array(&pool->out, values, PAGE_VALUES);
  record_end(&pool->out, begin);
}

void page_release(struct page *page, unsigned parity) {
  free(page->unshared[parity]);
  page->unshared[parity] = NULL;
}

void page_free(struct page *page) {
  checksums_free(page);
  free(page->unshared[0]);
  free(page->unshared[1]);
  free(page);
}
