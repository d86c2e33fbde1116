//! The OpenAPI document of the routes, and a page that lists its operations.

use axum::Router;
use axum::http::header;
use axum::routing::get;
use maud::{DOCTYPE, Markup, html};
use utoipa::OpenApi;
use utoipa::openapi::path::PathItem;

/// The beginning of the document: name, version and description of the package.
#[derive(OpenApi)]
pub struct Document;

/// The routes of the document and of the page. No link has a code with a dot, so they hide none.
pub fn routes<S: Clone + Send + Sync + 'static>(document: &utoipa::openapi::OpenApi) -> Router<S> {
    let page = page(document);
    let json = document.to_json().expect("it has no map with other keys than text");
    let json = ([(header::CONTENT_TYPE, "application/json")], json);
    Router::new()
        .route("/openapi.json", get(async move || json))
        .route("/openapi.html", get(async move || page))
}

fn page(document: &utoipa::openapi::OpenApi) -> Markup {
    let operations = document.paths.paths.iter().flat_map(|(path, item)| {
        let PathItem { get, post, .. } = item;
        let operations = [("GET", get), ("POST", post)].into_iter();
        operations.filter_map(move |(method, operation)| Some((method, path, operation.as_ref()?)))
    });
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                title { (document.info.title) " " (document.info.version) }
            }
            body {
                h1 { (document.info.title) " " (document.info.version) }
                p { a href="openapi.json" { "openapi.json" } }
                table {
                    @for (method, path, operation) in operations {
                        tr {
                            td { (method) " " (path) }
                            td { @if let Some(summary) = &operation.summary { (summary) } }
                            td { @for status in operation.responses.responses.keys() { (status) " " } }
                        }
                    }
                }
            }
        }
    }
}
