/* passthrough.c - the peer of bench_fuse.py: a file system of one file, "file", which is a plain file elsewhere, by libfuse's low-level interface.
 *
 * passthrough FILE MOUNTPOINT. Several threads, a connection queue each, direct I/O, parallel direct writes where this libfuse knows them.
 */
#define FUSE_USE_VERSION 312
#define _GNU_SOURCE 1
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int file;

static void attributes(fuse_ino_t inode, struct stat *st) {
  *st = (struct stat){.st_ino = inode, .st_mode = inode == FUSE_ROOT_ID ? S_IFDIR | 0700 : S_IFREG | 0600, .st_nlink = 1, .st_blksize = 4096};
  struct stat found;
  if (inode != FUSE_ROOT_ID && fstat(file, &found) == 0) st->st_size = found.st_size;
}

static void do_lookup(fuse_req_t request, fuse_ino_t parent, const char *name) {
  struct fuse_entry_param entry = {.ino = 2};
  if (parent != FUSE_ROOT_ID || strcmp(name, "file") != 0) {
    fuse_reply_err(request, ENOENT);
    return;
  }
  attributes(2, &entry.attr);
  fuse_reply_entry(request, &entry);
}

static void do_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info) {
  (void)info;
  struct stat st;
  attributes(inode, &st);
  fuse_reply_attr(request, &st, 0);
}

static void do_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info) {
  (void)inode;
  info->direct_io = 1;
#ifdef PARALLEL
  info->parallel_direct_writes = 1;
#endif
  fuse_reply_open(request, info);
}

static void do_read(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *info) {
  (void)inode, (void)info;
  struct fuse_bufvec from = FUSE_BUFVEC_INIT(size);
  from.buf[0].flags = FUSE_BUF_IS_FD | FUSE_BUF_FD_SEEK;
  from.buf[0].fd = file;
  from.buf[0].pos = offset;
  fuse_reply_data(request, &from, FUSE_BUF_SPLICE_MOVE);
}

static void do_write(fuse_req_t request, fuse_ino_t inode, const char *data, size_t size, off_t offset, struct fuse_file_info *info) {
  (void)inode, (void)info;
  ssize_t written = pwrite(file, data, size, offset);
  if (written < 0) fuse_reply_err(request, errno);
  else fuse_reply_write(request, (size_t)written);
}

static void do_fsync(fuse_req_t request, fuse_ino_t inode, int only_data, struct fuse_file_info *info) {
  (void)inode, (void)info, (void)only_data;
  fuse_reply_err(request, fdatasync(file) == 0 ? 0 : errno);
}

static const struct fuse_lowlevel_ops operations = {
    .lookup = do_lookup, .getattr = do_getattr, .open = do_open, .read = do_read, .write = do_write, .fsync = do_fsync};

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  file = open(argv[1], O_RDWR);
  char *words[] = {argv[0], NULL};
  struct fuse_args args = FUSE_ARGS_INIT(1, words);
  struct fuse_session *session = fuse_session_new(&args, &operations, sizeof operations, NULL);
  if (file < 0 || session == NULL || fuse_session_mount(session, argv[2]) != 0) return 1;
  struct fuse_loop_config *config = fuse_loop_cfg_create();
  fuse_loop_cfg_set_clone_fd(config, 1);
  fuse_loop_cfg_set_max_threads(config, 8);
  return fuse_session_loop_mt(session, config) != 0;
}
