/* space.h - chunk space: which chunk is handed out next, and how fresh chunks stay zero across a crash.
 *
 * The allocation window is a bounded set of chunk pages, stored before a chunk of them is handed out. Opening after
 * a crash treats what is free in these pages, and only there, as dirty: so a chunk that a lost transaction
 * had handed out never passes for clean (I6). Storing a wider window is a small store transaction of its own, with no
 * sync of the data.
 *
 * Life of a chunk (I3, I4); busy is a bit in memory, the rest is the page's value:
 *
 *   clean, dirty --space_take--> busy --space_map--> allocated --count_down to 0--> dirty and busy
 *                                 | space_untake: dirty                                | commit durable, no older reader
 *                                 v                                                    v
 *                               dirty -------------------- tp_punch ----------------> clean
 *
 * While a pool is compacted nothing is handed out from its ceiling on. What is freed while it moves stays busy until no I/O can
 * still be reading it (space_release_moved), and then waits for a commit like all else.
 */
#ifndef TP_SPACE_H
#define TP_SPACE_H

#include "table.h"

#define TP_NEED_WINDOW 1 /* internal: nothing free in the window; extend it without locks and try again */

struct run {
  uint64_t first, count;
};
struct run_list {
  struct run *items;
  size_t count, capacity;
};

struct held_runs { /* freed in a transaction that is durable, but a reader older than it is still there */
  uint64_t store_txn;
  struct run_list runs;
};

struct space {
  uint64_t capacity;       /* chunks; 0: no limit */
  uint64_t pages;          /* chunk pages that were ever in a window: all beyond are clean */
  uint64_t allocated;      /* chunks with a count */
  uint64_t dirty;          /* chunks with CHUNK_DIRTY, pending ones included */
  uint64_t taken;          /* busy: handed out, not mapped yet */
  uint64_t pending;        /* busy: freed, not reusable yet */
  uint64_t pinned;         /* of them, those in `held` */
  struct page **window;    /* pinned */
  size_t window_count;
  uint64_t window_free;    /* free bits in it */
  uint64_t window_full;    /* free bits in it when it was activated */
  struct page **planned;   /* pinned: the window that tp_window_plan wrote */
  size_t planned_count;
  struct bytes plan_record;
  size_t cursor;           /* window place where the last run began */
  uint64_t punch_cursor, scan_cursor; /* pages */
  struct run_list freed[2];      /* by the transaction's parity */
  uint64_t freed_now;            /* chunks in that of the open transaction */
  struct held_runs *held;
  size_t held_count;
  uint64_t ceiling;              /* chunks from here on are not handed out; 0: there is none */
  struct run_list moved;         /* freed while they were moving */
  uint64_t cut_txn, cut_store;   /* the transaction with which the file may be cut, and the store's number of it; 0: none, or not durable yet */
};

/* Takes a free chunk, the one after `hint` if it can. Dirty ones hold old bytes: *dirty. TP_NEED_WINDOW: see above. */
int space_take(struct tp_pool *pool, uint64_t hint, uint64_t *chunk, bool *dirty);
/* Takes exactly this chunk, if it is free. */
bool space_take_exactly(struct tp_pool *pool, uint64_t chunk);
void space_map(struct tp_pool *pool, uint64_t chunk);    /* the taken chunk has an entry now: count 1 */
void space_untake(struct tp_pool *pool, uint64_t chunk); /* nothing came of it; it may hold bytes */
void space_set_value(struct tp_pool *pool, struct page *page, unsigned i, uint32_t value); /* keeps the totals */
void space_freed(struct tp_pool *pool, struct page *page, unsigned i); /* count fell to 0 */
void space_release(struct tp_pool *pool, unsigned parity, uint64_t store_txn, uint64_t oldest_reader);
void space_begin_move(struct tp_pool *pool, uint64_t chunk); /* page loaded, and from then on pinned */
void space_end_move(struct tp_pool *pool, uint64_t chunk);
void space_release_moved(struct tp_pool *pool); /* nothing moves any more, and no I/O that began before is under way */
void space_set_ceiling(struct tp_pool *pool, uint64_t ceiling);
static inline bool space_is_below_ceiling(const struct space *space, uint64_t chunk) {
  return space->ceiling == 0 || chunk < space->ceiling;
}
/* The file is as long as its pages in use once that is durable, and nobody looks at a longer one. */
void space_cut_file(struct tp_pool *pool, uint64_t txn, uint64_t store_txn, uint64_t oldest_reader);
int space_open_window(struct tp_pool *pool); /* after a crash: what the stored window covers is dirty */
void space_free(struct tp_pool *pool);
bool space_window_is_low(const struct tp_pool *pool); /* extend it soon, so that nobody has to wait */

#endif
