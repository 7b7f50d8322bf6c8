/* ext4.h - the contract of the file system library: an ext4 inside a layer, read and edited without mounting it.
 *
 * libext2fs knows the format; here is what it lacks for layers: blocks come from and go to a layer through functions, what is equal is not
 * written, and the same operations on the same file system give the same bytes. Every function returns E4_OK (0), a count, or a negative
 * e4_error. An e4_fs is used by one thread at a time.
 */
#ifndef THINPOOL_EXT4_H
#define THINPOOL_EXT4_H

#include <stdint.h>

/* cdef begin */

enum e4_error {
  E4_OK = 0,
  E4_EDISK = -1,        /* the layer failed; its code is in e4_disk_error() */
  E4_ENOSPC = -2,       /* the file system is full */
  E4_ENOENT = -3,
  E4_EEXIST = -4,
  E4_ENOTDIR = -5,
  E4_ENOTEMPTY = -6,
  E4_EISDIR = -7,
  E4_EDAMAGED = -8,     /* e4_message() says what libext2fs found */
  E4_EUNSUPPORTED = -9, /* a feature that is not known here */
  E4_EDIRTY = -10,      /* its journal is to be replayed first, or it has errors */
  E4_EINVAL = -11,
  E4_ENOMEM = -12,
  E4_EMLINK = -13,
};

enum { E4_ROOT = 2, E4_BLOCK = 4096 };

typedef struct e4_fs e4_fs;

/* What is below. Each returns 0, or a negative code that e4_disk_error() gives back. */
typedef struct {
  void *ctx;
  int (*read)(void *ctx, void *buf, uint64_t length, uint64_t offset);
  int (*write)(void *ctx, const void *buf, uint64_t length, uint64_t offset);
  int (*discard)(void *ctx, uint64_t offset, uint64_t length);
} e4_disk;

/* Where data goes, in blocks. Equal files at equal places within chunks make equal chunks. */
typedef struct {
  uint32_t chunk_blocks;      /* the unit that begins are aligned to */
  uint32_t align_large;       /* files of at least so many blocks begin aligned; 0: none */
  uint32_t align_directories; /* 1: the first file of each directory does */
} e4_policy;

typedef struct {
  uint32_t mode;  /* with the type, as in stat(2) */
  uint32_t uid, gid, links;
  uint32_t major, minor; /* of devices */
  uint64_t size;
  int64_t mtime, ctime, atime; /* seconds since 1970 */
  uint32_t mtime_ns, ctime_ns, atime_ns;
  uint32_t generation;
} e4_attributes;

typedef struct {
  uint64_t offset, length; /* bytes */
} e4_range;

int e4_open(const e4_disk *disk, const e4_policy *policy, int writable, e4_fs **out);
int e4_sync(e4_fs *fs);  /* everything goes to the layer; freed blocks are discarded */
void e4_free(e4_fs *fs); /* what was not synced is lost */
int e4_disk_error(const e4_fs *fs);
const char *e4_message(const e4_fs *fs);
void e4_release(void *memory); /* frees what one of the calls below has allocated */

/* --- looking --- */
int e4_lookup(e4_fs *fs, uint32_t directory, const char *name, uint32_t length, uint32_t *inode, uint32_t *kind);
/* Entries but for . and ..: u32 inode, u32 kind (S_IFMT bits), u32 length, name; back to back. */
int e4_entries(e4_fs *fs, uint32_t directory, char **out, uint64_t *length);
int e4_get_attributes(e4_fs *fs, uint32_t inode, e4_attributes *out);
int e4_readlink(e4_fs *fs, uint32_t inode, char *target, uint32_t capacity); /* returns the length */
int64_t e4_read(e4_fs *fs, uint32_t inode, void *buf, uint64_t length, uint64_t offset); /* bytes; fewer at the end */
int64_t e4_data(e4_fs *fs, uint32_t inode, e4_range **out); /* where in the file data is; returns how many */
/* Names and values: u32 length of the name, u32 length of the value, both; back to back. */
int e4_xattrs(e4_fs *fs, uint32_t inode, char **out, uint64_t *length);

/* --- changing --- */
int e4_make(e4_fs *fs, uint32_t directory, const char *name, uint32_t length, const e4_attributes *attributes, const char *target, uint32_t target_length,
            uint32_t *inode);
int e4_link(e4_fs *fs, uint32_t directory, const char *name, uint32_t length, uint32_t inode);
int e4_unlink(e4_fs *fs, uint32_t directory, const char *name, uint32_t length);
int e4_set_attributes(e4_fs *fs, uint32_t inode, const e4_attributes *attributes); /* all but type, size and links */
int e4_set_xattr(e4_fs *fs, uint32_t inode, const char *name, const void *value, uint64_t length); /* value NULL: removes it */
/* expected: the size that the file will come to have. Files that are made and written from front to back go the quick way. */
int e4_write(e4_fs *fs, uint32_t inode, const void *buf, uint64_t length, uint64_t offset, uint64_t expected);
int e4_truncate(e4_fs *fs, uint32_t inode, uint64_t size);

/* --- where things lie, for comparing two file systems by their blocks --- */
int e4_inode_size(const e4_fs *fs);
int e4_inodes_per_group(const e4_fs *fs);
int e4_groups(const e4_fs *fs);
int e4_inode_table(e4_fs *fs, uint32_t group, e4_range *out);
int e4_group_metadata(e4_fs *fs, uint32_t group, e4_range *out); /* up to 6; returns how many */
int64_t e4_blocks(e4_fs *fs, uint32_t inode, e4_range **out);   /* all that an inode has, its own metadata too */
int e4_next_used(e4_fs *fs, uint64_t offset, uint64_t end, e4_range *out); /* 0: none from there on */

/* cdef end */

#endif
