/* uml_ptrace.c - a library to preload (ld.so(8)): ptrace(2) for user-mode Linux on processors whose floating point state is larger than it knows (AMX).
 *
 * It reads and writes the first 2.7 KiB of its processes' state. The host's kernel takes a state only as a whole, so that there the first process ends with
 * "ptrace set fp regs failed, errno = 14" and the guest with it. Loaded in front of the C library, this writes what it was given into the process's whole
 * state. What lies behind belongs to instructions that a process must ask the host for first, which none does.
 */
#define _GNU_SOURCE 1
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

static long (*libc_ptrace)(enum __ptrace_request, ...);
static char state[64 << 10]; /* its stacks are small, and it has one processor */

__attribute__((constructor)) static void find(void) { *(void **)&libc_ptrace = dlsym(RTLD_NEXT, "ptrace"); }

long ptrace(enum __ptrace_request request, ...) {
  va_list arguments;
  va_start(arguments, request);
  pid_t pid = va_arg(arguments, pid_t);
  void *address = va_arg(arguments, void *);
  void *data = va_arg(arguments, void *);
  va_end(arguments);
  if (request != PTRACE_SETREGSET || address != (void *)NT_X86_XSTATE) return libc_ptrace(request, pid, address, data);
  const struct iovec *given = data;
  struct iovec whole = {state, sizeof state};
  if (libc_ptrace(PTRACE_GETREGSET, pid, address, &whole) < 0) return -1;
  if (given->iov_len >= whole.iov_len) return libc_ptrace(request, pid, address, data);
  memcpy(state, given->iov_base, given->iov_len);
  return libc_ptrace(request, pid, address, &whole);
}
