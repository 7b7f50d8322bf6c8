/* nbd.h - NBD's numbers and structures on the wire (doc/proto.md of github.com/NetworkBlockDevice/nbd): all big-endian; and what
 * the two files of its transmission share: nbd.c has the connection, its threads and replies, nbd_ops.c does what requests ask for.
 */
#ifndef TP_NBD_H
#define TP_NBD_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "thinpool.h"

#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698u
#define NBD_STRUCTURED_REPLY_MAGIC 0x668e33efu
#define NBD_PAYLOAD_MAX (32u << 20) /* the block size limit that is told to clients */

enum nbd_command {
  NBD_CMD_READ = 0,
  NBD_CMD_WRITE = 1,
  NBD_CMD_DISC = 2,
  NBD_CMD_FLUSH = 3,
  NBD_CMD_TRIM = 4,
  NBD_CMD_CACHE = 5,
  NBD_CMD_WRITE_ZEROES = 6,
  NBD_CMD_BLOCK_STATUS = 7,
};

enum nbd_command_flag {
  NBD_CMD_FLAG_FUA = 1 << 0,
  NBD_CMD_FLAG_NO_HOLE = 1 << 1,
  NBD_CMD_FLAG_DF = 1 << 2,
  NBD_CMD_FLAG_REQ_ONE = 1 << 3,
  NBD_CMD_FLAG_FAST_ZERO = 1 << 4,
};

enum nbd_reply_type { NBD_REPLY_NONE = 0, NBD_REPLY_OFFSET_DATA = 1, NBD_REPLY_BLOCK_STATUS = 5, NBD_REPLY_ERROR = 32769 };
enum { NBD_REPLY_DONE = 1 };
enum { NBD_STATE_HOLE = 1, NBD_STATE_ZERO = 2, NBD_STATE_CHANGED = 1 };

enum nbd_error {
  NBD_EPERM = 1,
  NBD_EIO = 5,
  NBD_ENOMEM = 12,
  NBD_EINVAL = 22,
  NBD_ENOSPC = 28,
  NBD_EOVERFLOW = 75,
  NBD_ENOTSUP = 95,
  NBD_ESHUTDOWN = 108,
};

struct nbd_request_head {
  uint32_t magic;
  uint16_t flags, type;
  uint64_t cookie, offset;
  uint32_t length;
} __attribute__((packed));

struct nbd_simple_head {
  uint32_t magic, error;
  uint64_t cookie;
} __attribute__((packed));

struct nbd_structured_head {
  uint32_t magic;
  uint16_t flags, type;
  uint64_t cookie;
  uint32_t length;
} __attribute__((packed));

/* --- a connection, and the threads that serve it --- */

#define NBD_TAKE_MAX (32u << 10)     /* bytes of a payload that is used where it was received, and of a change that is answered with others */
#define NBD_ALONE_MAX (128u << 10)   /* bytes of a change that is made by the thread that received it: handing it over would take longer */
#define NBD_BATCH_BYTES (256u << 10) /* of data in replies that wait to be sent; but for a single one that may not be cut */
#define NBD_REPLIES 64u              /* that wait to be sent */
#define NBD_JOBS 4u
#define NBD_FLUSHES 256u             /* that wait */

struct nbd_reply {
  struct nbd_structured_head head; /* or a simple one, which is shorter */
  uint64_t offset;                 /* of OFFSET_DATA */
} __attribute__((packed));

/* The replies that one thread has ready. */
struct nbd_outbox {
  struct nbd_connection *connection;
  struct nbd_reply replies[NBD_REPLIES];
  struct iovec parts[NBD_REPLIES * 2];
  unsigned reply_count, part_count;
  uint8_t *arena; /* their data: NBD_PAYLOAD_MAX bytes, of which memory is there for what is used */
  size_t arena_used;
};

struct nbd_request {
  uint16_t flags, type;
  uint64_t cookie, offset; /* the cookie as it came */
  uint32_t length;
};

struct nbd_job {
  struct nbd_request request;
  uint8_t *memory; /* its payload; as an arena, once it was used */
};

struct nbd_helper { /* jobs in the order in which they came */
  pthread_t thread;
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  struct nbd_job jobs[NBD_JOBS];
  unsigned first, count; /* of those that wait or are being done */
  bool started, stop;
  struct nbd_outbox out;
};

struct nbd_lane { /* cookies of requests that are answered when a flush has ended */
  pthread_t thread;
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  uint64_t cookies[NBD_FLUSHES];
  unsigned count;
  bool started, stop;
};

struct nbd_connection {
  tp_pool *pool;
  tp_layer *layer;
  const tp_nbd_options *options;
  int fd;
  uint8_t *in; /* received and not used yet: from in_start to in_end */
  size_t in_start, in_end;
  bool by_header; /* the last request had a large payload, so the next one is received without what follows it */
  pthread_mutex_t sending; /* one message at a time */
  struct nbd_outbox out;
  struct nbd_helper helper;
  struct nbd_lane lane;
};

/* In what follows, false means that the connection is to end. */

/* --- nbd.c: receiving --- */
const uint8_t *nbd_take(struct nbd_connection *c, size_t length); /* the next bytes, at most NBD_TAKE_MAX */
bool nbd_take_large(struct nbd_connection *c, uint8_t *to, size_t length);
bool nbd_drain(struct nbd_connection *c, uint64_t length);

/* --- nbd.c: jobs --- */
struct nbd_job *nbd_free_job(struct nbd_connection *c); /* waits for one. NULL: no memory */
bool nbd_start_job(struct nbd_connection *c, struct nbd_job *job); /* the one that nbd_free_job gave */

/* --- nbd.c: replies, which wait until their thread has nothing else to do --- */
bool nbd_room(struct nbd_outbox *out, size_t length); /* for a reply with that much data, in the arena; what waits is sent if there is none */
struct nbd_reply *nbd_add(struct nbd_outbox *out, size_t head_length, const void *data, size_t length); /* the reply that nbd_room made room for */
size_t nbd_fill_simple(struct nbd_reply *reply, uint64_t cookie, uint32_t error); /* returns the head's length */
void nbd_fill_structured(struct nbd_reply *reply, uint64_t cookie, uint16_t type, uint16_t flags, size_t length);
bool nbd_answer(struct nbd_outbox *out, uint64_t cookie, uint32_t error, bool structured);
bool nbd_answer_flushed(struct nbd_outbox *out, uint64_t cookie); /* once all that was written is durable */
uint32_t nbd_error(int rc, bool fills_space);                         /* of a tp_error */

/* --- nbd_ops.c --- */
bool nbd_serve_request(struct nbd_connection *c, const struct nbd_request *r);
bool nbd_do_job(struct nbd_outbox *out, const struct nbd_job *job);

#endif
