/* records.c - fuzzing every decoder of stored records, with libFuzzer: nodes, pages of counts, summaries, layer maps, the pool's state.
 *
 * The input is a store: records of kind, key, length and body, each of which is given the checksum that it should have, so that
 * decoders see what no checksum would let through. A pool is opened over it and all of it is read; then each record is looked
 * at by csrc/inspect.c too, and what that accepts is encoded and decoded again: the same must come out.
 */
#include <stdlib.h>
#include <string.h>

#include "node.h"
#include "record.h"
#include "thinpool.h"

#define RECORDS_MAX 64u
#define BODY_MAX 16384u

struct stored {
  uint32_t kind;
  uint64_t key, length; /* with its checksum */
  uint8_t value[4 + BODY_MAX];
};
static struct stored records[RECORDS_MAX];
static unsigned record_count;

static void require(int right) {
  if (!right) abort();
}

/* --- the store and the disk --- */

static void take_record(uint32_t kind, uint64_t key, const uint8_t *body, uint64_t length) {
  struct stored *r = &records[record_count++];
  uint8_t be[8];
  store_u64_be(be, key);
  *r = (struct stored){.kind = kind, .key = key, .length = 4 + length};
  memcpy(r->value + 4, body, length);
  store_u32(r->value, record_crc(kind, be, body, length));
}

static void take_records(const uint8_t *data, size_t size) {
  static const uint32_t kinds[] = {TP_NODE, TP_CHUNK_PAGE, TP_NODE_PAGE, TP_SUMMARY, TP_MAP, TP_STATE, TP_CHECKSUM}; /* in the order of seeds.py */
  record_count = 0;
  while (size >= 4 && record_count < RECORDS_MAX) {
    uint64_t length = data[2] | (uint64_t)(data[3] & 0x3f) << 8;
    if (length > size - 4) length = size - 4;
    take_record(kinds[data[0] % (sizeof kinds / sizeof *kinds)], data[1], data + 4, length);
    data += 4 + length, size -= 4 + length;
  }
}

static int fetch(void *ctx, uint32_t kind, uint64_t key, void *buf, uint64_t capacity, uint64_t *length) {
  (void)ctx;
  for (unsigned k = 0; k < record_count; k++) {
    if (records[k].kind != kind || records[k].key != key) continue;
    *length = records[k].length;
    if (*length > capacity) return TP_ERANGE;
    memcpy(buf, records[k].value, *length);
    return TP_OK;
  }
  return TP_ENOENT;
}

static int no(void *ctx) {
  (void)ctx;
  return TP_ENOSPC;
}

static int64_t zeros(void *ctx, void *buf, uint64_t length, uint64_t offset) {
  (void)ctx, (void)offset;
  memset(buf, 0, length);
  return (int64_t)length;
}

static int64_t no_write(void *ctx, const void *buf, uint64_t length, uint64_t offset) {
  (void)ctx, (void)buf, (void)length, (void)offset;
  return -5;
}

static int fine(void *ctx) {
  (void)ctx;
  return 0;
}

static int punch(void *ctx, uint64_t offset, uint64_t length) {
  (void)ctx, (void)offset, (void)length;
  return 0;
}

static int resize(void *ctx, uint64_t length) {
  (void)ctx, (void)length;
  return 0;
}

static int64_t disk_size(void *ctx) {
  (void)ctx;
  return INT64_MAX;
}

static const tp_disk disk = {NULL, zeros, no_write, punch, fine, resize, disk_size, resize};

/* --- what is read --- */

static void walk(tp_layer *layer, tp_layer *other) {
  tp_extent extents[64];
  uint64_t cursor = 0, chunks;
  uint8_t buf[8192];
  for (int turn = 0; turn < 64; turn++) {
    uint64_t before = cursor;
    int64_t found = tp_extents(layer, &cursor, extents, 64);
    if (found < 0 || (found == 0 && cursor == before)) break;
    for (int64_t k = 0; k < found; k++) require(extents[k].length > 0 && extents[k].offset + extents[k].length <= tp_layer_size(layer));
    (void)tp_read(layer, buf, min_u64(sizeof buf, extents[0].length), extents[0].offset);
  }
  cursor = 0;
  for (int turn = 0; other != NULL && turn < 64; turn++) {
    uint64_t before = cursor;
    int64_t found = tp_diff(layer, other, &cursor, extents, 64);
    if (found < 0 || (found == 0 && cursor == before)) break;
  }
  (void)tp_exclusive(&layer, 1, &chunks);
}

static void read_pool(uint64_t chunk_size, int read_only) {
  tp_options options = {.chunk_size = chunk_size, .read_only = read_only, .verify_reads = 1, .disk = &disk, .fetch = fetch, .commit = no, .extend_window = no};
  tp_pool *pool;
  if (tp_pool_open(&options, &pool) != TP_OK) return;
  tp_layer *layers[3] = {NULL};
  for (uint64_t id = 1; id <= 3; id++) {
    if (tp_layer_get(pool, id, &layers[id - 1]) != TP_OK) layers[id - 1] = NULL;
  }
  for (int k = 0; k < 3; k++) {
    if (layers[k] != NULL) walk(layers[k], layers[(k + 1) % 3]);
  }
  for (int k = 0; k < 3; k++) tp_layer_put(layers[k]);
  tp_pool_close(pool);
  tp_pool_put(pool);
}

/* --- what is looked at without a pool --- */

static void again(const struct stored *r, uint64_t blocks) {
  static uint8_t made[1u << 22];
  static uint64_t splits[256 * (2 + TP_BLOCKS_MAX)], splits_again[256 * (2 + TP_BLOCKS_MAX)];
  tp_node_info node, node_again;
  uint32_t page[1024] = {0}, page_again[1024] = {0};
  uint64_t length = sizeof made;
  if (r->kind == TP_NODE && tp_inspect_node(r->key, r->value, r->length, blocks, &node, NULL, splits) == TP_OK) {
    require(tp_make_node(r->key, &node, blocks, splits, made, &length) == TP_OK);
    require(tp_inspect_node(r->key, made, length, blocks, &node_again, NULL, splits_again) == TP_OK);
    require(memcmp(&node, &node_again, sizeof node) == 0);
    require(node.level > 0 || memcmp(splits, splits_again, node.split_count * (2 + blocks) * sizeof *splits) == 0);
  }
  if (r->kind == TP_NODE || r->kind == TP_MAP || r->kind == TP_STATE) return;
  if (tp_inspect_page(r->kind, r->key, r->value, r->length, page) != TP_OK) return;
  require(tp_make_page(r->kind, r->key, page, made, &length) == TP_OK);
  require(tp_inspect_page(r->kind, r->key, made, length, page_again) == TP_OK);
  require(memcmp(page, page_again, sizeof page) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < 1) return 0;
  uint64_t chunk_size = (uint64_t)4096 << (data[0] & 7) % 5;
  take_records(data + 1, size - 1);
  read_pool(chunk_size, data[0] >> 7);
  for (unsigned k = 0; k < record_count; k++) again(&records[k], chunk_size / TP_BLOCK);
  return 0;
}
