//! The life of the process, from the command line to the exit code: it reads its configuration (`config.rs`, `cli.rs`),
//! starts, serves and stops (`run.rs`), and ends without losing a request (`drain.rs`). `admin.rs` answers for the state
//! of the whole process. This folder may name every other folder, and no other folder names it.

mod admin;
mod cli;
mod config;
mod drain;
mod run;

pub use cli::command;
pub use run::run;
