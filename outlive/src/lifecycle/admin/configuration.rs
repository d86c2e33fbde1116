//! `/config`: the values of all options and where each comes from, as this process read them when it started. Secrets are
//! hidden in [`OptionValue`] already.

use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};

use crate::lifecycle::cli::{self, OptionValue};
use crate::observe::json_string;

const JSON: &str = "application/json";

/// Answers with the lines that `check` prints, or with JSON to clients that accept it.
pub fn answer(values: &[OptionValue], headers: &HeaderMap) -> Response {
    if accepts_json(headers) {
        ([(header::CONTENT_TYPE, JSON)], json(values)).into_response()
    } else {
        cli::table(values).into_response()
    }
}

/// Whether the client names the type. Others, which accept everything, receive the text.
fn accepts_json(headers: &HeaderMap) -> bool {
    let fields = headers.get_all(header::ACCEPT).iter().filter_map(|field| field.to_str().ok());
    let types = fields.flat_map(|field| field.split(',')).filter_map(|range| range.split(';').next());
    types.into_iter().any(|name| name.trim().eq_ignore_ascii_case(JSON))
}

/// An object for each option, in the order of `--help`. The value is a string as in the text, or `null`.
fn json(values: &[OptionValue]) -> String {
    let object = |option: &OptionValue| {
        let mut text = String::from(r#"{"name":"#);
        json_string::push(&mut text, &option.name, usize::MAX);
        text.push_str(r#","value":"#);
        match &option.value {
            Some(value) => {
                json_string::push(&mut text, value, usize::MAX);
            }
            None => text.push_str("null"),
        }
        text.push_str(r#","origin":"#);
        json_string::push(&mut text, &option.origin.to_string(), usize::MAX);
        text.push('}');
        text
    };
    let objects: Vec<_> = values.iter().map(object).collect();
    format!("{{\"options\":[{}]}}\n", objects.join(","))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::lifecycle::cli::Origin;

    #[test]
    fn json_is_the_answer_to_clients_that_name_it() {
        for (fields, expected) in [
            (&[][..], false),
            (&["*/*"], false),
            (&["application/*"], false),
            (&["text/plain, application/jsonx"], false),
            (&["application/json"], true),
            (&["text/html;q=0.9, Application/JSON ; q=0.1"], true),
            (&["text/plain", "application/json"], true),
            (&["\u{e9}, application/json", ""], false),
        ] {
            let mut headers = HeaderMap::new();
            for field in fields {
                headers.append(header::ACCEPT, HeaderValue::from_str(field).expect("a valid field"));
            }
            assert_eq!(accepts_json(&headers), expected, "{fields:?}");
        }
    }

    proptest! {
        #[test]
        fn json_has_the_values_and_origins_of_all_options(
            options in prop::collection::vec((any::<String>(), any::<Option<String>>(), any::<String>(), 0..2_usize), 0..4),
        ) {
            let option = |(name, value, path, line): &(String, Option<String>, String, usize)| OptionValue {
                name: name.clone(),
                value: value.clone(),
                origin: if *line == 0 { Origin::Default } else { Origin::File(path.into(), *line) },
            };
            let values: Vec<_> = options.iter().map(option).collect();
            let parsed: Value = serde_json::from_str(&json(&values)).expect("valid JSON");
            let expected: Vec<_> = values
                .iter()
                .map(|option| json!({"name": option.name, "value": option.value, "origin": option.origin.to_string()}))
                .collect();
            prop_assert_eq!(parsed, json!({"options": expected}));
        }
    }
}
