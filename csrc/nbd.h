/* nbd.h - NBD's numbers and structures on the wire (doc/proto.md of github.com/NetworkBlockDevice/nbd): all big-endian. */
#ifndef TP_NBD_H
#define TP_NBD_H

#include <stdint.h>

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

struct nbd_request {
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

#endif
