/* metrics.c - counting, timing and telling it. Why and how: metrics.h. */
#include "metrics.h"

#include <time.h>

#include "pool.h"

#define EXACT 64u
#define LARGE (32u << 10) /* bytes: from here on the clock costs nothing in comparison */
#define GAP_LOG2 5        /* gaps are below 32: one in 16.5 is timed */
#define PENDING_COUNT_SHIFT 40
#define FIRST_BOUND_LOG2 8 /* of the first bucket, 256 ns; each next one reaches twice as far */

static uint64_t get(const _Atomic uint64_t *counter) { return atomic_load_explicit(counter, memory_order_relaxed); }
static void add(_Atomic uint64_t *counter, uint64_t value) { atomic_fetch_add_explicit(counter, value, memory_order_relaxed); }

uint64_t metrics_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec + 1;
}

static unsigned bucket_of(uint64_t nanoseconds) {
  if (nanoseconds <= 1u << FIRST_BOUND_LOG2) return 0;
  unsigned log2 = 64 - (unsigned)__builtin_clzll(nanoseconds - 1); /* rounded up */
  return (unsigned)min_u64(log2 - FIRST_BOUND_LOG2, TP_BUCKETS - 1);
}

static void observe(struct histogram *histogram, uint64_t nanoseconds) {
  add(&histogram->nanoseconds, nanoseconds);
  add(&histogram->bucket[bucket_of(nanoseconds)], 1);
}

void metrics_observe(struct histogram *histogram, uint64_t since) { observe(histogram, metrics_now() - since); }

/* --- operations --- */

static __attribute__((noinline)) struct layer_metrics *make(_Atomic(struct layer_metrics *) *metrics) {
  struct layer_metrics *made = tp_alloc_zero(sizeof *made), *there = NULL;
  pthread_mutex_init(&made->lock, NULL);
  if (atomic_compare_exchange_strong(metrics, &there, made)) return made;
  metrics_free(made);
  return there;
}

void metrics_free(struct layer_metrics *layer) {
  if (layer != NULL) pthread_mutex_destroy(&layer->lock);
  free(layer);
}

struct probe metrics_begin(_Atomic(struct layer_metrics *) *metrics, enum tp_operation_kind kind, uint64_t length) {
  struct layer_metrics *layer = atomic_load_explicit(metrics, memory_order_acquire);
  if (layer == NULL) layer = make(metrics);
  struct operation *operation = &layer->operation[kind];
  bool timed = length >= LARGE || get(&operation->pending) >> PENDING_COUNT_SHIFT >= get(&operation->gap);
  return (struct probe){layer, operation, timed ? metrics_now() : 0};
}

static void count_pending(tp_operation *out, uint64_t pending) {
  out->count += pending >> PENDING_COUNT_SHIFT;
  out->bytes += pending & (((uint64_t)1 << PENDING_COUNT_SHIFT) - 1);
}

static __attribute__((noinline)) void tell(const struct probe *probe, uint64_t length, int rc) {
  struct operation *operation = probe->operation;
  tp_operation *told = &operation->told;
  uint64_t took = probe->since != 0 ? metrics_now() - probe->since : 0;
  pthread_mutex_lock(&probe->layer->lock);
  uint64_t pending = probe->since != 0 && length < LARGE ? atomic_exchange_explicit(&operation->pending, 0, memory_order_relaxed) : 0;
  uint64_t weight = 1 + (pending >> PENDING_COUNT_SHIFT);
  count_pending(told, pending);
  told->count++;
  if (rc == TP_OK) told->bytes += length;
  else told->errors++;
  if (probe->since != 0) {
    told->latency.nanoseconds += took * weight;
    told->latency.bucket[bucket_of(took)] += weight;
  }
  uint64_t gap = told->count < EXACT ? 0 : told->count * 0x9E3779B97F4A7C15u >> (64 - GAP_LOG2);
  atomic_store_explicit(&operation->gap, gap, memory_order_relaxed);
  pthread_mutex_unlock(&probe->layer->lock);
}

void metrics_end(const struct probe *probe, uint64_t length, int rc) {
  if (probe->since != 0 || rc != TP_OK) tell(probe, length, rc);
  else add(&probe->operation->pending, (uint64_t)1 << PENDING_COUNT_SHIFT | length);
}

static void sum(tp_operation *out, const tp_operation *more) {
  for (unsigned k = 0; k < TP_OPERATIONS; k++) {
    out[k].count += more[k].count;
    out[k].errors += more[k].errors;
    out[k].bytes += more[k].bytes;
    out[k].latency.nanoseconds += more[k].latency.nanoseconds;
    for (unsigned b = 0; b < TP_BUCKETS; b++) out[k].latency.bucket[b] += more[k].latency.bucket[b];
  }
}

/* What the layer has counted until now; `forget`: and it begins anew. */
static void take(struct layer_metrics *layer, tp_operation *out, bool forget) {
  pthread_mutex_lock(&layer->lock);
  for (unsigned k = 0; k < TP_OPERATIONS; k++) {
    struct operation *operation = &layer->operation[k];
    out[k] = operation->told;
    count_pending(&out[k], forget ? atomic_exchange(&operation->pending, 0) : get(&operation->pending));
    if (forget) operation->told = (tp_operation){0};
  }
  pthread_mutex_unlock(&layer->lock);
}

static void copy_histogram(tp_histogram *out, const struct histogram *from) {
  out->nanoseconds = get(&from->nanoseconds);
  for (unsigned k = 0; k < TP_BUCKETS; k++) out->bucket[k] = get(&from->bucket[k]);
}

void metrics_retire(struct pool_metrics *pool, struct layer_metrics *layer) {
  tp_operation last[TP_OPERATIONS];
  if (layer == NULL) return;
  take(layer, last, true);
  sum(pool->deleted, last);
}

/* --- commits --- */

void metrics_phase(struct pool_metrics *pool, enum tp_phase phase) { pool->began[phase] = metrics_now(); }

/* A commit that has nothing to store has no such phase: it takes no time then. */
void metrics_committed(struct pool_metrics *pool) {
  uint64_t end = metrics_now(), began = pool->began[TP_PHASE_FREEZE];
  observe(&pool->commit, end - began);
  for (unsigned k = TP_PHASES; k-- > 0;) {
    uint64_t since = pool->began[k] != 0 ? pool->began[k] : end;
    observe(&pool->phase[k], end - since);
    end = since;
    pool->began[k] = 0;
  }
}

/* --- telling it --- */

int tp_get_metrics(tp_pool *pool, tp_metrics *out, tp_layer_metrics *layers, uint64_t capacity, uint64_t *count) {
  struct pool_metrics *metrics = &pool->metrics;
  memset(out, 0, sizeof *out);
  *count = 0;
  copy_histogram(&out->flush, &metrics->flush);
  copy_histogram(&out->commit, &metrics->commit);
  for (unsigned k = 0; k < TP_PHASES; k++) copy_histogram(&out->phase[k], &metrics->phase[k]);
  pthread_mutex_lock(&pool->mutex);
  int rc = pool->closed ? tp_error_set(TP_ECLOSED) : TP_OK;
  memcpy(out->operation, metrics->deleted, sizeof metrics->deleted);
  out->punched_bytes = metrics->punched_bytes;
  out->corrupt_reads = metrics->corrupt_reads;
  out->cache_hits = metrics->cache_hits;
  for (size_t i = 0; i < pool->cache.bucket_count; i++) {
    for (struct record *r = pool->cache.buckets[i]; r != NULL; r = r->hash_next) {
      if (r->kind != TP_MAP || as_layer(r)->metrics == NULL) continue;
      tp_layer_metrics one = {.layer_id = r->key};
      take(as_layer(r)->metrics, one.operation, false);
      sum(out->operation, one.operation);
      if (*count < capacity) layers[*count] = one;
      ++*count;
    }
  }
  pthread_mutex_unlock(&pool->mutex);
  return rc;
}
