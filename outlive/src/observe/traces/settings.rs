//! The standard variables of OpenTelemetry (`OTEL_*`) that concern the sending of traces. The SDK itself reads those of
//! the sampler, the limits of spans, and the attributes of the resource.

use std::time::Duration;

use anyhow::anyhow;

use crate::os::exit::{Failure, Result};

/// Where and how spans are sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub endpoint: String,
    /// The maximum number of spans in the queue.
    pub queue: usize,
    /// The maximum number of spans in a request.
    pub batch: usize,
    /// How long a span waits at most before it is sent.
    pub delay: Duration,
    /// How long the collector may take for a request.
    pub timeout: Duration,
    /// Whether the variables have a name for the service.
    pub has_service_name: bool,
}

impl Settings {
    /// The settings of this process; `None` if it sends no traces.
    pub fn from_env() -> Result<Option<Self>> {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        // The specification of OpenTelemetry treats an empty variable as one that is not set.
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let first = |names: &[&'static str]| names.iter().find_map(|name| Some((*name, variable(name)?)));
        if variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        let exporter = variable("OTEL_TRACES_EXPORTER");
        match exporter.as_deref() {
            Some("none") => return Ok(None),
            Some("otlp") | None => {}
            Some(other) => return Err(invalid("OTEL_TRACES_EXPORTER", other, "otlp or none")),
        }
        let endpoint = first(&["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"]);
        let endpoint = match endpoint {
            Some((name, endpoint)) => {
                let uri = endpoint.parse::<hyper::Uri>().ok();
                if uri.is_none_or(|uri| uri.scheme_str() != Some("http") || uri.host().is_none()) {
                    let expected = "the http:// address of a collector; for a collector behind https, run one on this \
                                    machine that passes the traces on";
                    return Err(invalid(name, &endpoint, expected));
                }
                endpoint
            }
            None if exporter.is_none() => return Ok(None),
            None => "http://localhost:4318".into(),
        };
        let protocol = first(&["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"]);
        if let Some((name, protocol)) = protocol
            && protocol != "http/protobuf"
        {
            return Err(invalid(name, &protocol, "http/protobuf"));
        }
        let number = |names: &[&'static str], default: u32| match first(names) {
            None => Ok(default),
            Some((name, value)) => match value.parse() {
                Ok(number @ 1..) => Ok(number),
                Ok(0) | Err(_) => Err(invalid(name, &value, "a number from 1 to 4294967295")),
            },
        };
        let milliseconds = |names: &[&'static str], default| {
            number(names, default).map(|time| Duration::from_millis(time.into()))
        };
        let queue = number(&["OTEL_BSP_MAX_QUEUE_SIZE"], 2048)?.min(MAX_QUEUE) as usize;
        let attributes = variable("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
        Ok(Some(Self {
            endpoint,
            queue,
            batch: (number(&["OTEL_BSP_MAX_EXPORT_BATCH_SIZE"], 512)? as usize).min(queue),
            delay: milliseconds(&["OTEL_BSP_SCHEDULE_DELAY"], 5000)?,
            timeout: milliseconds(
                &["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"],
                10_000,
            )?,
            has_service_name: variable("OTEL_SERVICE_NAME").is_some() || attributes.contains("service.name="),
        }))
    }
}

/// The largest queue, so that a wrong number does not let a hanging collector take all memory.
const MAX_QUEUE: u32 = 1_000_000;

fn invalid(name: &str, value: &str, expected: &str) -> Failure {
    Failure::config(anyhow!("invalid {name} {value:?}: expected {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Settings>, String> {
        let variable = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        Settings::read(variable).map_err(|failure| failure.to_string())
    }

    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318");

    #[test]
    fn traces_are_sent_only_if_a_collector_is_named_and_nothing_disables_them() {
        assert_eq!(read(&[]), Ok(None));
        assert_eq!(read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "")]), Ok(None));
        assert_eq!(read(&[ENDPOINT, ("OTEL_SDK_DISABLED", "true")]), Ok(None));
        assert_eq!(read(&[ENDPOINT, ("OTEL_TRACES_EXPORTER", "none")]), Ok(None));
        let default = Settings {
            endpoint: "http://localhost:4318".into(),
            queue: 2048,
            batch: 512,
            delay: Duration::from_secs(5),
            timeout: Duration::from_secs(10),
            has_service_name: false,
        };
        assert_eq!(read(&[ENDPOINT]), Ok(Some(default.clone())));
        assert_eq!(read(&[("OTEL_TRACES_EXPORTER", "otlp")]), Ok(Some(default.clone())));
        let named = read(&[ENDPOINT, ("OTEL_RESOURCE_ATTRIBUTES", "a=b,service.name=shop")]);
        assert_eq!(named, Ok(Some(Settings { has_service_name: true, ..default })));
    }

    #[test]
    fn invalid_variable_is_refused_by_its_name_with_what_is_expected() {
        for (name, value, expected) in [
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://example.org", "the http:// address"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "localhost:4318", "the http:// address"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "\u{1}", "the http:// address"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
            ("OTEL_TRACES_EXPORTER", "zipkin", "otlp or none"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "a number"),
            ("OTEL_BSP_SCHEDULE_DELAY", "5s", "a number"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "-1", "a number"),
        ] {
            let error = read(&[ENDPOINT, (name, value)]).expect_err("the value is invalid");
            let beginning = format!("invalid {name} {value:?}: expected {expected}");
            assert!(error.starts_with(&beginning), "{error}");
        }
    }
}
