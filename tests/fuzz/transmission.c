/* transmission.c - a libFuzzer target: NBD's transmission phase (csrc/nbd.c) over a socket pair, on a pool in memory.
 *
 * An input's first byte is what was negotiated (enum agreed); the rest is sent as it is, or, with IN_RECORDS, says what requests
 * to send, so that mutations get past the magic number and payloads fit their lengths. Then each request must get
 * just one reply, up to the one that ends the connection. Replies must be well formed, and a sealed layer must not change.
 */
#define _GNU_SOURCE 1
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "memory_store.h"
#include "nbd.h"

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);  \
      abort();                                                                 \
    }                                                                          \
  } while (0)

enum agreed { READ_ONLY = 1, STRUCTURED = 2, ALLOCATION = 4, CHANGES = 8, IN_RECORDS = 16, CAREFULLY = 32 };
enum { SIZE = (40 << 20) + 777, CAPACITY = 48 << 20, PATTERN_BYTES = 300000, RECORD_BYTES = 8, RECORDS_MAX = 64, PAYLOAD_MAX = 96 << 10 };

static struct store *store;
static tp_pool *pool;
static tp_layer *sealed, *disk;
static uint8_t pattern[PATTERN_BYTES];

static void open_pool(void) {
  tp_options options = {.chunk_size = 16 << 10, .capacity = CAPACITY, .window_bytes = 1};
  options.data_fd = memfd_create("fuzz", 0);
  store = store_new();
  store_options(store, &options);
  CHECK(tp_pool_open(&options, &pool) == TP_OK);
  store_attach(store, pool);
  for (unsigned k = 0; k < PATTERN_BYTES; k++) pattern[k] = (uint8_t)(k * 2654435761u >> 24);
  tp_layer *base;
  CHECK(tp_layer_create(pool, 1, SIZE, &base) == TP_OK);
  for (uint64_t at = 0; at + PATTERN_BYTES < SIZE; at += 9 << 20) CHECK(tp_write(base, pattern, PATTERN_BYTES, at + 1000) == TP_OK);
  CHECK(tp_layer_branch(base, 2, SIZE, 1, &sealed) == TP_OK);
  CHECK(tp_layer_branch(sealed, 3, SIZE, 0, &disk) == TP_OK);
  CHECK(tp_flush(pool) == TP_OK);
}

/* --- what is sent --- */

struct message {
  uint8_t *bytes;
  size_t length;
  unsigned requests;       /* in records: those that must be answered, whose cookies are 0, 1, ... */
  uint16_t types[RECORDS_MAX];
};

/* A record: type, flags, offset (in units of 257 bytes from the begin, or back from the end), length by its exponent and a factor. */
static void add_record(struct message *m, const uint8_t *record, bool *over) {
  uint16_t type = record[0] % 10;
  uint64_t back = (uint64_t)(record[3] << 8 | record[4]) * 257;
  uint64_t offset = record[1] & 0x80 ? SIZE - back : back * 3;
  uint32_t length = ((uint32_t)record[6] + 1) << record[5] % 25;
  bool is_write = type == NBD_CMD_WRITE;
  if (is_write && record[7] % 8 != 0) length %= PAYLOAD_MAX;
  if (type == NBD_CMD_WRITE_ZEROES && (record[1] & NBD_CMD_FLAG_NO_HOLE)) length %= 1 << 20; /* it takes long */
  m->types[m->requests] = type;
  struct nbd_request_head head = {htobe32(NBD_REQUEST_MAGIC), htobe16(record[1] & 0x3f), htobe16(type), m->requests, htobe64(offset), htobe32(length)};
  memcpy(m->bytes + m->length, &head, sizeof head);
  m->length += sizeof head;
  if (is_write) {
    uint32_t sent = (uint32_t)(length < PAYLOAD_MAX ? length : PAYLOAD_MAX);
    memcpy(m->bytes + m->length, pattern + record[7], sent);
    m->length += sent;
    if (sent < length) *over = true; /* the client vanishes in the middle of it */
  }
  if (type == NBD_CMD_DISC) *over = true;
  if (!*over) m->requests++;
}

static struct message compose(uint8_t agreed, const uint8_t *data, size_t size) {
  struct message m = {.bytes = malloc(size + RECORDS_MAX * (sizeof(struct nbd_request_head) + PAYLOAD_MAX))};
  if (!(agreed & IN_RECORDS)) {
    memcpy(m.bytes, data, size);
    m.length = size;
    return m;
  }
  bool over = false;
  for (unsigned k = 0; !over && k < RECORDS_MAX && (k + 1) * RECORD_BYTES <= size; k++) add_record(&m, data + (size_t)k * RECORD_BYTES, &over);
  return m;
}

/* --- what comes back --- */

struct replies {
  struct nbd_structured_head head;
  size_t have;         /* bytes of the head */
  uint64_t data_left;
  const struct message *sent;
  uint8_t agreed;
  bool answered[RECORDS_MAX];
};

/* A head that is whole: how much data follows it. */
static uint64_t check_head(struct replies *replies) {
  bool structured = be32toh(replies->head.magic) == NBD_STRUCTURED_REPLY_MAGIC, done = true;
  struct nbd_simple_head simple;
  memcpy(&simple, &replies->head, sizeof simple);
  uint64_t cookie = structured ? replies->head.cookie : simple.cookie, length = 0;
  if (structured) {
    uint16_t type = be16toh(replies->head.type);
    length = be32toh(replies->head.length);
    CHECK(replies->agreed & STRUCTURED);
    CHECK(type == NBD_REPLY_NONE ? length == 0 : type == NBD_REPLY_ERROR ? length == 6 : type == NBD_REPLY_OFFSET_DATA ? length > 8 : length % 8 == 4);
    CHECK(type == NBD_REPLY_NONE || type == NBD_REPLY_ERROR || type == NBD_REPLY_OFFSET_DATA || type == NBD_REPLY_BLOCK_STATUS);
    CHECK(length <= NBD_PAYLOAD_MAX + 8);
    done = be16toh(replies->head.flags) == NBD_REPLY_DONE;
  }
  if (!(replies->agreed & IN_RECORDS)) return length; /* a simple reply to READ cannot be told from others */
  CHECK(cookie < replies->sent->requests && !replies->answered[cookie]);
  replies->answered[cookie] = done;
  uint16_t type = replies->sent->types[cookie];
  bool only_structured = (replies->agreed & STRUCTURED) && (type == NBD_CMD_READ || type == NBD_CMD_BLOCK_STATUS);
  CHECK(structured == only_structured);
  if (!structured && simple.error == 0 && type == NBD_CMD_READ) {
    struct nbd_request_head asked;
    const uint8_t *p = replies->sent->bytes;
    for (uint64_t k = 0; k < cookie; k++) {
      memcpy(&asked, p, sizeof asked);
      p += sizeof asked + (be16toh(asked.type) == NBD_CMD_WRITE ? be32toh(asked.length) : 0);
    }
    memcpy(&asked, p, sizeof asked);
    length = be32toh(asked.length);
  }
  return length;
}

static void take_replies(struct replies *replies, const uint8_t *bytes, size_t length) {
  if (!(replies->agreed & IN_RECORDS) && !(replies->agreed & STRUCTURED)) return;
  while (length > 0) {
    if (replies->data_left > 0) {
      size_t n = length < replies->data_left ? length : (size_t)replies->data_left;
      bytes += n, length -= n, replies->data_left -= n;
      continue;
    }
    ((uint8_t *)&replies->head)[replies->have++] = *bytes++, length--;
    if (replies->have < 4) continue;
    uint32_t magic = be32toh(replies->head.magic);
    CHECK(magic == NBD_SIMPLE_REPLY_MAGIC || magic == NBD_STRUCTURED_REPLY_MAGIC);
    if (replies->have < (magic == NBD_SIMPLE_REPLY_MAGIC ? sizeof(struct nbd_simple_head) : sizeof replies->head)) continue;
    replies->data_left = check_head(replies);
    replies->have = 0;
  }
}

/* Sends it all, and takes what comes back, until the server has ended. Carefully: in bits, as a slow client does. */
static void exchange(int fd, const struct message *m, struct replies *replies) {
  static uint8_t bytes[1 << 20];
  size_t sent = 0, piece = replies->agreed & CAREFULLY ? 1 + m->length / 7 : m->length;
  if (m->length == 0) shutdown(fd, SHUT_WR);
  for (;;) {
    struct pollfd wanted = {fd, POLLIN | (sent < m->length ? POLLOUT : 0), 0};
    poll(&wanted, 1, -1);
    if ((wanted.revents & POLLOUT) && sent < m->length) {
      size_t left = m->length - sent;
      ssize_t n = send(fd, m->bytes + sent, left < piece ? left : piece, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (n < 0 && errno != EAGAIN) n = (ssize_t)left; /* the server has ended it */
      if (n > 0) sent += (size_t)n;
      if (sent == m->length) shutdown(fd, SHUT_WR);
    }
    ssize_t got = recv(fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (got > 0) take_replies(replies, bytes, (size_t)got);
    else if (got == 0 || errno != EAGAIN) return;
  }
}

struct service {
  int fd;
  tp_layer *layer;
  tp_nbd_options options;
};

static void *serve(void *argument) {
  struct service *service = argument;
  CHECK(tp_nbd_serve(pool, service->layer, service->fd, &service->options) == TP_OK);
  shutdown(service->fd, SHUT_RDWR);
  return NULL;
}

static void verify_and_tidy(void) {
  static unsigned runs;
  CHECK(tp_layer_reset(disk, sealed) == TP_OK);
  if (++runs % 64 != 0) return;
  for (uint64_t at = 0; at + PATTERN_BYTES < SIZE; at += 9 << 20) CHECK(tp_equal(sealed, pattern, PATTERN_BYTES, at + 1000) == 1);
  while (tp_reclaim(pool, 100000) == 1) CHECK(tp_flush(pool) == TP_OK);
  CHECK(tp_flush(pool) == TP_OK);
  while (tp_punch(pool, 1 << 30) == 1) continue;
  tp_pool_info info;
  CHECK(tp_pool_get_info(pool, &info) == TP_OK && info.failed == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (pool == NULL) open_pool();
  if (size == 0) return -1;
  uint8_t agreed = data[0];
  int fds[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
  tp_nbd_context contexts[2];
  uint64_t count = 0;
  if (agreed & ALLOCATION) contexts[count++] = (tp_nbd_context){1, NULL};
  if (agreed & CHANGES) contexts[count++] = (tp_nbd_context){2, sealed};
  bool read_only = agreed & READ_ONLY, structured = agreed & STRUCTURED;
  struct service service = {fds[0], read_only ? sealed : disk, {read_only, structured, contexts, structured ? count : 0}};
  struct message message = compose(agreed, data + 1, size - 1);
  struct replies replies = {.sent = &message, .agreed = agreed};
  pthread_t thread;
  CHECK(pthread_create(&thread, NULL, serve, &service) == 0);
  exchange(fds[1], &message, &replies);
  pthread_join(thread, NULL);
  CHECK(!(agreed & IN_RECORDS) || (replies.have == 0 && replies.data_left == 0));
  for (unsigned k = 0; k < message.requests; k++) CHECK(replies.answered[k]);
  close(fds[0]);
  close(fds[1]);
  free(message.bytes);
  verify_and_tidy();
  return 0;
}
