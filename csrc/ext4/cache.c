/* cache.c - what libext2fs reads and writes: metadata, a page of 4 KiB at a time, kept in memory until it is flushed.
 *
 * A page is dirty only if what is written to it differs from what it has; pages go to the layer in the order of their numbers,
 * neighbours together. File data does not come through here (file.c); cache_forget() drops a page whose block becomes data, or free.
 */
#include <stdlib.h>
#include <string.h>

#include "fs.h"

enum { BUCKETS = 4096, JOINED_PAGES = 128 };

static struct page **bucket(e4_fs *fs, uint64_t number) { return &fs->pages[(number * 0x9E3779B97F4A7C15u) >> 52]; }

static struct page *find(e4_fs *fs, uint64_t number) {
  for (struct page *page = *bucket(fs, number); page != NULL; page = page->next)
    if (page->number == number) return page;
  return NULL;
}

static void drop(e4_fs *fs, bool clean_only) {
  for (unsigned i = 0; i < BUCKETS; i++)
    for (struct page **at = &fs->pages[i]; *at != NULL;) {
      struct page *page = *at;
      if (clean_only && page->dirty) {
        at = &page->next;
        continue;
      }
      *at = page->next;
      free(page);
      fs->page_count--;
    }
}

static errcode_t disk_failed(e4_fs *fs, int code) {
  if (code >= 0) return 0;
  fs->disk_error = code;
  return EIO;
}

static errcode_t load(e4_fs *fs, uint64_t number, struct page **out) {
  struct page *page = find(fs, number);
  if (page == NULL) {
    if (fs->page_count >= PAGES_MAX) {
      errcode_t error = cache_flush(fs);
      if (error) return error;
      drop(fs, true);
    }
    page = malloc(sizeof *page);
    if (page == NULL) return ENOMEM;
    errcode_t error = disk_failed(fs, fs->disk.read(fs->disk.ctx, page->data, E4_BLOCK, number * E4_BLOCK));
    if (error) {
      free(page);
      return error;
    }
    struct page **head = bucket(fs, number);
    page->number = number;
    page->dirty = false;
    page->next = *head;
    *head = page;
    fs->page_count++;
  }
  *out = page;
  return 0;
}

errcode_t cache_read(e4_fs *fs, void *buf, uint64_t length, uint64_t offset) {
  for (uint64_t done = 0; done < length;) {
    uint64_t at = (offset + done) % E4_BLOCK, count = E4_BLOCK - at < length - done ? E4_BLOCK - at : length - done;
    struct page *page;
    errcode_t error = load(fs, (offset + done) / E4_BLOCK, &page);
    if (error) return error;
    memcpy((char *)buf + done, page->data + at, count);
    done += count;
  }
  return 0;
}

errcode_t cache_write(e4_fs *fs, const void *buf, uint64_t length, uint64_t offset) {
  for (uint64_t done = 0; done < length;) {
    uint64_t at = (offset + done) % E4_BLOCK, count = E4_BLOCK - at < length - done ? E4_BLOCK - at : length - done;
    struct page *page;
    errcode_t error = load(fs, (offset + done) / E4_BLOCK, &page);
    if (error) return error;
    if (memcmp(page->data + at, (const char *)buf + done, count) != 0) {
      memcpy(page->data + at, (const char *)buf + done, count);
      page->dirty = true;
    }
    done += count;
  }
  return 0;
}

static int by_number(const void *a, const void *b) {
  uint64_t x = (*(struct page *const *)a)->number, y = (*(struct page *const *)b)->number;
  return (x > y) - (x < y);
}

errcode_t cache_flush(e4_fs *fs) {
  struct page **dirty = malloc((fs->page_count + 1) * sizeof *dirty);
  uint8_t *joined = malloc(JOINED_PAGES * E4_BLOCK);
  errcode_t error = dirty == NULL || joined == NULL ? ENOMEM : 0;
  uint64_t count = 0;
  for (unsigned i = 0; !error && i < BUCKETS; i++)
    for (struct page *page = fs->pages[i]; page != NULL; page = page->next)
      if (page->dirty) dirty[count++] = page;
  if (count > 0) qsort(dirty, count, sizeof *dirty, by_number);
  for (uint64_t i = 0, n; !error && i < count; i += n) {
    for (n = 0; i + n < count && n < JOINED_PAGES && dirty[i + n]->number == dirty[i]->number + n; n++)
      memcpy(joined + n * E4_BLOCK, dirty[i + n]->data, E4_BLOCK);
    error = disk_failed(fs, fs->disk.write(fs->disk.ctx, joined, n * E4_BLOCK, dirty[i]->number * E4_BLOCK));
    for (uint64_t k = 0; !error && k < n; k++) dirty[i + k]->dirty = false;
  }
  free(dirty);
  free(joined);
  return error;
}

void cache_forget(e4_fs *fs, uint64_t block, uint64_t count) {
  if (fs->page_count == 0) return;
  for (uint64_t number = block; number < block + count; number++)
    for (struct page **at = bucket(fs, number); *at != NULL; at = &(*at)->next)
      if ((*at)->number == number) {
        struct page *page = *at;
        *at = page->next;
        free(page);
        fs->page_count--;
        break;
      }
}

void cache_free(e4_fs *fs) {
  if (fs->pages != NULL) drop(fs, false);
  free(fs->pages);
}

/* --- libext2fs's I/O manager. The name of the "device" is the address of the e4_fs. --- */

static errcode_t io_open(const char *name, int flags, io_channel *out) {
  (void)flags;
  void *fs;
  if (sscanf(name, "%p", &fs) != 1) return EXT2_ET_BAD_DEVICE_NAME;
  io_channel channel = calloc(1, sizeof *channel);
  char *copy = strdup(name);
  if (channel == NULL || copy == NULL) {
    free(channel);
    free(copy);
    return ENOMEM;
  }
  ((e4_fs *)fs)->pages = calloc(BUCKETS, sizeof(struct page *));
  channel->magic = EXT2_ET_MAGIC_IO_CHANNEL;
  channel->manager = &e4_io_manager;
  channel->name = copy;
  channel->block_size = 1024;
  channel->refcount = 1;
  channel->private_data = fs;
  *out = channel;
  return ((e4_fs *)fs)->pages == NULL ? ENOMEM : 0;
}

static errcode_t io_close(io_channel channel) {
  if (--channel->refcount > 0) return 0;
  free(channel->name);
  free(channel);
  return 0;
}

static errcode_t io_set_blksize(io_channel channel, int size) {
  channel->block_size = size;
  return 0;
}

static uint64_t length_of(io_channel channel, int count) { return count < 0 ? (uint64_t)-count : (uint64_t)count * channel->block_size; }

static errcode_t io_read(io_channel channel, unsigned long long block, int count, void *data) {
  return cache_read(channel->private_data, data, length_of(channel, count), block * channel->block_size);
}

static errcode_t io_write(io_channel channel, unsigned long long block, int count, const void *data) {
  return cache_write(channel->private_data, data, length_of(channel, count), block * channel->block_size);
}

static errcode_t io_read_32(io_channel channel, unsigned long block, int count, void *data) { return io_read(channel, block, count, data); }

static errcode_t io_write_32(io_channel channel, unsigned long block, int count, const void *data) { return io_write(channel, block, count, data); }

static errcode_t io_write_byte(io_channel channel, unsigned long offset, int count, const void *data) {
  return cache_write(channel->private_data, data, count, offset);
}

static errcode_t io_flush(io_channel channel) {
  (void)channel;
  return 0; /* e4_sync() does, when all of it is there */
}

struct struct_io_manager e4_io_manager = {
    .magic = EXT2_ET_MAGIC_IO_MANAGER,
    .name = "thinpool layer",
    .open = io_open,
    .close = io_close,
    .set_blksize = io_set_blksize,
    .read_blk = io_read_32,
    .write_blk = io_write_32,
    .flush = io_flush,
    .write_byte = io_write_byte,
    .read_blk64 = io_read,
    .write_blk64 = io_write,
};
