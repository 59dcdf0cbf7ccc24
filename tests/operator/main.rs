//! What an operator has in hand: the documents and the compose file, the key of the volume, and SSH.

mod cache;
mod documents;
mod fixtures;
mod owner;
mod pinning;
mod sources;
mod ssh;
