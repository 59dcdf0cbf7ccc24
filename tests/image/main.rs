//! The image, as users have it.

mod image;
