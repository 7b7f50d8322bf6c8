/* fuse.h - what the files of the FUSE server share: a request, the cache of layer handles, the operations.
 *
 * fuse.c talks to /dev/fuse: threads, start and stop, INIT, dispatch. fuse_ops.c answers requests.
 * fuse_node.c finds the layer behind an inode number. They use only the public side of the core (thinpool.h).
 *
 * Inode 1 is the directory; a layer's file is the inode of its id + 1. The server holds nothing that it could not
 * find again from the inode number in a request: open files have no state, listings go on by layer id, and the
 * handles are a cache. So another process can take over the connection without telling the kernel.
 */
#ifndef TP_FUSE_H
#define TP_FUSE_H

#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/types.h>

#include "thinpool.h"

/* Bytes of data in one READ or WRITE. The kernel would take 1 MiB, but then the threads' buffers together leave the
 * processor's caches: with 8 threads, 256 KiB moves a third more in 1 MiB writes through a loop device. */
#define FUSE_IO_MAX (256u << 10)

/* A layer's handle, found by layer id. */
struct fuse_node {
  struct fuse_node *next;
  uint64_t layer_id;
  tp_layer *layer;
  atomic_uint users;            /* requests at work on it, and one for the table */
  _Atomic int64_t modified_ns;  /* st_mtime; only as old as the handle */
};

#define FUSE_BUCKETS 256u
struct fuse_nodes {
  pthread_rwlock_t lock; /* of the chains; never held during a call into the core */
  struct fuse_node *buckets[FUSE_BUCKETS];
};

struct fuse_worker {
  tp_fuse *fuse;
  pthread_t thread;
  int fd;           /* this thread's own queue of the connection */
  uint8_t *memory;  /* the mapping */
  uint8_t *payload; /* page-aligned, FUSE_IO_MAX bytes: what WRITE brought, or what READ answers with */
  int pipe[2];      /* for answers by reference; -1: none */
};

struct tp_fuse {
  tp_pool *pool;
  tp_fuse_callbacks callbacks;
  int fd;
  uid_t uid;
  gid_t gid;
  uint64_t chunk_size;
  int64_t started_ns;
  struct fuse_nodes nodes;
  pthread_mutex_t late_mutex;
  pthread_cond_t late_done;
  unsigned late;           /* requests that wait for their layer's limits, in threads of their own */
  unsigned worker_count;
  struct fuse_worker workers[];
};

/* One request, and its answer in the making. */
struct fuse_request {
  tp_fuse *fuse;
  struct fuse_worker *worker;
  const struct fuse_in_header *header;
  const void *body;        /* what follows the header; the dispatcher has checked that it holds the operation's struct */
  size_t body_length;
  uint8_t *payload;        /* as in the worker */
  bool may_wait;           /* for the layer's limits */
  const void *reply;       /* set by the operation; NULL: no more than a header */
  size_t reply_length;
  union {                  /* room for a short reply */
    struct fuse_init_out init;
    struct fuse_entry_out entry;
    struct fuse_attr_out attr;
    struct fuse_open_out open;
    struct fuse_write_out write;
    struct fuse_statfs_out statfs;
    struct fuse_lseek_out lseek;
  } out;
};

#define FUSE_NO_REPLY 1 /* an operation returns 0, a negative errno, or this, */
#define FUSE_LATER 2    /* or this, having done nothing: it must wait, and may not here */

struct fuse_operation {
  int (*run)(struct fuse_request *request);
  size_t body_min; /* bytes */
};
const struct fuse_operation *fuse_operation(uint32_t opcode); /* NULL: not known */

/* Answers a READ of that range by reference. False: it must be read. */
bool fuse_splice(struct fuse_request *request, tp_layer *layer, uint64_t length, uint64_t offset);
int fuse_errno(int code); /* tp_error to negative errno */
int64_t fuse_now_ns(void);

/* --- fuse_node.c --- */
void fuse_nodes_init(struct fuse_nodes *nodes);
void fuse_nodes_clear(struct fuse_nodes *nodes); /* no request is at work any more */
int fuse_node_get(tp_fuse *fuse, uint64_t inode, struct fuse_node **out); /* 0 or negative errno; put it afterwards */
void fuse_node_put(struct fuse_node *node);
void fuse_node_forget(tp_fuse *fuse, uint64_t inode);

#endif
