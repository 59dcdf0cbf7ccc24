//! The real gateway under the supervisor.

mod life;
