//! What routes are called where requests are counted: by their templates, such as `/users/{id}`.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::MatchedPath;
use hyper::Request;
use tower::{Layer, Service};

/// Those of one router.
#[derive(Clone, Copy)]
pub(super) struct RouteLabels {
    router: u32,
}

thread_local! {
    /// The labels that this thread has met, with the number of their router. They stay, as the routes do.
    static SEEN: RefCell<Vec<(u32, &'static str)>> = const { RefCell::new(Vec::new()) };
    /// See [`matched`].
    static MATCHED: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// The label of the route that a router has chosen when it was just polled, if it did.
pub(super) fn matched() -> Option<&'static str> {
    MATCHED.take()
}

impl RouteLabels {
    pub(super) fn new() -> Self {
        static ROUTERS: AtomicU32 = AtomicU32::new(0);
        Self { router: ROUTERS.fetch_add(1, Ordering::Relaxed) }
    }

    /// Of the route that leads to `path`, where that is known without asking the router: a template without
    /// parameters is a path.
    pub(super) fn of_path(self, path: &str) -> Option<&'static str> {
        self.seen(path).filter(|label| !label.contains('{'))
    }

    fn of_template(self, template: &str) -> &'static str {
        self.seen(template).unwrap_or_else(|| {
            let label: &'static str = template.to_owned().leak();
            SEEN.with_borrow_mut(|met| met.push((self.router, label)));
            label
        })
    }

    fn seen(self, text: &str) -> Option<&'static str> {
        let is_it = |(router, label): &&(u32, &str)| *router == self.router && *label == text;
        SEEN.with_borrow(|met| met.iter().find(is_it).map(|(_, label)| *label))
    }
}

impl<S> Layer<S> for RouteLabels {
    type Service = RecordRoute<S>;

    fn layer(&self, inner: S) -> RecordRoute<S> {
        RecordRoute { inner, labels: *self }
    }
}

/// The outermost layer of each route: tells that it was chosen.
#[derive(Clone)]
pub(super) struct RecordRoute<S> {
    inner: S,
    labels: RouteLabels,
}

impl<S: Service<Request<Body>>> Service<Request<Body>> for RecordRoute<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> S::Future {
        if let Some(template) = request.extensions().get::<MatchedPath>() {
            MATCHED.set(Some(self.labels.of_template(template.as_str())));
        }
        self.inner.call(request)
    }
}
