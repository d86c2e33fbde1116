//! The label of a request in the metrics: the template of its route, such as `/users/{id}`. Paths would not do, because
//! a client could create a time series with each request.
//!
//! axum knows the template only inside of the route, so [`RouteLabels`] adds a layer to each route, which records the
//! template for the caller of the router in a variable of the thread.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::MatchedPath;
use hyper::Request;
use tower::{Layer, Service};

/// The labels of the routes of one router.
#[derive(Clone, Copy)]
pub(super) struct RouteLabels {
    router: u32,
}

thread_local! {
    /// The labels that this thread has recorded, with the number of their router. They are never freed; there are no
    /// more than routes.
    static SEEN: RefCell<Vec<(u32, &'static str)>> = const { RefCell::new(Vec::new()) };
    /// See [`matched`].
    static MATCHED: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// The label of the route that the router matched during the last poll on this thread, if it matched one.
pub(super) fn matched() -> Option<&'static str> {
    MATCHED.take()
}

impl RouteLabels {
    pub(super) fn new() -> Self {
        static ROUTERS: AtomicU32 = AtomicU32::new(0);
        Self { router: ROUTERS.fetch_add(1, Ordering::Relaxed) }
    }

    /// The label for `path`, if it is known without the router: a template without parameters is equal to its path.
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

/// The outermost layer of each route, which records that the route was matched.
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
