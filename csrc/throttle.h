/* throttle.h - what a layer may do: how fast it is read and written, and how much it maps.
 *
 * A rate is a bucket that knows when it will be even again: an operation begins once that time has come, and puts it off by what it costs.
 * A bucket that was idle is a tenth of a second ahead at most. So one operation of any size can begin, and the next ones pay for it.
 *
 * Waiting is done before anything is locked, so whoever waits is in nobody's way. The lock here is for the buckets alone, and for an instant.
 */
#ifndef TP_THROTTLE_H
#define TP_THROTTLE_H

#include <stdbool.h>

#include "thinpool.h"

enum { READ_BYTES, WRITE_BYTES, READS, WRITES, BUCKETS };

struct limits { /* made with a layer's first limit; goes with the layer */
  struct { uint64_t rate, even_ns; } bucket[BUCKETS]; /* a second; 0: no limit */
  uint64_t changes; /* who waits goes on when there are others */
  unsigned waiting;
};

/* Returns when the operation may begin; one that is under way when limits change or the pool ends begins at once. */
void limits_wait(tp_layer *layer, bool writing, uint64_t length);

void limits_lift(tp_layer *layer); /* the layer is deleted: nobody waits for it any more */

/* Waits for room as long as the pool's patience says; false: not any longer. *end_ns: 0 the first time. Of the host's disk nobody tells when it
 * has room again, so it returns now and then. */
bool room_wait(tp_pool *pool, uint64_t *end_ns);

#endif
