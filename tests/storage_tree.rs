//! The tree and the bucket stay equal, whatever is done to the tree.
