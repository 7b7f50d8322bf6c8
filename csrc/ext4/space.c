/* space.c - where blocks are taken from.
 *
 * Data is taken front to back from where the last used block is, metadata from stretches of 1 MiB of its own, so that neither file
 * contents nor inode numbers in directories disturb each other's chunks. Equal files are to lie equally within chunks wherever they lie
 * in the file system: large ones begin at a chunk's begin, and so does the first file of each directory. What that leaves over is used
 * once nothing else is free.
 */
#include <stdlib.h>

#include "fs.h"

enum { METADATA_BLOCKS = 256 };

static uint64_t blocks_count(e4_fs *fs) { return ext2fs_blocks_count(fs->fs->super); }

/* The first block behind all that is used, but for the copies of the superblock at the begin of some groups. */
static uint64_t used_end(e4_fs *fs) {
  for (dgrp_t group = fs->fs->group_desc_count; group-- > 0;) {
    if (ext2fs_bg_flags_test(fs->fs, group, EXT2_BG_BLOCK_UNINIT)) continue;
    blk64_t first = ext2fs_group_first_block2(fs->fs, group), last = ext2fs_group_last_block2(fs->fs, group), super, old, new;
    blk_t own = 0;
    ext2fs_super_and_bgd_loc2(fs->fs, group, &super, &old, &new, &own);
    for (blk64_t block = last + 1; block-- > first + own;)
      if (ext2fs_test_block_bitmap2(fs->fs->block_map, block)) return block + 1;
  }
  return fs->fs->super->s_first_data_block;
}

static void on_free(e4_fs *fs, uint64_t block, uint64_t count) {
  cache_forget(fs, block, count);
  if (runs_add(&fs->freed, block, block, count, false) != E4_OK) fs->freed.count = 0; /* not discarded: no more than a loss of space */
}

static void block_changed(ext2_filsys efs, blk64_t block, int inuse) {
  if (inuse < 0) on_free(efs->priv_data, block, 1);
}

static void range_changed(ext2_filsys efs, blk64_t block, blk_t count, int inuse) {
  if (inuse < 0) on_free(efs->priv_data, block, count);
}

/* A stretch of free blocks at or after `from`, at least one and at most `wanted`; false: none. */
static bool find_free(e4_fs *fs, uint64_t from, uint64_t wanted, bool aligned, uint64_t *start, uint64_t *count) {
  uint64_t unit = fs->policy.chunk_blocks, end = blocks_count(fs);
  for (;;) {
    if (aligned) from = (from + unit - 1) / unit * unit;
    blk64_t first, used;
    if (from >= end || ext2fs_find_first_zero_block_bitmap2(fs->fs->block_map, from, end - 1, &first) != 0) return false;
    if (aligned && first % unit != 0) {
      from = first;
      continue;
    }
    uint64_t last = first + wanted - 1 < end - 1 ? first + wanted - 1 : end - 1;
    if (ext2fs_find_first_set_block_bitmap2(fs->fs->block_map, first, last, &used) != 0) used = last + 1;
    *start = first;
    *count = used - first;
    return true;
  }
}

static void take(e4_fs *fs, uint64_t start, uint64_t count) {
  for (uint64_t done = 0; done < count;) { /* the library counts in 32 bits */
    uint64_t part = count - done < (1u << 30) ? count - done : 1u << 30;
    ext2fs_block_alloc_stats_range(fs->fs, start + done, part, +1);
    done += part;
  }
}

int space_take(e4_fs *fs, uint64_t wanted, bool aligned, uint64_t *start, uint64_t *count) {
  if (fs->wrapped) aligned = false;
  if (!find_free(fs, fs->data_next, wanted, aligned, start, count)) {
    fs->wrapped = true;
    if (!find_free(fs, fs->fs->super->s_first_data_block, wanted, false, start, count)) return E4_ENOSPC;
  }
  take(fs, *start, *count);
  fs->data_next = *start + *count;
  return E4_OK;
}

static int find_metadata(e4_fs *fs, uint64_t *block) {
  uint64_t count;
  if (fs->meta_next < fs->meta_end && find_free(fs, fs->meta_next, 1, false, block, &count) && *block < fs->meta_end) {
    fs->meta_next = *block + 1;
    return E4_OK;
  }
  uint64_t start;
  if (!fs->wrapped && find_free(fs, fs->data_next, METADATA_BLOCKS, true, &start, &count)) {
    fs->meta_next = start;
    fs->meta_end = start + count;
    if (fs->data_next < fs->meta_end) fs->data_next = fs->meta_end;
    return find_metadata(fs, block);
  }
  return find_free(fs, fs->fs->super->s_first_data_block, 1, false, block, &count) ? E4_OK : E4_ENOSPC;
}

int space_take_metadata(e4_fs *fs, uint64_t *block) {
  int rc = find_metadata(fs, block);
  if (rc == E4_OK) take(fs, *block, 1);
  return rc;
}

/* For blocks that the library wants: it takes what it is told to. */
static errcode_t find_for_library(ext2_filsys efs, blk64_t goal, blk64_t *out) {
  (void)goal;
  uint64_t block;
  if (find_metadata(efs->priv_data, &block) != E4_OK) return EXT2_ET_BLOCK_ALLOC_FAIL;
  *out = block;
  return 0;
}

int space_begin(e4_fs *fs) {
  fs->fs->priv_data = fs;
  fs->data_next = used_end(fs);
  ext2fs_set_block_alloc_stats_callback(fs->fs, block_changed, NULL);
  ext2fs_set_block_alloc_stats_range_callback(fs->fs, range_changed, NULL);
  ext2fs_set_alloc_block_callback(fs->fs, find_for_library, NULL);
  return E4_OK;
}

static int by_block(const void *a, const void *b) {
  uint64_t x = ((const struct run *)a)->physical, y = ((const struct run *)b)->physical;
  return (x > y) - (x < y);
}

/* After the flush: what was freed, and has not been taken again, is given back. */
int space_discard_freed(e4_fs *fs) {
  if (fs->disk.discard == NULL) return E4_OK;
  if (fs->freed.count > 0) qsort(fs->freed.items, fs->freed.count, sizeof *fs->freed.items, by_block);
  for (uint64_t i = 0; i < fs->freed.count; i++) {
    uint64_t at = fs->freed.items[i].physical, end = at + fs->freed.items[i].count;
    for (; i + 1 < fs->freed.count && fs->freed.items[i + 1].physical <= end; i++) {
      uint64_t next = fs->freed.items[i + 1].physical + fs->freed.items[i + 1].count;
      if (next > end) end = next;
    }
    for (uint64_t start, count; at < end && find_free(fs, at, end - at, false, &start, &count) && start < end; at = start + count) {
      int code = fs->disk.discard(fs->disk.ctx, start * E4_BLOCK, count * E4_BLOCK);
      if (code < 0) {
        fs->disk_error = code;
        return E4_EDISK;
      }
    }
  }
  fs->freed.count = 0;
  return E4_OK;
}
