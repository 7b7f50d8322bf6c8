/* inspect.c - stored records looked at and made without a pool, for checking and repairing: nothing here trusts what it reads.
 *
 * The engine's own decoders (node.c, table.c) stop at the first record that makes no sense; these serve whoever has to
 * find all of them, in pools too large for a table of everything. docs/FORMAT.md.
 */
#include "codec.h"
#include "node.h"

enum { CRC_BYTES = 4 };

static uint32_t crc_of(uint32_t kind, uint64_t key, const uint8_t *body, uint64_t length) {
  uint8_t be[8];
  store_u64_be(be, key);
  return record_crc(kind, be, body, length);
}

/* A reader on the body of a stored value; bad where the checksum is not its own. */
static struct reader open_value(uint32_t kind, uint64_t key, const uint8_t *value, uint64_t length) {
  struct reader in = {.data = value, .length = length, .position = CRC_BYTES};
  in.bad = length < CRC_BYTES || load_u32(value) != crc_of(kind, key, value + CRC_BYTES, length - CRC_BYTES);
  return in;
}

static void note_chunk(tp_node_info *out, const tp_counts *counts, uint64_t chunk) {
  out->references++;
  out->chunks_end = max_u64(out->chunks_end, chunk + 1);
  if (counts == NULL || chunk < counts->first || chunk - counts->first >= counts->length) return;
  uint32_t *count = &counts->count[chunk - counts->first];
  if (*count < UINT32_MAX) ++*count;
}

/* A chunk that a split names in several blocks counts once. */
static void note_split(tp_node_info *out, const tp_counts *counts, const uint64_t *block, uint64_t blocks) {
  for (uint64_t b = 0; b < blocks; b++) {
    if (block[b] == 0 || (b > 0 && block[b] == block[b - 1])) continue;
    uint64_t before = 0;
    while (before < b && block[before] != block[b]) before++;
    if (before == b) note_chunk(out, counts, block[b] - 1);
  }
}

static bool names(const uint64_t *block, uint64_t blocks, uint64_t value) {
  for (uint64_t b = 0; b < blocks; b++) {
    if (block[b] == value) return true;
  }
  return false;
}

static void read_splits(struct reader *in, uint64_t blocks, tp_node_info *out, const tp_counts *counts, uint64_t *splits) {
  uint64_t scratch[2 + TP_BLOCKS_MAX], at = 0, count = codec_get_varint(in);
  if (count > FANOUT || (count > 0 && blocks < 2)) in->bad = true;
  for (uint64_t k = 0; k < count && !in->bad; k++) {
    uint64_t *split = splits == NULL ? scratch : splits + k * (2 + blocks);
    at += codec_get_varint(in);
    if (in->bad || at >= FANOUT || out->entry[at] != 0 || (k > 0 && at <= out->last_split)) {
      in->bad = true;
      break;
    }
    out->last_split = at;
    split[0] = at;
    split[1] = codec_get_varint(in);
    codec_get_array(in, split + 2, (unsigned)blocks);
    if (in->bad || (split[1] != 0 && !names(split + 2, blocks, split[1]))) in->bad = true;
    else note_split(out, counts, split + 2, blocks);
  }
  out->split_count = count;
}

int tp_inspect_node(uint64_t id, const void *value, uint64_t length, uint64_t blocks, tp_node_info *out, const tp_counts *counts,
                    uint64_t *splits) {
  struct reader in = open_value(TP_NODE, id, value, length);
  memset(out, 0, sizeof *out);
  if (blocks == 0 || blocks > TP_BLOCKS_MAX) return TP_EINVAL;
  if (in.bad) return TP_ECORRUPT;
  out->level = codec_get_varint(&in);
  codec_get_array(&in, out->entry, FANOUT);
  if (in.bad || out->level >= MAX_HEIGHT) return TP_ECORRUPT;
  if (out->level == 0) {
    for (unsigned i = 0; i < FANOUT; i++) {
      if (out->entry[i] != 0) note_chunk(out, counts, out->entry[i] - 1);
    }
    read_splits(&in, blocks, out, counts, splits);
  }
  return in.bad || in.position != in.length ? TP_ECORRUPT : TP_OK;
}

static unsigned values_of(uint32_t kind) { return kind == TP_CHECKSUM ? CHECKSUM_VALUES : PAGE_VALUES; }

int tp_inspect_page(uint32_t kind, uint64_t key, const void *value, uint64_t length, uint32_t *out) {
  uint64_t values[PAGE_VALUES];
  struct reader in = open_value(kind, key, value, length);
  if (!in.bad) codec_get_array(&in, values, values_of(kind));
  if (in.bad || in.position != in.length) return TP_ECORRUPT;
  for (unsigned i = 0; i < values_of(kind); i++) {
    if (values[i] > UINT32_MAX) return TP_ECORRUPT;
    out[i] = (uint32_t)values[i];
  }
  return TP_OK;
}

/* The body, framed, into the caller's memory; frees it. */
static int hand_over(uint32_t kind, uint64_t key, struct bytes *body, uint8_t *out, uint64_t *length) {
  int rc = body->length + CRC_BYTES > *length ? TP_ERANGE : TP_OK;
  *length = body->length + CRC_BYTES;
  if (rc == TP_OK) {
    store_u32(out, crc_of(kind, key, body->data, body->length));
    memcpy(out + CRC_BYTES, body->data, body->length);
  }
  bytes_free(body);
  return rc;
}

int tp_make_page(uint32_t kind, uint64_t key, const uint32_t *values, void *out, uint64_t *length) {
  uint64_t wide[PAGE_VALUES];
  struct bytes body = {0};
  for (unsigned i = 0; i < values_of(kind); i++) wide[i] = values[i];
  codec_put_array(&body, wide, values_of(kind));
  return hand_over(kind, key, &body, out, length);
}

int tp_make_node(uint64_t id, const tp_node_info *node, uint64_t blocks, const uint64_t *splits, void *out, uint64_t *length) {
  struct bytes body = {0};
  codec_put_varint(&body, node->level);
  codec_put_array(&body, node->entry, FANOUT);
  if (node->level == 0) codec_put_varint(&body, node->split_count);
  for (uint64_t k = 0, last = 0; node->level == 0 && k < node->split_count; k++) {
    const uint64_t *split = splits + k * (2 + blocks);
    codec_put_varint(&body, split[0] - last);
    codec_put_varint(&body, split[1]);
    codec_put_array(&body, split + 2, (unsigned)blocks);
    last = split[0];
  }
  return hand_over(TP_NODE, id, &body, out, length);
}

void tp_compare_counts(const uint32_t *stored, const uint32_t *found, int chunks, tp_comparison *out) {
  memset(out, 0, sizeof *out);
  for (unsigned i = 0; i < PAGE_VALUES; i++) {
    uint32_t count = stored[i];
    if (chunks) {
      if (count == CHUNK_CLEAN) out->clean++;
      if (count == CHUNK_DIRTY) out->dirty++;
      if (count >= CHUNK_ONE) out->allocated++;
      count = count < CHUNK_ONE ? 0 : count - 1;
    }
    if (count < found[i] && out->too_low++ == 0) out->first_low = i;
    if (count > found[i] && out->too_high++ == 0) out->first_high = i;
    if (count > 0 && found[i] == 0) out->unused++;
  }
}

int tp_stray_checksum(const uint32_t *counts, const uint32_t *checksums) {
  for (unsigned i = 0; i < PAGE_VALUES; i++) {
    if (checksums[i] != 0 && counts[i] < CHUNK_ONE) return (int)i;
  }
  return -1;
}
