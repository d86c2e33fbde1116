//! The port `ingest`, on which other programs add many links: lines of text over TCP. Its connections stay open over restarts
//! and reloads.

use anyhow::ensure;
use outlive::{Carry, SocketStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::app::{NewLink, Refusal, URL_LIMIT, add_link};
use crate::store::Store;

/// Maximum length of a line in bytes: a link, and a code.
const LINE_LIMIT: usize = URL_LIMIT + 64;

/// Adds the link of each line, `URL` or `URL CODE`, and answers each line with `added CODE` or `refused: REASON`. The next
/// process continues the connection with the bytes that were read after the last whole line.
pub async fn read(mut stream: SocketStream, carry: Carry<Vec<u8>>, store: Store) -> anyhow::Result<()> {
    let mut rest = carry.received()?.unwrap_or_default();
    loop {
        tokio::select! {
            read = stream.read_buf(&mut rest) => if read? == 0 {
                return Ok(());
            },
            () = carry.requested() => {
                carry.hand_on(&rest);
                return Ok(());
            }
        }
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let answer = match add(&line, &store).await {
                Ok(code) => format!("added {code}\n"),
                Err(refusal) => format!("refused: {refusal}\n"),
            };
            stream.write_all(answer.as_bytes()).await?;
        }
        ensure!(rest.len() <= LINE_LIMIT, "a line is longer than {LINE_LIMIT} bytes");
    }
}

async fn add(line: &[u8], store: &Store) -> Result<String, Refusal> {
    add_link(parse(line).ok_or(Refusal::Line)?, store).await
}

/// Returns None unless the line consists of one or two words: a link, and perhaps its code.
fn parse(line: &[u8]) -> Option<NewLink> {
    let mut words = str::from_utf8(line).ok()?.split_whitespace().map(str::to_owned);
    let new = NewLink { url: words.next()?, code: words.next() };
    words.next().is_none().then_some(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_a_link_and_perhaps_a_code() {
        let parsed = |line: &[u8]| parse(line).map(|link| (link.url, link.code));
        assert_eq!(parsed(b"http://a/\n"), Some(("http://a/".to_owned(), None)));
        assert_eq!(parsed(b" http://a/\tb\r\n"), Some(("http://a/".to_owned(), Some("b".to_owned()))));
        for line in [&b"\n"[..], b"", b"a b c\n", b"\xff\n", b" \r\n"] {
            assert_eq!(parsed(line), None, "{line:?}");
        }
    }
}
