//! Lines of JSON (RFC 8259), one object for each event.
//!
//! The formatter of tracing-subscriber is not used: it needs two more crates, writes the fields of spans into nested
//! objects, and cannot keep a line below the limit of journald.

use std::time::SystemTime;

use tracing::Level;

use super::entry::{Entry, Recorded, Recording};
use crate::observe::json_string;

/// The longest line that journald reads as one entry (`LineMax=`, journald.conf(5)).
const JOURNALD_LIMIT: usize = 48 << 10;
/// What a line below the limit needs besides its fields: the prefix with the priority, and the end with [`CUT`].
const MARGIN: usize = 64;
/// The largest part of the limit that one value may take, so that a long message leaves room for other fields.
const SHARE: usize = 4;
/// The end of a line from which values or fields are missing.
const CUT: &str = r#","truncated":true"#;
/// The names that each line has. A field of the application with one of these names has an underscore after it.
const OWN: [&str; 8] =
    ["timestamp", "level", "target", "service", "pid", "generation", "span_name", "truncated"];

/// Writes entries as lines of JSON.
#[derive(Clone, Debug)]
pub struct Format {
    /// The name of the service.
    pub service: String,
    pub generation: u64,
    /// Whether journald reads the lines, and would split one that is too long into two.
    pub is_for_journald: bool,
}

impl Format {
    /// The line of `entry`, which was logged at `at`, with its end of line.
    pub fn line(&self, entry: &Entry, at: SystemTime) -> String {
        let metadata = entry.metadata();
        let mut line = self.begin(at, *metadata.level());
        let mut seen = Vec::new();
        // The innermost value of a name wins, because an object must not have a name twice.
        let fields = fields(&entry.event).chain(entry.spans.iter().rev().flat_map(|span| fields(span)));
        let (messages, others): (Vec<_>, Vec<_>) = fields.partition(|(name, _)| *name == "message");
        line.message(messages.first().map_or("", |(_, message)| &message.text));
        line.text("target", metadata.target());
        self.origin(&mut line);
        if let Some(span) = entry.spans.last() {
            line.text("span_name", span.metadata.name());
        }
        let generation = self.generation.to_string();
        // Events in the life of the process have it as a field too.
        let is_known =
            |(name, value): &(&str, &Recording)| *name == "generation" && *value.text == *generation;
        for (name, value) in others.into_iter().filter(|field| !is_known(field)) {
            if !seen.contains(&name) {
                seen.push(name);
                line.value(name, value);
            }
        }
        line.end()
    }

    /// The line of a message without fields.
    pub fn last_line(&self, message: &str, at: SystemTime) -> String {
        let mut line = self.begin(at, Level::ERROR);
        line.message(message);
        self.origin(&mut line);
        line.end()
    }

    fn begin(&self, at: SystemTime, level: Level) -> Line {
        let limit = if self.is_for_journald { JOURNALD_LIMIT - MARGIN } else { usize::MAX };
        let mut line = Line { text: String::with_capacity(512), limit, is_cut: false };
        line.text.push_str(r#"{"timestamp":""#);
        line.text.push_str(&humantime::format_rfc3339_micros(at).to_string());
        line.text.push_str(r#"","level":""#);
        line.text.push_str(level.as_str());
        line.text.push('"');
        line
    }

    fn origin(&self, line: &mut Line) {
        line.text("service", &self.service);
        line.literal("pid", &std::process::id().to_string());
        line.literal("generation", &self.generation.to_string());
    }
}

/// The values of a span or an event, with their names.
fn fields(recorded: &Recorded) -> impl Iterator<Item = (&'static str, &Recording)> {
    let names = recorded.metadata.fields().iter().map(|field| field.name());
    names.zip(&recorded.values).filter_map(|(name, value)| Some((name, value.as_ref()?)))
}

/// A line that is being written, without its end.
struct Line {
    text: String,
    limit: usize,
    /// Whether something was left out because of the limit.
    is_cut: bool,
}

impl Line {
    fn message(&mut self, text: &str) {
        self.text("message", text);
    }

    fn value(&mut self, name: &str, value: &Recording) {
        let renamed;
        let name = if OWN.contains(&name) {
            renamed = format!("{name}_");
            &renamed
        } else {
            name
        };
        if value.is_literal { self.literal(name, &value.text) } else { self.text(name, &value.text) }
    }

    fn literal(&mut self, name: &str, literal: &str) {
        self.field(name, |text| {
            text.push_str(literal);
            true
        });
    }

    fn text(&mut self, name: &str, value: &str) {
        let limit = self.limit / SHARE;
        self.field(name, |text| json_string::push(text, value, limit));
    }

    /// Adds a field, unless the line is full. `push` adds its value, and returns whether that is the whole value.
    fn field(&mut self, name: &str, push: impl FnOnce(&mut String) -> bool) {
        let before = self.text.len();
        self.text.push(',');
        let is_whole_name = json_string::push(&mut self.text, name, self.limit);
        self.text.push(':');
        let is_whole = push(&mut self.text);
        self.is_cut |= !is_whole;
        if !is_whole_name || self.text.len() > self.limit {
            self.text.truncate(before);
            self.is_cut = true;
        }
    }

    fn end(mut self) -> String {
        if self.is_cut {
            self.text.push_str(CUT);
        }
        self.text.push_str("}\n");
        self.text
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::{Duration, UNIX_EPOCH};

    use proptest::prelude::*;
    use serde_json::{Map, Value, json};
    use tracing::field::Empty;
    use tracing::{error_span, info, info_span, warn};

    use super::super::entry::entries_of;
    use super::*;

    fn format(is_for_journald: bool) -> Format {
        Format { service: "shop".into(), generation: 7, is_for_journald }
    }

    /// The object of the only line that `log` logs.
    fn logged(format: &Format, log: impl FnOnce()) -> Map<String, Value> {
        let entries = entries_of(log);
        assert_eq!(entries.len(), 1);
        let line = format.line(&entries[0], UNIX_EPOCH + Duration::from_micros(1_000_001));
        parsed(&line)
    }

    fn parsed(line: &str) -> Map<String, Value> {
        let object = line.strip_suffix('\n').expect("the line has an end");
        assert!(!object.contains(char::is_control), "one line: {object:?}");
        // Each name once: a map of serde_json keeps the last value of a name, so it has less entries than the text.
        let pairs: Pairs = serde_json::from_str(object).unwrap_or_else(|error| panic!("{error}: {object}"));
        let parsed: Map<String, Value> = serde_json::from_str(object).expect("the object is valid");
        assert_eq!(pairs.0, parsed.len(), "a name occurs twice: {object}");
        parsed
    }

    /// The number of names in an object.
    struct Pairs(usize);

    impl<'de> serde::Deserialize<'de> for Pairs {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Count;
            impl<'de> serde::de::Visitor<'de> for Count {
                type Value = Pairs;

                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("an object")
                }

                fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                    let mut count = 0;
                    while map.next_entry::<String, Value>()?.is_some() {
                        count += 1;
                    }
                    Ok(Pairs(count))
                }
            }
            deserializer.deserialize_map(Count)
        }
    }

    #[test]
    fn line_has_the_origin_of_the_event_and_its_fields_by_type() {
        let object = logged(&format(false), || {
            let outer =
                info_span!("request", request_id = "a\"b", peer = %"unix", late = Empty, never = Empty);
            outer.record("late", true);
            let _outer = outer.entered();
            let _inner = error_span!("step", http.method = "GET").entered();
            warn!(target: "shop", status = 500_u64, change = -3, share = 0.5, "two\nlines {}", 1);
        });
        let wanted = json!({
            "timestamp": "1970-01-01T00:00:01.000001Z",
            "level": "WARN",
            "message": "two\nlines 1",
            "target": "shop",
            "service": "shop",
            "pid": std::process::id(),
            "generation": 7,
            "span_name": "step",
            "status": 500,
            "change": -3,
            "share": 0.5,
            "http.method": "GET",
            "request_id": "a\"b",
            "peer": "unix",
            "late": true,
        });
        assert_eq!(Value::Object(object), wanted);
    }

    #[test]
    fn value_of_the_event_replaces_that_of_its_span_and_that_of_an_inner_span_that_of_an_outer_one() {
        let object = logged(&format(false), || {
            let _outer = info_span!("outer", a = 1, b = 1, c = 1).entered();
            let _inner = info_span!("inner", a = 2, b = 2).entered();
            info!(a = 3, "hello");
        });
        assert_eq!(json!([object["a"], object["b"], object["c"]]), json!([3, 2, 1]));
    }

    #[test]
    fn field_with_a_name_of_the_line_has_an_underscore_after_its_name() {
        let object = logged(&format(false), || info!(pid = 1, level = "high", timestamp = "never", "hello"));
        assert_eq!((&object["pid"], &object["pid_"]), (&json!(std::process::id()), &json!(1)));
        assert_eq!((&object["level"], &object["level_"]), (&json!("INFO"), &json!("high")));
        assert_eq!(object["timestamp_"], "never");
        for (generation, other) in [(7, None), (8, Some(&json!(8)))] {
            let object = logged(&format(false), || info!(generation, "hello"));
            assert_eq!((&object["generation"], object.get("generation_")), (&json!(7), other));
        }
    }

    #[test]
    fn number_that_json_does_not_have_is_a_string() {
        let object = logged(&format(false), || info!(none = f64::NAN, most = f64::INFINITY, big = u128::MAX));
        assert_eq!(object["none"], "NaN");
        assert_eq!(object["most"], "inf");
        assert_eq!(object["big"], u128::MAX.to_string());
        assert_eq!(object["message"], "");
    }

    #[test]
    fn line_for_journald_is_below_its_limit_and_says_what_is_missing() {
        let long = "\u{1}ä\"".repeat(100_000);
        for for_journald in [true, false] {
            let entries =
                entries_of(|| info!(a = long, b = long, c = long, d = long, e = long, f = 1, "{long}"));
            let line = format(for_journald).line(&entries[0], UNIX_EPOCH);
            let object = parsed(&line);
            assert_eq!(object.contains_key("truncated"), for_journald);
            if for_journald {
                assert!(line.len() <= JOURNALD_LIMIT - "<6>".len(), "{}", line.len());
                assert_eq!(object["generation"], 7);
                let begins = |value: &Value| value.as_str().is_some_and(|text| long.starts_with(text));
                assert!(begins(&object["message"]) && begins(&object["a"]));
                assert_eq!(object["f"], 1, "a short value is kept after long ones");
            } else {
                assert_eq!(object["message"], long);
            }
        }
    }

    #[test]
    fn last_line_of_a_process_is_an_object_too() {
        let object = parsed(&format(true).last_line("could not bind \"x\"\n", UNIX_EPOCH));
        assert_eq!(object["message"], "could not bind \"x\"\n");
        assert_eq!((&object["level"], &object["service"]), (&json!("ERROR"), &json!("shop")));
    }

    proptest! {
        /// Any text, with control characters, quotes and separators of lines.
        #[test]
        fn any_values_give_one_line_with_these_values(
            message in "(?s).*",
            name in any::<String>(),
            number in any::<i64>(),
            share in any::<f64>(),
            bytes in any::<Vec<u8>>(),
            service in any::<String>(),
        ) {
            let path = String::from_utf8_lossy(&bytes).into_owned();
            let format = Format { service: service.clone(), generation: 1, is_for_journald: false };
            let object = logged(&format, || {
                info_span!("request", path, name).in_scope(|| warn!(number, share, "{message}"));
            });
            let found: BTreeMap<_, _> = object.iter().map(|(name, value)| (name.as_str(), value)).collect();
            prop_assert_eq!(found["message"], &json!(message));
            prop_assert_eq!(found["path"], &json!(path));
            prop_assert_eq!(found["name"], &json!(name));
            prop_assert_eq!(found["number"], &json!(number));
            prop_assert_eq!(found["service"], &json!(service));
            // The parser of serde_json rounds the last digit of some numbers.
            let read = found["share"].as_f64().unwrap_or(f64::NAN);
            prop_assert!((read - share).abs() <= share.abs() * 1e-15 + f64::MIN_POSITIVE, "{read} {share}");
        }

        /// For journald, each line is below its limit, and each value a beginning of the logged one.
        #[test]
        fn any_values_give_one_line_below_the_limit_of_journald(
            message in "(?s).{0,40}",
            value in "(?s).{0,40}",
            times in 0_usize..3000,
        ) {
            let (message, value) = (message.repeat(times), value.repeat(times));
            let entries = entries_of(|| info!(value, again = value, "{message}"));
            let line = format(true).line(&entries[0], SystemTime::now());
            prop_assert!(line.len() < JOURNALD_LIMIT);
            let object = parsed(&line);
            for (name, whole) in [("message", &message), ("value", &value), ("again", &value)] {
                let text = object[name].as_str().unwrap_or_default();
                let is_cut = object.get("truncated") == Some(&Value::Bool(true));
                prop_assert!(whole.starts_with(text) && (is_cut || whole == text));
            }
        }
    }
}
