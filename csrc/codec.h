/* codec.h - how arrays of numbers are stored: in runs where that is smaller, else packed to the bytes they need.
 *
 * Used for the entries of map nodes and for pages of counts. The encoded form (docs/FORMAT.md, "Arrays"):
 *   u8 form
 *   form 0, runs: until the array is full, each: varint (length << 2 | kind), and for kinds 1 and 2 a zigzag
 *     varint: the first value less the last value of the previous run that had one. Kind 0: zeros; 1: the same
 *     value; 2: growing by one.
 *   form 1..8, packed to that many bytes: varint base; then each number, little-endian: 0, or value - base + 1.
 */
#ifndef TP_CODEC_H
#define TP_CODEC_H

#include "common.h"

#define CODEC_VALUE_MAX ((uint64_t)1 << 56) /* exclusive bound of a value */

void codec_put_varint(struct bytes *out, uint64_t value);
void codec_put_array(struct bytes *out, const uint64_t *values, unsigned count);

/* A cursor over bytes that may be damaged: reads never pass the end, and any nonsense sets bad. */
struct reader {
  const uint8_t *data;
  size_t length, position;
  bool bad;
};
uint64_t codec_get_varint(struct reader *in);
void codec_get_array(struct reader *in, uint64_t *values, unsigned count);

#endif
