/* metrics.h - what is counted and timed: of layers, of commits, of the pool.
 *
 * Reading the clock twice costs a tenth of a 4 KiB operation, and each atomic addition a hundredth. So a small operation that succeeds adds
 * to one word, `pending`, and no more; now and then one is timed, puts what is pending to what is told, and stands in the histogram for
 * all that it found there. How many it leaves untimed is as if at random, so that no pattern of operations is in step with it. The first
 * EXACT ones and the large are all timed.
 */
#ifndef TP_METRICS_H
#define TP_METRICS_H

#include <pthread.h>
#include <stdatomic.h>

#include "common.h"

struct histogram { /* as tp_histogram */
  _Atomic uint64_t nanoseconds;
  _Atomic uint64_t bucket[TP_BUCKETS];
};
struct layer_metrics {
  pthread_mutex_t lock; /* of all that is told; taken last */
  struct operation {
    _Atomic uint64_t pending; /* count << PENDING_COUNT_SHIFT | bytes, of operations that are not told yet */
    _Atomic uint64_t gap;     /* so many pending, and one is timed */
    tp_operation told;
  } operation[TP_OPERATIONS];
};
struct pool_metrics {
  tp_operation deleted[TP_OPERATIONS]; /* of layers that are gone. Mutex held */
  struct histogram flush, commit, phase[TP_PHASES];
  _Atomic uint64_t began[TP_PHASES];   /* when the phases of the commit under way did, in ns; 0: not yet */
  _Atomic uint64_t punched_bytes, corrupt_reads;
  uint64_t cache_hits; /* mutex held */
};

uint64_t metrics_now(void); /* nanoseconds; never 0 */
void metrics_observe(struct histogram *histogram, uint64_t since);

/* An operation on a layer, from its begin to its end; `metrics` is made by the first one. */
struct probe {
  struct layer_metrics *layer;
  struct operation *operation;
  uint64_t since; /* 0: not timed */
};
struct probe metrics_begin(_Atomic(struct layer_metrics *) *metrics, enum tp_operation_kind kind, uint64_t length);
void metrics_end(const struct probe *probe, uint64_t length, int rc);
void metrics_free(struct layer_metrics *layer); /* NULL: none */

/* The layer is gone, or going: what it has counted so far is the pool's. Mutex held. */
void metrics_retire(struct pool_metrics *pool, struct layer_metrics *layer);

/* A phase of the commit under way begins; at the end all are observed. One commit at a time. */
void metrics_phase(struct pool_metrics *pool, enum tp_phase phase);
void metrics_committed(struct pool_metrics *pool);

#endif
