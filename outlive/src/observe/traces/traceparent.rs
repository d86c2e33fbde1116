//! The header fields `traceparent` and `tracestate` (W3C Trace Context). The parser of the SDK is not used, because it
//! accepts values that the W3C text forbids, such as short ids.

use std::str::FromStr;

use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};
use opentelemetry::Context;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// The length of version 00, and of the part that later versions have in common with it.
const LENGTH: usize = 55;

/// The span of the client; `None` if there is no `traceparent`, or an invalid one, or several.
pub fn read(headers: &HeaderMap) -> Option<SpanContext> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let (trace, span, flags) = parse(values.next()?.as_bytes())?;
    if values.next().is_some() {
        return None;
    }
    let states: Option<Vec<&str>> =
        headers.get_all(TRACESTATE).iter().map(|value| value.to_str().ok()).collect();
    let state = states.and_then(|states| TraceState::from_str(&states.join(",")).ok()).unwrap_or_default();
    Some(SpanContext::new(trace, span, flags, true, state))
}

fn parse(text: &[u8]) -> Option<(TraceId, SpanId, TraceFlags)> {
    let (text, more) = text.split_at_checked(LENGTH)?;
    let is_lower_hex = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
    let fields: Vec<&[u8]> = text.split(|byte| *byte == b'-').collect();
    let [version, trace, span, flags] = fields[..] else { return None };
    let are_hex = fields.iter().all(|field| field.iter().all(is_lower_hex));
    let have_lengths = (version.len(), trace.len(), span.len(), flags.len()) == (2, 32, 16, 2);
    // Later versions may have more fields. Version ff is invalid.
    let may_continue = more.is_empty() || (version != b"00" && more.starts_with(b"-"));
    if !are_hex || !have_lengths || !may_continue || version == b"ff" {
        return None;
    }
    let text = |field| str::from_utf8(field).ok();
    let trace = TraceId::from_hex(text(trace)?).ok().filter(|id| *id != TraceId::INVALID)?;
    let span = SpanId::from_hex(text(span)?).ok().filter(|id| *id != SpanId::INVALID)?;
    let flags = TraceFlags::new(u8::from_str_radix(text(flags)?, 16).ok()?) & TraceFlags::SAMPLED;
    Some((trace, span, flags))
}

/// The header fields with which a request to another service continues the current trace: `traceparent`, and
/// `tracestate` if there is one. Empty outside of a request, and if no traces are sent. It needs the feature `otlp`.
///
/// ```
/// async fn handler() {
///     // In a handler: add these to the request that the handler sends.
///     let headers = outlive::trace_headers();
/// #   assert!(headers.is_empty());
/// }
/// ```
///
/// See [W3C Trace Context](https://www.w3.org/TR/trace-context/).
pub fn headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    let context = Context::current();
    let span = context.span().span_context().clone();
    if !span.is_valid() {
        return headers;
    }
    let (trace, id, flags) = (span.trace_id(), span.span_id(), span.trace_flags() & TraceFlags::SAMPLED);
    if let Ok(value) = HeaderValue::try_from(format!("00-{trace}-{id}-{:02x}", flags.to_u8())) {
        headers.insert(TRACEPARENT, value);
    }
    let state = span.trace_state().header();
    if !state.is_empty()
        && let Ok(value) = HeaderValue::try_from(state)
    {
        headers.insert(TRACESTATE, value);
    }
    headers
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    fn read_from(values: &[&str]) -> Option<SpanContext> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(TRACEPARENT, HeaderValue::from_bytes(value.as_bytes()).expect("a valid value"));
        }
        headers.append(TRACESTATE, HeaderValue::from_static("a=1"));
        headers.append(TRACESTATE, HeaderValue::from_static("b=2"));
        read(&headers)
    }

    #[test]
    fn valid_traceparent_is_read_with_the_state_and_written_again() {
        for (text, is_sampled) in [
            (format!("00-{TRACE}-{SPAN}-01"), true),
            (format!("00-{TRACE}-{SPAN}-00"), false),
            (format!("00-{TRACE}-{SPAN}-ff"), true),
            (format!("cc-{TRACE}-{SPAN}-01"), true),
            (format!("cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like"), true),
        ] {
            let span = read_from(&[&text]).unwrap_or_else(|| panic!("{text} is valid"));
            assert_eq!(
                (span.trace_id().to_string(), span.span_id().to_string()),
                (TRACE.into(), SPAN.into())
            );
            assert_eq!((span.is_sampled(), span.is_remote()), (is_sampled, true), "{text}");
            let _current = Context::new().with_remote_span_context(span).attach();
            let headers = headers();
            assert_eq!(headers[TRACEPARENT], format!("00-{TRACE}-{SPAN}-{:02x}", u8::from(is_sampled)));
            assert_eq!(headers[TRACESTATE], "a=1,b=2");
        }
        assert!(headers().is_empty());
    }

    #[test]
    fn invalid_traceparent_is_ignored() {
        let valid = format!("00-{TRACE}-{SPAN}-01");
        for text in [
            String::new(),
            "nonsense".into(),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("cc-{TRACE}-{SPAN}-01.more"),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{}-{SPAN}0-01", &TRACE[1..]),
            format!("00-{TRACE}-{SPAN}-1"),
            format!("00-{TRACE}-{SPAN}-0g"),
            format!("0+-{TRACE}-{SPAN}-01"),
            format!(" {valid}"),
        ] {
            assert_eq!(read_from(&[&text]), None, "{text:?}");
        }
        assert_eq!(read_from(&[&valid, &valid]), None, "several values are invalid");
        assert_eq!(read_from(&[]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic_and_only_exact_values_are_accepted(
            bytes in any::<Vec<u8>>(),
            place in 0_usize..LENGTH,
            byte in any::<u8>(),
        ) {
            prop_assert!(parse(&bytes).is_none() || bytes.len() >= LENGTH);
            let mut changed = format!("00-{TRACE}-{SPAN}-01").into_bytes();
            changed[place] = byte;
            let is_hex = byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
            let is_separator = [2, 35, 52].contains(&place);
            let may_be_read = if is_separator { byte == b'-' } else { is_hex };
            prop_assert_eq!(parse(&changed).is_some(), may_be_read && !changed.starts_with(b"ff"));
        }
    }
}
