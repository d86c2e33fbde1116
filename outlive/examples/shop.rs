//! A service with a secret and with a command of its own, `shop migrate`.
//!
//! `cargo run --example shop -- migrate --dry-run --database-password open-sesame`

use std::process::ExitCode;

use anyhow::ensure;
use axum::Router;
use axum::routing::get;
use outlive::{Secret, Setup};
use tracing::info;

/// Sells things.
#[derive(clap::Parser)]
#[command(name = "shop", version, about)]
struct Config {
    /// Name of the database.
    #[arg(long, default_value = "shop")]
    database: String,
    /// Password of the database.
    #[arg(long)]
    database_password: Secret,
}

/// The tables of the database.
const TABLES: [&str; 2] = ["customers", "orders"];

async fn start(config: Config, _: &mut Setup) -> anyhow::Result<Router> {
    connect(&config)?;
    Ok(Router::new().route("/", get(async move || config.database)))
}

/// Stands for a connection to a database, which would check the password.
fn connect(config: &Config) -> anyhow::Result<()> {
    ensure!(config.database_password.expose() == "open-sesame", "the database refuses the password");
    Ok(())
}

#[derive(clap::Subcommand)]
enum Command {
    /// Bring the tables of the database up to date.
    Migrate {
        /// Only print what would be done.
        #[arg(long)]
        dry_run: bool,
    },
}

async fn execute(command: Command, config: Config, setup: &mut Setup) -> anyhow::Result<()> {
    let stop = setup.shutdown();
    match command {
        Command::Migrate { dry_run } => {
            connect(&config)?;
            for table in TABLES {
                ensure!(!stop.is_cancelled(), "stopped before the table {table}");
                info!(dry_run, "the table {table} is up to date");
            }
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    outlive::run_with(start, execute)
}
