/* map.h - the block map of a layer: a persistent radix tree of nodes, changed by copying what is shared.
 *
 * The tree of height h covers 256^h chunks; it grows at the root when a higher index is written. An absent child is a
 * hole. Reading costs the same however many snapshots there are: a layer's tree is whole, no chain is walked.
 * All functions: layer lock held (exclusively where the map changes), mutex held.
 */
#ifndef TP_MAP_H
#define TP_MAP_H

#include "pool.h"

/* Finds the leaf for reading; *out NULL: nothing is mapped there. */
int map_find(tp_layer *layer, uint64_t leaf_index, struct node **out);

/* Finds the leaf if no other layer has it: every node on the way has one owner. *out NULL: others do, or nothing is there. */
int map_find_own(tp_layer *layer, uint64_t leaf_index, struct node **out);

/* Finds the node of that level above (or at) the leaf, owned by this layer alone: shared nodes on the way are copied,
 * missing ones made. *mine: no other layer had the path in the committed state either. */
int map_own(tp_layer *layer, uint64_t leaf_index, unsigned level, struct node **out, bool *mine);

/* Like map_own for a leaf, through the layer's slot, which pins the leaf until the layer's lock is given up. Afterwards
 * leaf->mine is valid for the layer's epoch if the path is *mine. */
int map_own_leaf(tp_layer *layer, uint64_t leaf_index, struct node **out, bool *mine);

/* Puts the leaf into its slot for lock-free finding under the shared lock. */
int map_fill_slot(tp_layer *layer, uint64_t leaf_index);

/* Replaces an entry. Counts of what old and new name must be loaded, and new's chunks counted already. */
void map_set_entry(tp_layer *layer, struct node *leaf, unsigned i, uint64_t entry);

/* Unmaps the whole leaf, without copying it if it is shared; and nodes above that become empty. */
int map_cut_leaf(tp_layer *layer, uint64_t leaf_index);

/* Puts another layer's leaf, which the two share from then on, in the place of the one that is there. */
int map_share_leaf(tp_layer *layer, uint64_t leaf_index, struct node *leaf);

/* Next leaf index >= from whose leaf exists; UINT64_MAX: none. */
int map_next_leaf(tp_layer *layer, uint64_t from, uint64_t *leaf_index);

static inline struct slot *layer_slot(const tp_layer *layer, uint64_t leaf_index) {
  return layer->slots == NULL ? NULL : &layer->slots[leaf_index % SLOT_COUNT];
}

static inline uint64_t split_chunk_at(uint64_t entry, unsigned block) {
  return entry_is_split(entry) ? entry_read(&entry_split(entry)->block[block]) : entry;
}

#endif
