//! The life of the process, from the command line to the exit code: it reads its configuration (`config.rs`, `cli.rs`),
//! starts (`start.rs`), serves (`serve.rs`), drains (`drain.rs`) and stops (`stop.rs`); `run.rs` calls them in this order. `admin.rs` answers for the state
//! of the whole process. This folder may name every other folder, and no other folder names it.

mod admin;
mod cli;
mod config;
mod drain;
mod run;
mod serve;
mod start;
mod stop;

pub use cli::command;
pub use run::run;
