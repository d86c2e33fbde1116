//! The life of the process, from the command line to the exit code.
//!
//! `run.rs` calls the steps in order: the process reads its configuration (`config.rs`, `cli.rs`), starts (`start.rs`),
//! serves (`serve.rs`), and stops (`stop.rs`), for which it drains its connections (`drain.rs`). `admin.rs` has the
//! routes of the admin listeners, which report the state of the whole process. This folder may import every other
//! folder, and no other folder imports it. A command of the application runs in `own_command.rs` instead.

mod admin;
mod cli;
mod config;
mod drain;
mod own_command;
mod run;
mod runtime;
mod serve;
mod start;
mod stop;

pub use cli::{command, command_with};
pub use run::{run, run_with};
