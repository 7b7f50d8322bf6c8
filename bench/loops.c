/* loops.c - the same loops over a layer and over a plain file, so that their ratio is the engine's cost and nothing else.
 *
 * A transfer is a function pointer with the signature of tp_read and tp_write; a plain file's are below. */
#include <pthread.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

typedef int (*transfer)(void *handle, void *buf, uint64_t length, uint64_t offset);

int plain_read(void *fd, void *buf, uint64_t length, uint64_t offset) {
  return pread((int)(intptr_t)fd, buf, length, (off_t)offset) == (ssize_t)length ? 0 : -1;
}

int plain_write(void *fd, void *buf, uint64_t length, uint64_t offset) {
  return pwrite((int)(intptr_t)fd, buf, length, (off_t)offset) == (ssize_t)length ? 0 : -1;
}

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Seconds for all offsets, or a negative error. */
double run(transfer move, void *handle, void *buf, uint64_t length, const uint64_t *offsets, uint64_t count) {
  double start = seconds();
  for (uint64_t k = 0; k < count; k++) {
    int rc = move(handle, buf, length, offsets[k]);
    if (rc < 0) return rc;
  }
  return seconds() - start;
}

/* Goes round the offsets until *stop; the seconds of the transfer that took longest, or a negative error. */
double longest(transfer move, void *handle, void *buf, uint64_t length, const uint64_t *offsets, uint64_t count,
               volatile int *stop) {
  double worst = 0;
  for (uint64_t k = 0; !*stop; k = (k + 1) % count) {
    double start = seconds();
    int rc = move(handle, buf, length, offsets[k]);
    if (rc < 0) return rc;
    double took = seconds() - start;
    if (took > worst) worst = took;
  }
  return worst;
}

struct job {
  transfer move;
  void *handle, *buf;
  uint64_t length, count;
  const uint64_t *offsets;
  double result;
};

static void *thread(void *arg) {
  struct job *job = arg;
  job->result = run(job->move, job->handle, job->buf, job->length, job->offsets, job->count);
  return NULL;
}

/* The same with a thread for each of two handles; seconds until both are done. */
double run_two(transfer move, void **handles, void **bufs, uint64_t length, const uint64_t *offsets, uint64_t count) {
  struct job jobs[2];
  pthread_t threads[2];
  double start = seconds();
  for (int k = 0; k < 2; k++) {
    jobs[k] = (struct job){move, handles[k], bufs[k], length, count, offsets, 0};
    pthread_create(&threads[k], NULL, thread, &jobs[k]);
  }
  for (int k = 0; k < 2; k++) pthread_join(threads[k], NULL);
  if (jobs[0].result < 0 || jobs[1].result < 0) return -1;
  return seconds() - start;
}
