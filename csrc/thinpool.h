/* thinpool.h - the data plane's whole contract: what Python (through cffi) and the export loops may call.
 *
 * A pool maps layers to chunks of one data file. This core owns every byte that moves: block maps, chunk
 * space, reference counts and I/O. It never touches the metadata store: it asks for a record that is not in
 * memory through `fetch`, and hands over changed records, already encoded, at a commit.
 *
 * Every function returns TP_OK (0), a count, or a negative tp_error; none uses errno across this boundary.
 * The detail of the last error of the calling thread is in tp_last_error(). Any thread may call anything at
 * any time; a handle stays valid until it is put, whatever happens to its layer or pool meanwhile.
 */
#ifndef THINPOOL_H
#define THINPOOL_H

#include <stddef.h>
#include <stdint.h>

/* cdef begin */

enum tp_error {
  TP_OK = 0,
  TP_EIO = -1,        /* the disk below failed; the errno is in tp_last_error() */
  TP_ENOSPC = -2,     /* the pool's capacity, or the host's disk, is used up */
  TP_ERANGE = -3,     /* past the end of the layer */
  TP_ESEALED = -4,    /* a sealed layer never changes */
  TP_EDELETED = -5,   /* the layer was deleted */
  TP_ECLOSED = -6,    /* the pool was closed */
  TP_ECORRUPT = -7,   /* a stored record does not match its checksum, or makes no sense */
  TP_ENOMEM = -8,
  TP_EFAILED = -9,    /* the pool is in error mode after a failed sync or commit: reads only */
  TP_EREADONLY = -10, /* the pool is open read-only */
  TP_EINVAL = -11,
  TP_ENOENT = -12,    /* no such record or layer */
  TP_ECALLBACK = -13, /* the metadata store failed; its exception is kept by the caller */
  TP_EQUOTA = -14,    /* the layer maps as much as it may */
  TP_ECHECKSUM = -15, /* a chunk (key) is not what its checksum says */
};

/* Record kinds: one LMDB database each. Keys are 64-bit numbers, stored big-endian. docs/FORMAT.md. */
enum tp_kind {
  TP_NODE = 1,        /* key: node id. A block map node */
  TP_CHUNK_PAGE = 2,  /* key: page number. Reference counts of 1,024 chunks */
  TP_NODE_PAGE = 3,   /* key: page number. Reference counts of 1,024 nodes */
  TP_SUMMARY = 4,     /* key: page number. Free chunks of 1,024 chunk pages */
  TP_MAP = 5,         /* key: layer id. Root, size and counters of a layer's map */
  TP_STATE = 6,       /* key 0: the pool's counters; 1: the reclaim queue; 2: the allocation window */
  TP_CHECKSUM = 11,   /* key: number of 128 chunks. Their checksums */
};

typedef struct tp_pool tp_pool;
typedef struct tp_layer tp_layer;

/* The disk below: the data file, or a test's stand-in. Each returns >= 0 or a negative errno. */
typedef struct {
  void *ctx;
  int64_t (*pread)(void *ctx, void *buf, uint64_t length, uint64_t offset);
  int64_t (*pwrite)(void *ctx, const void *buf, uint64_t length, uint64_t offset);
  int (*punch)(void *ctx, uint64_t offset, uint64_t length); /* becomes a hole that reads as zeros */
  int (*sync)(void *ctx);
  int (*resize)(void *ctx, uint64_t length); /* grows the file, sparse; never shrinks it */
  int64_t (*size)(void *ctx);
  int (*cut)(void *ctx, uint64_t length); /* shortens the file, if it is longer: what is cut off reads as zeros */
} tp_disk;

typedef struct {
  uint64_t chunk_size;     /* bytes; a power of two, 4 KiB to 4 MiB */
  uint64_t capacity;       /* bytes that chunks may take; 0: no limit */
  uint64_t cache_bytes;    /* bound of the node and page cache; 0: 64 MiB */
  uint64_t window_bytes;   /* clean space that a crash may make dirty; 0: 1 GiB. At least two pages of chunks */
  int data_fd;             /* the data file, when disk is NULL; stays the caller's */
  int read_only;
  int verify_reads;        /* chunks that have a checksum are read whole and compared: TP_ECHECKSUM */
  const tp_disk *disk;     /* copied; NULL: plain I/O on data_fd */
  void *ctx;               /* handed to the callbacks */
  /* Copy the record's value into buf; its length in *length. TP_ENOENT where there is none. If capacity is too
   * small, set *length and return TP_ERANGE. Called with locks held: must not call back into this core. */
  int (*fetch)(void *ctx, uint32_t kind, uint64_t key, void *buf, uint64_t capacity, uint64_t *length);
  /* Run one whole commit (freeze, sync, store, release). Called without locks. 0 or negative. */
  int (*commit)(void *ctx);
  /* Plan, store and activate more allocation window (tp_window_plan). Called without locks. 0 or negative. */
  int (*extend_window)(void *ctx);
} tp_options;

typedef struct {
  int code;           /* tp_error */
  int os_error;       /* errno of the host, for TP_EIO and TP_ENOSPC; 0: the pool's own limit */
  uint32_t kind;      /* record concerned, for TP_ECORRUPT; 0: none */
  uint64_t key;
  uint64_t layer_id;  /* layer and range concerned; 0: none */
  uint64_t offset;
  uint64_t length;
} tp_error_info;

typedef struct {
  uint64_t offset;
  uint64_t length;
  uint32_t data;      /* 1: data, 0: hole */
} tp_extent;

typedef struct {
  uint64_t size;          /* bytes */
  uint64_t mapped_refs;   /* chunk references of the map: a whole entry is one, a split one per chunk it names */
  uint64_t epoch;         /* grows with each snapshot of the layer */
  int sealed;
} tp_layer_info;

typedef struct {
  uint64_t chunk_size;      /* bytes */
  uint64_t capacity_chunks; /* 0: no limit */
  uint64_t allocated_chunks;
  uint64_t dirty_chunks;    /* free, but still holding old bytes: to be punched */
  uint64_t pending_chunks;  /* freed, not yet committed; and pinned ones */
  uint64_t pinned_chunks;   /* freed and committed, but a reader looks at an older state, which names them */
  uint64_t data_bytes;      /* length of the data file in use */
  uint64_t reclaim_nodes;   /* nodes of deleted maps still to be walked */
  uint64_t txn;             /* the open transaction */
  uint64_t durable_txn;
  int dirty;                /* the open transaction has changed records */
  int failed;               /* tp_error that put the pool into error mode; 0: none */
  int failed_errno;         /* errno of the host, where the thread that failed had one */
  int refused;              /* the host has no room, by its disk or a quota on it: a write was refused, and none with new chunks has been done since */
  uint64_t waiting_writers; /* for room */
  uint64_t cached_bytes;    /* nodes and pages in memory */
  uint64_t splits, in_place, first_writes, window_waits, fetches; /* counters since open */
} tp_pool_info;

enum tp_operation_kind { TP_READ = 0, TP_WRITE = 1, TP_DISCARD = 2 };
enum tp_phase { TP_PHASE_FREEZE = 0, TP_PHASE_SYNC = 1, TP_PHASE_STORE = 2, TP_PHASE_RELEASE = 3 }; /* of a commit */
enum { TP_OPERATIONS = 3, TP_PHASES = 4, TP_BUCKETS = 26 };

typedef struct {
  uint64_t nanoseconds;          /* of all together */
  uint64_t bucket[TP_BUCKETS];   /* how many took up to 256 ns << k, and longer than the bucket before says; the last: any longer */
} tp_histogram;
typedef struct {
  uint64_t count, errors, bytes; /* errors are among count; bytes: of those that did not fail */
  tp_histogram latency;          /* of small operations only some are timed, each of which stands for several */
} tp_operation;
typedef struct {
  uint64_t layer_id;
  tp_operation operation[TP_OPERATIONS];
} tp_layer_metrics;
typedef struct {
  tp_operation operation[TP_OPERATIONS]; /* of all layers, deleted ones too */
  tp_histogram flush, commit, phase[TP_PHASES];
  uint64_t punched_bytes;        /* given back to the host */
  uint64_t corrupt_reads;        /* of chunks that were not what their checksum says */
  uint64_t cache_hits;           /* records found in memory; tp_pool_info.fetches: those that were not */
} tp_metrics;

typedef struct {
  void *buf;
  uint64_t length;
  uint64_t offset;
} tp_vec;

void tp_last_error(tp_error_info *out);
uint32_t tp_crc32c(uint32_t crc, const void *data, uint64_t length);
int tp_is_zero(const void *data, uint64_t length);

/* --- pool --- */
int tp_pool_open(const tp_options *options, tp_pool **out);
void tp_pool_stop(tp_pool *pool);     /* drains I/O; nothing changes from now on, so that the commit that follows is the last */
void tp_pool_close(tp_pool *pool);    /* drains I/O; every later call on its handles is TP_ECLOSED. No commit */
void tp_pool_put(tp_pool *pool);      /* frees the handle; after tp_pool_close */
int tp_pool_get_info(tp_pool *pool, tp_pool_info *out);
int tp_pool_set_capacity(tp_pool *pool, uint64_t capacity);
int tp_pool_set_patience(tp_pool *pool, uint64_t ms); /* how long tp_write_patient waits for room; who waits now goes by the old one, except for 0 */
uint64_t tp_pool_patience(tp_pool *pool);             /* ms; no lock */
/* What was counted since the pool was opened; `layers`: those with traffic, up to capacity of them. *count: how many there are. */
int tp_get_metrics(tp_pool *pool, tp_metrics *out, tp_layer_metrics *layers, uint64_t capacity, uint64_t *count);

/* --- layers --- */
int tp_layer_create(tp_pool *pool, uint64_t id, uint64_t size, tp_layer **out);
int tp_layer_get(tp_pool *pool, uint64_t id, tp_layer **out); /* one more handle on the layer */
void tp_layer_put(tp_layer *layer);
int tp_layer_branch(tp_layer *source, uint64_t id, uint64_t size, int sealed, tp_layer **out); /* O(1) */
int tp_layer_seal(tp_layer *layer);
int tp_layer_resize(tp_layer *layer, uint64_t size);
int tp_layer_reset(tp_layer *layer, tp_layer *source);  /* takes source's content as it is now; O(1) */
int tp_layer_delete(tp_layer *layer);                   /* O(1); space comes back through tp_reclaim */
int tp_layer_get_info(tp_layer *layer, tp_layer_info *out);
uint64_t tp_layer_size(tp_layer *layer);                /* bytes; no lock */

/* --- I/O: bytes at any offset; all or an error --- */
int tp_read(tp_layer *layer, void *buf, uint64_t length, uint64_t offset);
int tp_write(tp_layer *layer, const void *buf, uint64_t length, uint64_t offset);
/* For those who know nothing of pools, behind a block device: where there is no room, waits for some as long as the pool's patience says. Holds no lock then. */
int tp_write_patient(tp_layer *layer, const void *buf, uint64_t length, uint64_t offset);
int tp_readv(tp_layer *layer, const tp_vec *vecs, uint64_t count);
int tp_writev(tp_layer *layer, const tp_vec *vecs, uint64_t count);
int tp_discard(tp_layer *layer, uint64_t offset, uint64_t length); /* reads back as zeros; whole blocks are given back */
typedef struct {
  uint64_t cursor; /* where to go on; begins as 0 */
  uint64_t zeros;  /* bytes that became holes */
  uint64_t freed;  /* bytes of these that nobody needs any more: of chunks that went, and of blocks in chunks that stay */
} tp_sparsified;
/* Chunks, and blocks of split ones, that read as zeros become holes; others may write meanwhile. Looks at up to `chunks` of them; adds to *done.
 * 1: more to do, 0: done. */
int tp_sparsify(tp_layer *layer, tp_sparsified *done, uint64_t chunks);
int tp_flush(tp_pool *pool); /* all that was written before the call is durable when it returns */

/* --- limits of one layer: reads and writes wait for their turn before anything else, so that others are not held up --- */
typedef struct {
  uint64_t rbps, wbps;   /* bytes read and written a second; 0: no limit. As io.max of Linux control groups has them */
  uint64_t riops, wiops; /* operations a second */
  uint64_t quota;        /* bytes of chunks that the map may name before a write that needs another is TP_EQUOTA; 0: no limit */
} tp_limits;
int tp_layer_set_limits(tp_layer *layer, const tp_limits *limits); /* who waits goes on at once */
/* For callers that must not wait: 1 if the operation may begin now (and is paid for), and then goes by tp_*_admitted. now_ns: on the monotonic
 * clock; 0: now. */
int tp_limits_take(tp_layer *layer, int writing, uint64_t length, uint64_t now_ns);
int tp_read_admitted(tp_layer *layer, void *buf, uint64_t length, uint64_t offset);
int tp_write_admitted(tp_layer *layer, const void *buf, uint64_t length, uint64_t offset); /* in a patient pool TP_ENOSPC is to go on by tp_write_patient */
uint64_t tp_limits_waiting(tp_layer *layer); /* how many wait */
void tp_limits_end(tp_pool *pool);           /* nobody waits any more, nor for room: the pool is about to close */

/* --- what is where. Each fills up to capacity items from *cursor on, and moves *cursor to where to go on; a
 *     return of 0 items with *cursor at the end means done. Neighbours may have the same kind. --- */
int64_t tp_extents(tp_layer *layer, uint64_t *cursor, tp_extent *out, uint64_t capacity);
int64_t tp_diff(tp_layer *from, tp_layer *to, uint64_t *cursor, tp_extent *out, uint64_t capacity);
int tp_exclusive(tp_layer **layers, uint64_t count, uint64_t *chunks); /* how many chunks deleting all these would free */

/* --- sharing equal chunks (import). Map, revoke, compare, and on a difference write over it --- */
int tp_map_shared(tp_layer *layer, uint64_t index, uint64_t chunk); /* 1: entry names chunk now; 0: chunk is not allocated */
int tp_revoke(tp_pool *pool);     /* no layer overwrites in place until it has looked at the counts again */
int tp_equal(tp_layer *layer, const void *buf, uint64_t length, uint64_t offset); /* 1, 0, or an error */
int64_t tp_chunk_at(tp_layer *layer, uint64_t index); /* chunk number of a whole entry, or -1 */

/* --- layers found to be equal: sealed, of one size and content, byte for byte. Wherever `layer` (a descendant of `from`, or `from`
 *     itself as the last) names what `from` names in that place, it names what `to` names there from now on: no byte that it reads
 *     changes. A bounded part from *cursor on; 1: more to do, 0: done --- */
int tp_layer_rebase(tp_layer *layer, tp_layer *from, tp_layer *to, uint64_t *cursor);

/* --- checksums of chunks (checksum.h). Of all chunks that a sealed layer names in a range, those that have none get one --- */
int tp_layer_checksum(tp_layer *layer, uint64_t offset, uint64_t length);
/* Puts the bytes, of a whole chunk, into a chunk that the layer names in chunk `index` of its own; 1: done, 0: they are not what its checksum
 * says, or it has none. Durable with the next flush. */
int tp_layer_heal(tp_layer *layer, uint64_t index, uint64_t chunk, const void *bytes);

/* --- commit: freeze, (tp_sync), encode until none is left, store, release. One at a time. --- */
int tp_freeze(tp_pool *pool, uint64_t *txn);  /* returns 1 if there is anything to store */
/* The next records, back to back: u8 kind, u8 deleted, u16 0, u32 length, u8 key[8] big-endian, value. The
 * buffer belongs to the pool, until the next call. *length 0: all are encoded. */
int tp_encode(tp_pool *pool, const uint8_t **records, uint64_t *length);
int tp_sync(tp_pool *pool);
/* The transaction is durable. store_txn: the store's number of it; oldest_reader: the oldest store_txn that a
 * reader may still look at (UINT64_MAX: none): what was freed since is kept. */
int tp_release(tp_pool *pool, uint64_t store_txn, uint64_t oldest_reader);
void tp_fail(tp_pool *pool, int error); /* error mode, for good; with the errno of the last error of this thread, if that is the one */
void tp_touch(tp_pool *pool);           /* the caller has records of its own for the open transaction: a flush must commit */

/* --- surviving the process: map changes since the last commit are noted in a memory file (memfd_create) that somebody else keeps
 *     open too. Before anything else is done with the pool: do again what the file has (returns how many notes), flush,
 *     begin to note. fd may be closed after tp_redo_open --- */
int64_t tp_redo_open(tp_pool *pool, int fd);
int tp_redo_begin(tp_pool *pool);

/* --- background work --- */
/* Waits up to timeout_ms for work; returns a set of tp_work bits (0: none), or TP_ECLOSED. */
enum tp_work { TP_WORK_WINDOW = 1, TP_WORK_RECLAIM = 2, TP_WORK_PUNCH = 4, TP_WORK_COMMIT = 8, TP_WORK_OVERDUE = 16 };
int tp_wait_work(tp_pool *pool, int timeout_ms);
void tp_wake(tp_pool *pool);
int tp_reclaim(tp_pool *pool, uint64_t budget);  /* walks up to budget entries of deleted maps; 1: more to do */
int tp_punch(tp_pool *pool, uint64_t budget);    /* punches up to budget bytes of free chunks; 1: more to do; 0: all is done, by other threads too */

/* --- compaction: chunks move down in the data file, so that its end can be given up. Layers are read, written, made and deleted meanwhile.
 *     One at a time. --- */
typedef struct tp_compaction tp_compaction;
/* ceiling: chunks from here on are to be empty, and are not handed out until tp_compact_end; 0: as few pages as hold all that there is. *total:
 * how many chunks are to move. TP_EINVAL: there is one already. */
int tp_compact_begin(tp_pool *pool, uint64_t ceiling, tp_compaction **out, uint64_t *total);
int tp_compact_step(tp_compaction *compaction, uint64_t *moved); /* a bounded part, committed; 1: more to do. *moved: chunks by now */
void tp_compact_end(tp_compaction *compaction);
int tp_shrink(tp_pool *pool); /* gives up the pages at the end that are clean; the file is cut with a commit from now on. 1: there were some */
/* Entries that are split over several chunks which nobody else has: their blocks come to lie in one. A bounded part from *cursor on; 1: more to
 * do. *merged grows by the entries. Maps that layers share are left as they are. */
int tp_layer_merge(tp_layer *layer, uint64_t *cursor, uint64_t *merged);

/* The record to store under (TP_STATE, 2) so that more clean chunks may be handed out; then tp_window_activate. */
int tp_window_plan(tp_pool *pool, const uint8_t **record, uint64_t *length);
int tp_window_activate(tp_pool *pool);

/* For tests and benchmarks: maps count chunks from index on, without writing any data. */
int tp_map_unwritten(tp_layer *layer, uint64_t index, uint64_t count);

/* --- FUSE: one file per layer, served from /dev/fuse by threads of this core. The number of a layer's inode is its
 *     id + 1, so that nothing the kernel holds on to depends on the process that serves it. --- */
typedef struct tp_fuse tp_fuse;
typedef struct tp_fuse_listing tp_fuse_listing;
typedef struct {
  void *ctx;
  int (*lookup)(void *ctx, const char *name, uint64_t *layer_id); /* TP_ENOENT: no layer has that file name */
  /* tp_fuse_list for each layer whose id is at least `from`, in the order of ids, until that returns 0. */
  int (*list)(void *ctx, uint64_t from, tp_fuse_listing *out);
} tp_fuse_callbacks;
int tp_fuse_list(tp_fuse_listing *out, uint64_t layer_id, const char *name); /* 0: no room, stop */
/* fds: /dev/fuse, already mounted, and clones of it (FUSE_DEV_IOC_CLONE), each served by a thread; they stay the caller's, who keeps them
 * open until tp_fuse_stop has returned. resume: another process served them before; what it had not answered is asked again. */
int tp_fuse_start(tp_pool *pool, const int *fds, unsigned count, int resume, const tp_fuse_callbacks *callbacks, tp_fuse **out);
int tp_fuse_stop(tp_fuse *fuse); /* joins the threads and frees; after the unmount */
int tp_fuse_resized(tp_fuse *fuse, uint64_t layer_id); /* tell the kernel that the size changed */

/* --- NBD: the transmission phase of one connection, negotiated by the caller --- */
typedef struct {
  uint32_t id;
  tp_layer *since;  /* thinpool:changed-since:<this layer>; NULL: base:allocation */
} tp_nbd_context;
typedef struct {
  int read_only;
  int structured;   /* structured replies were agreed on */
  const tp_nbd_context *contexts;
  uint64_t context_count;
} tp_nbd_options;
/* Serves until the client or anybody who shuts the socket down ends it; fd stays the caller's. */
int tp_nbd_serve(tp_pool *pool, tp_layer *layer, int fd, const tp_nbd_options *options);

/* --- stored records without a pool, for checking and repairing (inspect.c). Values as they are in the store, checksum first;
 *     TP_ECORRUPT: not what was written. Nothing is locked, and no error detail is set --- */
typedef struct {        /* where the references to chunks are counted: `length` chunks from `first` on */
  uint32_t *count;      /* stops growing at its largest value */
  uint64_t first, length;
} tp_counts;
typedef struct {
  uint64_t level;
  uint64_t entry[256];  /* chunk number + 1, or a child's id; 0: nothing, or a split */
  uint64_t split_count, last_split;
  uint64_t references;  /* leaves: chunks named, by a split each once */
  uint64_t chunks_end;  /* leaves: the largest chunk number named, + 1 */
} tp_node_info;
/* Decodes a node of a pool with `blocks` blocks to the chunk. counts and splits may be NULL; splits has room for 256 times
 * 2 + blocks numbers: place, own, blocks. */
int tp_inspect_node(uint64_t id, const void *value, uint64_t length, uint64_t blocks, tp_node_info *out, const tp_counts *counts,
                    uint64_t *splits);
int tp_inspect_page(uint32_t kind, uint64_t key, const void *value, uint64_t length, uint32_t *out); /* 1,024 values; of checksums, 128 */
/* The stored form; *length: the room there is, then what it took. TP_ERANGE: too little. */
int tp_make_node(uint64_t id, const tp_node_info *node, uint64_t blocks, const uint64_t *splits, void *out, uint64_t *length);
int tp_make_page(uint32_t kind, uint64_t key, const uint32_t *values, void *out, uint64_t *length);
typedef struct {
  uint32_t too_low, first_low;   /* how many counts are below the references found, and the first such place */
  uint32_t too_high, first_high; /* above */
  uint32_t unused;               /* with a count, without a reference */
  uint32_t clean, dirty, allocated;
} tp_comparison;
/* A page's 1,024 stored values against references that were found; chunks: the values are those of chunks, else of nodes. */
void tp_compare_counts(const uint32_t *stored, const uint32_t *found, int chunks, tp_comparison *out);
/* The first of a page's 1,024 chunks that has a checksum and is free; -1: there is none. */
int tp_stray_checksum(const uint32_t *counts, const uint32_t *checksums);

/* cdef end */

/* For exports in C. As tp_read, but into a pipe, and by reference to the page cache; then `send` hands it on, and while that runs nothing that
 * the pipe refers to can get another owner. What send returns; or an error, and then the pipe may hold a part. TP_EINVAL: it cannot be done
 * this way now, tp_read can. */
int tp_splice(tp_layer *layer, int pipe_fd, uint64_t length, uint64_t offset, int (*send)(void *ctx), void *ctx);

#endif
