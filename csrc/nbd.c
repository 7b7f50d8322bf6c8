/* nbd.c - the transmission phase of NBD (github.com/NetworkBlockDevice/nbd, doc/proto.md), for one connection: its threads and replies.
 *
 * Its thread takes requests as they come: what one recv() brings is worked off as a batch, and its replies go out in one sendmsg(),
 * so that a client with many requests in flight costs few system calls. Reads and writes mostly meet the page cache, so there
 * is little to wait for; but moving much data takes time, and so two more threads come in when they are needed:
 *
 *   client --requests--> [in] --> small ones, reads ---------------+--> client
 *                         +--> helper: large changes, one by one --+
 *                         +--> lane: FLUSH, FUA (tp_flush) --------+
 *
 * The helper writes one payload while the next is received. One is enough: writes of one layer that change its map, and what one
 * file system does for one file, go one after the other anyway. Replies may come in any order; one that says that something is
 * written comes when it is. What waits for the disk by its nature, a flush, is the slow lane's, so that it holds nobody up. It is one
 * of the pool, so it covers all connections (NBD_FLAG_CAN_MULTI_CONN), and all that was answered before.
 *
 * What a client says wrongly is answered with the error that the protocol names; after what leaves unknown where the next
 * request begins, the connection ends.
 */
#define _GNU_SOURCE 1
#include "nbd.h"

#include <endian.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common.h"

#define RECEIVE_BYTES (64u << 10) /* at once, where less is needed */
#define ALIGNMENT 64u             /* of data: the kernel copies to memory that is not aligned at a fifth of the speed */
#define IN_BYTES (ALIGNMENT + NBD_TAKE_MAX + RECEIVE_BYTES)
#define KEPT_BYTES (2u << 20) /* of memory for large payloads */

/* --- memory for data --- */

static uint8_t *new_arena(void) {
  void *arena = mmap(NULL, NBD_PAYLOAD_MAX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return arena == MAP_FAILED ? NULL : arena;
}

static void give_back(uint8_t *arena) { (void)madvise(arena + KEPT_BYTES, NBD_PAYLOAD_MAX - KEPT_BYTES, MADV_DONTNEED); }

/* --- sending --- */

/* False: the connection has ended, for whoever receives too. */
static bool send_all(struct nbd_connection *c, struct iovec *parts, size_t count) {
  struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
  bool alive = true;
  pthread_mutex_lock(&c->sending);
  while (alive && message.msg_iovlen > 0) {
    ssize_t sent = sendmsg(c->fd, &message, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    alive = sent > 0;
    while (alive && message.msg_iovlen > 0 && (size_t)sent >= message.msg_iov->iov_len) {
      sent -= (ssize_t)message.msg_iov->iov_len;
      message.msg_iov++, message.msg_iovlen--;
    }
    if (!alive || message.msg_iovlen == 0) break;
    message.msg_iov->iov_base = (uint8_t *)message.msg_iov->iov_base + sent;
    message.msg_iov->iov_len -= (size_t)sent;
  }
  pthread_mutex_unlock(&c->sending);
  if (!alive) (void)shutdown(c->fd, SHUT_RDWR);
  return alive;
}

static bool send_replies(struct nbd_outbox *out) {
  bool alive = out->part_count == 0 || send_all(out->connection, out->parts, out->part_count);
  out->reply_count = out->part_count = 0;
  if (out->arena_used > KEPT_BYTES) give_back(out->arena);
  out->arena_used = 0;
  return alive;
}

/* --- receiving --- */

/* Makes the next `length` bytes be there, in c->in, at `place` if they are not there yet; what waits is sent before. */
static bool need(struct nbd_connection *c, size_t length, size_t place, bool no_more) {
  size_t there = c->in_end - c->in_start;
  if (there >= length) return true;
  if (!send_replies(&c->out)) return false;
  memmove(c->in + place, c->in + c->in_start, there);
  c->in_start = place;
  while (there < length) {
    ssize_t got = recv(c->fd, c->in + place + there, no_more ? length - there : RECEIVE_BYTES, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    there += (size_t)got;
  }
  c->in_end = place + there;
  return true;
}

const uint8_t *nbd_take(struct nbd_connection *c, size_t length) {
  assert(length <= NBD_TAKE_MAX);
  if (!need(c, length, 0, false)) return NULL;
  c->in_start += length;
  return c->in + c->in_start - length;
}

bool nbd_take_large(struct nbd_connection *c, uint8_t *to, size_t length) {
  if (!send_replies(&c->out)) return false;
  size_t done = min_u64(c->in_end - c->in_start, length);
  memcpy(to, c->in + c->in_start, done);
  c->in_start += done;
  while (done < length) {
    ssize_t got = recv(c->fd, to + done, length - done, MSG_WAITALL);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    done += (size_t)got;
  }
  return true;
}

bool nbd_drain(struct nbd_connection *c, uint64_t length) {
  while (length > 0) {
    if (!need(c, 1, 0, false)) return false;
    size_t piece = min_u64(c->in_end - c->in_start, length);
    c->in_start += piece, length -= piece;
  }
  return true;
}

static bool has_more(const struct nbd_connection *c) {
  uint8_t byte;
  return c->in_end > c->in_start || recv(c->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0;
}

/* --- replies --- */

static size_t aligned(size_t length) { return (length + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

uint32_t nbd_error(int rc, bool fills_space) {
  switch (rc) {
    case TP_OK: return 0;
    case TP_EQUOTA:
    case TP_ENOSPC: return NBD_ENOSPC;
    case TP_ERANGE: return fills_space ? NBD_ENOSPC : NBD_EINVAL;
    case TP_EINVAL: return NBD_EINVAL;
    case TP_ESEALED:
    case TP_EREADONLY: return NBD_EPERM;
    case TP_EDELETED:
    case TP_ECLOSED: return NBD_ESHUTDOWN;
    case TP_ENOMEM: return NBD_ENOMEM;
    default: return NBD_EIO;
  }
}

size_t nbd_fill_simple(struct nbd_reply *reply, uint64_t cookie, uint32_t error) {
  struct nbd_simple_head head = {htobe32(NBD_SIMPLE_REPLY_MAGIC), htobe32(error), cookie};
  memcpy(&reply->head, &head, sizeof head);
  return sizeof head;
}

void nbd_fill_structured(struct nbd_reply *reply, uint64_t cookie, uint16_t type, uint16_t flags, size_t length) {
  reply->head = (struct nbd_structured_head){htobe32(NBD_STRUCTURED_REPLY_MAGIC), htobe16(flags), htobe16(type), cookie, htobe32((uint32_t)length)};
}

bool nbd_room(struct nbd_outbox *out, size_t length) {
  bool full = out->reply_count == NBD_REPLIES || out->arena_used + aligned(length) > NBD_BATCH_BYTES;
  return !full || send_replies(out);
}

struct nbd_reply *nbd_add(struct nbd_outbox *out, size_t head_length, const void *data, size_t length) {
  struct nbd_reply *reply = &out->replies[out->reply_count++];
  out->parts[out->part_count++] = (struct iovec){&reply->head, head_length};
  if (length > 0) out->parts[out->part_count++] = (struct iovec){(void *)(uintptr_t)data, length};
  out->arena_used += aligned(length);
  return reply;
}

bool nbd_answer(struct nbd_outbox *out, uint64_t cookie, uint32_t error, bool structured) {
  if (!nbd_room(out, 6)) return false;
  if (!structured) {
    nbd_fill_simple(nbd_add(out, sizeof(struct nbd_simple_head), NULL, 0), cookie, error);
  } else if (error == 0) {
    nbd_fill_structured(nbd_add(out, sizeof(struct nbd_structured_head), NULL, 0), cookie, NBD_REPLY_NONE, NBD_REPLY_DONE, 0);
  } else {
    uint8_t *data = out->arena + out->arena_used;
    uint32_t number = htobe32(error);
    memcpy(data, &number, sizeof number);
    memset(data + sizeof number, 0, 2); /* no message */
    nbd_fill_structured(nbd_add(out, sizeof(struct nbd_structured_head), data, 6), cookie, NBD_REPLY_ERROR, NBD_REPLY_DONE, 6);
  }
  return true;
}

/* --- the slow lane --- */

static void *run_lane(void *argument) {
  struct nbd_connection *c = argument;
  struct nbd_lane *lane = &c->lane;
  uint64_t cookies[NBD_FLUSHES];
  pthread_mutex_lock(&lane->mutex);
  for (;;) {
    while (lane->count == 0 && !lane->stop) pthread_cond_wait(&lane->changed, &lane->mutex);
    if (lane->count == 0) break;
    unsigned count = lane->count;
    memcpy(cookies, lane->cookies, count * sizeof *cookies);
    lane->count = 0;
    pthread_cond_broadcast(&lane->changed);
    pthread_mutex_unlock(&lane->mutex);
    uint32_t error = nbd_error(tp_flush(c->pool), false);
    for (unsigned k = 0; k < count; k++) {
      struct nbd_reply reply;
      struct iovec part = {&reply, nbd_fill_simple(&reply, cookies[k], error)};
      (void)send_all(c, &part, 1);
    }
    pthread_mutex_lock(&lane->mutex);
  }
  pthread_mutex_unlock(&lane->mutex);
  return NULL;
}

bool nbd_answer_flushed(struct nbd_outbox *out, uint64_t cookie) {
  struct nbd_connection *c = out->connection;
  struct nbd_lane *lane = &c->lane;
  pthread_mutex_lock(&lane->mutex);
  lane->started = lane->started || pthread_create(&lane->thread, NULL, run_lane, c) == 0;
  bool taken = lane->started;
  if (taken) {
    while (lane->count == NBD_FLUSHES) pthread_cond_wait(&lane->changed, &lane->mutex);
    lane->cookies[lane->count++] = cookie;
    pthread_cond_broadcast(&lane->changed);
  }
  pthread_mutex_unlock(&lane->mutex);
  return taken || nbd_answer(out, cookie, nbd_error(tp_flush(c->pool), false), false);
}

static void end_lane(struct nbd_lane *lane) {
  pthread_mutex_lock(&lane->mutex);
  lane->stop = true;
  pthread_cond_broadcast(&lane->changed);
  pthread_mutex_unlock(&lane->mutex);
  if (lane->started) pthread_join(lane->thread, NULL);
  pthread_cond_destroy(&lane->changed);
  pthread_mutex_destroy(&lane->mutex);
}

/* --- jobs --- */

/* Does what takes long, in the order in which it came. */
static void *run_helper(void *argument) {
  struct nbd_connection *c = argument;
  struct nbd_helper *helper = &c->helper;
  pthread_mutex_lock(&helper->mutex);
  for (;;) {
    while (helper->count == 0 && !helper->stop) pthread_cond_wait(&helper->changed, &helper->mutex);
    if (helper->count == 0) break;
    struct nbd_job *job = &helper->jobs[helper->first];
    pthread_mutex_unlock(&helper->mutex);
    (void)(nbd_do_job(&helper->out, job) && send_replies(&helper->out)); /* if the connection has ended, the receiving thread sees it */
    if (job->request.length > KEPT_BYTES) give_back(job->memory);
    pthread_mutex_lock(&helper->mutex);
    helper->first = (helper->first + 1) % NBD_JOBS;
    helper->count--;
    pthread_cond_signal(&helper->changed);
  }
  pthread_mutex_unlock(&helper->mutex);
  return NULL;
}

struct nbd_job *nbd_free_job(struct nbd_connection *c) {
  struct nbd_helper *helper = &c->helper;
  (void)send_replies(&c->out); /* if the connection has ended, it is seen when more is received */
  pthread_mutex_lock(&helper->mutex);
  while (helper->count == NBD_JOBS) pthread_cond_wait(&helper->changed, &helper->mutex);
  struct nbd_job *job = &helper->jobs[(helper->first + helper->count) % NBD_JOBS];
  pthread_mutex_unlock(&helper->mutex);
  if (job->memory == NULL) job->memory = new_arena();
  return job->memory == NULL ? NULL : job;
}

/* What is small or alone is done at once: another thread would only cost the time of waking it. */
bool nbd_start_job(struct nbd_connection *c, struct nbd_job *job) {
  struct nbd_helper *helper = &c->helper;
  pthread_mutex_lock(&helper->mutex);
  bool hand_over = job->request.length > NBD_ALONE_MAX && (helper->count > 0 || has_more(c));
  if (hand_over && !helper->started) hand_over = helper->started = pthread_create(&helper->thread, NULL, run_helper, c) == 0;
  if (hand_over) {
    helper->count++;
    pthread_cond_signal(&helper->changed);
  }
  pthread_mutex_unlock(&helper->mutex);
  if (hand_over) return true;
  bool alive = nbd_do_job(&c->out, job);
  if (job->request.length > KEPT_BYTES) give_back(job->memory);
  return alive;
}

static void end_helper(struct nbd_helper *helper) {
  pthread_mutex_lock(&helper->mutex);
  helper->stop = true;
  pthread_cond_signal(&helper->changed);
  pthread_mutex_unlock(&helper->mutex);
  if (helper->started) pthread_join(helper->thread, NULL);
  for (unsigned k = 0; k < NBD_JOBS; k++) {
    if (helper->jobs[k].memory != NULL) munmap(helper->jobs[k].memory, NBD_PAYLOAD_MAX);
  }
  pthread_cond_destroy(&helper->changed);
  pthread_mutex_destroy(&helper->mutex);
}

/* --- the connection --- */

static bool serve_next(struct nbd_connection *c) {
  struct nbd_request_head head;
  if (!need(c, sizeof head, ALIGNMENT - sizeof head, c->by_header)) return false;
  memcpy(&head, c->in + c->in_start, sizeof head);
  c->in_start += sizeof head;
  if (be32toh(head.magic) != NBD_REQUEST_MAGIC) return false;
  struct nbd_request r = {be16toh(head.flags), be16toh(head.type), head.cookie, be64toh(head.offset), be32toh(head.length)};
  c->by_header = r.type == NBD_CMD_WRITE && r.length > NBD_TAKE_MAX;
  return nbd_serve_request(c, &r);
}

int tp_nbd_serve(tp_pool *pool, tp_layer *layer, int fd, const tp_nbd_options *options) {
  struct nbd_connection *c = tp_alloc_zero(sizeof *c);
  c->pool = pool, c->layer = layer, c->options = options, c->fd = fd;
  c->out.connection = c->helper.out.connection = c;
  c->in = aligned_alloc(ALIGNMENT, IN_BYTES);
  c->out.arena = new_arena();
  if (c->in == NULL || c->out.arena == NULL) {
    if (c->out.arena != NULL) munmap(c->out.arena, NBD_PAYLOAD_MAX);
    free(c->in);
    free(c);
    return tp_error_set(TP_ENOMEM);
  }
  pthread_mutex_init(&c->sending, NULL);
  pthread_mutex_init(&c->helper.mutex, NULL);
  pthread_cond_init(&c->helper.changed, NULL);
  pthread_mutex_init(&c->lane.mutex, NULL);
  pthread_cond_init(&c->lane.changed, NULL);
  sigset_t all, before; /* signals are for the program's own threads */
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (serve_next(c)) continue;
  (void)send_replies(&c->out);
  end_helper(&c->helper);
  end_lane(&c->lane);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_mutex_destroy(&c->sending);
  munmap(c->out.arena, NBD_PAYLOAD_MAX);
  free(c->in);
  free(c);
  return TP_OK;
}
