/* volume.c - a file system opened, put away, and its errors. */
#include <et/com_err.h>
#include <stdlib.h>
#include <string.h>

#include "fs.h"

int failed(e4_fs *fs, errcode_t error) {
  if (error == 0) return E4_OK;
  fs->error = error;
  if (fs->disk_error != 0) return E4_EDISK;
  switch (error) {
  case ENOMEM:
  case EXT2_ET_NO_MEMORY: return E4_ENOMEM;
  case EXT2_ET_BLOCK_ALLOC_FAIL:
  case EXT2_ET_INODE_ALLOC_FAIL:
  case EXT2_ET_DIR_NO_SPACE: return E4_ENOSPC;
  case EXT2_ET_UNSUPP_FEATURE:
  case EXT2_ET_RO_UNSUPP_FEATURE: return E4_EUNSUPPORTED;
  default: return E4_EDAMAGED;
  }
}

const char *e4_message(const e4_fs *fs) { return fs->error == 0 ? "" : error_message(fs->error); }

int e4_disk_error(const e4_fs *fs) { return fs->disk_error; }

void e4_release(void *memory) { free(memory); }

static int check(e4_fs *fs) {
  struct ext2_super_block *super = fs->fs->super;
  if (fs->fs->blocksize != E4_BLOCK || EXT2_INODE_SIZE(super) > INODE_BYTES_MAX || ext2fs_has_feature_inline_data(super) ||
      ext2fs_has_feature_encrypt(super) || ext2fs_has_feature_casefold(super) || ext2fs_has_feature_bigalloc(super) ||
      ext2fs_has_feature_journal_dev(super))
    return E4_EUNSUPPORTED;
  if (fs->writable && EXT2_INODE_SIZE(super) < sizeof(struct ext2_inode_large)) return E4_EUNSUPPORTED;
  if (ext2fs_has_feature_journal_needs_recovery(super) || super->s_state & EXT2_ERROR_FS || !(super->s_state & EXT2_VALID_FS)) return E4_EDIRTY;
  if (fs->writable && (super->s_last_orphan != 0 || ext2fs_has_feature_orphan_present(super))) return E4_EDIRTY;
  return E4_OK;
}

static int read_bitmaps(e4_fs *fs) {
  if (fs->bitmaps) return E4_OK;
  int rc = failed(fs, ext2fs_read_bitmaps(fs->fs));
  fs->bitmaps = rc == E4_OK;
  return rc;
}

int e4_open(const e4_disk *disk, const e4_policy *policy, int writable, e4_fs **out) {
  e4_fs *fs = calloc(1, sizeof *fs);
  *out = fs; /* also on failure, for what it says */
  if (fs == NULL) return E4_ENOMEM;
  fs->disk = *disk;
  fs->policy = *policy;
  fs->writable = writable;
  if (fs->policy.chunk_blocks == 0) fs->policy.chunk_blocks = 1;
  initialize_ext2_error_table();
  char name[32];
  snprintf(name, sizeof name, "%p", (void *)fs);
  int flags = EXT2_FLAG_64BITS | (writable ? EXT2_FLAG_RW : 0);
  int rc = failed(fs, ext2fs_open2(name, NULL, flags, 0, 0, &e4_io_manager, &fs->fs));
  if (rc != E4_OK) {
    fs->fs = NULL;
    return rc;
  }
  rc = check(fs);
  if (rc != E4_OK || !writable) return rc;
  fs->fs->now = FIXED_TIME;
  fs->fs->flags |= EXT2_FLAG_MASTER_SB_ONLY;
  fs->stage = malloc(STAGE_BYTES);
  if (fs->stage == NULL) return E4_ENOMEM;
  rc = read_bitmaps(fs);
  return rc == E4_OK ? space_begin(fs) : rc;
}

int e4_sync(e4_fs *fs) {
  if (!fs->writable) return E4_OK;
  int rc = filling_end(fs);
  if (rc == E4_OK) rc = stage_flush(fs);
  if (rc == E4_OK) rc = directories_flush(fs);
  if (rc == E4_OK) rc = failed(fs, ext2fs_flush2(fs->fs, EXT2_FLAG_FLUSH_NO_SYNC));
  if (rc == E4_OK) rc = failed(fs, cache_flush(fs));
  return rc == E4_OK ? space_discard_freed(fs) : rc;
}

void e4_free(e4_fs *fs) {
  if (fs == NULL) return;
  if (fs->fs != NULL) ext2fs_free(fs->fs);
  directories_free(fs);
  cache_free(fs);
  free(fs->stage);
  free(fs->freed.items);
  free(fs->filling.runs.items);
  free(fs->map.items);
  free(fs);
}

/* --- where things lie --- */

int e4_inode_size(const e4_fs *fs) { return EXT2_INODE_SIZE(fs->fs->super); }

int e4_inodes_per_group(const e4_fs *fs) { return fs->fs->super->s_inodes_per_group; }

int e4_groups(const e4_fs *fs) { return fs->fs->group_desc_count; }

static e4_range range(uint64_t block, uint64_t count) { return (e4_range){.offset = block * E4_BLOCK, .length = count * E4_BLOCK}; }

int e4_inode_table(e4_fs *fs, uint32_t group, e4_range *out) {
  if (group >= fs->fs->group_desc_count) return E4_EINVAL;
  out->offset = ext2fs_inode_table_loc(fs->fs, group) * E4_BLOCK;
  out->length = (uint64_t)fs->fs->super->s_inodes_per_group * EXT2_INODE_SIZE(fs->fs->super);
  return E4_OK;
}

int e4_group_metadata(e4_fs *fs, uint32_t group, e4_range *out) {
  blk64_t super = 0, old = 0, new = 0;
  blk_t used = 0;
  int count = 0;
  if (group >= fs->fs->group_desc_count) return E4_EINVAL;
  ext2fs_super_and_bgd_loc2(fs->fs, group, &super, &old, &new, &used);
  if (group == 0 || super != 0) out[count++] = range(super, 1);
  if (old != 0) out[count++] = range(old, fs->fs->desc_blocks + fs->fs->super->s_reserved_gdt_blocks);
  if (new != 0) out[count++] = range(new, 1);
  out[count++] = range(ext2fs_block_bitmap_loc(fs->fs, group), 1);
  out[count++] = range(ext2fs_inode_bitmap_loc(fs->fs, group), 1);
  out[count++] = range(ext2fs_inode_table_loc(fs->fs, group), fs->fs->inode_blocks_per_group);
  return count;
}

static int add_block(ext2_filsys efs, blk64_t *block, e2_blkcnt_t number, blk64_t ref, int offset, void *arg) {
  (void)efs, (void)number, (void)ref, (void)offset;
  return runs_add(arg, *block, *block, 1, false) != E4_OK ? BLOCK_ABORT : 0;
}

int64_t e4_blocks(e4_fs *fs, uint32_t inode, e4_range **out) {
  union inode store, *buffer = &store;
  struct runs runs = {0};
  int rc = filling_end(fs);
  if (rc == E4_OK) rc = inode_read(fs, inode, buffer);
  if (rc == E4_OK && ext2fs_inode_has_valid_blocks2(fs->fs, &buffer->base))
    rc = failed(fs, ext2fs_block_iterate3(fs->fs, inode, BLOCK_FLAG_READ_ONLY, NULL, add_block, &runs));
  blk64_t xattrs = rc == E4_OK ? ext2fs_file_acl_block(fs->fs, &buffer->base) : 0;
  if (xattrs != 0) rc = runs_add(&runs, xattrs, xattrs, 1, false);
  e4_range *ranges = malloc((runs.count + 1) * sizeof *ranges);
  if (rc == E4_OK && ranges == NULL) rc = E4_ENOMEM;
  int64_t count = 0;
  for (; rc == E4_OK && (uint64_t)count < runs.count; count++) ranges[count] = range(runs.items[count].physical, runs.items[count].count);
  free(runs.items);
  if (rc != E4_OK) {
    free(ranges);
    return rc;
  }
  *out = ranges;
  return count;
}

int e4_next_used(e4_fs *fs, uint64_t offset, uint64_t end, e4_range *out) {
  int rc = read_bitmaps(fs);
  if (rc != E4_OK) return rc;
  uint64_t first = offset / E4_BLOCK, last = (end + E4_BLOCK - 1) / E4_BLOCK, blocks = ext2fs_blocks_count(fs->fs->super);
  if (first < fs->fs->super->s_first_data_block) first = fs->fs->super->s_first_data_block;
  if (last > blocks) last = blocks;
  if (first >= last) return 0;
  blk64_t from, to;
  errcode_t error = ext2fs_find_first_set_block_bitmap2(fs->fs->block_map, first, last - 1, &from);
  if (error == ENOENT) return 0;
  if (error) return failed(fs, error);
  error = ext2fs_find_first_zero_block_bitmap2(fs->fs->block_map, from, last - 1, &to);
  if (error && error != ENOENT) return failed(fs, error);
  *out = range(from, (error ? last : to) - from);
  return 1;
}
