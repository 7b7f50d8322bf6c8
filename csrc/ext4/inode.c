/* inode.c - inodes: what they say, making them, and freeing them with what they have. */
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "fs.h"

enum { FAST_LINK_BYTES = 60, LINKS_MAX = 65000, NSEC_SHIFT = 2 };

int inode_read(e4_fs *fs, uint32_t inode, union inode *buffer) {
  if (inode == 0 || inode > fs->fs->super->s_inodes_count) return E4_EINVAL;
  memset(buffer, 0, sizeof *buffer);
  return failed(fs, ext2fs_read_inode_full(fs->fs, inode, &buffer->base, EXT2_INODE_SIZE(fs->fs->super)));
}

int inode_write(e4_fs *fs, uint32_t inode, union inode *buffer) {
  return failed(fs, ext2fs_write_inode_full(fs->fs, inode, &buffer->base, EXT2_INODE_SIZE(fs->fs->super)));
}

/* --- times: 34 bits of seconds, of which the extra field has the upper two, and the nanoseconds (ext4's inode, "Inode Timestamps") --- */

static void set_time(uint32_t *low, uint32_t *extra, int64_t seconds, uint32_t ns) {
  *low = (uint32_t)seconds;
  *extra = (uint32_t)(((uint64_t)(seconds - (int32_t)seconds) >> 32) & 3) | ns << NSEC_SHIFT;
}

static int64_t get_time(uint32_t low, uint32_t extra, uint32_t *ns) {
  *ns = extra >> NSEC_SHIFT;
  return (int64_t)(int32_t)low + ((int64_t)(extra & 3) << 32);
}

static void set_attributes(union inode *buffer, const e4_attributes *a) {
  struct ext2_inode_large *inode = &buffer->large;
  inode->i_mode = (inode->i_mode & LINUX_S_IFMT) | (a->mode & ~(uint32_t)LINUX_S_IFMT);
  inode->i_uid = a->uid & 0xFFFF;
  inode->i_uid_high = a->uid >> 16;
  inode->i_gid = a->gid & 0xFFFF;
  inode->i_gid_high = a->gid >> 16;
  uint32_t extra;
  set_time(&inode->i_mtime, &extra, a->mtime, a->mtime_ns);
  inode->i_ctime = inode->i_atime = inode->i_mtime;
  inode->i_mtime_extra = inode->i_ctime_extra = inode->i_atime_extra = extra;
}

int e4_get_attributes(e4_fs *fs, uint32_t number, e4_attributes *out) {
  union inode store, *buffer = &store;
  int rc = filling_end(fs);
  if (rc == E4_OK) rc = inode_read(fs, number, buffer);
  if (rc != E4_OK) return rc;
  const struct ext2_inode_large *inode = &buffer->large;
  bool wide = EXT2_INODE_SIZE(fs->fs->super) > EXT2_GOOD_OLD_INODE_SIZE && inode->i_extra_isize >= 28;
  memset(out, 0, sizeof *out);
  out->mode = inode->i_mode;
  out->uid = inode->i_uid | (uint32_t)inode->i_uid_high << 16;
  out->gid = inode->i_gid | (uint32_t)inode->i_gid_high << 16;
  out->links = inode->i_links_count;
  out->size = EXT2_I_SIZE(inode);
  out->generation = inode->i_generation;
  out->mtime = get_time(inode->i_mtime, wide ? inode->i_mtime_extra : 0, &out->mtime_ns);
  out->ctime = get_time(inode->i_ctime, wide ? inode->i_ctime_extra : 0, &out->ctime_ns);
  out->atime = get_time(inode->i_atime, wide ? inode->i_atime_extra : 0, &out->atime_ns);
  if (LINUX_S_ISCHR(inode->i_mode) || LINUX_S_ISBLK(inode->i_mode)) {
    uint32_t device = inode->i_block[0] != 0 ? inode->i_block[0] : inode->i_block[1];
    bool old = inode->i_block[0] != 0;
    out->major = old ? (device >> 8) & 0xFF : (device >> 8) & 0xFFF;
    out->minor = old ? device & 0xFF : (device & 0xFF) | ((device >> 12) & 0xFFF00);
  }
  return E4_OK;
}

int e4_set_attributes(e4_fs *fs, uint32_t number, const e4_attributes *attributes) {
  union inode store, *buffer = &store;
  int rc = filling_end(fs);
  if (rc == E4_OK) rc = inode_read(fs, number, buffer);
  if (rc != E4_OK) return rc;
  set_attributes(buffer, attributes);
  return inode_write(fs, number, buffer);
}

/* --- making --- */

static void set_device(struct ext2_inode_large *inode, uint32_t major, uint32_t minor) {
  if (major < 256 && minor < 256) {
    inode->i_block[0] = major << 8 | minor;
  } else {
    inode->i_block[1] = (minor & 0xFF) | major << 8 | (minor & ~0xFFu) << 12;
  }
}

static int set_link_target(e4_fs *fs, uint32_t number, union inode *buffer, const char *target, uint32_t length) {
  struct ext2_inode_large *inode = &buffer->large;
  inode->i_size = length;
  if (length < FAST_LINK_BYTES) {
    memcpy(inode->i_block, target, length);
    return inode_write(fs, number, buffer);
  }
  uint8_t block[E4_BLOCK] = {0};
  uint64_t at;
  memcpy(block, target, length);
  int rc = space_take_metadata(fs, &at);
  if (rc == E4_OK) rc = failed(fs, cache_write(fs, block, E4_BLOCK, at * E4_BLOCK));
  struct run run = {.physical = at, .count = 1};
  struct runs runs = {.items = &run, .count = 1};
  return rc == E4_OK ? store_runs(fs, number, buffer, &runs) : rc;
}

static int change_links(e4_fs *fs, uint32_t number, int by) {
  union inode store, *buffer = &store;
  int rc = inode_read(fs, number, buffer);
  if (rc != E4_OK) return rc;
  struct ext2_inode_large *inode = &buffer->large;
  if (LINUX_S_ISDIR(inode->i_mode)) { /* 1: more than can be counted (dir_nlink) */
    if (inode->i_links_count == 1) return E4_OK;
    inode->i_links_count = inode->i_links_count + by > LINKS_MAX ? 1 : inode->i_links_count + by;
  } else {
    if (inode->i_links_count + by > LINKS_MAX) return E4_EMLINK;
    inode->i_links_count += by;
  }
  return inode_write(fs, number, buffer);
}

static int fill_inode(e4_fs *fs, uint32_t number, uint32_t parent, const e4_attributes *attributes, const char *target, uint32_t target_length) {
  union inode store = {0}, *buffer = &store;
  struct ext2_inode_large *inode = &buffer->large;
  inode->i_mode = attributes->mode;
  inode->i_links_count = 1;
  inode->i_generation = attributes->generation;
  inode->i_extra_isize = sizeof(struct ext2_inode_large) - EXT2_GOOD_OLD_INODE_SIZE;
  set_attributes(buffer, attributes);
  inode->i_crtime = inode->i_mtime;
  inode->i_crtime_extra = inode->i_mtime_extra;
  struct runs none = {0};
  switch (attributes->mode & LINUX_S_IFMT) {
  case LINUX_S_IFDIR: return directory_make(fs, number, parent, buffer);
  case LINUX_S_IFREG: return store_runs(fs, number, buffer, &none);
  case LINUX_S_IFLNK: return set_link_target(fs, number, buffer, target, target_length);
  case LINUX_S_IFCHR:
  case LINUX_S_IFBLK: set_device(inode, attributes->major, attributes->minor); break;
  case LINUX_S_IFIFO:
  case LINUX_S_IFSOCK: break;
  default: return E4_EINVAL;
  }
  return inode_write(fs, number, buffer);
}

int e4_make(e4_fs *fs, uint32_t directory, const char *name, uint32_t length, const e4_attributes *attributes, const char *target, uint32_t target_length,
            uint32_t *out) {
  uint32_t there, kind;
  int rc = filling_end(fs);
  if (rc == E4_OK) rc = e4_lookup(fs, directory, name, length, &there, &kind);
  if (rc != E4_ENOENT) return rc == E4_OK ? E4_EEXIST : rc;
  if (LINUX_S_ISLNK(attributes->mode) && (target_length == 0 || target_length >= E4_BLOCK)) return E4_EINVAL;
  bool is_directory = LINUX_S_ISDIR(attributes->mode);
  ext2_ino_t number;
  errcode_t error = ext2fs_new_inode(fs->fs, 0, attributes->mode, NULL, &number); /* the first that is free */
  if (error == EXT2_ET_INODE_ALLOC_FAIL) return E4_ENOSPC;
  if (error) return failed(fs, error);
  ext2fs_inode_alloc_stats2(fs->fs, number, +1, is_directory);
  rc = fill_inode(fs, number, directory, attributes, target, target_length);
  if (rc == E4_OK) rc = directory_add(fs, directory, name, length, number, attributes->mode);
  if (rc != E4_OK) {
    union inode store, *buffer = &store;
    directory_forget(fs, number);
    if (inode_read(fs, number, buffer) == E4_OK) {
      buffer->base.i_links_count = 1;
      inode_release(fs, number, buffer);
    }
    return rc;
  }
  if (is_directory) rc = change_links(fs, directory, +1);
  fs->filling_directory = directory;
  *out = number;
  return rc;
}

int e4_link(e4_fs *fs, uint32_t directory, const char *name, uint32_t length, uint32_t number) {
  uint32_t there, kind;
  union inode store, *buffer = &store;
  int rc = filling_end(fs);
  if (rc == E4_OK) rc = e4_lookup(fs, directory, name, length, &there, &kind);
  if (rc != E4_ENOENT) return rc == E4_OK ? E4_EEXIST : rc;
  rc = inode_read(fs, number, buffer);
  if (rc == E4_OK && LINUX_S_ISDIR(buffer->base.i_mode)) rc = E4_EISDIR;
  if (rc == E4_OK) rc = change_links(fs, number, +1);
  if (rc == E4_OK) {
    rc = directory_add(fs, directory, name, length, number, buffer->base.i_mode);
    if (rc != E4_OK) change_links(fs, number, -1);
  }
  return rc;
}

/* --- freeing --- */

int inode_release(e4_fs *fs, uint32_t number, union inode *buffer) {
  struct ext2_inode_large *inode = &buffer->large;
  bool is_directory = LINUX_S_ISDIR(inode->i_mode);
  if (!is_directory && inode->i_links_count > 1) {
    inode->i_links_count--;
    return inode_write(fs, number, buffer);
  }
  inode->i_links_count = 0;
  if (fs->mapped_inode == number) fs->mapped_inode = 0;
  errcode_t error = ext2fs_free_ext_attr(fs->fs, number, inode);
  if (!error && ext2fs_inode_has_valid_blocks2(fs->fs, &buffer->base)) error = ext2fs_punch(fs->fs, number, &buffer->base, NULL, 0, ~(blk64_t)0);
  if (error) return failed(fs, error);
  uint32_t mode = inode->i_mode;
  memset(buffer, 0, sizeof *buffer);
  inode->i_mode = mode;
  inode->i_dtime = FIXED_TIME;
  inode->i_extra_isize = sizeof(struct ext2_inode_large) - EXT2_GOOD_OLD_INODE_SIZE;
  int rc = inode_write(fs, number, buffer);
  if (rc == E4_OK) ext2fs_inode_alloc_stats2(fs->fs, number, -1, is_directory);
  return rc;
}

/* --- links' targets, and extended attributes --- */

int e4_readlink(e4_fs *fs, uint32_t number, char *target, uint32_t capacity) {
  union inode store, *buffer = &store;
  int rc = inode_read(fs, number, buffer);
  if (rc != E4_OK) return rc;
  if (!LINUX_S_ISLNK(buffer->base.i_mode) || buffer->base.i_size > capacity) return E4_EINVAL;
  uint32_t length = buffer->base.i_size;
  if (ext2fs_is_fast_symlink(&buffer->base)) {
    if (length > sizeof buffer->base.i_block) return E4_EDAMAGED;
    memcpy(target, buffer->base.i_block, length);
    return length;
  }
  blk64_t block;
  errcode_t error = ext2fs_bmap2(fs->fs, number, &buffer->base, NULL, 0, 0, NULL, &block);
  if (!error) error = length > E4_BLOCK || block == 0 ? EXT2_ET_CORRUPT_SUPERBLOCK : cache_read(fs, target, length, block * E4_BLOCK);
  return error ? failed(fs, error) : (int)length;
}

struct packed {
  char *data;
  uint64_t length, room;
};

static int pack(struct packed *p, const void *data, uint64_t length) {
  if (p->length + length > p->room) {
    uint64_t room = (p->length + length) * 2 + 256;
    char *grown = realloc(p->data, room);
    if (grown == NULL) return 1;
    p->data = grown;
    p->room = room;
  }
  memcpy(p->data + p->length, data, length);
  p->length += length;
  return 0;
}

static int pack_xattr(char *name, char *value, size_t length, void *arg) {
  (void)value;
  uint32_t sizes[2] = {strlen(name), length};
  return pack(arg, sizes, sizeof sizes) || pack(arg, name, sizes[0]) || pack(arg, value, length) ? XATTR_ABORT : 0;
}

int e4_xattrs(e4_fs *fs, uint32_t number, char **out, uint64_t *length) {
  struct ext2_xattr_handle *handle;
  struct packed packed = {0};
  int rc = filling_end(fs);
  if (rc != E4_OK) return rc;
  errcode_t error = ext2fs_xattrs_open(fs->fs, number, &handle);
  if (error) return failed(fs, error);
  error = ext2fs_xattrs_read(handle);
  struct packed names = {0};
  if (!error) error = ext2fs_xattrs_iterate(handle, pack_xattr, &names);
  for (uint64_t at = 0; !error && at < names.length;) { /* the values once more, in the form that getxattr(2) gives */
    uint32_t sizes[2];
    memcpy(sizes, names.data + at, sizeof sizes);
    char name[256] = {0};
    memcpy(name, names.data + at + sizeof sizes, sizes[0] < 255 ? sizes[0] : 255);
    at += sizeof sizes + sizes[0] + sizes[1];
    void *value;
    size_t count;
    error = ext2fs_xattr_get(handle, name, &value, &count);
    if (error) break;
    uint32_t found[2] = {sizes[0], count};
    if (pack(&packed, found, sizeof found) || pack(&packed, name, sizes[0]) || pack(&packed, value, count)) error = ENOMEM;
    ext2fs_free_mem(&value);
  }
  free(names.data);
  ext2fs_xattrs_close(&handle);
  if (error) {
    free(packed.data);
    return failed(fs, error);
  }
  *out = packed.data;
  *length = packed.length;
  return E4_OK;
}

/* What the kernel can list and get; the library would store anything. */
static bool can_be_named(const char *name) {
  static const char *const spaces[] = {"user.", "trusted.", "security.", "system.posix_acl_access", "system.posix_acl_default"};
  for (unsigned i = 0; i < sizeof spaces / sizeof *spaces; i++) {
    size_t length = strlen(spaces[i]);
    if (strncmp(name, spaces[i], length) == 0) return spaces[i][length - 1] != '.' ? name[length] == 0 : name[length] != 0 && strlen(name) <= 255;
  }
  return false;
}

int e4_set_xattr(e4_fs *fs, uint32_t number, const char *name, const void *value, uint64_t length) {
  struct ext2_xattr_handle *handle;
  if (!can_be_named(name)) return E4_EINVAL;
  int rc = filling_end(fs);
  if (rc != E4_OK) return rc;
  errcode_t error = ext2fs_xattrs_open(fs->fs, number, &handle);
  if (error) return failed(fs, error);
  error = ext2fs_xattrs_read(handle);
  if (!error) error = value == NULL ? ext2fs_xattr_remove(handle, name) : ext2fs_xattr_set(handle, name, value, length);
  errcode_t closed = ext2fs_xattrs_close(&handle);
  if (error == EXT2_ET_EA_NO_SPACE) return E4_ENOSPC;
  return failed(fs, error ? error : closed);
}
