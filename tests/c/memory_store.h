/* memory_store.h - a metadata store in memory, for programs that drive the core without Python and LMDB. */
#ifndef MEMORY_STORE_H
#define MEMORY_STORE_H

#include <stdbool.h>

#include "thinpool.h"

struct store;

struct store *store_new(void);
void store_free(struct store *store);
/* Sets ctx and the callbacks of options. The pool that is opened with them must be told with store_attach. */
void store_options(struct store *store, tp_options *options);
void store_attach(struct store *store, tp_pool *pool);
/* A clean close: what the stored window says is void, for all that was handed out is committed. */
void store_drop_window(struct store *store);
/* Whether commits claim, now and then, that a reader still looks at an older state, so that freed chunks are held. */
void store_pretend_readers(struct store *store, bool pretend);
uint64_t store_count(struct store *store, uint32_t kind);

#endif
