/* throttle.c - waiting: for a layer's turn, and for room. */
#include "throttle.h"

#include <time.h>

#include "pool.h"

#define BURST_NS ((uint64_t)100 * 1000 * 1000)
#define ROOM_LOOK_NS ((uint64_t)1000 * 1000 * 1000)
#define COST_NS_MAX ((uint64_t)1 << 60) /* years */

static uint64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* When the operation may begin, by all buckets that it takes from. */
static uint64_t begin_ns(const struct limits *limits, bool writing, uint64_t now) {
  uint64_t begin = now;
  for (int k = writing ? WRITE_BYTES : READ_BYTES; k < BUCKETS; k += 2) {
    if (limits->bucket[k].rate != 0) begin = max_u64(begin, limits->bucket[k].even_ns);
  }
  return begin;
}

static void take(struct limits *limits, bool writing, uint64_t length, uint64_t now) {
  for (int k = writing ? WRITE_BYTES : READ_BYTES; k < BUCKETS; k += 2) {
    uint64_t rate = limits->bucket[k].rate, amount = k < READS ? length : 1;
    if (rate == 0) continue;
    uint64_t even = max_u64(limits->bucket[k].even_ns, now > BURST_NS ? now - BURST_NS : 0);
    unsigned __int128 cost = (unsigned __int128)amount * 1000000000 / rate;
    limits->bucket[k].even_ns = min_u64(even + (cost < COST_NS_MAX ? (uint64_t)cost : COST_NS_MAX), 4 * COST_NS_MAX);
  }
}

void limits_wait(tp_layer *layer, bool writing, uint64_t length) {
  tp_pool *pool = layer->pool;
  struct limits *limits = layer->limits;
  pthread_mutex_lock(&pool->limiting);
  uint64_t now = now_ns(), begin = begin_ns(limits, writing, now), changes = limits->changes;
  take(limits, writing, length, now);
  struct timespec until = {.tv_sec = (time_t)(begin / 1000000000), .tv_nsec = (long)(begin % 1000000000)};
  limits->waiting++;
  while (!pool->unlimited && limits->changes == changes && now_ns() < begin) {
    pthread_cond_timedwait(&pool->limits_changed, &pool->limiting, &until);
  }
  limits->waiting--;
  pthread_mutex_unlock(&pool->limiting);
}

int tp_limits_take(tp_layer *layer, int writing, uint64_t length, uint64_t now) {
  struct limits *limits = layer->limits;
  if (limits == NULL) return 1;
  pthread_mutex_lock(&layer->pool->limiting);
  if (now == 0) now = now_ns();
  bool may = layer->pool->unlimited || (limits->waiting == 0 && begin_ns(limits, writing != 0, now) == now);
  if (may) take(limits, writing != 0, length, now);
  pthread_mutex_unlock(&layer->pool->limiting);
  return may;
}

uint64_t tp_limits_waiting(tp_layer *layer) {
  struct limits *limits = layer->limits;
  if (limits == NULL) return 0;
  pthread_mutex_lock(&layer->pool->limiting);
  unsigned waiting = limits->waiting;
  pthread_mutex_unlock(&layer->pool->limiting);
  return waiting;
}

static void change(tp_layer *layer, const tp_limits *to) {
  struct limits *limits = layer->limits;
  const uint64_t rates[BUCKETS] = {to->rbps, to->wbps, to->riops, to->wiops};
  for (int k = 0; k < BUCKETS; k++) limits->bucket[k].rate = rates[k], limits->bucket[k].even_ns = 0;
  limits->changes++;
  pthread_cond_broadcast(&layer->pool->limits_changed);
}

int tp_layer_set_limits(tp_layer *layer, const tp_limits *limits) {
  tp_pool *pool = layer->pool;
  bool any_rate = limits->rbps || limits->wbps || limits->riops || limits->wiops;
  pthread_mutex_lock(&pool->limiting);
  if (layer->limits == NULL && any_rate) layer->limits = tp_alloc_zero(sizeof *layer->limits);
  if (layer->limits != NULL) change(layer, limits);
  pthread_mutex_unlock(&pool->limiting);
  layer->quota_chunks = limits->quota == 0 ? UINT64_MAX : limits->quota >> pool->chunk_shift;
  return TP_OK;
}

void limits_lift(tp_layer *layer) {
  if (layer->limits == NULL) return;
  pthread_mutex_lock(&layer->pool->limiting);
  change(layer, &(tp_limits){0});
  pthread_mutex_unlock(&layer->pool->limiting);
}

/* --- waiting for room --- */

int tp_pool_set_patience(tp_pool *pool, uint64_t ms) {
  pthread_mutex_lock(&pool->mutex);
  pool->patience_ns = pool->unlimited ? 0 : ms * 1000000;
  if (pool->patience_ns == 0) pthread_cond_broadcast(&pool->room);
  pthread_mutex_unlock(&pool->mutex);
  return TP_OK;
}

uint64_t tp_pool_patience(tp_pool *pool) { return pool->patience_ns / 1000000; }

bool room_wait(tp_pool *pool, uint64_t *end_ns) {
  pthread_mutex_lock(&pool->mutex);
  uint64_t now = now_ns(), patience = pool->patience_ns;
  if (*end_ns == 0) *end_ns = now + patience;
  bool waits = patience != 0 && now < *end_ns;
  if (waits) {
    uint64_t next = min_u64(*end_ns, now + ROOM_LOOK_NS);
    struct timespec until = {.tv_sec = (time_t)(next / 1000000000), .tv_nsec = (long)(next % 1000000000)};
    pool->waiting_writers++;
    pthread_cond_timedwait(&pool->room, &pool->mutex, &until);
    pool->waiting_writers--;
  }
  pthread_mutex_unlock(&pool->mutex);
  return waits;
}

void tp_limits_end(tp_pool *pool) {
  pthread_mutex_lock(&pool->limiting);
  pool->unlimited = true;
  pthread_cond_broadcast(&pool->limits_changed);
  pthread_mutex_unlock(&pool->limiting);
  (void)tp_pool_set_patience(pool, 0);
}
