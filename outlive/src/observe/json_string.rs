//! [`push`], which writes a string of JSON (RFC 8259).

/// Adds `value` as a string of JSON. Leaves out the end of `value` if the string would be longer than `limit` bytes;
/// returns whether it is whole. Control characters are escaped, those above U+007F too, because a terminal could
/// interpret them.
pub fn push(text: &mut String, value: &str, limit: usize) -> bool {
    let mut escaped;
    let begin = text.len();
    text.push('"');
    let mut is_whole = true;
    for character in value.chars() {
        let before = text.len();
        match character {
            '"' | '\\' => text.extend(['\\', character]),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            character if character.is_control() => {
                escaped = format!("\\u{:04x}", u32::from(character));
                text.push_str(&escaped);
            }
            character => text.push(character),
        }
        if text.len() - begin >= limit {
            text.truncate(before);
            is_whole = false;
            break;
        }
    }
    text.push('"');
    is_whole
}
