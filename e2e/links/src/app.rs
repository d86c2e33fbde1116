//! The configuration of the service, its start, its command and its routes. `docs/recipes/application.md` quotes `start`.

use std::fmt;

use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::{Json, Router};
use maud::{DOCTYPE, Markup, html};
use outlive::{ClientCertificate, Setup};
use rand::distr::{Alphanumeric, SampleString};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgConnectOptions;
use tower_http::compression::CompressionLayer;
use url::Url;
use utoipa::{OpenApi, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::clicks::Clicks;
use crate::store::{self, Link, Store};
use crate::{api, ingest};

/// Number of letters and digits of a code that the service chooses.
const CODE_LENGTH: usize = 7;
/// Maximum number of letters and digits of a code.
const CODE_LIMIT: usize = 32;
/// Maximum length of a link in bytes.
pub const URL_LIMIT: usize = 2048;

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
    let ingested = store.clone();
    setup.serve("ingest", move |stream, carry| ingest::read(stream, carry, ingested.clone()))?;
    Ok(routes(App { store, clicks }))
}

#[derive(clap::Subcommand)]
pub enum Command {
    /// Bring the tables of the database up to date.
    Migrate,
}

pub async fn execute(command: Command, config: Config, _: &mut Setup) -> anyhow::Result<()> {
    match command {
        Command::Migrate => store::migrate(&config.database_url).await,
    }
}

/// Each route is in the OpenAPI document, because `routes!` adds it to both.
fn routes(app: App) -> Router {
    let (routes, document) = OpenApiRouter::with_openapi(api::Document::openapi())
        .routes(routes!(page))
        .routes(routes!(list, add))
        .routes(routes!(follow))
        .split_for_parts();
    routes.merge(api::routes(&document)).layer(CompressionLayer::new()).with_state(app)
}

/// An HTML page with the links that were followed most
#[utoipa::path(get, path = "/", responses(
    (status = 200, body = str, content_type = "text/html"),
    (status = 503, description = "The database is not available"),
))]
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

/// The links that were followed most, for partners
#[utoipa::path(get, path = "/links", responses(
    (status = 200, body = [Link]),
    (status = 403, description = "The client has presented no certificate"),
    (status = 503, description = "The database is not available"),
))]
async fn list(partner: ClientCertificate, State(app): State<App>) -> Result<Json<Vec<Link>>, Refusal> {
    tracing::info!(partner = partner.common_name(), "a partner reads the links");
    Ok(Json(app.store.most_followed().await?))
}

#[derive(Deserialize, ToSchema)]
pub struct NewLink {
    #[schema(example = "https://example.org/")]
    pub url: String,
    /// Letters and digits. If it is missing, the service chooses a code.
    #[schema(example = "example")]
    pub code: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct Added {
    code: String,
}

/// Adds a link
#[utoipa::path(post, path = "/links", responses(
    (status = 201, body = Added, headers(("location", description = "Path of the link"))),
    (status = 400, description = "The body is not JSON"),
    (status = 409, description = "The code is already in use"),
    (status = 415, description = "The content type is not application/json"),
    (status = 422, description = "The link or the code is invalid"),
    (status = 503, description = "The database is not available"),
))]
async fn add(State(app): State<App>, Json(link): Json<NewLink>) -> Result<Response, Refusal> {
    let code = add_link(link, &app.store).await?;
    let location = [(header::LOCATION, format!("/{code}"))];
    Ok((StatusCode::CREATED, location, Json(Added { code })).into_response())
}

/// Adds a link, and returns its code.
pub async fn add_link(link: NewLink, store: &Store) -> Result<String, Refusal> {
    let url = Url::parse(&link.url)
        .ok()
        .filter(|url| ["http", "https"].contains(&url.scheme()) && link.url.len() <= URL_LIMIT)
        .ok_or(Refusal::Link)?;
    let code = match link.code {
        Some(code) if is_code(&code) => code,
        Some(_) => return Err(Refusal::Code),
        None => Alphanumeric.sample_string(&mut rand::rng(), CODE_LENGTH),
    };
    if !store.add(&code, url.as_str()).await? {
        return Err(Refusal::Taken);
    }
    Ok(code)
}

fn is_code(code: &str) -> bool {
    // /links is the route that adds links, so a link with this code could never be followed.
    (1..=CODE_LIMIT).contains(&code.len())
        && code.bytes().all(|byte| byte.is_ascii_alphanumeric())
        && code != "links"
}

/// Leads to a link
#[utoipa::path(get, path = "/{code}", params(("code" = str, Path)), responses(
    (status = 307, headers(("location", description = "The link"))),
    (status = 404, description = "No link has this code"),
    (status = 503, description = "The database is not available"),
))]
async fn follow(State(app): State<App>, Path(code): Path<String>) -> Result<Redirect, Refusal> {
    let url = app.store.url(&code).await?.ok_or(Refusal::Unknown)?;
    app.clicks.count(code);
    Ok(Redirect::temporary(&url))
}

/// Why a request or a line is refused; the response is 422, 409, 404 or 503.
pub enum Refusal {
    Line,
    Link,
    Code,
    Taken,
    Unknown,
    Database,
}

impl From<sqlx::Error> for Refusal {
    fn from(error: sqlx::Error) -> Self {
        tracing::error!("database query failed: {error}");
        Self::Database
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Line => "expected a link, or a link and a code",
            Self::Link => "expected an http or https link of at most 2048 bytes",
            Self::Code => "invalid code: expected 1 to 32 letters and digits",
            Self::Taken => "this code is already in use",
            Self::Unknown => "no such link",
            Self::Database => "the database is not available",
        })
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self {
            Self::Line | Self::Link | Self::Code => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Taken => StatusCode::CONFLICT,
            Self::Unknown => StatusCode::NOT_FOUND,
            Self::Database => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, format!("{self}\n")).into_response()
    }
}
