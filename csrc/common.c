/* common.c - errors with their detail per thread, memory, CRC-32C, and the test for zeros. */
#include "common.h"

#include <errno.h>
#include <stdio.h>
#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

static _Thread_local tp_error_info last_error;

void tp_last_error(tp_error_info *out) { *out = last_error; }

int tp_error_set(int code) {
  last_error = (tp_error_info){.code = code};
  return code;
}

int tp_error_os(int64_t negative_errno) {
  int os_error = (int)-negative_errno;
  bool no_space = os_error == ENOSPC || os_error == EDQUOT || os_error == EFBIG;
  tp_error_set(no_space ? TP_ENOSPC : TP_EIO);
  last_error.os_error = os_error;
  return last_error.code;
}

int tp_error_record(int code, uint32_t kind, uint64_t key) {
  last_error = (tp_error_info){.code = code, .kind = kind, .key = key};
  return code;
}

int tp_error_where(int code, uint64_t layer_id, uint64_t offset, uint64_t length) {
  if (last_error.code != code) tp_error_set(code);
  last_error.layer_id = layer_id;
  last_error.offset = offset;
  last_error.length = length;
  return code;
}

static void *checked(void *memory) {
  if (memory == NULL) {
    fputs("thinpool: out of memory\n", stderr);
    abort();
  }
  return memory;
}

void *tp_alloc(size_t size) { return checked(malloc(size)); }
void *tp_alloc_zero(size_t size) { return checked(calloc(1, size)); }
void *tp_realloc(void *old, size_t size) { return checked(realloc(old, size)); }

uint8_t *bytes_reserve(struct bytes *bytes, size_t more) {
  if (bytes->capacity - bytes->length < more) {
    size_t capacity = bytes->capacity * 2 > 4096 ? bytes->capacity * 2 : 4096;
    while (capacity - bytes->length < more) capacity *= 2;
    bytes->data = tp_realloc(bytes->data, capacity);
    bytes->capacity = capacity;
  }
  return bytes->data + bytes->length;
}

void bytes_free(struct bytes *bytes) {
  free(bytes->data);
  *bytes = (struct bytes){0};
}

/* CRC-32C (Castagnoli, RFC 3720 appendix B.4), by table where the processor has no instruction for it. */
static uint32_t crc_table_step(uint32_t crc, uint8_t byte) {
  crc ^= byte;
  for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (0x82F63B78u & (0u - (crc & 1)));
  return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t crc_hardware(uint32_t crc, const uint8_t *data, uint64_t length) {
  uint64_t wide = crc;
  for (; length >= 8; data += 8, length -= 8) {
    uint64_t word;
    memcpy(&word, data, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  crc = (uint32_t)wide;
  for (; length > 0; data++, length--) crc = _mm_crc32_u8(crc, *data);
  return crc;
}
#endif

uint32_t tp_crc32c(uint32_t crc, const void *data, uint64_t length) {
  const uint8_t *bytes = data;
  crc = ~crc;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return ~crc_hardware(crc, bytes, length);
#endif
  for (uint64_t i = 0; i < length; i++) crc = crc_table_step(crc, bytes[i]);
  return ~crc;
}

int tp_is_zero(const void *data, uint64_t length) {
  const uint8_t *bytes = data;
  for (; length >= 64; bytes += 64, length -= 64) {
    uint64_t words[8];
    memcpy(words, bytes, 64);
    if ((words[0] | words[1] | words[2] | words[3] | words[4] | words[5] | words[6] | words[7]) != 0) return 0;
  }
  for (; length > 0; bytes++, length--) {
    if (*bytes != 0) return 0;
  }
  return 1;
}
