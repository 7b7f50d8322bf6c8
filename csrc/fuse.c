/* fuse.c - the FUSE server's side of /dev/fuse: threads, INIT, dispatch, start and stop.
 *
 * It speaks the kernel's protocol (linux/fuse.h) without a library: a handful of operations, full control over
 * buffers and threads, and a connection that is nothing but a descriptor. Each thread has its own queue of the
 * connection (FUSE_DEV_IOC_CLONE) and one buffer. A request is read so that the data of a WRITE begins on a page;
 * the data of a READ is read into the same page-aligned place and answered together with its header by writev.
 *
 * The threads sleep in read() until there is work. They end when the connection ends: the file system is unmounted
 * everywhere, or aborted (umount2 with MNT_FORCE).
 */
#define _GNU_SOURCE 1
#include "fuse.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define HEAD_SIZE (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in)) /* in front of a WRITE's data */
#define MEMORY_SIZE (PAGE + FUSE_IO_MAX)

int64_t fuse_now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME_COARSE, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int fuse_errno(int code) {
  switch (code) {
    case TP_ENOSPC: return -ENOSPC;
    case TP_ERANGE: return -EFBIG;
    case TP_ESEALED:
    case TP_EREADONLY: return -EROFS;
    case TP_EDELETED: return -ESTALE;
    case TP_ECLOSED: return -ESHUTDOWN;
    case TP_ENOMEM: return -ENOMEM;
    case TP_EINVAL: return -EINVAL;
    case TP_ENOENT: return -ENOENT;
    default: return code < 0 ? -EIO : 0;
  }
}

/* --- one request --- */

static void send_reply(int fd, const struct fuse_request *request, int error) {
  size_t length = error == 0 ? request->reply_length : 0;
  struct fuse_out_header header = {
      .len = (uint32_t)(sizeof header + length), .error = error, .unique = request->header->unique};
  struct iovec parts[2] = {{&header, sizeof header}, {(void *)request->reply, length}};
  /* It fails when the request was aborted or the connection has ended; the next read() says so. */
  ssize_t sent = writev(fd, parts, length > 0 ? 2 : 1);
  (void)sent;
}

static void serve(struct fuse_worker *worker, size_t length) {
  const uint8_t *start = worker->payload - HEAD_SIZE;
  struct fuse_request request = {.fuse = worker->fuse, .header = (const void *)start, .payload = worker->payload};
  if (length < sizeof *request.header || request.header->len != length) return; /* not from the kernel */
  request.body = start + sizeof *request.header;
  request.body_length = length - sizeof *request.header;
  const struct fuse_operation *operation = fuse_operation(request.header->opcode);
  int error;
  if (operation == NULL) {
    error = -ENOSYS;
  } else if (request.body_length < operation->body_min) {
    error = -EINVAL;
  } else {
    error = operation->run(&request);
  }
  if (error != FUSE_NO_REPLY) send_reply(worker->fd, &request, error);
}

static void *work(void *argument) {
  struct fuse_worker *worker = argument;
  /* What is mounted on our files writes back through this thread: while memory is short, it must not wait for that
   * write-back itself. Without root it is not allowed, nor needed: then nothing is mounted. */
  (void)prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
  for (;;) {
    ssize_t length = read(worker->fd, worker->payload - HEAD_SIZE, HEAD_SIZE + FUSE_IO_MAX);
    if (length > 0) {
      serve(worker, (size_t)length);
    } else if (length == 0 || (errno != EINTR && errno != EAGAIN && errno != ENOENT)) {
      return NULL; /* ENODEV: the connection has ended. ENOENT: a request was taken back before we read it */
    }
  }
}

/* --- threads --- */

/* A queue of its own for a thread; the connection's descriptor itself where that cannot be had. */
static int clone_connection(int fuse_fd) {
  int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
  if (fd < 0) return fuse_fd;
  uint32_t source = (uint32_t)fuse_fd;
  if (ioctl(fd, FUSE_DEV_IOC_CLONE, &source) == 0) return fd;
  close(fd);
  return fuse_fd;
}

static int start_worker(tp_fuse *fuse, struct fuse_worker *worker) {
  worker->fuse = fuse;
  worker->memory = mmap(NULL, MEMORY_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (worker->memory == MAP_FAILED) return TP_ENOMEM;
  worker->payload = worker->memory + PAGE;
  worker->fd = fuse->worker_count == 0 ? fuse->fd : clone_connection(fuse->fd);
  if (pthread_create(&worker->thread, NULL, work, worker) == 0) return TP_OK;
  if (worker->fd != fuse->fd) close(worker->fd);
  munmap(worker->memory, MEMORY_SIZE);
  return TP_ENOMEM;
}

int tp_fuse_start(tp_pool *pool, int fuse_fd, unsigned threads, const tp_fuse_callbacks *callbacks, tp_fuse **out) {
  if (threads == 0 || threads > 256 || fuse_fd < 0) return TP_EINVAL;
  tp_pool_info info;
  int code = tp_pool_get_info(pool, &info);
  if (code < 0) return code;
  tp_fuse *fuse = calloc(1, sizeof *fuse + threads * sizeof fuse->workers[0]);
  if (fuse == NULL) return TP_ENOMEM;
  *fuse = (tp_fuse){.pool = pool, .callbacks = *callbacks, .fd = fuse_fd, .uid = geteuid(), .gid = getegid(),
                    .chunk_size = info.chunk_size, .started_ns = fuse_now_ns()};
  fuse_nodes_init(&fuse->nodes);
  /* Signals are for the program's own threads. */
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (fuse->worker_count < threads && code == TP_OK) {
    code = start_worker(fuse, &fuse->workers[fuse->worker_count]);
    if (code == TP_OK) fuse->worker_count++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (fuse->worker_count == 0) {
    fuse_nodes_clear(&fuse->nodes);
    free(fuse);
    return code;
  }
  *out = fuse; /* fewer threads than asked for do as well */
  return TP_OK;
}

int tp_fuse_stop(tp_fuse *fuse) {
  for (unsigned i = 0; i < fuse->worker_count; i++) {
    struct fuse_worker *worker = &fuse->workers[i];
    pthread_join(worker->thread, NULL);
    if (worker->fd != fuse->fd) close(worker->fd);
    munmap(worker->memory, MEMORY_SIZE);
  }
  fuse_nodes_clear(&fuse->nodes);
  free(fuse);
  return TP_OK;
}

int tp_fuse_resized(tp_fuse *fuse, uint64_t layer_id) {
  struct {
    struct fuse_out_header header;
    struct fuse_notify_inval_inode_out inode;
  } notice = {
      .header = {.len = sizeof notice, .error = FUSE_NOTIFY_INVAL_INODE},
      .inode = {.ino = layer_id + 1, .off = 0, .len = 0}, /* attributes, and all cached pages */
  };
  if (write(fuse->fd, &notice, sizeof notice) >= 0) return TP_OK;
  return errno == ENOENT || errno == ENODEV ? TP_OK : TP_EIO; /* the kernel does not know the file: nothing to do */
}
