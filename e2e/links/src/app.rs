//! The configuration of the service, its start and its routes. `docs/recipes/application.md` quotes `start`.

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use maud::{DOCTYPE, Markup, html};
use outlive::Setup;
use rand::distr::{Alphanumeric, SampleString};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgConnectOptions;
use tower_http::compression::CompressionLayer;
use url::Url;

use crate::clicks::Clicks;
use crate::store::Store;

/// Number of letters and digits of a code that the service chooses.
const CODE_LENGTH: usize = 7;
/// Maximum number of letters and digits of a code.
const CODE_LIMIT: usize = 32;
/// Maximum length of a link in bytes.
const URL_LIMIT: usize = 2048;

/// A link shortener on PostgreSQL.
#[derive(clap::Parser)]
#[command(version, about)]
pub struct Config {
    /// URL of the PostgreSQL database that stores the links.
    #[arg(
        long,
        env = "LINKS_DATABASE_URL",
        value_name = "URL",
        hide_env_values = true,
        default_value = "postgres:///links?host=/run/postgresql&user=links"
    )]
    database_url: PgConnectOptions,
}

#[derive(Clone)]
struct App {
    store: Store,
    clicks: Clicks,
}

pub async fn start(config: Config, setup: &mut Setup) -> anyhow::Result<Router> {
    let store = Store::open(&config.database_url).await?;
    let clicks = Clicks::new(store.clone())?;
    setup.register_metric(clicks.total())?;
    let checked = store.clone();
    setup.readiness_check("database", move || checked.ping());
    let counted = clicks.clone();
    setup.background("count clicks", |end| counted.flush(end));
    setup.on_exit("close the database", store.close());
    Ok(routes(App { store, clicks }))
}

fn routes(app: App) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/links", post(add))
        .route("/{code}", get(follow))
        .layer(CompressionLayer::new())
        .with_state(app)
}

/// An HTML page with the links that were followed most.
async fn page(State(app): State<App>) -> Result<Markup, Refusal> {
    let links = app.store.most_followed().await?;
    Ok(html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "Links" }
            }
            body {
                h1 { "Links" }
                table {
                    tr { th { "code" } th { "leads to" } th { "followed" } }
                    @for link in links {
                        tr {
                            td { a href={ "/" (link.code) } { (link.code) } }
                            td { (link.url) }
                            td { (link.clicks) }
                        }
                    }
                }
            }
        }
    })
}

#[derive(Deserialize)]
struct NewLink {
    url: String,
    /// If it is missing, the service chooses a code.
    code: Option<String>,
}

#[derive(Serialize)]
struct Added {
    code: String,
}

/// Adds a link. The body is JSON, such as `{"url": "https://example.org/", "code": "example"}`; `code` is optional and
/// consists of letters and digits.
async fn add(State(app): State<App>, Json(link): Json<NewLink>) -> Result<Response, Refusal> {
    let url = Url::parse(&link.url)
        .ok()
        .filter(|url| ["http", "https"].contains(&url.scheme()) && link.url.len() <= URL_LIMIT)
        .ok_or(Refusal::Link)?;
    let code = match link.code {
        Some(code) if is_code(&code) => code,
        Some(_) => return Err(Refusal::Code),
        None => Alphanumeric.sample_string(&mut rand::rng(), CODE_LENGTH),
    };
    if !app.store.add(&code, url.as_str()).await? {
        return Err(Refusal::Taken);
    }
    let location = [(header::LOCATION, format!("/{code}"))];
    Ok((StatusCode::CREATED, location, Json(Added { code })).into_response())
}

fn is_code(code: &str) -> bool {
    // /links is the route that adds links, so a link with this code could never be followed.
    (1..=CODE_LIMIT).contains(&code.len())
        && code.bytes().all(|byte| byte.is_ascii_alphanumeric())
        && code != "links"
}

async fn follow(State(app): State<App>, Path(code): Path<String>) -> Result<Redirect, Refusal> {
    let url = app.store.url(&code).await?.ok_or(Refusal::Unknown)?;
    app.clicks.count(code);
    Ok(Redirect::temporary(&url))
}

/// Why a request is refused; the response is 422, 409, 404 or 503.
enum Refusal {
    Link,
    Code,
    Taken,
    Unknown,
    Database(sqlx::Error),
}

impl From<sqlx::Error> for Refusal {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::Link => {
                (StatusCode::UNPROCESSABLE_ENTITY, "expected an http or https link of at most 2048 bytes\n")
            }
            Self::Code => {
                (StatusCode::UNPROCESSABLE_ENTITY, "invalid code: expected 1 to 32 letters and digits\n")
            }
            Self::Taken => (StatusCode::CONFLICT, "this code is already in use\n"),
            Self::Unknown => (StatusCode::NOT_FOUND, "no such link\n"),
            Self::Database(error) => {
                tracing::error!("database query failed: {error}");
                (StatusCode::SERVICE_UNAVAILABLE, "the database is not available\n")
            }
        }
        .into_response()
    }
}
