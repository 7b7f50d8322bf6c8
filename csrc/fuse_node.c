/* fuse_node.c - from an inode number to a layer's handle.
 *
 * A hash table of handles, filled on demand and emptied by the kernel's FORGET. An entry that is gone too early
 * is made again by the next request, so the kernel's lookup counts need not be kept. Whoever works with a node holds
 * one of its users; the table holds one more; the handle is put with the last.
 */
#define _GNU_SOURCE 1
#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "fuse.h"

void fuse_nodes_init(struct fuse_nodes *nodes) {
  int error = pthread_rwlock_init(&nodes->lock, NULL);
  assert(error == 0);
  (void)error;
}

void fuse_nodes_clear(struct fuse_nodes *nodes) {
  for (unsigned i = 0; i < FUSE_BUCKETS; i++) {
    while (nodes->buckets[i] != NULL) {
      struct fuse_node *node = nodes->buckets[i];
      nodes->buckets[i] = node->next;
      fuse_node_put(node);
    }
  }
  pthread_rwlock_destroy(&nodes->lock);
}

static struct fuse_node **find(struct fuse_nodes *nodes, uint64_t layer_id) {
  struct fuse_node **at = &nodes->buckets[layer_id % FUSE_BUCKETS];
  while (*at != NULL && (*at)->layer_id != layer_id) at = &(*at)->next;
  return at;
}

static int node_make(tp_fuse *fuse, uint64_t layer_id, struct fuse_node **out) {
  struct fuse_node *node = calloc(1, sizeof *node);
  if (node == NULL) return -ENOMEM;
  int code = tp_layer_get(fuse->pool, layer_id, &node->layer);
  if (code < 0) {
    free(node);
    return code == TP_ENOENT ? -ESTALE : fuse_errno(code);
  }
  node->layer_id = layer_id;
  atomic_init(&node->users, 1);
  atomic_init(&node->modified_ns, fuse->started_ns);
  *out = node;
  return 0;
}

int fuse_node_get(tp_fuse *fuse, uint64_t inode, struct fuse_node **out) {
  if (inode <= FUSE_ROOT_ID) return inode == FUSE_ROOT_ID ? -EISDIR : -EINVAL;
  uint64_t layer_id = inode - 1;
  struct fuse_nodes *nodes = &fuse->nodes;
  pthread_rwlock_rdlock(&nodes->lock);
  struct fuse_node *node = *find(nodes, layer_id);
  if (node != NULL) atomic_fetch_add(&node->users, 1);
  pthread_rwlock_unlock(&nodes->lock);
  if (node != NULL) {
    *out = node;
    return 0;
  }
  struct fuse_node *made = NULL;
  int error = node_make(fuse, layer_id, &made);
  if (error < 0) return error;
  pthread_rwlock_wrlock(&nodes->lock);
  struct fuse_node **at = find(nodes, layer_id);
  bool first = *at == NULL;
  if (first) *at = made; /* with the user it was born with */
  node = *at;
  atomic_fetch_add(&node->users, 1);
  pthread_rwlock_unlock(&nodes->lock);
  if (!first) fuse_node_put(made);
  *out = node;
  return 0;
}

void fuse_node_put(struct fuse_node *node) {
  if (atomic_fetch_sub(&node->users, 1) > 1) return;
  tp_layer_put(node->layer);
  free(node);
}

void fuse_node_forget(tp_fuse *fuse, uint64_t inode) {
  if (inode <= FUSE_ROOT_ID) return;
  struct fuse_nodes *nodes = &fuse->nodes;
  pthread_rwlock_wrlock(&nodes->lock);
  struct fuse_node **at = find(nodes, inode - 1);
  struct fuse_node *node = *at;
  if (node != NULL) *at = node->next;
  pthread_rwlock_unlock(&nodes->lock);
  if (node != NULL) fuse_node_put(node);
}
