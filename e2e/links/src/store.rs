//! The PostgreSQL database: its connections, its migrations and all queries.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Serialize;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use utoipa::ToSchema;

use crate::clicks::Counts;

/// How long a request waits for a database connection before it is answered with 503.
const ACQUIRE_LIMIT: Duration = Duration::from_secs(3);
/// During a reload two processes run, so the server must allow twice as many.
const MAX_CONNECTIONS: u32 = 10;
/// During a reload two releases use the tables, and a release may be rolled back. So a migration must not remove
/// anything that the previous release needs, and `ignore_missing` accepts migrations of a later release.
static MIGRATIONS: Migrator = Migrator { ignore_missing: true, ..sqlx::migrate!() };

#[derive(Clone)]
pub struct Store {
    pool: PgPool,
}

/// A link, and the number of its clicks.
#[derive(Serialize, ToSchema)]
pub struct Link {
    pub code: String,
    pub url: String,
    pub clicks: i64,
}

impl Store {
    /// Connects to a database whose tables `migrate` has created for this release or a later one.
    pub async fn open(database: &PgConnectOptions) -> anyhow::Result<Self> {
        let pool = connect(database).await?;
        let applied: Vec<i64> = sqlx::query_scalar("select version from _sqlx_migrations where success")
            .fetch_all(&pool)
            .await
            .context("could not read which migrations were applied: run `links migrate`")?;
        let missing = MIGRATIONS.iter().filter(|migration| !applied.contains(&migration.version)).count();
        ensure!(missing == 0, "the database lacks {missing} migrations: run `links migrate`");
        Ok(Self { pool })
    }

    pub fn ping(&self) -> impl Future<Output = anyhow::Result<()>> + Send + use<> {
        let pool = self.pool.clone();
        async move {
            sqlx::query("select 1").execute(&pool).await?;
            Ok(())
        }
    }

    pub fn close(&self) -> impl Future<Output = anyhow::Result<()>> + Send + use<> {
        let pool = self.pool.clone();
        async move {
            pool.close().await;
            Ok(())
        }
    }

    /// Returns false if the code is in use already.
    pub async fn add(&self, code: &str, url: &str) -> sqlx::Result<bool> {
        let done = sqlx::query("insert into links (code, url) values ($1, $2) on conflict do nothing")
            .bind(code)
            .bind(url)
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() == 1)
    }

    pub async fn url(&self, code: &str) -> sqlx::Result<Option<String>> {
        sqlx::query_scalar("select url from links where code = $1")
            .bind(code)
            .fetch_optional(&self.pool)
            .await
    }

    /// The ten links with the most clicks.
    pub async fn most_followed(&self) -> sqlx::Result<Vec<Link>> {
        let rows: Vec<(String, String, i64)> =
            sqlx::query_as("select code, url, clicks from links order by clicks desc, code limit 10")
                .fetch_all(&self.pool)
                .await?;
        Ok(rows.into_iter().map(|(code, url, clicks)| Link { code, url, clicks }).collect())
    }

    /// Adds `counts`. Further calls with the same `id` add nothing, so that a call can be repeated after any error.
    pub async fn add_clicks(&self, id: i64, counts: &Counts) -> anyhow::Result<()> {
        let (codes, counts): (Vec<&str>, Vec<i64>) =
            counts.iter().map(|(code, count)| (code.as_str(), *count)).unzip();
        let add = "with old as (delete from flushes where at < now() - interval '1 day'), \
            new as (insert into flushes (id) values ($1) on conflict do nothing returning id) \
            update links set clicks = links.clicks + counts.clicks \
            from new, unnest($2::text[], $3::bigint[]) as counts (code, clicks) where links.code = counts.code";
        sqlx::query(add)
            .bind(id)
            .bind(codes)
            .bind(counts)
            .execute(&self.pool)
            .await
            .context("could not add clicks to the database")?;
        Ok(())
    }
}

/// Brings the tables to the form that this release needs.
pub async fn migrate(database: &PgConnectOptions) -> anyhow::Result<()> {
    let pool = connect(database).await?;
    MIGRATIONS.run(&pool).await.context("could not update the database tables")
}

async fn connect(database: &PgConnectOptions) -> anyhow::Result<PgPool> {
    let place = match database.get_socket() {
        Some(folder) => folder.display().to_string(),
        None => format!("{}:{}", database.get_host(), database.get_port()),
    };
    PgPoolOptions::new()
        .max_connections(MAX_CONNECTIONS)
        .acquire_timeout(ACQUIRE_LIMIT)
        // Without this, PostgreSQL reports on each start that the migrations table exists already.
        .connect_with(database.clone().options([("client_min_messages", "warning")]))
        .await
        .with_context(|| format!("could not reach the database at {place} (--database-url)"))
}
