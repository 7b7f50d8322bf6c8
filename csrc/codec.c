/* codec.c - arrays of numbers in runs or packed; the smaller form is stored. */
#include "codec.h"

enum { RUN_ZERO = 0, RUN_SAME = 1, RUN_GROWING = 2 };

void codec_put_varint(struct bytes *out, uint64_t value) {
  uint8_t *p = bytes_reserve(out, 10);
  while (value >= 0x80) {
    *p++ = (uint8_t)(value | 0x80);
    value >>= 7;
  }
  *p++ = (uint8_t)value;
  out->length = (size_t)(p - out->data);
}

uint64_t codec_get_varint(struct reader *in) {
  uint64_t value = 0;
  for (unsigned shift = 0; shift < 64; shift += 7) {
    if (in->position >= in->length) break;
    uint8_t byte = in->data[in->position++];
    if (shift == 63 && byte > 1) break;
    value |= (uint64_t)(byte & 0x7f) << shift;
    if (byte < 0x80) return value;
  }
  in->bad = true;
  return 0;
}

static uint64_t zigzag(int64_t value) { return ((uint64_t)value << 1) ^ (uint64_t)(value >> 63); }
static int64_t unzigzag(uint64_t value) { return (int64_t)(value >> 1) ^ -(int64_t)(value & 1); }

/* Length and kind of the run that starts at values[0]. */
static unsigned run_at(const uint64_t *values, unsigned count, unsigned *kind) {
  unsigned length = 1;
  if (values[0] == 0) {
    *kind = RUN_ZERO;
    while (length < count && values[length] == 0) length++;
  } else if (count > 1 && values[1] == values[0] + 1) {
    *kind = RUN_GROWING;
    while (length < count && values[length] == values[0] + length) length++;
  } else {
    *kind = RUN_SAME;
    while (length < count && values[length] == values[0]) length++;
  }
  return length;
}

/* Appends the runs, unless they grow past limit bytes: then returns false, with out as it was. */
static bool put_runs(struct bytes *out, const uint64_t *values, unsigned count, size_t limit) {
  size_t start = out->length;
  uint64_t previous = 0;
  for (unsigned i = 0; i < count;) {
    unsigned kind, length = run_at(values + i, count - i, &kind);
    codec_put_varint(out, (uint64_t)length << 2 | kind);
    if (kind != RUN_ZERO) {
      codec_put_varint(out, zigzag((int64_t)(values[i] - previous)));
      previous = kind == RUN_GROWING ? values[i] + length - 1 : values[i];
    }
    if (out->length - start > limit) {
      out->length = start;
      return false;
    }
    i += length;
  }
  return true;
}

void codec_put_array(struct bytes *out, const uint64_t *values, unsigned count) {
  uint64_t low = UINT64_MAX, high = 0;
  for (unsigned i = 0; i < count; i++) {
    assert(values[i] < CODEC_VALUE_MAX);
    if (values[i] == 0) continue;
    low = min_u64(low, values[i]);
    high = max_u64(high, values[i]);
  }
  unsigned width = 1;
  if (high != 0) {
    for (uint64_t span = (high - low + 1) >> 8; span != 0; span >>= 8) width++;
  }
  uint8_t *form = bytes_reserve(out, 1);
  *form = 0;
  size_t form_at = out->length++;
  if (put_runs(out, values, count, (size_t)width * count)) return;

  out->data[form_at] = (uint8_t)width;
  codec_put_varint(out, low);
  uint8_t *p = bytes_reserve(out, (size_t)width * count);
  for (unsigned i = 0; i < count; i++) {
    uint64_t code = values[i] == 0 ? 0 : values[i] - low + 1;
    for (unsigned byte = 0; byte < width; byte++) *p++ = (uint8_t)(code >> (8 * byte));
  }
  out->length += (size_t)width * count;
}

static void get_runs(struct reader *in, uint64_t *values, unsigned count) {
  uint64_t previous = 0;
  for (unsigned i = 0; i < count && !in->bad;) {
    uint64_t head = codec_get_varint(in);
    uint64_t length = head >> 2, kind = head & 3;
    if (length == 0 || length > count - i || kind > RUN_GROWING) {
      in->bad = true;
      break;
    }
    uint64_t value = 0;
    if (kind != RUN_ZERO) value = previous + (uint64_t)unzigzag(codec_get_varint(in));
    uint64_t last = kind == RUN_GROWING ? value + length - 1 : value;
    if (value >= CODEC_VALUE_MAX || last >= CODEC_VALUE_MAX || (kind != RUN_ZERO && value == 0)) {
      in->bad = true;
      break;
    }
    if (kind != RUN_ZERO) previous = last;
    for (uint64_t k = 0; k < length; k++) values[i++] = kind == RUN_GROWING ? value + k : value;
  }
}

void codec_get_array(struct reader *in, uint64_t *values, unsigned count) {
  memset(values, 0, count * sizeof *values);
  if (in->position >= in->length) in->bad = true;
  if (in->bad) return;
  unsigned width = in->data[in->position++];
  if (width == 0) {
    get_runs(in, values, count);
    return;
  }
  uint64_t base = codec_get_varint(in);
  if (in->bad || width > 8 || in->length - in->position < (size_t)width * count) {
    in->bad = true;
    return;
  }
  const uint8_t *p = in->data + in->position;
  for (unsigned i = 0; i < count; i++, p += width) {
    uint64_t code = 0;
    for (unsigned byte = 0; byte < width; byte++) code |= (uint64_t)p[byte] << (8 * byte);
    values[i] = code == 0 ? 0 : base + code - 1;
    if (values[i] >= CODEC_VALUE_MAX) in->bad = true;
  }
  in->position += (size_t)width * count;
}
