//! The filter of the log, which `--log` and `RUST_LOG` set: levels, each for all targets or for those that begin with a
//! name.
//!
//! `EnvFilter` of `tracing_subscriber` can also select spans and values of their fields. It is behind a feature,
//! because its crates for regular expressions add 0.6 MB to the binary.

/// The type of the filter.
#[cfg(not(feature = "span-filter"))]
pub type LogFilter = tracing_subscriber::filter::Targets;
/// The type of the filter.
#[cfg(feature = "span-filter")]
pub type LogFilter = tracing_subscriber::EnvFilter;

/// The filter that `text` describes: `info` or `info,request=debug`. None if it is invalid. An empty one logs errors.
pub fn parse(text: &str) -> Option<LogFilter> {
    // Without the feature, a span would be taken for the name of a target, and would match nothing.
    if cfg!(not(feature = "span-filter")) && text.contains('[') {
        return None;
    }
    let directives: Vec<_> = text.split(',').filter(|directive| !directive.is_empty()).collect();
    if directives.is_empty() { "error".parse() } else { directives.join(",").parse() }.ok()
}

#[cfg(test)]
mod tests {
    use tracing::level_filters::LevelFilter;
    use tracing::{Level, enabled};
    use tracing_subscriber::prelude::*;

    use super::*;

    /// The most detailed level that `text` enables for the target `request`.
    fn level_of_requests(text: &str) -> LevelFilter {
        let filter = parse(text).expect("the filter is valid");
        let log = tracing_subscriber::fmt::layer().with_filter(filter);
        let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(log));
        if enabled!(target: "request", Level::TRACE) {
            LevelFilter::TRACE
        } else if enabled!(target: "request", Level::DEBUG) {
            LevelFilter::DEBUG
        } else if enabled!(target: "request", Level::INFO) {
            LevelFilter::INFO
        } else if enabled!(target: "request", Level::WARN) {
            LevelFilter::WARN
        } else if enabled!(target: "request", Level::ERROR) {
            LevelFilter::ERROR
        } else {
            LevelFilter::OFF
        }
    }

    #[test]
    fn filter_enables_the_level_of_the_longest_name_that_matches() {
        for (text, level) in [
            ("info", LevelFilter::INFO),
            ("WARN", LevelFilter::WARN),
            ("off", LevelFilter::OFF),
            ("", LevelFilter::ERROR),
            ("info,request=debug", LevelFilter::DEBUG),
            ("request=debug,", LevelFilter::DEBUG),
            ("off,req=debug,request=warn", LevelFilter::WARN),
            ("info,other=debug", LevelFilter::INFO),
            ("other=debug", LevelFilter::OFF),
            ("request", LevelFilter::TRACE),
        ] {
            assert_eq!(level_of_requests(text), level, "{text:?}");
        }
    }

    #[test]
    fn invalid_filters_are_refused() {
        for text in ["info,request=loud", "a=b=c"] {
            assert!(parse(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn spans_are_accepted_with_the_feature_only() {
        for text in ["[request]=debug", "info,app[request{path=\"/\"}]=debug"] {
            assert_eq!(parse(text).is_some(), cfg!(feature = "span-filter"), "{text:?}");
        }
    }
}
