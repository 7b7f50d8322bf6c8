/* fuse.c - the FUSE server's side of /dev/fuse: threads, INIT, dispatch, start and stop.
 *
 * It speaks the kernel's protocol (linux/fuse.h) without a library: a handful of operations, full control over
 * buffers and threads, and a connection that is nothing but descriptors. Each thread has its own queue of the
 * connection (a clone) and one buffer. A request is read so that the data of a WRITE begins on a page;
 * the data of a READ is read into the same page-aligned place and answered together with its header by writev.
 *
 * The threads sleep in read() until there is work. They end when the connection ends: the file system is unmounted
 * everywhere, or aborted (umount2 with MNT_FORCE). A request that must wait for its layer's limits does so in a thread of its own.
 *
 * The process may be killed at any instruction, and another goes on with the same descriptors: a request that was read
 * and not answered stays with the kernel as long as somebody has that descriptor open, and is asked again on demand
 * (FUSE_NOTIFY_RESEND). All requests that change anything may be done twice. The threads' memory is locked: the kernel ends a
 * request with EIO if it cannot copy it into a page that is not there, and for a thread that is being killed it brings none in.
 */
#define _GNU_SOURCE 1
#include "fuse.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
/* Newer than the protocol header of the oldest system this builds on. */
#define FUSE_NOTIFY_RESEND 7
#define HEAD_SIZE (sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in)) /* in front of a WRITE's data */
#define MEMORY_SIZE (PAGE + FUSE_IO_MAX)
#define LATE_STACK (256u << 10)

int64_t fuse_now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME_COARSE, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int fuse_errno(int code) {
  switch (code) {
    case TP_EQUOTA:
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

/* --- large answers: from the page cache to the kernel by reference, which copies once where read() and write() copy twice --- */

#define PIPE_BYTES (1u << 20) /* a page for each block, and one for the header */

static void open_pipe(struct fuse_worker *worker) {
  struct stat found;
  bool is_device = fstat(worker->fd, &found) == 0 && S_ISCHR(found.st_mode); /* what stands in for it in tests takes no answer in pieces */
  if (is_device && pipe2(worker->pipe, O_CLOEXEC) == 0) {
    if (fcntl(worker->pipe[1], F_SETPIPE_SZ, PIPE_BYTES) >= (int)PIPE_BYTES) return;
    close(worker->pipe[0]);
    close(worker->pipe[1]);
  }
  worker->pipe[0] = worker->pipe[1] = -1;
}

static void close_pipe(struct fuse_worker *worker) {
  if (worker->pipe[0] < 0) return;
  close(worker->pipe[0]);
  close(worker->pipe[1]);
}

struct spliced {
  const struct fuse_worker *worker;
  size_t length;
};

static int send_spliced(void *ctx) {
  const struct spliced *s = ctx;
  ssize_t sent = splice(s->worker->pipe[0], NULL, s->worker->fd, NULL, s->length, 0);
  /* The request was aborted, or the connection has ended: what the pipe still has goes with it. */
  return sent == (ssize_t)s->length ? TP_OK : TP_ECLOSED;
}

bool fuse_splice(struct fuse_request *request, tp_layer *layer, uint64_t length, uint64_t offset) {
  struct fuse_worker *worker = request->worker;
  if (worker->pipe[0] < 0) return false;
  struct fuse_out_header header = {.len = (uint32_t)(sizeof header + length), .unique = request->header->unique};
  if (write(worker->pipe[1], &header, sizeof header) != sizeof header) return false;
  struct spliced spliced = {worker, header.len};
  int rc = tp_splice(layer, worker->pipe[1], length, offset, send_spliced, &spliced);
  if (rc == TP_OK) return true;
  close_pipe(worker); /* with what is in it */
  open_pipe(worker);
  return rc == TP_ECLOSED;
}

/* True: it must be done again where it may wait. */
static bool serve(struct fuse_worker *worker, size_t length, bool may_wait) {
  const uint8_t *start = worker->payload - HEAD_SIZE;
  struct fuse_request request = {.fuse = worker->fuse, .worker = worker, .header = (const void *)start,
                                 .payload = worker->payload, .may_wait = may_wait};
  if (length < sizeof *request.header || request.header->len != length) return false; /* not from the kernel */
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
  if (error != FUSE_NO_REPLY && error != FUSE_LATER) send_reply(worker->fd, &request, error);
  return error == FUSE_LATER;
}

static uint8_t *map_memory(void) {
  uint8_t *memory = mmap(NULL, MEMORY_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (memory == MAP_FAILED) return NULL;
  (void)mlock(memory, MEMORY_SIZE); /* without the right to lock as much, it is there all the same, most of the time */
  (void)madvise(memory, MEMORY_SIZE, MADV_DONTFORK); /* a fork would have it copied at the next write */
  return memory;
}

/* --- requests that must wait for their layer's limits: each in a thread of its own, so that those of other layers go on --- */

struct late {
  struct fuse_worker worker; /* a copy, with the memory that the request is in */
  size_t length;
};

static void *work_late(void *argument) {
  struct late *late = argument;
  tp_fuse *fuse = late->worker.fuse;
  (void)prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
  (void)serve(&late->worker, late->length, true);
  munmap(late->worker.memory, MEMORY_SIZE);
  free(late);
  pthread_mutex_lock(&fuse->late_mutex);
  if (--fuse->late == 0) pthread_cond_signal(&fuse->late_done);
  pthread_mutex_unlock(&fuse->late_mutex);
  return NULL;
}

/* The worker goes on with memory of its own; where there is none, it waits itself. */
static void serve_late(struct fuse_worker *worker, size_t length) {
  struct late *late = malloc(sizeof *late);
  uint8_t *memory = late == NULL ? NULL : map_memory();
  pthread_attr_t attr;
  pthread_t thread;
  bool started = false;
  if (memory != NULL && pthread_attr_init(&attr) == 0) {
    *late = (struct late){.worker = *worker, .length = length};
    late->worker.pipe[0] = late->worker.pipe[1] = -1; /* that is the worker's */
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, LATE_STACK);
    pthread_mutex_lock(&worker->fuse->late_mutex);
    started = pthread_create(&thread, &attr, work_late, late) == 0;
    if (started) worker->fuse->late++;
    pthread_mutex_unlock(&worker->fuse->late_mutex);
    pthread_attr_destroy(&attr);
  }
  if (started) {
    worker->memory = memory;
    worker->payload = memory + PAGE;
    return;
  }
  if (memory != NULL) munmap(memory, MEMORY_SIZE);
  free(late);
  (void)serve(worker, length, true);
}

static void *work(void *argument) {
  struct fuse_worker *worker = argument;
  /* What is mounted on our files writes back through this thread: while memory is short, it must not wait for that
   * write-back itself. Without root it is not allowed, nor needed: then nothing is mounted. */
  (void)prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
  for (;;) {
    ssize_t length = read(worker->fd, worker->payload - HEAD_SIZE, HEAD_SIZE + FUSE_IO_MAX);
    if (length > 0) {
      if (serve(worker, (size_t)length, false)) serve_late(worker, (size_t)length);
    } else if (length == 0 || (errno != EINTR && errno != EAGAIN && errno != ENOENT)) {
      return NULL; /* ENODEV: the connection has ended. ENOENT: a request was taken back before we read it */
    }
  }
}

/* --- threads --- */

static int start_worker(tp_fuse *fuse, struct fuse_worker *worker, int fd) {
  worker->fuse = fuse;
  worker->fd = fd;
  worker->memory = map_memory();
  if (worker->memory == NULL) return TP_ENOMEM;
  worker->payload = worker->memory + PAGE;
  open_pipe(worker);
  if (pthread_create(&worker->thread, NULL, work, worker) == 0) return TP_OK;
  close_pipe(worker);
  munmap(worker->memory, MEMORY_SIZE);
  return TP_ENOMEM;
}

/* Lets the kernel hand out again what the threads of another process had read and not answered: before any of ours reads. */
static int resend(int fd) {
  struct fuse_out_header notice = {.len = sizeof notice, .error = FUSE_NOTIFY_RESEND};
  return write(fd, &notice, sizeof notice) == sizeof notice ? TP_OK : TP_EIO;
}

int tp_fuse_start(tp_pool *pool, const int *fds, unsigned count, int resume, const tp_fuse_callbacks *callbacks, tp_fuse **out) {
  if (count == 0 || count > 256) return TP_EINVAL;
  tp_pool_info info;
  int code = tp_pool_get_info(pool, &info);
  if (code == TP_OK && resume) code = resend(fds[0]);
  if (code < 0) return code;
  tp_fuse *fuse = calloc(1, sizeof *fuse + count * sizeof fuse->workers[0]);
  if (fuse == NULL) return TP_ENOMEM;
  *fuse = (tp_fuse){.pool = pool, .callbacks = *callbacks, .fd = fds[0], .uid = geteuid(), .gid = getegid(),
                    .chunk_size = info.chunk_size, .started_ns = fuse_now_ns()};
  fuse_nodes_init(&fuse->nodes);
  pthread_mutex_init(&fuse->late_mutex, NULL);
  pthread_cond_init(&fuse->late_done, NULL);
  /* Signals are for the program's own threads. */
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (fuse->worker_count < count && code == TP_OK) {
    code = start_worker(fuse, &fuse->workers[fuse->worker_count], fds[fuse->worker_count]);
    if (code == TP_OK) fuse->worker_count++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (fuse->worker_count == 0) {
    fuse_nodes_clear(&fuse->nodes);
    free(fuse);
    return code;
  }
  *out = fuse; /* fewer threads than asked for do as well: the kernel gives a request to whichever reads */
  return TP_OK;
}

int tp_fuse_stop(tp_fuse *fuse) {
  for (unsigned i = 0; i < fuse->worker_count; i++) {
    struct fuse_worker *worker = &fuse->workers[i];
    pthread_join(worker->thread, NULL);
    close_pipe(worker);
    munmap(worker->memory, MEMORY_SIZE);
  }
  pthread_mutex_lock(&fuse->late_mutex);
  while (fuse->late > 0) pthread_cond_wait(&fuse->late_done, &fuse->late_mutex);
  pthread_mutex_unlock(&fuse->late_mutex);
  pthread_mutex_destroy(&fuse->late_mutex);
  pthread_cond_destroy(&fuse->late_done);
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
