//! What an application sees of the library: it registers its tasks, checks and hooks on `Setup`, reads `Process`, waits on
//! `Shutdown`, and tests its routes with `testing`. Everything public except `run` is defined here, in one place.

pub mod context;
pub mod process;
pub mod readiness;
pub mod setup;
pub mod tasks;
pub mod testing;
