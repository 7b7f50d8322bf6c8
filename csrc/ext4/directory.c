/* directory.c - names. A directory that is touched has all its names in memory, and is written a block at a time.
 *
 * Names are added where the last one was, or in a new block: the library's own way looks through the whole directory for each. The index
 * that the kernel keeps for large directories (htree) is taken off one that is changed: its names are laid out anew, in a line.
 */
#include <stdlib.h>
#include <string.h>

#include "fs.h"

enum { BUCKETS_MIN = 16, HEAD_BYTES = 8, NAME_MAX_BYTES = 255, TABLES = 1024 };

static uint32_t hash_of(const char *name, uint32_t length) {
  uint32_t hash = 2166136261u;
  for (uint32_t i = 0; i < length; i++) hash = (hash ^ (uint8_t)name[i]) * 16777619u;
  return hash;
}

static struct ext2_dir_entry *entry_at(uint8_t *block, uint32_t at) { return (struct ext2_dir_entry *)(void *)(block + at); }

static uint32_t room_for(uint32_t name_length) { return (HEAD_BYTES + name_length + 3) & ~3u; }

static uint32_t usable(e4_fs *fs) {
  return E4_BLOCK - (ext2fs_has_feature_metadata_csum(fs->fs->super) ? sizeof(struct ext2_dir_entry_tail) : 0);
}

static uint8_t type_of(uint32_t mode) {
  switch (mode & LINUX_S_IFMT) {
  case LINUX_S_IFREG: return EXT2_FT_REG_FILE;
  case LINUX_S_IFDIR: return EXT2_FT_DIR;
  case LINUX_S_IFCHR: return EXT2_FT_CHRDEV;
  case LINUX_S_IFBLK: return EXT2_FT_BLKDEV;
  case LINUX_S_IFIFO: return EXT2_FT_FIFO;
  case LINUX_S_IFSOCK: return EXT2_FT_SOCK;
  default: return EXT2_FT_SYMLINK;
  }
}

static uint32_t kind_of(uint8_t type) {
  static const uint32_t kinds[] = {0, LINUX_S_IFREG, LINUX_S_IFDIR, LINUX_S_IFCHR, LINUX_S_IFBLK, LINUX_S_IFIFO, LINUX_S_IFSOCK, LINUX_S_IFLNK};
  return type < sizeof kinds / sizeof *kinds ? kinds[type] : 0;
}

/* --- the names in memory --- */

static struct name **find(struct directory *d, const char *name, uint32_t length) {
  struct name **at = &d->table[hash_of(name, length) & (d->buckets - 1)];
  while (*at != NULL && ((*at)->length != length || memcmp((*at)->text, name, length) != 0)) at = &(*at)->next;
  return at;
}

static int grow(struct directory *d) {
  uint64_t buckets = d->buckets == 0 ? BUCKETS_MIN : d->buckets * 4;
  struct name **table = calloc(buckets, sizeof *table);
  if (table == NULL) return E4_ENOMEM;
  for (uint64_t i = 0; i < d->buckets; i++)
    for (struct name *name = d->table[i], *next; name != NULL; name = next) {
      struct name **head = &table[hash_of(name->text, name->length) & (buckets - 1)];
      next = name->next;
      name->next = *head;
      *head = name;
    }
  free(d->table);
  d->table = table;
  d->buckets = buckets;
  return E4_OK;
}

static int remember(struct directory *d, const char *text, uint32_t length, uint32_t inode, uint8_t type, uint32_t block) {
  if (d->names >= d->buckets && grow(d) != E4_OK) return E4_ENOMEM;
  struct name *name = malloc(sizeof *name + length);
  if (name == NULL) return E4_ENOMEM;
  *name = (struct name){.inode = inode, .block = block, .type = type, .length = length};
  memcpy(name->text, text, length);
  struct name **head = &d->table[hash_of(text, length) & (d->buckets - 1)];
  name->next = *head;
  *head = name;
  d->names++;
  return E4_OK;
}

static void free_directory(struct directory *d) {
  for (uint64_t i = 0; i < d->buckets; i++)
    for (struct name *name = d->table[i], *next; name != NULL; name = next) {
      next = name->next;
      free(name);
    }
  free(d->table);
  free(d);
}

/* --- blocks --- */

static int block_of(e4_fs *fs, uint32_t inode, uint64_t number, uint64_t *out) {
  union inode store, *buffer = &store;
  blk64_t block = 0;
  int rc = inode_read(fs, inode, buffer);
  if (rc == E4_OK) rc = failed(fs, ext2fs_bmap2(fs->fs, inode, &buffer->base, NULL, 0, number, NULL, &block));
  if (rc == E4_OK && block == 0) rc = E4_EDAMAGED;
  *out = block;
  return rc;
}

static int write_buffer(e4_fs *fs, struct directory *d) {
  if (!d->dirty) return E4_OK;
  uint64_t block;
  int rc = block_of(fs, d->inode, d->at, &block);
  if (rc == E4_OK) rc = failed(fs, ext2fs_write_dir_block4(fs->fs, block, d->buffer, 0, d->inode));
  if (rc == E4_OK) d->dirty = false;
  return rc;
}

static int read_buffer(e4_fs *fs, struct directory *d, uint64_t number) {
  if (d->at == number) return E4_OK;
  uint64_t block;
  int rc = write_buffer(fs, d);
  if (rc == E4_OK) rc = block_of(fs, d->inode, number, &block);
  if (rc != E4_OK) return rc;
  d->at = UINT64_MAX;
  rc = failed(fs, ext2fs_read_dir_block4(fs->fs, block, d->buffer, 0, d->inode));
  if (rc == E4_OK) d->at = number;
  return rc;
}

/* The next entry of the block, from `at` on; false at the end, or where it makes no sense. */
static bool step(e4_fs *fs, uint8_t *block, uint32_t at, struct ext2_dir_entry **entry, uint32_t *length) {
  if (at + HEAD_BYTES > E4_BLOCK) return false;
  *entry = entry_at(block, at);
  unsigned int count;
  if (ext2fs_get_rec_len(fs->fs, *entry, &count) != 0 || count < HEAD_BYTES || count % 4 != 0 || at + count > E4_BLOCK) return false;
  *length = count;
  return (*entry)->inode == 0 || room_for(ext2fs_dirent_name_len(*entry)) <= count;
}

static bool is_dots(const struct ext2_dir_entry *entry) {
  int length = ext2fs_dirent_name_len(entry);
  return entry->name[0] == '.' && (length == 1 || (length == 2 && entry->name[1] == '.'));
}

static int load_block(e4_fs *fs, struct directory *d, uint64_t number) {
  int rc = read_buffer(fs, d, number);
  struct ext2_dir_entry *entry;
  for (uint32_t at = 0, length; rc == E4_OK && at < E4_BLOCK; at += length) {
    if (!step(fs, d->buffer, at, &entry, &length)) return E4_EDAMAGED;
    if (entry->inode != 0 && !is_dots(entry))
      rc = remember(d, entry->name, ext2fs_dirent_name_len(entry), entry->inode, ext2fs_dirent_file_type(entry), number);
  }
  return rc;
}

/* --- directories in memory --- */

static struct directory **slot(e4_fs *fs, uint32_t inode) {
  struct directory **at = &fs->directories[inode % TABLES];
  while (*at != NULL && (*at)->inode != inode) at = &(*at)->next;
  return at;
}

static int make_room(e4_fs *fs) {
  if (fs->directories == NULL && (fs->directories = calloc(TABLES, sizeof *fs->directories)) == NULL) return E4_ENOMEM;
  if (fs->directory_count < DIRECTORIES_MAX) return E4_OK;
  int rc = directories_flush(fs);
  if (rc == E4_OK)
    for (unsigned i = 0; i < TABLES; i++)
      while (fs->directories[i] != NULL) directory_forget(fs, fs->directories[i]->inode);
  return rc;
}

static int new_directory(e4_fs *fs, uint32_t inode, uint64_t blocks, struct directory **out) {
  int rc = make_room(fs);
  if (rc != E4_OK) return rc;
  struct directory *d = calloc(1, sizeof *d);
  if (d == NULL || grow(d) != E4_OK) {
    free(d);
    return E4_ENOMEM;
  }
  d->inode = inode;
  d->blocks = blocks;
  d->at = UINT64_MAX;
  struct directory **head = &fs->directories[inode % TABLES];
  d->next = *head;
  *head = d;
  fs->directory_count++;
  *out = d;
  return E4_OK;
}

static int get(e4_fs *fs, uint32_t inode, struct directory **out) {
  if (fs->directories != NULL && (*out = *slot(fs, inode)) != NULL) return E4_OK;
  union inode store, *buffer = &store;
  int rc = inode_read(fs, inode, buffer);
  if (rc != E4_OK) return rc;
  if (!LINUX_S_ISDIR(buffer->base.i_mode)) return E4_ENOTDIR;
  if (buffer->base.i_flags & EXT4_INLINE_DATA_FL) return E4_EUNSUPPORTED;
  rc = new_directory(fs, inode, EXT2_I_SIZE(&buffer->base) / E4_BLOCK, out);
  for (uint64_t number = 0; rc == E4_OK && number < (*out)->blocks; number++) rc = load_block(fs, *out, number);
  if (rc != E4_OK) directory_forget(fs, inode);
  return rc;
}

void directory_forget(e4_fs *fs, uint32_t inode) {
  if (fs->directories == NULL) return;
  struct directory **at = slot(fs, inode), *d = *at;
  if (d == NULL) return;
  *at = d->next;
  free_directory(d);
  fs->directory_count--;
}

int directories_flush(e4_fs *fs) {
  int rc = E4_OK;
  for (unsigned i = 0; fs->directories != NULL && i < TABLES; i++)
    for (struct directory *d = fs->directories[i]; rc == E4_OK && d != NULL; d = d->next) rc = write_buffer(fs, d);
  return rc;
}

void directories_free(e4_fs *fs) {
  for (unsigned i = 0; fs->directories != NULL && i < TABLES; i++)
    while (fs->directories[i] != NULL) directory_forget(fs, fs->directories[i]->inode);
  free(fs->directories);
}

/* --- making and changing --- */

/* One free entry as large as the block. */
static void clear_block(e4_fs *fs, uint8_t *block) {
  memset(block, 0, E4_BLOCK);
  ext2fs_set_rec_len(fs->fs, usable(fs), entry_at(block, 0));
  if (usable(fs) < E4_BLOCK) ext2fs_initialize_dirent_tail(fs->fs, EXT2_DIRENT_TAIL(block, E4_BLOCK));
}

static void put_entry(e4_fs *fs, struct ext2_dir_entry *entry, uint32_t room, const char *name, uint32_t length, uint32_t inode, uint8_t type) {
  memset(entry, 0, room);
  entry->inode = inode;
  ext2fs_set_rec_len(fs->fs, room, entry);
  ext2fs_dirent_set_name_len(entry, length);
  ext2fs_dirent_set_file_type(entry, type);
  memcpy(entry->name, name, length);
}

int directory_make(e4_fs *fs, uint32_t inode, uint32_t parent, union inode *buffer) {
  struct directory *d;
  uint64_t block;
  int rc = new_directory(fs, inode, 1, &d);
  if (rc == E4_OK) rc = space_take_metadata(fs, &block);
  if (rc != E4_OK) return rc;
  uint32_t first = room_for(1);
  clear_block(fs, d->buffer);
  put_entry(fs, entry_at(d->buffer, 0), first, ".", 1, inode, EXT2_FT_DIR);
  put_entry(fs, entry_at(d->buffer, first), usable(fs) - first, "..", 2, parent, EXT2_FT_DIR);
  d->at = 0;
  d->dirty = true;
  buffer->base.i_links_count = 2;
  buffer->base.i_size = E4_BLOCK;
  struct run run = {.physical = block, .count = 1};
  struct runs runs = {.items = &run, .count = 1};
  return store_runs(fs, inode, buffer, &runs);
}

static int append_block(e4_fs *fs, struct directory *d) {
  union inode store, *buffer = &store;
  uint64_t taken;
  int rc = write_buffer(fs, d);
  if (rc == E4_OK) rc = inode_read(fs, d->inode, buffer);
  if (rc == E4_OK) rc = space_take_metadata(fs, &taken);
  if (rc != E4_OK) return rc;
  blk64_t block = taken;
  errcode_t error = ext2fs_bmap2(fs->fs, d->inode, &buffer->base, NULL, BMAP_SET, d->blocks, NULL, &block);
  if (!error) error = ext2fs_iblk_add_blocks(fs->fs, &buffer->base, 1);
  if (!error) error = ext2fs_inode_size_set(fs->fs, &buffer->base, (d->blocks + 1) * E4_BLOCK);
  rc = error ? failed(fs, error) : inode_write(fs, d->inode, buffer);
  if (rc != E4_OK) return rc;
  clear_block(fs, d->buffer);
  d->at = d->blocks++;
  d->dirty = true;
  return E4_OK;
}

/* Into what an entry of the block in memory leaves free; false: there is no room. */
static bool add_to_buffer(e4_fs *fs, struct directory *d, const char *name, uint32_t length, uint32_t inode, uint8_t type) {
  struct ext2_dir_entry *entry;
  for (uint32_t at = 0, count; step(fs, d->buffer, at, &entry, &count) && at < usable(fs); at += count) {
    uint32_t used = entry->inode == 0 ? 0 : room_for(ext2fs_dirent_name_len(entry));
    if (at + count > usable(fs) || count - used < room_for(length)) continue;
    if (used > 0) ext2fs_set_rec_len(fs->fs, used, entry);
    put_entry(fs, entry_at(d->buffer, at + used), count - used, name, length, inode, type);
    d->dirty = true;
    return true;
  }
  return false;
}

static int add(e4_fs *fs, struct directory *d, const char *name, uint32_t length, uint32_t inode, uint8_t type) {
  int rc = d->at == UINT64_MAX ? read_buffer(fs, d, d->blocks - 1) : E4_OK;
  if (rc == E4_OK && !add_to_buffer(fs, d, name, length, inode, type)) {
    if (d->at != d->blocks - 1) rc = read_buffer(fs, d, d->blocks - 1);
    if (rc == E4_OK && !add_to_buffer(fs, d, name, length, inode, type)) {
      rc = append_block(fs, d);
      if (rc == E4_OK && !add_to_buffer(fs, d, name, length, inode, type)) rc = E4_EDAMAGED;
    }
  }
  return rc == E4_OK ? remember(d, name, length, inode, type, d->at) : rc;
}

/* Takes the index off: the names are laid out anew, the blocks that are left over hold none. */
static int make_linear(e4_fs *fs, struct directory *d) {
  union inode store, *buffer = &store;
  int rc = inode_read(fs, d->inode, buffer);
  if (rc != E4_OK || !(buffer->base.i_flags & EXT2_INDEX_FL)) return rc;
  rc = read_buffer(fs, d, 0);
  if (rc != E4_OK) return rc;
  uint32_t first = room_for(1), parent = entry_at(d->buffer, first)->inode;
  uint64_t blocks = d->blocks, buckets = d->buckets, number = 0;
  struct name **names = d->table;
  d->table = NULL;
  d->buckets = d->names = 0;
  clear_block(fs, d->buffer);
  put_entry(fs, entry_at(d->buffer, 0), first, ".", 1, d->inode, EXT2_FT_DIR);
  put_entry(fs, entry_at(d->buffer, first), usable(fs) - first, "..", 2, parent, EXT2_FT_DIR);
  d->dirty = true;
  for (uint64_t i = 0; i < buckets; i++)
    for (struct name *name = names[i], *next; name != NULL; name = next) {
      next = name->next;
      while (rc == E4_OK && !add_to_buffer(fs, d, name->text, name->length, name->inode, name->type)) {
        rc = number + 1 < blocks ? write_buffer(fs, d) : E4_EDAMAGED;
        clear_block(fs, d->buffer);
        d->at = ++number;
        d->dirty = true;
      }
      if (rc == E4_OK) rc = remember(d, name->text, name->length, name->inode, name->type, number);
      free(name);
    }
  free(names);
  while (rc == E4_OK && ++number < blocks) {
    rc = write_buffer(fs, d);
    clear_block(fs, d->buffer);
    d->at = number;
    d->dirty = true;
  }
  buffer->base.i_flags &= ~EXT2_INDEX_FL;
  return rc == E4_OK ? inode_write(fs, d->inode, buffer) : rc;
}

int directory_add(e4_fs *fs, uint32_t directory, const char *name, uint32_t length, uint32_t inode, uint32_t mode) {
  struct directory *d;
  if (length == 0 || length > NAME_MAX_BYTES || memchr(name, '/', length) != NULL || memchr(name, 0, length) != NULL) return E4_EINVAL;
  if (name[0] == '.' && (length == 1 || (length == 2 && name[1] == '.'))) return E4_EINVAL;
  int rc = get(fs, directory, &d);
  if (rc == E4_OK) rc = make_linear(fs, d);
  return rc == E4_OK ? add(fs, d, name, length, inode, type_of(mode)) : rc;
}

int directory_empty(e4_fs *fs, uint32_t directory) {
  struct directory *d;
  int rc = get(fs, directory, &d);
  return rc != E4_OK ? rc : d->names == 0;
}

static int remove_entry(e4_fs *fs, struct directory *d, const struct name *name) {
  int rc = read_buffer(fs, d, name->block);
  struct ext2_dir_entry *entry, *before = NULL;
  for (uint32_t at = 0, length, joined = 0; rc == E4_OK && step(fs, d->buffer, at, &entry, &length); at += length) {
    if (entry->inode == name->inode && (uint32_t)ext2fs_dirent_name_len(entry) == name->length && memcmp(entry->name, name->text, name->length) == 0) {
      if (before != NULL) {
        ext2fs_set_rec_len(fs->fs, joined + length, before);
      } else {
        entry->inode = 0;
      }
      d->dirty = true;
      return E4_OK;
    }
    before = entry;
    joined = length;
  }
  return rc == E4_OK ? E4_EDAMAGED : rc;
}

int e4_unlink(e4_fs *fs, uint32_t directory, const char *name, uint32_t length) {
  struct directory *d;
  union inode store, *buffer = &store;
  int rc = filling_end(fs);
  if (rc == E4_OK) rc = get(fs, directory, &d);
  if (rc == E4_OK) rc = make_linear(fs, d);
  if (rc != E4_OK) return rc;
  struct name **at = find(d, name, length), *found = *at;
  if (found == NULL) return E4_ENOENT;
  uint32_t inode = found->inode;
  rc = inode_read(fs, inode, buffer);
  bool is_directory = LINUX_S_ISDIR(buffer->base.i_mode);
  if (rc == E4_OK && is_directory) {
    rc = directory_empty(fs, inode);
    rc = rc == 0 ? E4_ENOTEMPTY : rc < 0 ? rc : E4_OK;
    if (rc == E4_OK) rc = get(fs, directory, &d); /* it may have been let go of meanwhile */
    if (rc == E4_OK) found = *(at = find(d, name, length));
  }
  if (rc == E4_OK) rc = remove_entry(fs, d, found);
  if (rc != E4_OK) return rc;
  *at = found->next;
  free(found);
  d->names--;
  if (!is_directory) return inode_release(fs, inode, buffer);
  directory_forget(fs, inode);
  rc = inode_release(fs, inode, buffer);
  if (rc == E4_OK) rc = inode_read(fs, directory, buffer);
  if (rc == E4_OK && buffer->base.i_links_count > 2) {
    buffer->base.i_links_count--;
    rc = inode_write(fs, directory, buffer);
  }
  return rc;
}

/* --- looking --- */

int e4_lookup(e4_fs *fs, uint32_t directory, const char *name, uint32_t length, uint32_t *inode, uint32_t *kind) {
  struct directory *d;
  int rc = get(fs, directory, &d);
  if (rc != E4_OK) return rc;
  struct name *found = length <= NAME_MAX_BYTES ? *find(d, name, length) : NULL;
  if (found == NULL) return E4_ENOENT;
  *inode = found->inode;
  *kind = kind_of(found->type);
  return E4_OK;
}

int e4_entries(e4_fs *fs, uint32_t directory, char **out, uint64_t *length) {
  struct directory *d;
  int rc = get(fs, directory, &d);
  if (rc != E4_OK) return rc;
  uint64_t size = 0, at = 0;
  for (uint64_t i = 0; i < d->buckets; i++)
    for (struct name *name = d->table[i]; name != NULL; name = name->next) size += 3 * sizeof(uint32_t) + name->length;
  char *data = malloc(size + 1);
  if (data == NULL) return E4_ENOMEM;
  for (uint64_t i = 0; i < d->buckets; i++)
    for (struct name *name = d->table[i]; name != NULL; name = name->next) {
      uint32_t head[3] = {name->inode, kind_of(name->type), name->length};
      memcpy(data + at, head, sizeof head);
      memcpy(data + at + sizeof head, name->text, name->length);
      at += sizeof head + name->length;
    }
  *out = data;
  *length = size;
  return E4_OK;
}
