/* nbd.c - the transmission phase of NBD (github.com/NetworkBlockDevice/nbd, doc/proto.md), for one connection.
 *
 * One thread takes requests as they come: what one recv() brings is worked off as a batch, and its replies go out in one sendmsg(),
 * so that a client with many requests in flight costs few system calls. Reads and writes mostly meet the page cache. What waits for the
 * disk by its nature, FLUSH and the flush of FUA, goes to a second thread, the slow lane, so that it holds nobody up; replies may
 * come in any order. A flush covers all connections (NBD_FLAG_CAN_MULTI_CONN): it is one of the pool.
 *
 *   client --requests--> [in] --> work --> replies[] --sendmsg--> client
 *                                  |                      ^
 *                                  +--> lane (tp_flush) --+
 *
 * What a client says wrongly is answered with the error that the protocol names; after what leaves unknown where the next
 * request begins, the connection ends.
 */
#define _GNU_SOURCE 1
#include <endian.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "common.h"
#include "nbd.h"

#define IN_BYTES (256u << 10)
#define RECEIVE_BYTES (64u << 10) /* at once, where less is needed: what comes of a large payload with its request is copied once more */
#define ARENA_BYTES (1u << 20) /* data of replies that wait to be sent */
#define REPLIES 64u
#define LANE 256u              /* flushes that wait */
#define DRAIN_BYTES_MAX (64u << 20) /* of a payload that is too large, read and thrown away */
#define EXTENTS 512u           /* that one BLOCK_STATUS tells of, per context */

struct lane { /* the slow lane: cookies of requests that are answered when a flush has ended */
  pthread_t thread;
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  uint64_t cookies[LANE];
  unsigned count;
  bool started, stop;
};

struct reply {
  struct nbd_structured_head head; /* or a simple one, which is shorter */
  uint64_t offset;                 /* of OFFSET_DATA */
} __attribute__((packed));

struct connection {
  tp_pool *pool;
  tp_layer *layer;
  const tp_nbd_options *options;
  int fd;
  uint8_t *in;
  size_t in_start, in_end;
  uint8_t *arena;
  size_t arena_used;
  uint8_t *large;                  /* a payload that fits neither, kept for the next one */
  size_t large_bytes;
  pthread_mutex_t sending; /* the order of what is sent */
  struct reply replies[REPLIES];
  struct iovec parts[REPLIES * 2];
  unsigned reply_count, part_count;
  struct lane lane;
};

/* --- the socket --- */

/* False: the connection has ended. */
static bool send_all(struct connection *c, struct iovec *parts, size_t count) {
  struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
  while (message.msg_iovlen > 0) {
    ssize_t sent = sendmsg(c->fd, &message, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    while (message.msg_iovlen > 0 && (size_t)sent >= message.msg_iov->iov_len) {
      sent -= (ssize_t)message.msg_iov->iov_len;
      message.msg_iov++, message.msg_iovlen--;
    }
    if (message.msg_iovlen == 0) break;
    message.msg_iov->iov_base = (uint8_t *)message.msg_iov->iov_base + sent;
    message.msg_iov->iov_len -= (size_t)sent;
  }
  return true;
}

static bool send_replies(struct connection *c) {
  if (c->part_count == 0) return true;
  pthread_mutex_lock(&c->sending);
  bool alive = send_all(c, c->parts, c->part_count);
  pthread_mutex_unlock(&c->sending);
  c->reply_count = c->part_count = 0;
  c->arena_used = 0;
  return alive;
}

static bool receive(struct connection *c, void *buf, size_t length) {
  uint8_t *to = buf;
  while (length > 0) {
    ssize_t got = recv(c->fd, to, length, MSG_WAITALL);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    to += got, length -= (size_t)got;
  }
  return true;
}

/* Makes the next `length` bytes be there, in c->in; replies go out before it waits. */
static bool need(struct connection *c, size_t length) {
  if (c->in_end - c->in_start >= length) return true;
  if (!send_replies(c)) return false;
  memmove(c->in, c->in + c->in_start, c->in_end - c->in_start);
  c->in_end -= c->in_start, c->in_start = 0;
  while (c->in_end < length) {
    size_t wanted = max_u64(length - c->in_end, min_u64(IN_BYTES - c->in_end, RECEIVE_BYTES));
    ssize_t got = recv(c->fd, c->in + c->in_end, wanted, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    c->in_end += (size_t)got;
  }
  return true;
}

/* Memory for a payload of that length. NULL: there is none. */
static uint8_t *large_buffer(struct connection *c, size_t length) {
  if (length <= c->large_bytes) return c->large;
  if (c->large != NULL) munmap(c->large, c->large_bytes);
  c->large = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (c->large == MAP_FAILED) c->large = NULL;
  c->large_bytes = c->large == NULL ? 0 : length;
  return c->large;
}

/* --- replies --- */

static uint32_t protocol_error(int rc, bool writing) {
  switch (rc) {
    case TP_OK: return 0;
    case TP_EQUOTA:
    case TP_ENOSPC: return NBD_ENOSPC;
    case TP_ERANGE: return writing ? NBD_ENOSPC : NBD_EINVAL;
    case TP_EINVAL: return NBD_EINVAL;
    case TP_ESEALED:
    case TP_EREADONLY: return NBD_EPERM;
    case TP_EDELETED:
    case TP_ECLOSED: return NBD_ESHUTDOWN;
    case TP_ENOMEM: return NBD_ENOMEM;
    default: return NBD_EIO;
  }
}

static size_t fill_simple(struct reply *reply, uint64_t cookie, uint32_t error) {
  struct nbd_simple_head head = {htobe32(NBD_SIMPLE_REPLY_MAGIC), htobe32(error), cookie};
  memcpy(&reply->head, &head, sizeof head);
  return sizeof head;
}

static size_t fill_structured(struct reply *reply, uint64_t cookie, uint16_t type, uint16_t flags, size_t length) {
  reply->head = (struct nbd_structured_head){htobe32(NBD_STRUCTURED_REPLY_MAGIC), htobe16(flags), htobe16(type), cookie, htobe32((uint32_t)length)};
  return sizeof reply->head;
}

/* Room for one more reply with that many bytes in the arena; what waits is sent if there is none. NULL: the connection has ended. */
static uint8_t *room(struct connection *c, size_t length) {
  size_t needed = (length + 63) / 64 * 64; /* a read into memory that is not aligned is slow */
  bool full = c->reply_count == REPLIES || c->part_count + 2 > REPLIES * 2 || c->arena_used + needed > ARENA_BYTES;
  if (full && !send_replies(c)) return NULL;
  return c->arena + c->arena_used;
}

/* The reply that room() has made room for, with `length` bytes of data (in the arena, or elsewhere until send_replies). */
static struct reply *add(struct connection *c, size_t head_length, const void *data, size_t length) {
  struct reply *reply = &c->replies[c->reply_count++];
  c->parts[c->part_count++] = (struct iovec){&reply->head, head_length};
  if (length > 0) c->parts[c->part_count++] = (struct iovec){(void *)(uintptr_t)data, length};
  if (data == c->arena + c->arena_used) c->arena_used += (length + 63) / 64 * 64;
  return reply;
}

static bool answer(struct connection *c, uint64_t cookie, uint32_t error, bool structured) {
  uint8_t *data = room(c, 6);
  if (data == NULL) return false;
  if (!structured) {
    fill_simple(add(c, sizeof(struct nbd_simple_head), NULL, 0), cookie, error);
  } else if (error == 0) {
    fill_structured(add(c, sizeof(struct nbd_structured_head), NULL, 0), cookie, NBD_REPLY_NONE, NBD_REPLY_DONE, 0);
  } else {
    uint32_t number = htobe32(error);
    memcpy(data, &number, sizeof number);
    memset(data + sizeof number, 0, 2); /* no message */
    fill_structured(add(c, sizeof(struct nbd_structured_head), data, 6), cookie, NBD_REPLY_ERROR, NBD_REPLY_DONE, 6);
  }
  return true;
}

/* --- the slow lane --- */

static void *run_lane(void *argument) {
  struct connection *c = argument;
  struct lane *lane = &c->lane;
  uint64_t cookies[LANE];
  pthread_mutex_lock(&lane->mutex);
  for (;;) {
    while (lane->count == 0 && !lane->stop) pthread_cond_wait(&lane->changed, &lane->mutex);
    if (lane->count == 0) break;
    unsigned count = lane->count;
    memcpy(cookies, lane->cookies, count * sizeof *cookies);
    lane->count = 0;
    pthread_cond_broadcast(&lane->changed);
    pthread_mutex_unlock(&lane->mutex);
    uint32_t error = protocol_error(tp_flush(c->pool), false);
    for (unsigned k = 0; k < count; k++) {
      struct reply reply;
      struct iovec part = {&reply, fill_simple(&reply, cookies[k], error)};
      pthread_mutex_lock(&c->sending);
      (void)send_all(c, &part, 1); /* if the connection has ended, the other thread sees it */
      pthread_mutex_unlock(&c->sending);
    }
    pthread_mutex_lock(&lane->mutex);
  }
  pthread_mutex_unlock(&lane->mutex);
  return NULL;
}

/* Answers when all that was written is durable. */
static bool answer_flushed(struct connection *c, uint64_t cookie) {
  struct lane *lane = &c->lane;
  if (!lane->started && pthread_create(&lane->thread, NULL, run_lane, c) != 0)
    return answer(c, cookie, protocol_error(tp_flush(c->pool), false), false);
  lane->started = true;
  pthread_mutex_lock(&lane->mutex);
  while (lane->count == LANE) pthread_cond_wait(&lane->changed, &lane->mutex);
  lane->cookies[lane->count++] = cookie;
  pthread_cond_broadcast(&lane->changed);
  pthread_mutex_unlock(&lane->mutex);
  return true;
}

/* --- requests --- */

struct request {
  uint16_t flags, type;
  uint64_t cookie, offset; /* the cookie as it came */
  uint32_t length;
};

static bool in_range(const struct connection *c, const struct request *r) {
  uint64_t size = tp_layer_size(c->layer);
  return r->offset <= size && r->length <= size - r->offset;
}

static bool do_read(struct connection *c, const struct request *r) {
  bool structured = c->options->structured != 0;
  if (r->length == 0 || r->length > NBD_PAYLOAD_MAX) return answer(c, r->cookie, r->length == 0 ? 0 : NBD_EOVERFLOW, structured);
  bool fits = r->length <= ARENA_BYTES;
  uint8_t *data = room(c, fits ? r->length : 0);
  if (data == NULL) return false;
  if (!fits && (data = large_buffer(c, r->length)) == NULL) return answer(c, r->cookie, NBD_ENOMEM, structured);
  int rc = tp_read(c->layer, data, r->length, r->offset);
  if (rc != TP_OK) return answer(c, r->cookie, protocol_error(rc, false), structured);
  if (structured) {
    struct reply *reply = add(c, sizeof *reply, data, r->length);
    fill_structured(reply, r->cookie, NBD_REPLY_OFFSET_DATA, NBD_REPLY_DONE, sizeof reply->offset + r->length);
    reply->offset = htobe64(r->offset);
  } else {
    fill_simple(add(c, sizeof(struct nbd_simple_head), data, r->length), r->cookie, 0);
  }
  return fits || send_replies(c);
}

static bool drain(struct connection *c, uint64_t length) {
  while (length > 0) {
    if (!need(c, 1)) return false;
    size_t piece = min_u64(c->in_end - c->in_start, length);
    c->in_start += piece, length -= piece;
  }
  return true;
}

static bool end_change(struct connection *c, const struct request *r, int rc) {
  if (rc == TP_OK && (r->flags & NBD_CMD_FLAG_FUA)) return answer_flushed(c, r->cookie);
  return answer(c, r->cookie, protocol_error(rc, true), false);
}

static bool do_write(struct connection *c, const struct request *r) {
  if (r->length > NBD_PAYLOAD_MAX || !in_range(c, r) || c->options->read_only) {
    uint32_t error = c->options->read_only ? NBD_EPERM : r->length > NBD_PAYLOAD_MAX ? NBD_EINVAL : NBD_ENOSPC;
    return r->length <= DRAIN_BYTES_MAX && drain(c, r->length) && answer(c, r->cookie, error, false);
  }
  if (r->length == 0) return end_change(c, r, TP_OK);
  if (r->length <= IN_BYTES / 2) { /* small: from where it came */
    if (!need(c, r->length)) return false;
    int rc = tp_write(c->layer, c->in + c->in_start, r->length, r->offset);
    c->in_start += r->length;
    return end_change(c, r, rc);
  }
  if (!send_replies(c)) return false; /* the rest may be long in coming */
  uint8_t *data = large_buffer(c, r->length);
  if (data == NULL) return drain(c, r->length) && answer(c, r->cookie, NBD_ENOMEM, false);
  size_t there = min_u64(c->in_end - c->in_start, r->length);
  memcpy(data, c->in + c->in_start, there);
  c->in_start += there;
  if (!receive(c, data + there, r->length - there)) return false; /* a write that never came whole is none */
  return end_change(c, r, tp_write(c->layer, data, r->length, r->offset));
}

static int write_zeros(tp_layer *layer, uint64_t length, uint64_t offset) {
  static const uint8_t zeros[512 << 10];
  int rc = TP_OK;
  while (rc == TP_OK && length > 0) {
    uint64_t piece = min_u64(length, sizeof zeros);
    rc = tp_write(layer, zeros, piece, offset);
    offset += piece, length -= piece;
  }
  return rc;
}

static bool do_zero(struct connection *c, const struct request *r) {
  bool keep = r->type == NBD_CMD_WRITE_ZEROES && (r->flags & NBD_CMD_FLAG_NO_HOLE);
  if (c->options->read_only) return answer(c, r->cookie, NBD_EPERM, false);
  if (!in_range(c, r)) return answer(c, r->cookie, NBD_ENOSPC, false);
  if (keep && (r->flags & NBD_CMD_FLAG_FAST_ZERO)) return answer(c, r->cookie, NBD_ENOTSUP, false); /* zeros that take space are written */
  int rc = keep ? write_zeros(c->layer, r->length, r->offset) : tp_discard(c->layer, r->offset, r->length);
  return end_change(c, r, rc);
}

static bool do_cache(struct connection *c, const struct request *r) {
  if (!in_range(c, r)) return answer(c, r->cookie, NBD_EINVAL, false);
  int rc = TP_OK;
  for (uint64_t done = 0; rc == TP_OK && done < r->length; done += ARENA_BYTES) {
    if (c->part_count > 0 && !send_replies(c)) return false; /* their data is in the arena */
    uint64_t piece = min_u64(r->length - done, ARENA_BYTES);
    rc = tp_read(c->layer, c->arena, piece, r->offset + done);
  }
  return answer(c, r->cookie, protocol_error(rc, false), false);
}

/* --- block status --- */

struct status {
  uint32_t *out; /* pairs of length and flags, as they are sent */
  unsigned count;
  uint64_t position, end;
};

/* A range up to `end`, joined to the last where it is of the same kind. False: full. */
static bool put_status(struct status *s, uint64_t end, uint32_t flags) {
  end = min_u64(end, s->end);
  if (end <= s->position) return true;
  uint64_t length = end - s->position;
  uint32_t *last = s->count > 0 ? &s->out[(s->count - 1) * 2] : NULL;
  if (last != NULL && last[1] == htobe32(flags)) {
    last[0] = htobe32((uint32_t)(be32toh(last[0]) + length));
  } else if (s->count < EXTENTS) {
    s->out[s->count * 2] = htobe32((uint32_t)length);
    s->out[s->count * 2 + 1] = htobe32(flags);
    s->count++;
  } else {
    return false;
  }
  s->position = end;
  return true;
}

/* since NULL: data and holes. Else: what has changed since that layer. */
static int collect_status(tp_layer *layer, tp_layer *since, struct status *s) {
  tp_extent extents[64];
  uint64_t cursor = s->position;
  while (s->position < s->end) {
    uint64_t before = cursor;
    int64_t count = since == NULL ? tp_extents(layer, &cursor, extents, 64) : tp_diff(since, layer, &cursor, extents, 64);
    if (count < 0) return (int)count;
    for (int64_t k = 0; k < count; k++) {
      const tp_extent *e = &extents[k];
      bool fits = since == NULL ? put_status(s, e->offset + e->length, e->data ? 0 : NBD_STATE_HOLE | NBD_STATE_ZERO)
                                : put_status(s, e->offset, 0) && put_status(s, e->offset + e->length, NBD_STATE_CHANGED);
      if (!fits) return TP_OK;
    }
    if (count == 0 && cursor == before) break; /* the end: nothing has changed from here on */
  }
  (void)put_status(s, s->end, since == NULL ? NBD_STATE_HOLE | NBD_STATE_ZERO : 0);
  return TP_OK;
}

static bool do_status(struct connection *c, const struct request *r) {
  const tp_nbd_options *options = c->options;
  if (options->context_count == 0 || r->length == 0 || !in_range(c, r)) return answer(c, r->cookie, NBD_EINVAL, options->structured != 0);
  for (uint64_t k = 0; k < options->context_count; k++) {
    size_t capacity = sizeof(uint32_t) * (1 + 2 * EXTENTS);
    uint8_t *data = room(c, capacity);
    if (data == NULL) return false;
    uint32_t id = htobe32(options->contexts[k].id);
    memcpy(data, &id, sizeof id);
    struct status s = {.out = (uint32_t *)(void *)(data + sizeof id), .position = r->offset, .end = r->offset + r->length};
    int rc = collect_status(c->layer, options->contexts[k].since, &s);
    if (rc != TP_OK || s.count == 0) return answer(c, r->cookie, rc != TP_OK ? protocol_error(rc, false) : NBD_EIO, true);
    if (r->flags & NBD_CMD_FLAG_REQ_ONE) s.count = 1;
    size_t length = sizeof(uint32_t) * (1 + 2 * (size_t)s.count);
    uint16_t flags = k + 1 == options->context_count ? NBD_REPLY_DONE : 0;
    struct reply *reply = add(c, sizeof reply->head, data, length);
    fill_structured(reply, r->cookie, NBD_REPLY_BLOCK_STATUS, flags, length);
  }
  return true;
}

/* --- the connection --- */

static uint16_t known_flags(uint16_t type) {
  switch (type) {
    case NBD_CMD_READ: return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF;
    case NBD_CMD_WRITE:
    case NBD_CMD_TRIM: return NBD_CMD_FLAG_FUA;
    case NBD_CMD_WRITE_ZEROES: return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
    case NBD_CMD_BLOCK_STATUS: return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE;
    default: return NBD_CMD_FLAG_FUA;
  }
}

/* False: the connection is to end. */
static bool serve_one(struct connection *c) {
  struct nbd_request wire;
  if (!need(c, sizeof wire)) return false;
  memcpy(&wire, c->in + c->in_start, sizeof wire);
  c->in_start += sizeof wire;
  if (be32toh(wire.magic) != NBD_REQUEST_MAGIC) return false;
  struct request r = {be16toh(wire.flags), be16toh(wire.type), wire.cookie, be64toh(wire.offset), be32toh(wire.length)};
  bool structured_only = c->options->structured != 0 && (r.type == NBD_CMD_READ || r.type == NBD_CMD_BLOCK_STATUS);
  if (r.flags & ~known_flags(r.type)) {
    if (r.type == NBD_CMD_WRITE && (r.length > DRAIN_BYTES_MAX || !drain(c, r.length))) return false;
    return answer(c, r.cookie, NBD_EINVAL, structured_only);
  }
  switch (r.type) {
    case NBD_CMD_READ: return do_read(c, &r);
    case NBD_CMD_WRITE: return do_write(c, &r);
    case NBD_CMD_DISC: return false;
    case NBD_CMD_FLUSH: return answer_flushed(c, r.cookie);
    case NBD_CMD_TRIM:
    case NBD_CMD_WRITE_ZEROES: return do_zero(c, &r);
    case NBD_CMD_CACHE: return do_cache(c, &r);
    case NBD_CMD_BLOCK_STATUS: return do_status(c, &r);
    default: return answer(c, r.cookie, NBD_EINVAL, false);
  }
}

static void end_lane(struct lane *lane) {
  pthread_mutex_lock(&lane->mutex);
  lane->stop = true;
  pthread_cond_broadcast(&lane->changed);
  pthread_mutex_unlock(&lane->mutex);
  if (lane->started) pthread_join(lane->thread, NULL);
  pthread_cond_destroy(&lane->changed);
  pthread_mutex_destroy(&lane->mutex);
}

int tp_nbd_serve(tp_pool *pool, tp_layer *layer, int fd, const tp_nbd_options *options) {
  struct connection *c = tp_alloc_zero(sizeof *c);
  *c = (struct connection){.pool = pool, .layer = layer, .options = options, .fd = fd};
  c->in = mmap(NULL, IN_BYTES + ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (c->in == MAP_FAILED) {
    free(c);
    return TP_ENOMEM;
  }
  c->arena = c->in + IN_BYTES;
  pthread_mutex_init(&c->sending, NULL);
  pthread_mutex_init(&c->lane.mutex, NULL);
  pthread_cond_init(&c->lane.changed, NULL);
  sigset_t all, before; /* signals are for the program's own threads */
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (serve_one(c)) continue;
  (void)send_replies(c);
  end_lane(&c->lane);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_mutex_destroy(&c->sending);
  munmap(c->in, IN_BYTES + ARENA_BYTES);
  if (c->large != NULL) munmap(c->large, c->large_bytes);
  free(c);
  return TP_OK;
}
