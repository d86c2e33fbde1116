//! Connections of a socket that the application serves, between servers in this process, as they move between processes.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use futures_util::FutureExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::tests::{Served, endpoint, move_to, serve_on};
use super::{Endpoint, EndpointKind};
use crate::app::carry::Carry;
use crate::app::sockets::SocketStream;
use crate::registry::Phase;

/// How long a test waits for an event before it fails.
const PATIENCE: Duration = Duration::from_secs(120);

/// Serves connections with `handler` on a free port until the end of the test.
async fn serve<S: 'static, W>(handler: impl Fn(SocketStream, Carry<S>) -> W + Send + Sync + 'static) -> Served
where
    W: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let handler = move |stream, continuation, shutdown| {
        handler(stream, Carry::of_socket(continuation, shutdown)).boxed()
    };
    let kind = EndpointKind::Socket(Arc::new(handler));
    let name = "lines".parse().expect("the name is valid");
    let routes = endpoint(Router::new(), None).routes.clone();
    serve_on(Arc::new(Endpoint::new(name, kind, routes, None))).await
}

async fn connect(served: &Served) -> TcpStream {
    TcpStream::connect(served.address).await.expect("the server accepts")
}

async fn receives(client: &mut TcpStream, expected: &str) {
    let mut answer = vec![0; expected.len()];
    let read = timeout(PATIENCE, client.read_exact(&mut answer)).await.expect("an answer arrives in time");
    read.expect("the connection is open");
    assert_eq!(String::from_utf8_lossy(&answer), expected);
}

/// Whether the connection ends without an error.
async fn ends(client: &mut TcpStream) {
    let mut rest = Vec::new();
    let end = timeout(PATIENCE, client.read_to_end(&mut rest)).await.expect("the connection ends in time");
    end.expect("the connection is not reset");
    assert!(rest.is_empty(), "{rest:?}");
}

/// Confirms each line with its number. The state is that number and the beginning of the next line.
async fn count(mut stream: SocketStream, carry: Carry<(u64, Vec<u8>)>) -> anyhow::Result<()> {
    let (mut lines, mut rest) = carry.received()?.unwrap_or_default();
    loop {
        tokio::select! {
            read = stream.read_buf(&mut rest) => if read? == 0 {
                return Ok(());
            },
            () = carry.requested() => {
                carry.hand_on(&(lines, rest));
                return Ok(());
            }
        }
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            rest.drain(..=end);
            lines += 1;
            stream.write_all(format!("{lines} ").as_bytes()).await?;
        }
    }
}

/// A client that sends without a pause while its connection moves, so that its bytes are cut at any point.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_are_neither_lost_nor_repeated_nor_reordered_over_moves() {
    const LINES: usize = 20_000;
    let mut served = serve(count).await;
    let (mut reader, mut writer) = connect(&served).await.into_split();
    let sending = tokio::spawn(async move {
        for number in 0..LINES {
            let line = format!("{}\n", "x".repeat(number % 50));
            writer.write_all(line.as_bytes()).await.expect("the connection is open");
        }
        writer
    });
    let expected = (1..=LINES).map(|number| number.to_string()).collect::<Vec<_>>().join(" ") + " ";
    let length = expected.len();
    let receiving = tokio::spawn(async move {
        let mut answer = vec![0; length];
        timeout(PATIENCE, reader.read_exact(&mut answer)).await.expect("in time").expect("it is open");
        (String::from_utf8_lossy(&answer).into_owned(), reader)
    });
    let mut moves = 0;
    while !receiving.is_finished() || moves < 3 {
        let next = serve(count).await;
        move_to(&next, served).await;
        served = next;
        moves += 1;
    }
    let (answer, _reader) = receiving.await.expect("the client does not panic");
    assert!(answer == expected, "the answers differ after {moves} moves");
    drop(sending.await);
}

#[tokio::test(flavor = "multi_thread")]
async fn handler_that_panics_closes_its_connection_and_no_other() {
    let served = serve(async |mut stream: SocketStream, _: Carry<()>| {
        loop {
            let byte = stream.read_u8().await?;
            assert_ne!(byte, b'!', "on purpose");
            stream.write_u8(byte).await?;
        }
    })
    .await;
    let (mut first, mut second) = (connect(&served).await, connect(&served).await);
    first.write_all(b"!").await.expect("the byte is sent");
    ends(&mut first).await;
    second.write_all(b"x").await.expect("the byte is sent");
    receives(&mut second, "x").await;
}

/// To close a socket with unread bytes would reset the connection, which can destroy the answer.
#[tokio::test(flavor = "multi_thread")]
async fn peer_that_still_sends_receives_all_that_the_handler_has_written() {
    const ANSWER: usize = 1 << 20;
    let served = serve(async |mut stream: SocketStream, _: Carry<()>| {
        stream.read_u8().await?;
        stream.write_all(&vec![b'a'; ANSWER]).await?;
        Ok(())
    })
    .await;
    let mut client = connect(&served).await;
    client.write_all(&[0; 10_000]).await.expect("the bytes are sent");
    receives(&mut client, &"a".repeat(ANSWER)).await;
    ends(&mut client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn handler_that_returns_without_a_state_ends_its_connection_at_a_move() {
    let wait = async |_: SocketStream, carry: Carry<()>| {
        carry.requested().await;
        Ok(())
    };
    let served = serve(wait).await;
    let mut client = connect(&served).await;
    served.until_connections(1).await;
    served.server.enter(Phase::Quiescing);
    ends(&mut client).await;
    assert_eq!(served.count_quiescent().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn state_of_another_release_is_an_error_that_the_handler_can_return() {
    let served = serve(count).await;
    let mut client = connect(&served).await;
    client.write_all(b"x\n").await.expect("the bytes are sent");
    receives(&mut client, "1 ").await;
    let next = serve(async |_: SocketStream, carry: Carry<String>| {
        carry.received()?;
        Ok(())
    })
    .await;
    move_to(&next, served).await;
    ends(&mut client).await;
}
