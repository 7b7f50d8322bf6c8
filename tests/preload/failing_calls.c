/* failing_calls.c - a library to preload (ld.so(8)): the n-th system call on a pool's files fails, once or from then on.
 *
 * Counted are reads, writes, syncs, allocations, punches and resizes of files named `data` or `data.mdb`: all that the core, LMDB and
 * Python do to a pool. What LMDB reads, it reads by mapping the file.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls, fail_at;
static int fail_with; /* an errno; 0: reads and writes are short */
static bool fail_on, paused;
static _Thread_local char failed_call[64]; /* of this process's one working thread */

/* The call of that number, counted from now on, fails; go_on: and all later ones but reads. */
void faults_arm(long at, int error, int go_on) {
  failed_call[0] = 0;
  fail_with = error;
  fail_on = go_on != 0;
  paused = false;
  calls = 0;
  fail_at = at;
}

/* Nothing fails any more. */
void faults_disarm(void) { fail_at = 0; }

/* Nothing is counted meanwhile. */
void faults_pause(int pause) { paused = pause != 0; }

const char *faults_failed_call(void) { return failed_call; }

enum kind { READ, WRITE, OTHER };
enum verdict { GO_ON, FAIL, SHORT };

static enum verdict judge(int fd, const char *call, enum kind kind) {
  char link[32], path[4096];
  if (fail_at == 0 || paused) return GO_ON;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return GO_ON;
  path[length] = 0;
  const char *name = strrchr(path, '/');
  if (name == NULL || (strcmp(name, "/data") != 0 && strcmp(name, "/data.mdb") != 0)) return GO_ON;
  long number = ++calls;
  if (number < fail_at || (number > fail_at && (!fail_on || kind == READ))) return GO_ON;
  if (number == fail_at) snprintf(failed_call, sizeof failed_call, "%s %s", call, name + 1);
  if (fail_with == 0 && kind == OTHER) return GO_ON;
  errno = fail_with;
  return fail_with == 0 ? SHORT : FAIL;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define TRANSFER(name, kind, buffer)                                        \
  ssize_t name(int fd, buffer buf, size_t length, off_t offset) {           \
    enum verdict verdict = judge(fd, #name, kind);                          \
    if (verdict == FAIL) return -1;                                         \
    if (verdict == SHORT && length > 1) length /= 2;                        \
    return REAL(name)(fd, buf, length, offset);                             \
  }

#define VECTORS(name)                                                       \
  ssize_t name(int fd, const struct iovec *parts, int count, off_t offset) { \
    enum verdict verdict = judge(fd, #name, WRITE);                         \
    if (verdict == FAIL) return -1;                                         \
    return REAL(name)(fd, parts, verdict == SHORT && count > 1 ? count / 2 : count, offset); \
  }

#define WHOLE(name, parameters, arguments)                                  \
  int name parameters { return judge(fd, #name, OTHER) == FAIL ? -1 : REAL(name) arguments; }

#define ALLOCATE(name)                                                      \
  int name(int fd, off_t offset, off_t length) {                            \
    return judge(fd, #name, OTHER) == FAIL ? fail_with : REAL(name)(fd, offset, length); \
  }

TRANSFER(pread, READ, void *)
TRANSFER(pread64, READ, void *)
TRANSFER(pwrite, WRITE, const void *)
TRANSFER(pwrite64, WRITE, const void *)
VECTORS(pwritev)
VECTORS(pwritev64)
WHOLE(fdatasync, (int fd), (fd))
WHOLE(fsync, (int fd), (fd))
WHOLE(ftruncate, (int fd, off_t length), (fd, length))
WHOLE(ftruncate64, (int fd, off_t length), (fd, length))
WHOLE(fallocate, (int fd, int mode, off_t offset, off_t length), (fd, mode, offset, length))
WHOLE(fallocate64, (int fd, int mode, off_t offset, off_t length), (fd, mode, offset, length))
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)
