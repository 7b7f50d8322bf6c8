/* table.h - paged arrays of counts, loaded on demand: the reference counts of chunks and of nodes.
 *
 * A page holds 1,024 values. For nodes a value is the reference count (0: no such node, ids are never reused).
 * For chunks: 0 is free and clean (a hole, reads as zeros), 1 free but dirty (holds old bytes), n + 1 allocated with
 * count n. A summary page holds, for each of 1,024 chunk pages, clean | dirty << 16: how many free chunks it has.
 */
#ifndef TP_TABLE_H
#define TP_TABLE_H

#include "record.h"

#define PAGE_VALUES 1024u
#define PAGE_WORDS (PAGE_VALUES / 64)

#define CHECKSUM_VALUES 128u /* of chunks in a record: small enough to fill the store's pages */
#define CHECKSUM_RECORDS (PAGE_VALUES / CHECKSUM_VALUES)

enum { CHUNK_CLEAN = 0, CHUNK_DIRTY = 1, CHUNK_ONE = 2 };

struct page {
  struct record rec;
  /* Bits of what lost a reference in a transaction, by that transaction's parity, and still has some: until it is
   * committed, a crash would bring the other owner back (docs/DESIGN.md, "Sharing test"). NULL: none. */
  uint64_t *unshared[2];
  /* Chunk pages only. busy: handed out but not mapped yet, freed but not committed, or being punched.
   * Pinned while any is. free: may be handed out now; kept for pages of the window only. */
  uint64_t busy[PAGE_WORDS];
  uint64_t free[PAGE_WORDS];
  unsigned busy_count, free_count;
  bool in_window;
  uint64_t moving[PAGE_WORDS]; /* chunk pages: compact.c is copying them. Each one pins the page */
  struct page *summary; /* pinned for good once loaded: there are few */
  struct checksums *sums[CHECKSUM_RECORDS]; /* checksum.h; NULL: no chunk of these has any, if loaded */
  uint8_t sums_loaded;                      /* a bit for each record */
  uint32_t value[PAGE_VALUES];
};

static inline bool bit_get(const uint64_t *bits, unsigned i) { return bits[i / 64] >> (i % 64) & 1; }
static inline void bit_set(uint64_t *bits, unsigned i) { bits[i / 64] |= (uint64_t)1 << (i % 64); }
static inline void bit_clear(uint64_t *bits, unsigned i) { bits[i / 64] &= ~((uint64_t)1 << (i % 64)); }

/* Finds or loads a page; one that was never stored is all zeros. Mutex held. */
int page_get(struct tp_pool *pool, uint32_t kind, uint64_t index, struct page **out);
/* The page of a chunk or node that the caller has loaded before, in the same operation. */
struct page *page_loaded(struct tp_pool *pool, uint32_t kind, uint64_t item);

/* Reference counts. load_* bring the page in, and a chunk's checksum, and may fail; the others need it loaded, and cannot. */
int load_count(struct tp_pool *pool, uint32_t kind, uint64_t item, uint64_t *count);
void count_up(struct tp_pool *pool, uint32_t kind, uint64_t item);
/* Returns the count that is left. A chunk whose count falls to 0 is freed with the open transaction's commit. What has none left
 * puts the pool into error mode, and keeps none. */
uint64_t count_down(struct tp_pool *pool, uint32_t kind, uint64_t item);
/* True if item has one owner now, had no other in the last committed state, and does not move; a chunk also no checksum, then nor now. Page loaded. */
bool count_is_mine(struct tp_pool *pool, uint32_t kind, uint64_t item);
void page_set_unshared(struct tp_pool *pool, struct page *page, unsigned i); /* until the open transaction is durable, which has changed the page */

void page_encode(struct tp_pool *pool, struct page *page);
void page_free(struct page *page);
void page_release(struct page *page, unsigned parity); /* the transaction is durable */

#endif
