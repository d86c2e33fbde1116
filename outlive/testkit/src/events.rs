//! [`EventStream`]: a client that reads the events of one response, and never connects again.

use anyhow::{Context, Result, ensure};
use h2::RecvStream;

use crate::client::{Connection, Http2, Target};

const REQUEST: &[u8] = b"GET /events HTTP/1.1\r\nhost: test\r\naccept: text/event-stream\r\n\r\n";

/// The response of /events.
pub struct EventStream {
    response: Response,
    /// The beginning of the next event.
    unread: Vec<u8>,
}

enum Response {
    Http1(Connection),
    Http2(RecvStream),
}

impl EventStream {
    /// Requests the events on a new connection; returns when the response has begun.
    pub async fn http1(target: &Target) -> Result<Self> {
        let mut connection = Connection::open(target).await.context("could not connect")?;
        connection.send(REQUEST).await.context("could not send")?;
        let head = connection.head().await?;
        ensure!(head.status == 200, "status {}", head.status);
        Ok(Self { response: Response::Http1(connection), unread: Vec::new() })
    }

    /// As `http1`, on a connection that may have other streams.
    pub async fn http2(connection: &mut Http2) -> Result<Self> {
        Ok(Self { response: Response::Http2(connection.events().await?), unread: Vec::new() })
    }

    /// The next event with the empty line that ends it. None if the response has ended after a whole event.
    pub async fn next(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(end) = self.unread.windows(2).position(|two| two == b"\n\n") {
                let event = self.unread.drain(..end + 2).collect();
                return Ok(Some(String::from_utf8(event)?));
            }
            match &mut self.response {
                Response::Http1(connection) => match connection.chunk().await? {
                    Some(mut chunk) => self.unread.append(&mut chunk),
                    None => break,
                },
                Response::Http2(body) => match body.data().await {
                    Some(data) => {
                        let data = data.context("reset inside an answer")?;
                        body.flow_control().release_capacity(data.len())?;
                        self.unread.extend_from_slice(&data);
                    }
                    None => break,
                },
            }
        }
        let part = String::from_utf8_lossy(&self.unread);
        ensure!(part.is_empty(), "the response ended inside an event: {part:?}");
        Ok(None)
    }
}
