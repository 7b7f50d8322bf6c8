/* nbd_ops.c - what NBD's requests ask for: reading, writing, zeros, caching, and what is where. */
#include "nbd.h"

#include <endian.h>
#include <string.h>

#include "common.h"

#define DRAIN_BYTES_MAX (64u << 20) /* of a payload that is too large, read and thrown away */
#define EXTENTS 512u                /* that one BLOCK_STATUS tells of, per context */

static bool in_range(const struct nbd_connection *c, const struct nbd_request *r) {
  uint64_t size = tp_layer_size(c->layer);
  return r->offset <= size && r->length <= size - r->offset;
}

static bool fills_space(const struct nbd_request *r) { return r->type == NBD_CMD_WRITE || r->type == NBD_CMD_WRITE_ZEROES; }

static bool is_structured(const struct nbd_connection *c) { return c->options->structured != 0; }

/* --- reading --- */

/* A structured reply comes in pieces that the processor's cache holds, unless the client wants it whole. */
static bool do_read(struct nbd_connection *c, const struct nbd_request *r) {
  bool structured = is_structured(c);
  bool whole = !structured || (r->flags & NBD_CMD_FLAG_DF);
  if (r->length > NBD_PAYLOAD_MAX) return nbd_answer(&c->out, r->cookie, structured && whole ? NBD_EOVERFLOW : NBD_EINVAL, structured);
  if (r->length == 0 || !in_range(c, r)) return nbd_answer(&c->out, r->cookie, r->length == 0 ? 0 : NBD_EINVAL, structured);
  uint32_t piece = whole ? r->length : NBD_BATCH_BYTES;
  for (uint32_t done = 0; done < r->length; done += piece) {
    uint32_t length = (uint32_t)min_u64(piece, r->length - done);
    if (!nbd_room(&c->out, length)) return false;
    uint8_t *data = c->out.arena + c->out.arena_used;
    int rc = tp_read(c->layer, data, length, r->offset + done);
    if (rc != TP_OK) return nbd_answer(&c->out, r->cookie, nbd_error(rc, false), structured);
    if (structured) {
      struct nbd_reply *reply = nbd_add(&c->out, sizeof *reply, data, length);
      nbd_fill_structured(reply, r->cookie, NBD_REPLY_OFFSET_DATA, done + length == r->length ? NBD_REPLY_DONE : 0, sizeof reply->offset + length);
      reply->offset = htobe64(r->offset + done);
    } else {
      nbd_fill_simple(nbd_add(&c->out, sizeof(struct nbd_simple_head), data, length), r->cookie, 0);
    }
  }
  return true;
}

/* --- changing and caching --- */

#define ZEROS_BYTES (512u << 10)
#define SCRATCH_BYTES (64u << 10)

static int write_zeros(tp_layer *layer, uint64_t length, uint64_t offset) {
  static const uint8_t zeros[ZEROS_BYTES];
  return tp_write_patient(layer, zeros, length, offset);
}

static int cache(tp_layer *layer, uint64_t length, uint64_t offset) {
  uint8_t scratch[SCRATCH_BYTES] __attribute__((aligned(64)));
  return tp_read(layer, scratch, length, offset);
}

static int in_pieces(tp_layer *layer, const struct nbd_request *r, uint64_t most, int (*work)(tp_layer *, uint64_t, uint64_t)) {
  int rc = TP_OK;
  for (uint64_t done = 0; rc == TP_OK && done < r->length; done += most) {
    rc = work(layer, min_u64(most, r->length - done), r->offset + done);
  }
  return rc;
}

static bool do_change(struct nbd_outbox *out, const struct nbd_request *r, const uint8_t *payload) {
  tp_layer *layer = out->connection->layer;
  int rc;
  if (r->type == NBD_CMD_WRITE) rc = tp_write_patient(layer, payload, r->length, r->offset);
  else if (r->type == NBD_CMD_CACHE) rc = in_pieces(layer, r, SCRATCH_BYTES, cache);
  else if (r->flags & NBD_CMD_FLAG_NO_HOLE) rc = in_pieces(layer, r, ZEROS_BYTES, write_zeros);
  else rc = tp_discard(layer, r->offset, r->length);
  if (rc == TP_OK && (r->flags & NBD_CMD_FLAG_FUA)) return nbd_answer_flushed(out, r->cookie);
  return nbd_answer(out, r->cookie, nbd_error(rc, fills_space(r)), false);
}

bool nbd_do_job(struct nbd_outbox *out, const struct nbd_job *job) { return do_change(out, &job->request, job->memory); }

/* WRITE, WRITE_ZEROES, TRIM and CACHE: what is small at once, what is large as a job. A write that never came whole is none. */
static bool serve_change(struct nbd_connection *c, const struct nbd_request *r) {
  uint32_t payload = r->type == NBD_CMD_WRITE ? r->length : 0, error = 0;
  bool no_hole = (r->flags & NBD_CMD_FLAG_NO_HOLE) != 0;
  if (r->type != NBD_CMD_CACHE && c->options->read_only) error = NBD_EPERM;
  else if (payload > NBD_PAYLOAD_MAX) error = NBD_EINVAL;
  else if (!in_range(c, r)) error = fills_space(r) ? NBD_ENOSPC : NBD_EINVAL;
  else if (no_hole && (r->flags & NBD_CMD_FLAG_FAST_ZERO)) error = NBD_ENOTSUP; /* zeros that take space are written */
  bool large = error == 0 && r->length > NBD_TAKE_MAX;
  struct nbd_job *job = large ? nbd_free_job(c) : NULL;
  if (large && job == NULL) error = NBD_ENOMEM;
  if (error != 0) return payload <= DRAIN_BYTES_MAX && nbd_drain(c, payload) && nbd_answer(&c->out, r->cookie, error, false);
  if (!large) {
    const uint8_t *data = nbd_take(c, payload);
    return data != NULL && do_change(&c->out, r, data);
  }
  job->request = *r;
  return nbd_take_large(c, job->memory, payload) && nbd_start_job(c, job);
}

/* --- block status --- */

struct status {
  uint32_t *out; /* pairs of length and flags, as they are sent */
  unsigned count;
  uint64_t position, end;
};

/* A range up to `end`, joined to the last where it is of the same kind. False: full. */
static bool put_status(struct status *s, uint64_t end, uint32_t flags) {
  end = min_u64(end, s->end);
  if (end <= s->position) return true;
  uint64_t length = end - s->position;
  uint32_t *last = s->count > 0 ? &s->out[(s->count - 1) * 2] : NULL;
  if (last != NULL && last[1] == htobe32(flags)) {
    last[0] = htobe32((uint32_t)(be32toh(last[0]) + length));
  } else if (s->count < EXTENTS) {
    s->out[s->count * 2] = htobe32((uint32_t)length);
    s->out[s->count * 2 + 1] = htobe32(flags);
    s->count++;
  } else {
    return false;
  }
  s->position = end;
  return true;
}

/* since NULL: data and holes. Else: what has changed since that layer. */
static int collect_status(tp_layer *layer, tp_layer *since, struct status *s) {
  tp_extent extents[64];
  uint64_t cursor = s->position;
  while (s->position < s->end) {
    uint64_t before = cursor;
    int64_t count = since == NULL ? tp_extents(layer, &cursor, extents, 64) : tp_diff(since, layer, &cursor, extents, 64);
    if (count < 0) return (int)count;
    for (int64_t k = 0; k < count; k++) {
      const tp_extent *e = &extents[k];
      bool fits = since == NULL ? put_status(s, e->offset + e->length, e->data ? 0 : NBD_STATE_HOLE | NBD_STATE_ZERO)
                                : put_status(s, e->offset, 0) && put_status(s, e->offset + e->length, NBD_STATE_CHANGED);
      if (!fits) return TP_OK;
    }
    if (count == 0 && cursor == before) break; /* the end: nothing has changed from here on */
  }
  (void)put_status(s, s->end, since == NULL ? NBD_STATE_HOLE | NBD_STATE_ZERO : 0);
  return TP_OK;
}

static bool do_status(struct nbd_connection *c, const struct nbd_request *r) {
  const tp_nbd_options *options = c->options;
  if (options->context_count == 0 || r->length == 0 || !in_range(c, r)) return nbd_answer(&c->out, r->cookie, NBD_EINVAL, is_structured(c));
  for (uint64_t k = 0; k < options->context_count; k++) {
    if (!nbd_room(&c->out, sizeof(uint32_t) * (1 + 2 * EXTENTS))) return false;
    uint8_t *data = c->out.arena + c->out.arena_used;
    uint32_t id = htobe32(options->contexts[k].id);
    memcpy(data, &id, sizeof id);
    struct status s = {.out = (uint32_t *)(void *)(data + sizeof id), .position = r->offset, .end = r->offset + r->length};
    int rc = collect_status(c->layer, options->contexts[k].since, &s);
    if (rc != TP_OK || s.count == 0) return nbd_answer(&c->out, r->cookie, rc != TP_OK ? nbd_error(rc, false) : NBD_EIO, true);
    if (r->flags & NBD_CMD_FLAG_REQ_ONE) s.count = 1;
    size_t length = sizeof(uint32_t) * (1 + 2 * (size_t)s.count);
    struct nbd_reply *reply = nbd_add(&c->out, sizeof reply->head, data, length);
    nbd_fill_structured(reply, r->cookie, NBD_REPLY_BLOCK_STATUS, k + 1 == options->context_count ? NBD_REPLY_DONE : 0, length);
  }
  return true;
}

/* --- any request --- */

static uint16_t known_flags(uint16_t type) {
  switch (type) {
    case NBD_CMD_READ: return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF;
    case NBD_CMD_WRITE:
    case NBD_CMD_TRIM: return NBD_CMD_FLAG_FUA;
    case NBD_CMD_WRITE_ZEROES: return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
    case NBD_CMD_BLOCK_STATUS: return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE;
    default: return NBD_CMD_FLAG_FUA;
  }
}

bool nbd_serve_request(struct nbd_connection *c, const struct nbd_request *r) {
  if (r->type == NBD_CMD_DISC) return false; /* it has no reply, whatever its flags say */
  bool structured_only = is_structured(c) && (r->type == NBD_CMD_READ || r->type == NBD_CMD_BLOCK_STATUS);
  if (r->flags & ~known_flags(r->type)) {
    if (r->type == NBD_CMD_WRITE && (r->length > DRAIN_BYTES_MAX || !nbd_drain(c, r->length))) return false;
    return nbd_answer(&c->out, r->cookie, NBD_EINVAL, structured_only);
  }
  switch (r->type) {
    case NBD_CMD_READ: return do_read(c, r);
    case NBD_CMD_WRITE:
    case NBD_CMD_TRIM:
    case NBD_CMD_WRITE_ZEROES:
    case NBD_CMD_CACHE: return serve_change(c, r);
    case NBD_CMD_FLUSH: return nbd_answer_flushed(&c->out, r->cookie);
    case NBD_CMD_BLOCK_STATUS: return do_status(c, r);
    default: return nbd_answer(&c->out, r->cookie, NBD_EINVAL, false);
  }
}
