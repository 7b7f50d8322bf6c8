/* fuse_ops.c - the operations of the FUSE file system.
 *
 * One flat directory, one file per layer. Data goes by the page cache (FOPEN_DIRECT_IO): the pool's data file is
 * cached already, and what the library, other clones or a reset change is seen at once. Names and attributes are not
 * cached by the kernel for the same reason. What would change the set of files or their sizes is refused: layers are
 * made, renamed, resized and deleted through the library.
 */
#define _GNU_SOURCE 1
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuse.h"

#define NS_PER_S 1000000000
#define NAME_MAX_BYTES 1024u /* the kernel's FUSE_NAME_MAX; a layer's 255 bytes with each "/" as "%2F" */
#define SPLICE_MIN (64u << 10)  /* bytes of a READ that is answered by reference */
/* Requests in the background at once, of all layers together: direct I/O of a loop device is there, up to 128 each, and those that wait for
 * their layer's limits must not fill it up. */
#define QUEUE_DEPTH 1024u

/* Newer than the protocol header of the oldest system this builds on; older kernels do not offer it. */
#ifndef FUSE_DIRECT_IO_ALLOW_MMAP
#define FUSE_DIRECT_IO_ALLOW_MMAP (1ULL << 36)
#endif

static int answer(struct fuse_request *request, const void *reply, size_t length) {
  request->reply = reply;
  request->reply_length = length;
  return 0;
}

/* --- the connection --- */

static int op_init(struct fuse_request *request) {
  struct fuse_init_in in = {0};
  memcpy(&in, request->body, request->body_length < sizeof in ? request->body_length : sizeof in);
  struct fuse_init_out *out = &request->out.init;
  *out = (struct fuse_init_out){.major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION};
  if (in.major > FUSE_KERNEL_VERSION) return answer(request, out, sizeof *out); /* the kernel asks again */
  if (in.major < FUSE_KERNEL_VERSION || in.minor < 31) return -EPROTO;         /* before Linux 5.4 */
  uint64_t offered = in.flags;
  if (in.flags & FUSE_INIT_EXT) offered |= (uint64_t)in.flags2 << 32;
  uint64_t wanted = FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_BIG_WRITES | FUSE_MAX_PAGES | FUSE_PARALLEL_DIROPS |
                    FUSE_INIT_EXT | FUSE_DIRECT_IO_ALLOW_MMAP;
  out->flags = (uint32_t)(wanted & offered);
  out->flags2 = (uint32_t)((wanted & offered) >> 32);
  out->max_readahead = in.max_readahead;
  out->max_background = QUEUE_DEPTH;
  out->congestion_threshold = QUEUE_DEPTH;
  out->max_write = FUSE_IO_MAX;
  out->max_pages = FUSE_IO_MAX / 4096;
  out->time_gran = 1;
  return answer(request, out, sizeof *out);
}

static int op_statfs(struct fuse_request *request) {
  tp_pool_info info;
  int code = tp_pool_get_info(request->fuse->pool, &info);
  if (code < 0) return fuse_errno(code);
  uint64_t blocks_per_chunk = request->fuse->chunk_size / 4096;
  uint64_t limit = INT64_MAX / request->fuse->chunk_size; /* chunks; what "no limit" looks like */
  uint64_t total = info.capacity_chunks != 0 ? info.capacity_chunks : limit;
  uint64_t free_chunks = total > info.allocated_chunks ? total - info.allocated_chunks : 0;
  struct fuse_kstatfs *st = &request->out.statfs.st;
  *st = (struct fuse_kstatfs){.blocks = total * blocks_per_chunk, .bfree = free_chunks * blocks_per_chunk,
                              .bavail = free_chunks * blocks_per_chunk, .namelen = NAME_MAX_BYTES,
                              .bsize = 4096, .frsize = 4096}; /* a loop device discards in units of bsize */
  return answer(request, &request->out.statfs, sizeof request->out.statfs);
}

static int op_nothing(struct fuse_request *request) {
  (void)request;
  return 0;
}

static int op_refuse(struct fuse_request *request) {
  (void)request;
  return -EPERM;
}

/* --- names and attributes --- */

static void set_times(struct fuse_attr *attr, int64_t ns) {
  attr->atime = attr->mtime = attr->ctime = (uint64_t)(ns / NS_PER_S);
  attr->atimensec = attr->mtimensec = attr->ctimensec = (uint32_t)(ns % NS_PER_S);
}

static void root_attributes(const tp_fuse *fuse, struct fuse_attr *attr) {
  *attr = (struct fuse_attr){.ino = FUSE_ROOT_ID, .mode = S_IFDIR | 0500, .nlink = 2, .uid = fuse->uid,
                             .gid = fuse->gid, .blksize = 4096};
  set_times(attr, fuse->started_ns);
}

static int layer_attributes(const tp_fuse *fuse, struct fuse_node *node, struct fuse_attr *attr) {
  tp_layer_info info;
  int code = tp_layer_get_info(node->layer, &info);
  if (code < 0) return fuse_errno(code);
  *attr = (struct fuse_attr){.ino = node->layer_id + 1, .size = info.size, .nlink = 1, .uid = fuse->uid,
                             .gid = fuse->gid, .blksize = 4096};
  attr->mode = S_IFREG | (info.sealed ? 0400 : 0600);
  attr->blocks = info.mapped_refs * fuse->chunk_size / 512;
  set_times(attr, atomic_load(&node->modified_ns));
  return 0;
}

static int op_lookup(struct fuse_request *request) {
  tp_fuse *fuse = request->fuse;
  const char *name = request->body;
  if (memchr(name, 0, request->body_length) == NULL) return -EINVAL;
  if (request->header->nodeid != FUSE_ROOT_ID) return -ENOTDIR;
  uint64_t layer_id = 0;
  int code = fuse->callbacks.lookup(fuse->callbacks.ctx, name, &layer_id);
  if (code < 0) return fuse_errno(code);
  struct fuse_node *node;
  int error = fuse_node_get(fuse, layer_id + 1, &node);
  if (error < 0) return error == -ESTALE ? -ENOENT : error;
  struct fuse_entry_out *out = &request->out.entry;
  *out = (struct fuse_entry_out){.nodeid = layer_id + 1}; /* times to live of 0: asked for again each time */
  error = layer_attributes(fuse, node, &out->attr);
  fuse_node_put(node);
  if (error < 0) return error == -ESTALE ? -ENOENT : error;
  return answer(request, out, sizeof *out);
}

static int op_forget(struct fuse_request *request) {
  fuse_node_forget(request->fuse, request->header->nodeid);
  return FUSE_NO_REPLY;
}

static int op_batch_forget(struct fuse_request *request) {
  const struct fuse_batch_forget_in *in = request->body;
  const struct fuse_forget_one *one = (const void *)(in + 1);
  size_t present = (request->body_length - sizeof *in) / sizeof *one;
  for (size_t i = 0; i < in->count && i < present; i++) fuse_node_forget(request->fuse, one[i].nodeid);
  return FUSE_NO_REPLY;
}

static int answer_attributes(struct fuse_request *request, struct fuse_node *node) {
  struct fuse_attr_out *out = &request->out.attr;
  *out = (struct fuse_attr_out){0};
  int error = layer_attributes(request->fuse, node, &out->attr);
  return error < 0 ? error : answer(request, out, sizeof *out);
}

static int op_getattr(struct fuse_request *request) {
  if (request->header->nodeid == FUSE_ROOT_ID) {
    struct fuse_attr_out *out = &request->out.attr;
    *out = (struct fuse_attr_out){0};
    root_attributes(request->fuse, &out->attr);
    return answer(request, out, sizeof *out);
  }
  struct fuse_node *node;
  int error = fuse_node_get(request->fuse, request->header->nodeid, &node);
  if (error < 0) return error;
  error = answer_attributes(request, node);
  fuse_node_put(node);
  return error;
}

/* Times may be set; owner, mode and size only to what they are. */
static int set_attributes(struct fuse_request *request, struct fuse_node *node) {
  const struct fuse_setattr_in *in = request->body;
  struct fuse_attr now;
  int error = layer_attributes(request->fuse, node, &now);
  if (error < 0) return error;
  if ((in->valid & FATTR_SIZE) && in->size != now.size) return -EPERM;
  if ((in->valid & FATTR_MODE) && (in->mode & 07777) != (now.mode & 07777)) return -EPERM;
  if ((in->valid & FATTR_UID) && in->uid != now.uid) return -EPERM;
  if ((in->valid & FATTR_GID) && in->gid != now.gid) return -EPERM;
  if (in->valid & FATTR_MTIME_NOW) {
    atomic_store(&node->modified_ns, fuse_now_ns());
  } else if (in->valid & FATTR_MTIME) {
    if (in->mtime > INT64_MAX / NS_PER_S - 1 || in->mtimensec >= NS_PER_S) return -EINVAL;
    atomic_store(&node->modified_ns, (int64_t)in->mtime * NS_PER_S + in->mtimensec);
  }
  return answer_attributes(request, node);
}

static int op_setattr(struct fuse_request *request) {
  struct fuse_node *node;
  int error = fuse_node_get(request->fuse, request->header->nodeid, &node);
  if (error < 0) return error == -EISDIR ? -EPERM : error;
  error = set_attributes(request, node);
  fuse_node_put(node);
  return error;
}

/* --- the directory --- */

struct tp_fuse_listing {
  uint8_t *data;
  size_t used, capacity;
};

/* next: where a listing goes on after this entry */
static int add_entry(tp_fuse_listing *out, uint64_t inode, uint64_t next, uint32_t type, const char *name) {
  size_t length = strlen(name);
  size_t record = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + length);
  if (record > out->capacity - out->used) return 0;
  struct fuse_dirent *entry = (void *)(out->data + out->used);
  memset(entry, 0, record);
  *entry = (struct fuse_dirent){.ino = inode, .off = next, .namelen = (uint32_t)length, .type = type};
  memcpy(entry->name, name, length);
  out->used += record;
  return 1;
}

int tp_fuse_list(tp_fuse_listing *out, uint64_t layer_id, const char *name) {
  return add_entry(out, layer_id + 1, layer_id + 2, S_IFREG >> 12, name);
}

static int op_opendir(struct fuse_request *request) {
  if (request->header->nodeid != FUSE_ROOT_ID) return -ENOTDIR;
  request->out.open = (struct fuse_open_out){0};
  return answer(request, &request->out.open, sizeof request->out.open);
}

/* Offsets: 0 is ".", 1 is "..", n + 1 is the first layer whose id is at least n. */
static int op_readdir(struct fuse_request *request) {
  struct fuse_read_in in = *(const struct fuse_read_in *)request->body;
  tp_fuse *fuse = request->fuse;
  if (request->header->nodeid != FUSE_ROOT_ID) return -ENOTDIR;
  tp_fuse_listing listing = {.data = request->payload, .capacity = in.size < FUSE_IO_MAX ? in.size : FUSE_IO_MAX};
  int room = 1;
  if (in.offset == 0) room = add_entry(&listing, FUSE_ROOT_ID, 1, S_IFDIR >> 12, ".");
  if (in.offset <= 1 && room) room = add_entry(&listing, FUSE_ROOT_ID, 2, S_IFDIR >> 12, "..");
  if (room) {
    uint64_t from = in.offset <= 2 ? 1 : in.offset - 1;
    int code = fuse->callbacks.list(fuse->callbacks.ctx, from, &listing);
    if (code < 0 && listing.used == 0) return fuse_errno(code);
  }
  return answer(request, listing.data, listing.used);
}

/* --- data --- */

static int op_open(struct fuse_request *request) {
  const struct fuse_open_in *in = request->body;
  struct fuse_node *node;
  int error = fuse_node_get(request->fuse, request->header->nodeid, &node);
  if (error < 0) return error;
  tp_layer_info info;
  int code = tp_layer_get_info(node->layer, &info);
  fuse_node_put(node);
  if (code < 0) return fuse_errno(code);
  if (info.sealed && (in->flags & O_ACCMODE) != O_RDONLY) return -EACCES; /* on which losetup goes on read-only */
  request->out.open = (struct fuse_open_out){.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES};
  return answer(request, &request->out.open, sizeof request->out.open);
}

/* Whether the layer's limits let it begin here and now. */
static bool may_begin(const struct fuse_request *request, const struct fuse_node *node, bool writing, uint64_t length) {
  return request->may_wait || tp_limits_take(node->layer, writing, length, 0);
}

static int op_read(struct fuse_request *request) {
  struct fuse_read_in in = *(const struct fuse_read_in *)request->body;
  struct fuse_node *node;
  int error = fuse_node_get(request->fuse, request->header->nodeid, &node);
  if (error < 0) return error;
  uint64_t length = in.size < FUSE_IO_MAX ? in.size : FUSE_IO_MAX;
  uint64_t size = tp_layer_size(node->layer);
  uint64_t left = in.offset < size ? size - in.offset : 0;
  if (length > left) length = left;
  bool begins = may_begin(request, node, false, length);
  /* One that may wait has a thread of its own, but not a pipe. */
  if (begins && !request->may_wait && length >= SPLICE_MIN && fuse_splice(request, node->layer, length, in.offset)) {
    fuse_node_put(node);
    return FUSE_NO_REPLY;
  }
  int code = TP_OK;
  if (begins && length > 0) code = (request->may_wait ? tp_read : tp_read_admitted)(node->layer, request->payload, length, in.offset);
  fuse_node_put(node);
  if (!begins) return FUSE_LATER;
  if (code == TP_ERANGE) return answer(request, NULL, 0); /* made smaller meanwhile: the end of the file */
  return code < 0 ? fuse_errno(code) : answer(request, request->payload, length);
}

/* As on a disk, nothing can be written past the end; what lies before it is. */
static int write_layer(struct fuse_request *request, struct fuse_node *node) {
  const struct fuse_write_in *in = request->body;
  uint64_t length = request->body_length - sizeof *in;
  if (in->size != length) return -EINVAL;
  uint64_t size = tp_layer_size(node->layer);
  if (in->offset >= size && length > 0) return -EFBIG;
  if (length > size - in->offset) length = size - in->offset;
  if (!may_begin(request, node, true, length)) return FUSE_LATER;
  int code = TP_OK;
  if (length > 0) code = (request->may_wait ? tp_write_patient : tp_write_admitted)(node->layer, in + 1, length, in->offset);
  if (code == TP_ENOSPC && !request->may_wait && tp_pool_patience(request->fuse->pool) > 0) return FUSE_LATER;
  if (code >= 0 && (in->flags & (O_SYNC | O_DSYNC))) code = tp_flush(request->fuse->pool);
  if (code < 0) return fuse_errno(code);
  atomic_store(&node->modified_ns, fuse_now_ns());
  request->out.write = (struct fuse_write_out){.size = (uint32_t)length};
  return answer(request, &request->out.write, sizeof request->out.write);
}

static int op_write(struct fuse_request *request) {
  struct fuse_node *node;
  int error = fuse_node_get(request->fuse, request->header->nodeid, &node);
  if (error < 0) return error;
  error = write_layer(request, node);
  fuse_node_put(node);
  return error;
}

static int op_fsync(struct fuse_request *request) { return fuse_errno(tp_flush(request->fuse->pool)); }

static int discard(struct fuse_node *node, uint64_t offset, uint64_t length, bool may_pass_end) {
  uint64_t size = tp_layer_size(node->layer);
  uint64_t left = offset < size ? size - offset : 0;
  if (length > left && !may_pass_end) return -EFBIG;
  if (length > left) length = left;
  if (length == 0) return 0;
  int code = tp_discard(node->layer, offset, length);
  if (code >= 0) atomic_store(&node->modified_ns, fuse_now_ns());
  return fuse_errno(code);
}

/* Punching and zeroing are one thing here. Space is never reserved, so plain allocation is not offered. */
static int op_fallocate(struct fuse_request *request) {
  const struct fuse_fallocate_in *in = request->body;
  uint32_t kind = in->mode & ~(uint32_t)FALLOC_FL_KEEP_SIZE;
  bool keep_size = in->mode & FALLOC_FL_KEEP_SIZE;
  if (kind != FALLOC_FL_ZERO_RANGE && (kind != FALLOC_FL_PUNCH_HOLE || !keep_size)) return -EOPNOTSUPP;
  struct fuse_node *node;
  int error = fuse_node_get(request->fuse, request->header->nodeid, &node);
  if (error < 0) return error;
  error = discard(node, in->offset, in->length, keep_size);
  fuse_node_put(node);
  return error;
}

/* The first byte from offset on that is data (or hole); the layer's end counts as a hole. */
static int seek(tp_layer *layer, uint64_t offset, bool data, uint64_t *out) {
  uint64_t size = tp_layer_size(layer);
  uint64_t cursor = offset;
  if (offset >= size) return -ENXIO;
  for (;;) {
    tp_extent extents[64];
    int64_t count = tp_extents(layer, &cursor, extents, 64);
    if (count < 0) return fuse_errno((int)count);
    for (int64_t i = 0; i < count; i++) {
      if ((extents[i].data != 0) != data) continue;
      *out = extents[i].offset > offset ? extents[i].offset : offset;
      return 0;
    }
    if (count == 0) break;
  }
  *out = size;
  return data ? -ENXIO : 0;
}

static int op_lseek(struct fuse_request *request) {
  const struct fuse_lseek_in *in = request->body;
  if (in->whence != SEEK_DATA && in->whence != SEEK_HOLE) return -EINVAL;
  struct fuse_node *node;
  int error = fuse_node_get(request->fuse, request->header->nodeid, &node);
  if (error < 0) return error;
  error = seek(node->layer, in->offset, in->whence == SEEK_DATA, &request->out.lseek.offset);
  fuse_node_put(node);
  return error < 0 ? error : answer(request, &request->out.lseek, sizeof request->out.lseek);
}

/* --- the table. What is not in it is answered with ENOSYS, upon which the kernel does without or asks no more:
 *     FLUSH (closing makes nothing durable), INTERRUPT (no request waits long), ACCESS, extended attributes, locks. --- */

static const struct fuse_operation operations[] = {
    [FUSE_INIT] = {op_init, 16}, /* its first four fields; newer kernels send more */
    [FUSE_STATFS] = {op_statfs, 0},
    [FUSE_DESTROY] = {op_nothing, 0},
    [FUSE_LOOKUP] = {op_lookup, 1},
    [FUSE_FORGET] = {op_forget, 0},
    [FUSE_BATCH_FORGET] = {op_batch_forget, sizeof(struct fuse_batch_forget_in)},
    [FUSE_GETATTR] = {op_getattr, 0},
    [FUSE_SETATTR] = {op_setattr, sizeof(struct fuse_setattr_in)},
    [FUSE_OPENDIR] = {op_opendir, sizeof(struct fuse_open_in)},
    [FUSE_READDIR] = {op_readdir, sizeof(struct fuse_read_in)},
    [FUSE_RELEASEDIR] = {op_nothing, 0},
    [FUSE_FSYNCDIR] = {op_fsync, 0},
    [FUSE_OPEN] = {op_open, sizeof(struct fuse_open_in)},
    [FUSE_RELEASE] = {op_nothing, 0},
    [FUSE_READ] = {op_read, sizeof(struct fuse_read_in)},
    [FUSE_WRITE] = {op_write, sizeof(struct fuse_write_in)},
    [FUSE_FSYNC] = {op_fsync, 0},
    [FUSE_FALLOCATE] = {op_fallocate, sizeof(struct fuse_fallocate_in)},
    [FUSE_LSEEK] = {op_lseek, sizeof(struct fuse_lseek_in)},
    [FUSE_SYNCFS] = {op_fsync, 0},
    [FUSE_CREATE] = {op_refuse, 0},
    [FUSE_MKNOD] = {op_refuse, 0},
    [FUSE_MKDIR] = {op_refuse, 0},
    [FUSE_SYMLINK] = {op_refuse, 0},
    [FUSE_LINK] = {op_refuse, 0},
    [FUSE_UNLINK] = {op_refuse, 0},
    [FUSE_RMDIR] = {op_refuse, 0},
    [FUSE_RENAME] = {op_refuse, 0},
    [FUSE_RENAME2] = {op_refuse, 0},
    [FUSE_TMPFILE] = {op_refuse, 0},
};

const struct fuse_operation *fuse_operation(uint32_t opcode) {
  if (opcode >= sizeof operations / sizeof operations[0] || operations[opcode].run == NULL) return NULL;
  return &operations[opcode];
}
