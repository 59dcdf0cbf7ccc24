//! What an operator has in hand: the documents and the compose file, the key of the volume, and SSH.

mod documents;
mod owner;
mod ssh;
