/* fs.h - what the files of the file system library share. */
#ifndef THINPOOL_EXT4_FS_H
#define THINPOOL_EXT4_FS_H

#include <ext2fs/ext2fs.h>
#include <stdbool.h>

#include "ext4.h"

enum {
  STAGE_BYTES = 512 << 10,
  PAGES_MAX = 16384,       /* of the cache: 64 MiB */
  DIRECTORIES_MAX = 4096,  /* whose names are in memory */
  INODE_BYTES_MAX = 1024,
};
/* The time of everything that is not told: the same operations are to give the same bytes. */
#define FIXED_TIME 0x40000000u

struct run {
  uint64_t logical, physical, count; /* blocks */
  bool unwritten;
};

struct runs {
  struct run *items;
  uint64_t count, room;
};

/* A block of metadata. */
struct page {
  struct page *next;
  uint64_t number;
  bool dirty;
  uint8_t data[E4_BLOCK];
};

struct name {
  struct name *next;
  uint32_t inode, block; /* which block of the directory holds it */
  uint8_t type, length;
  char text[];
};

/* A directory whose names are in memory, and the block of it that was changed last. */
struct directory {
  struct directory *next;
  uint32_t inode;
  struct name **table;
  uint64_t buckets, names, blocks;
  uint64_t at; /* number of the block in `buffer` */
  bool dirty;
  uint8_t buffer[E4_BLOCK];
};

/* A file that is being written from front to back. */
struct filling {
  uint32_t inode; /* 0: none */
  struct runs runs;
  uint64_t end;   /* bytes written, or passed over */
  uint64_t tail;  /* bytes of `block`, the last one, that is not written yet */
  uint8_t block[E4_BLOCK];
};

struct e4_fs {
  ext2_filsys fs;
  e4_disk disk;
  e4_policy policy;
  bool writable, bitmaps;
  int disk_error;
  errcode_t error;
  /* cache of metadata: pages by number */
  struct page **pages;
  uint64_t page_count;
  /* data on its way to the layer: one stretch of blocks */
  uint8_t *stage;
  uint64_t stage_block, stage_count;
  /* where blocks are taken from */
  uint64_t data_next, meta_next, meta_end;
  uint32_t data_directory, filling_directory;
  bool wrapped;
  struct runs freed;
  struct directory **directories;
  uint64_t directory_count;
  struct filling filling;
  /* where the blocks of the inode that was read last are */
  uint32_t mapped_inode;
  struct runs map;
};

/* An inode with all that follows it in its table. */
union inode {
  struct ext2_inode base;
  struct ext2_inode_large large;
  uint8_t bytes[INODE_BYTES_MAX];
};

int failed(e4_fs *fs, errcode_t error); /* libext2fs's error as ours; 0 for 0 */
int runs_add(struct runs *runs, uint64_t logical, uint64_t physical, uint64_t count, bool unwritten);

/* cache.c */
extern struct struct_io_manager e4_io_manager;
errcode_t cache_read(e4_fs *fs, void *buf, uint64_t length, uint64_t offset);
errcode_t cache_write(e4_fs *fs, const void *buf, uint64_t length, uint64_t offset);
errcode_t cache_flush(e4_fs *fs);
void cache_forget(e4_fs *fs, uint64_t block, uint64_t count);
void cache_free(e4_fs *fs);

/* space.c */
int space_begin(e4_fs *fs);
int space_take(e4_fs *fs, uint64_t wanted, bool aligned, uint64_t *start, uint64_t *count); /* for data */
int space_take_metadata(e4_fs *fs, uint64_t *block);
int space_discard_freed(e4_fs *fs);

/* inode.c */
int inode_read(e4_fs *fs, uint32_t inode, union inode *buffer);
int inode_write(e4_fs *fs, uint32_t inode, union inode *buffer);
int inode_release(e4_fs *fs, uint32_t inode, union inode *buffer); /* one link less; with the last, all it has is freed */

/* directory.c */
int directory_make(e4_fs *fs, uint32_t inode, uint32_t parent, union inode *buffer);
int directory_add(e4_fs *fs, uint32_t directory, const char *name, uint32_t length, uint32_t inode, uint32_t mode);
int directory_empty(e4_fs *fs, uint32_t directory); /* 1, 0, or an error */
int directories_flush(e4_fs *fs);
void directory_forget(e4_fs *fs, uint32_t inode);
void directories_free(e4_fs *fs);

/* file.c */
int map_load(e4_fs *fs, uint32_t inode);
int filling_end(e4_fs *fs);
int stage_flush(e4_fs *fs);
int store_runs(e4_fs *fs, uint32_t inode, union inode *buffer, const struct runs *runs);

#endif
