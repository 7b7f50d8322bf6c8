/* common.h - what every file of the core needs: errors with their detail, checked arithmetic, memory, bytes. */
#ifndef TP_COMMON_H
#define TP_COMMON_H

#include <assert.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "thinpool.h"

#define TP_BLOCK 4096u /* bytes: the unit of mapping inside a shared chunk */

static inline uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* Sets the calling thread's error detail and returns code. */
int tp_error_set(int code);
int tp_error_os(int64_t negative_errno); /* TP_EIO, or TP_ENOSPC for ENOSPC, EDQUOT and EFBIG */
int tp_error_record(int code, uint32_t kind, uint64_t key);
int tp_error_where(int code, uint64_t layer_id, uint64_t offset, uint64_t length); /* adds to the detail */

/* Memory for the core's own small structures. Running out of it is not recoverable half-way through a change of
 * shared maps, so it stops the process: committed state is safe by design (I5). */
void *tp_alloc(size_t size);
void *tp_alloc_zero(size_t size);
void *tp_realloc(void *old, size_t size);

/* A growing array of bytes. */
struct bytes {
  uint8_t *data;
  size_t length, capacity;
};
uint8_t *bytes_reserve(struct bytes *bytes, size_t more); /* room for `more` at the end; the caller adds to length */
void bytes_free(struct bytes *bytes);

static inline void store_u32(uint8_t *p, uint32_t v) {
  for (int i = 0; i < 4; i++) p[i] = (uint8_t)(v >> (8 * i));
}
static inline void store_u64(uint8_t *p, uint64_t v) {
  for (int i = 0; i < 8; i++) p[i] = (uint8_t)(v >> (8 * i));
}
static inline uint32_t load_u32(const uint8_t *p) {
  uint32_t v = 0;
  for (int i = 0; i < 4; i++) v |= (uint32_t)p[i] << (8 * i);
  return v;
}
static inline uint64_t load_u64(const uint8_t *p) {
  uint64_t v = 0;
  for (int i = 0; i < 8; i++) v |= (uint64_t)p[i] << (8 * i);
  return v;
}
static inline void store_u64_be(uint8_t *p, uint64_t v) {
  for (int i = 0; i < 8; i++) p[i] = (uint8_t)(v >> (8 * (7 - i)));
}

#endif
