/* file.c - what is in files: where their blocks are, reading, and writing from front to back.
 *
 * A new file is filled: its blocks are taken and written as they come, through a stage that joins neighbours, also those of several
 * files; its extents are stored when it is left. Anything else (writing into what is there) goes the library's slower way.
 */
#include <stdlib.h>
#include <string.h>

#include "fs.h"

enum { INLINE_RUNS = 4, RUN_BLOCKS_MAX = 32768, DIRECT_BYTES = 128 << 10, EXTENT_MAGIC = 0xF30A };

int runs_add(struct runs *runs, uint64_t logical, uint64_t physical, uint64_t count, bool unwritten) {
  struct run *last = runs->count > 0 ? &runs->items[runs->count - 1] : NULL;
  if (last != NULL && last->logical + last->count == logical && last->physical + last->count == physical && last->unwritten == unwritten) {
    last->count += count;
    return E4_OK;
  }
  if (runs->count == runs->room) {
    uint64_t room = runs->room == 0 ? 16 : runs->room * 2;
    struct run *items = realloc(runs->items, room * sizeof *items);
    if (items == NULL) return E4_ENOMEM;
    runs->items = items;
    runs->room = room;
  }
  runs->items[runs->count++] = (struct run){.logical = logical, .physical = physical, .count = count, .unwritten = unwritten};
  return E4_OK;
}

/* --- extents of new inodes --- */

static errcode_t insert_run(ext2_extent_handle_t handle, const struct run *run, bool first) {
  for (uint64_t done = 0; done < run->count;) {
    uint64_t part = run->count - done < RUN_BLOCKS_MAX ? run->count - done : RUN_BLOCKS_MAX;
    struct ext2fs_extent extent = {.e_lblk = run->logical + done, .e_pblk = run->physical + done, .e_len = part, .e_flags = EXT2_EXTENT_FLAGS_LEAF};
    errcode_t error = ext2fs_extent_insert(handle, first ? 0 : EXT2_EXTENT_INSERT_AFTER, &extent);
    if (!error) error = ext2fs_extent_fix_parents(handle);
    if (error) return error;
    first = false;
    done += part;
  }
  return 0;
}

static errcode_t insert_runs(e4_fs *fs, uint32_t inode, union inode *buffer, const struct runs *runs) {
  ext2_extent_handle_t handle;
  errcode_t error = ext2fs_extent_open2(fs->fs, inode, &buffer->base, &handle);
  if (error) return error;
  for (uint64_t i = 0; !error && i < runs->count; i++) error = insert_run(handle, &runs->items[i], i == 0);
  ext2fs_extent_free(handle);
  return error;
}

int store_runs(e4_fs *fs, uint32_t inode, union inode *buffer, const struct runs *runs) {
  uint64_t blocks = 0;
  bool inlined = runs->count <= INLINE_RUNS;
  for (uint64_t i = 0; i < runs->count; i++) {
    blocks += runs->items[i].count;
    inlined &= runs->items[i].count <= RUN_BLOCKS_MAX;
  }
  struct ext3_extent_header *header = (void *)buffer->base.i_block;
  memset(buffer->base.i_block, 0, sizeof buffer->base.i_block);
  header->eh_magic = EXTENT_MAGIC;
  header->eh_max = INLINE_RUNS;
  buffer->base.i_flags |= EXT4_EXTENTS_FL;
  errcode_t error = ext2fs_iblk_add_blocks(fs->fs, &buffer->base, blocks);
  if (error) return failed(fs, error);
  if (inlined) {
    struct ext3_extent *extents = (void *)(header + 1);
    header->eh_entries = runs->count;
    for (uint64_t i = 0; i < runs->count; i++)
      extents[i] = (struct ext3_extent){
          .ee_block = runs->items[i].logical,
          .ee_len = runs->items[i].count,
          .ee_start = (uint32_t)runs->items[i].physical,
          .ee_start_hi = runs->items[i].physical >> 32,
      };
    return inode_write(fs, inode, buffer);
  }
  int rc = inode_write(fs, inode, buffer);
  if (rc == E4_OK) rc = failed(fs, insert_runs(fs, inode, buffer, runs));
  return rc == E4_OK ? inode_write(fs, inode, buffer) : rc;
}

/* --- where data is --- */

static errcode_t load_extents(e4_fs *fs, uint32_t inode, union inode *buffer, struct runs *runs) {
  ext2_extent_handle_t handle;
  struct ext2fs_extent extent;
  errcode_t error = ext2fs_extent_open2(fs->fs, inode, &buffer->base, &handle);
  if (error) return error;
  for (int op = EXT2_EXTENT_ROOT;; op = EXT2_EXTENT_NEXT) {
    error = ext2fs_extent_get(handle, op, &extent);
    if (error == EXT2_ET_EXTENT_NO_NEXT || (op == EXT2_EXTENT_ROOT && error == EXT2_ET_NO_CURRENT_NODE)) {
      error = 0;
      break;
    }
    if (error) break;
    if (!(extent.e_flags & EXT2_EXTENT_FLAGS_LEAF) || extent.e_flags & EXT2_EXTENT_FLAGS_SECOND_VISIT) continue;
    if (runs_add(runs, extent.e_lblk, extent.e_pblk, extent.e_len, extent.e_flags & EXT2_EXTENT_FLAGS_UNINIT) != E4_OK) {
      error = ENOMEM;
      break;
    }
  }
  ext2fs_extent_free(handle);
  return error;
}

static int add_block(ext2_filsys efs, blk64_t *block, e2_blkcnt_t number, blk64_t ref, int offset, void *arg) {
  (void)efs, (void)ref, (void)offset;
  return number >= 0 && runs_add(arg, number, *block, 1, false) != E4_OK ? BLOCK_ABORT : 0;
}

int map_load(e4_fs *fs, uint32_t inode) {
  if (fs->mapped_inode == inode) return E4_OK;
  union inode store, *buffer = &store;
  int rc = inode_read(fs, inode, buffer);
  if (rc != E4_OK) return rc;
  if (buffer->base.i_flags & EXT4_INLINE_DATA_FL) return E4_EUNSUPPORTED;
  fs->mapped_inode = 0;
  fs->map.count = 0;
  errcode_t error = 0;
  if (buffer->base.i_flags & EXT4_EXTENTS_FL) {
    error = load_extents(fs, inode, buffer, &fs->map);
  } else if (ext2fs_inode_has_valid_blocks2(fs->fs, &buffer->base)) {
    error = ext2fs_block_iterate3(fs->fs, inode, BLOCK_FLAG_READ_ONLY | BLOCK_FLAG_DATA_ONLY, NULL, add_block, &fs->map);
  }
  if (!error) fs->mapped_inode = inode;
  return failed(fs, error);
}

static int disk_failed(e4_fs *fs, int code) {
  if (code >= 0) return E4_OK;
  fs->disk_error = code;
  return E4_EDISK;
}

static int prepare_to_read(e4_fs *fs, uint32_t inode, uint64_t *size) {
  union inode store, *buffer = &store;
  int rc = filling_end(fs);
  if (rc == E4_OK) rc = stage_flush(fs);
  if (rc == E4_OK) rc = inode_read(fs, inode, buffer);
  if (rc == E4_OK && LINUX_S_ISDIR(buffer->base.i_mode)) rc = E4_EISDIR;
  if (rc == E4_OK && !LINUX_S_ISREG(buffer->base.i_mode)) rc = E4_EINVAL;
  *size = EXT2_I_SIZE(&buffer->base);
  return rc == E4_OK ? map_load(fs, inode) : rc;
}

int64_t e4_read(e4_fs *fs, uint32_t inode, void *buf, uint64_t length, uint64_t offset) {
  uint64_t size;
  int rc = prepare_to_read(fs, inode, &size);
  if (rc != E4_OK) return rc;
  if (offset >= size) return 0;
  if (length > size - offset) length = size - offset;
  memset(buf, 0, length);
  for (uint64_t i = 0; i < fs->map.count; i++) {
    const struct run *run = &fs->map.items[i];
    uint64_t start = run->logical * E4_BLOCK, end = start + run->count * E4_BLOCK;
    uint64_t from = start > offset ? start : offset, to = end < offset + length ? end : offset + length;
    if (run->unwritten || from >= to) continue;
    rc = disk_failed(fs, fs->disk.read(fs->disk.ctx, (char *)buf + (from - offset), to - from, run->physical * E4_BLOCK + (from - start)));
    if (rc != E4_OK) return rc;
  }
  return length;
}

int64_t e4_data(e4_fs *fs, uint32_t inode, e4_range **out) {
  uint64_t size;
  int rc = prepare_to_read(fs, inode, &size);
  if (rc != E4_OK) return rc;
  e4_range *ranges = malloc((fs->map.count + 1) * sizeof *ranges);
  if (ranges == NULL) return E4_ENOMEM;
  int64_t count = 0;
  for (uint64_t i = 0; i < fs->map.count; i++) {
    const struct run *run = &fs->map.items[i];
    uint64_t start = run->logical * E4_BLOCK, end = start + run->count * E4_BLOCK;
    if (end > size) end = size;
    if (run->unwritten || start >= end) continue;
    if (count > 0 && ranges[count - 1].offset + ranges[count - 1].length == start) {
      ranges[count - 1].length = end - ranges[count - 1].offset;
    } else {
      ranges[count++] = (e4_range){.offset = start, .length = end - start};
    }
  }
  *out = ranges;
  return count;
}

/* --- the stage --- */

int stage_flush(e4_fs *fs) {
  if (fs->stage_count == 0) return E4_OK;
  uint64_t count = fs->stage_count;
  fs->stage_count = 0;
  return disk_failed(fs, fs->disk.write(fs->disk.ctx, fs->stage, count * E4_BLOCK, fs->stage_block * E4_BLOCK));
}

static int stage_write(e4_fs *fs, uint64_t block, uint64_t count, const void *data) {
  cache_forget(fs, block, count);
  bool follows = fs->stage_count > 0 && block == fs->stage_block + fs->stage_count && (fs->stage_count + count) * E4_BLOCK <= STAGE_BYTES;
  int rc = follows ? E4_OK : stage_flush(fs);
  if (rc != E4_OK) return rc;
  if (!follows && count * E4_BLOCK >= DIRECT_BYTES)
    return disk_failed(fs, fs->disk.write(fs->disk.ctx, data, count * E4_BLOCK, block * E4_BLOCK));
  if (!follows) fs->stage_block = block;
  memcpy(fs->stage + fs->stage_count * E4_BLOCK, data, count * E4_BLOCK);
  fs->stage_count += count;
  return E4_OK;
}

/* --- filling --- */

/* Blocks for a new file's data, and the data into them. */
static int put_blocks(e4_fs *fs, uint64_t logical, uint64_t count, const void *data, uint64_t expected) {
  struct filling *f = &fs->filling;
  const e4_policy *policy = &fs->policy;
  while (count > 0) {
    bool aligned = false;
    if (f->runs.count == 0) {
      aligned = policy->align_large > 0 && expected >= (uint64_t)policy->align_large * E4_BLOCK;
      aligned |= policy->align_directories && fs->data_directory != fs->filling_directory;
      fs->data_directory = fs->filling_directory;
    }
    uint64_t start, taken;
    int rc = space_take(fs, count, aligned, &start, &taken);
    if (rc == E4_OK) rc = runs_add(&f->runs, logical, start, taken, false);
    if (rc == E4_OK) rc = stage_write(fs, start, taken, data);
    if (rc != E4_OK) return rc;
    data = (const char *)data + taken * E4_BLOCK;
    logical += taken;
    count -= taken;
  }
  return E4_OK;
}

static int put_tail(e4_fs *fs, uint64_t expected) {
  struct filling *f = &fs->filling;
  if (f->tail == 0) return E4_OK;
  memset(f->block + f->tail, 0, E4_BLOCK - f->tail);
  f->tail = 0;
  return put_blocks(fs, (f->end - 1) / E4_BLOCK, 1, f->block, expected);
}

static int fill(e4_fs *fs, const char *data, uint64_t length, uint64_t offset, uint64_t expected) {
  struct filling *f = &fs->filling;
  int rc = E4_OK;
  if (f->tail > 0 && offset / E4_BLOCK != (f->end - 1) / E4_BLOCK) rc = put_tail(fs, expected);
  while (rc == E4_OK && length > 0) {
    uint64_t at = offset % E4_BLOCK, part = E4_BLOCK - at < length ? E4_BLOCK - at : length;
    if (part == E4_BLOCK) {
      part = length / E4_BLOCK * E4_BLOCK;
      rc = put_blocks(fs, offset / E4_BLOCK, part / E4_BLOCK, data, expected);
    } else {
      memset(f->block + f->tail, 0, E4_BLOCK - f->tail);
      memcpy(f->block + at, data, part);
      f->tail = at + part;
    }
    data += part;
    offset += part;
    length -= part;
    f->end = offset;
    if (f->tail == E4_BLOCK) {
      f->tail = 0;
      rc = put_blocks(fs, (offset - 1) / E4_BLOCK, 1, f->block, expected);
    }
  }
  return rc;
}

int filling_end(e4_fs *fs) {
  struct filling *f = &fs->filling;
  if (f->inode == 0) return E4_OK;
  uint32_t inode = f->inode;
  union inode store, *buffer = &store;
  int rc = put_tail(fs, f->end);
  f->inode = 0;
  if (fs->mapped_inode == inode) fs->mapped_inode = 0;
  int stored = inode_read(fs, inode, buffer);
  if (stored == E4_OK) stored = failed(fs, ext2fs_inode_size_set(fs->fs, &buffer->base, f->end));
  if (stored == E4_OK) stored = store_runs(fs, inode, buffer, &f->runs);
  f->runs.count = 0;
  return rc == E4_OK ? stored : rc;
}

/* --- writing --- */

static int write_slowly(e4_fs *fs, uint32_t inode, const char *data, uint64_t length, uint64_t offset) {
  ext2_file_t file;
  int rc = stage_flush(fs);
  if (rc != E4_OK) return rc;
  if (fs->mapped_inode == inode) fs->mapped_inode = 0;
  errcode_t error = ext2fs_file_open(fs->fs, inode, EXT2_FILE_WRITE, &file);
  if (error) return failed(fs, error);
  error = ext2fs_file_llseek(file, offset, EXT2_SEEK_SET, NULL);
  while (!error && length > 0) {
    unsigned int written, part = length < (1u << 30) ? length : 1u << 30;
    error = ext2fs_file_write(file, data, part, &written);
    data += written;
    length -= written;
  }
  errcode_t closed = ext2fs_file_close(file);
  if (!error) error = closed;
  if (!error) error = cache_flush(fs); /* data is not read from there */
  return failed(fs, error);
}

int e4_write(e4_fs *fs, uint32_t inode, const void *buf, uint64_t length, uint64_t offset, uint64_t expected) {
  struct filling *f = &fs->filling;
  if (length == 0) return E4_OK;
  if (f->inode == inode && offset >= f->end) return fill(fs, buf, length, offset, expected);
  int rc = filling_end(fs);
  union inode store, *buffer = &store;
  if (rc == E4_OK) rc = inode_read(fs, inode, buffer);
  if (rc == E4_OK && !LINUX_S_ISREG(buffer->base.i_mode)) rc = LINUX_S_ISDIR(buffer->base.i_mode) ? E4_EISDIR : E4_EINVAL;
  if (rc == E4_OK) rc = map_load(fs, inode);
  if (rc != E4_OK) return rc;
  if (fs->map.count > 0 || EXT2_I_SIZE(&buffer->base) > 0) return write_slowly(fs, inode, buf, length, offset);
  f->inode = inode;
  f->end = f->tail = 0;
  return fill(fs, buf, length, offset, expected);
}

int e4_truncate(e4_fs *fs, uint32_t inode, uint64_t size) {
  union inode store, *buffer = &store;
  int rc = filling_end(fs);
  if (rc == E4_OK) rc = inode_read(fs, inode, buffer);
  if (rc == E4_OK && !LINUX_S_ISREG(buffer->base.i_mode)) rc = E4_EINVAL;
  if (rc != E4_OK) return rc;
  uint64_t old = EXT2_I_SIZE(&buffer->base), kept = size % E4_BLOCK;
  if (size < old && kept > 0) { /* what lies behind the end is zero */
    static const char zeros[E4_BLOCK];
    uint64_t part = E4_BLOCK - kept < old - size ? E4_BLOCK - kept : old - size;
    rc = write_slowly(fs, inode, zeros, part, size);
    if (rc == E4_OK) rc = inode_read(fs, inode, buffer);
    if (rc != E4_OK) return rc;
  }
  if (fs->mapped_inode == inode) fs->mapped_inode = 0;
  errcode_t error = 0;
  if (size < old) error = ext2fs_punch(fs->fs, inode, &buffer->base, NULL, (size + E4_BLOCK - 1) / E4_BLOCK, ~(blk64_t)0);
  if (!error) error = ext2fs_inode_size_set(fs->fs, &buffer->base, size);
  return error ? failed(fs, error) : inode_write(fs, inode, buffer);
}
