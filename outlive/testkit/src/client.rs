//! Clients that never retry: HTTP/1.1, which sees each byte, and HTTP/2.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::ClientConfig;

#[derive(Clone, Debug)]
pub enum Target {
    Tcp(SocketAddr),
    Unix(PathBuf),
    /// TLS, with whom the client trusts and what it speaks.
    Tls(SocketAddr, Arc<ClientConfig>),
}

impl Target {
    async fn connect(&self) -> io::Result<Stream> {
        Ok(match self {
            Self::Tcp(address) => Box::pin(connect(*address).await?),
            Self::Unix(path) => Box::pin(UnixStream::connect(path).await?),
            Self::Tls(address, client) => {
                let stream = connect(*address).await?;
                Box::pin(TlsConnector::from(client.clone()).connect(address.ip().into(), stream).await?)
            }
        })
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// What carries the bytes.
trait Duplex: AsyncRead + AsyncWrite + Send {
    /// Asks the server for new keys and goes on with new ones: a KeyUpdate before what is sent next.
    fn update_keys(self: Pin<&mut Self>) -> Result<()> {
        bail!("this connection has no keys")
    }
}

impl Duplex for TcpStream {}
impl Duplex for UnixStream {}
impl Duplex for TlsStream<TcpStream> {
    fn update_keys(self: Pin<&mut Self>) -> Result<()> {
        Ok(self.get_mut().get_mut().1.refresh_traffic_keys()?)
    }
}
type Stream = Pin<Box<dyn Duplex>>;

/// An answer, whole.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Whether the server ends the connection with this answer.
    pub fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// One connection, with what was read from it and belongs to later answers.
pub struct Connection {
    stream: Stream,
    buffer: Vec<u8>,
}

/// A request to speak WebSocket at /socket.
pub const WEBSOCKET: &[u8] =
    b"GET /socket HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
    sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

/// A request whose handler sends back what it has, and waits for `REST_OF_HELD`.
const HELD: &[u8] = b"POST /echo HTTP/1.1\r\nhost: test\r\ncontent-length: 10\r\n\r\n01234";
const REST_OF_HELD: &[u8] = b"56789";

/// A GET for `path`.
pub fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n").into_bytes()
}

/// A POST of `length` bytes to `path`.
pub fn post(path: &str, length: usize) -> Vec<u8> {
    let head = format!("POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\n\r\n");
    let mut request = head.into_bytes();
    request.resize(request.len() + length, b'x');
    request
}

impl Connection {
    pub async fn open(target: &Target) -> io::Result<Self> {
        Ok(Self { stream: target.connect().await?, buffer: Vec::new() })
    }

    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await?;
        // TLS may hold it back.
        self.stream.flush().await
    }

    /// TLS 1.3: goes on with new keys, and asks the server to do so.
    pub fn update_keys(&mut self) -> Result<()> {
        self.stream.as_mut().update_keys()
    }

    /// Sends no more; still reads.
    pub async fn finish_sending(&mut self) -> io::Result<()> {
        self.stream.shutdown().await
    }

    pub async fn ask(&mut self, request: &[u8]) -> Result<Answer> {
        self.send(request).await.context("could not send")?;
        self.answer().await
    }

    /// The next answer, with its whole body.
    pub async fn answer(&mut self) -> Result<Answer> {
        let mut answer = loop {
            let mut answer = self.head().await?;
            // 100 Continue and its like come before the answer.
            if answer.status >= 200 || answer.status == 101 {
                break answer;
            }
            answer.headers.clear();
        };
        if answer.status == 101 || answer.status == 204 || answer.status == 304 {
            return Ok(answer);
        }
        answer.body = match (answer.header("content-length"), answer.header("transfer-encoding")) {
            (Some(length), _) => {
                let length = length.parse().context("content-length")?;
                self.take(length).await?
            }
            (None, Some("chunked")) => self.chunks().await?,
            (None, _) => {
                while self.read_more().await? > 0 {}
                std::mem::take(&mut self.buffer)
            }
        };
        Ok(answer)
    }

    /// The head of the next answer, of whatever status.
    pub async fn head(&mut self) -> Result<Answer> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 64];
            let mut head = httparse::Response::new(&mut headers);
            if let httparse::Status::Complete(length) = head.parse(&self.buffer)? {
                let pair = |header: &httparse::Header<'_>| {
                    (header.name.to_lowercase(), String::from_utf8_lossy(header.value).into_owned())
                };
                let answer = Answer {
                    status: head.code.unwrap_or(0),
                    headers: head.headers.iter().map(pair).collect(),
                    body: Vec::new(),
                };
                self.buffer.drain(..length);
                return Ok(answer);
            }
            if self.read_more().await? == 0 {
                bail!("closed before the answer ({} bytes of it came)", self.buffer.len());
            }
        }
    }

    /// Reads what comes next; 0 at the end of the stream.
    pub async fn read_more(&mut self) -> Result<usize> {
        self.stream.read_buf(&mut self.buffer).await.context("reset before the answer")
    }

    /// What was read and not taken yet.
    pub fn unread(&self) -> &[u8] {
        &self.buffer
    }

    pub async fn take(&mut self, length: usize) -> Result<Vec<u8>> {
        while self.buffer.len() < length {
            if self.read_more().await? == 0 {
                bail!("closed inside an answer");
            }
        }
        Ok(self.buffer.drain(..length).collect())
    }

    async fn chunks(&mut self) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = loop {
                if let Some(end) = self.buffer.windows(2).position(|two| two == b"\r\n") {
                    let line: Vec<u8> = self.buffer.drain(..end + 2).collect();
                    break String::from_utf8_lossy(&line).trim().to_owned();
                }
                if self.read_more().await? == 0 {
                    bail!("closed inside a chunked answer");
                }
            };
            let length = usize::from_str_radix(&line, 16).with_context(|| format!("chunk size {line:?}"))?;
            let mut chunk = self.take(length + 2).await?;
            chunk.truncate(length);
            if length == 0 {
                return Ok(body);
            }
            body.append(&mut chunk);
        }
    }

    /// Begins a request that is in flight until `release`: a POST of which half of the body is missing. Gives the head
    /// of the answer, which says that the handler has begun.
    pub async fn hold(&mut self) -> Result<Answer> {
        self.send(HELD).await.context("could not send")?;
        let head = self.head().await?;
        ensure!(head.status == 200, "status {}", head.status);
        Ok(head)
    }

    /// Sends what `hold` has held back, and reads the answer to its end.
    pub async fn release(&mut self) -> Result<()> {
        self.send(REST_OF_HELD).await.context("could not send")?;
        let body = self.chunks().await?;
        ensure!(body == b"0123456789", "a wrong answer: {body:?}");
        Ok(())
    }

    /// Whether the server has closed this connection, as far as can be seen now.
    pub fn is_closed_by_server(&mut self) -> bool {
        let mut byte = [0];
        let mut into = ReadBuf::new(&mut byte);
        match self.stream.as_mut().poll_read(&mut Context::from_waker(Waker::noop()), &mut into) {
            Poll::Ready(Ok(())) => {
                self.buffer.extend_from_slice(into.filled());
                into.filled().is_empty()
            }
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({} bytes unread)", self.buffer.len())
    }
}

/// One HTTP/2 connection; a clone is the same.
#[derive(Clone)]
pub struct Http2 {
    sender: SendRequest<Bytes>,
}

impl Http2 {
    pub async fn open(target: &Target) -> Result<Self> {
        let (sender, connection) = h2::client::handshake(target.connect().await?).await?;
        // Its end shows in what the sender says.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Self { sender })
    }

    /// Whether the server has said GOAWAY, or the connection is closed.
    pub async fn is_over(&mut self) -> bool {
        poll_fn(|cx| self.sender.poll_ready(cx)).await.is_err()
    }

    /// The status and body of a GET. None where nothing was sent, since the server had said GOAWAY.
    pub async fn get(&mut self, path: &str) -> Result<Option<(u16, String)>> {
        self.ask(http::Method::GET, path, None).await
    }

    /// As `get`, for a POST.
    pub async fn post(&mut self, path: &str, body: &'static [u8]) -> Result<Option<(u16, String)>> {
        self.ask(http::Method::POST, path, Some(Bytes::from_static(body))).await
    }

    /// Begins a request that is in flight until it is released: a POST of which half of the body is missing. Returns
    /// when the answer has begun.
    pub async fn hold(&mut self) -> Result<HeldStream> {
        let request = http::Request::post("https://localhost/echo").body(())?;
        poll_fn(|cx| self.sender.poll_ready(cx)).await?;
        let (response, mut sending) = self.sender.send_request(request, false)?;
        sending.send_data(Bytes::from_static(b"01234"), false)?;
        let response = response.await?;
        ensure!(response.status() == 200, "status {}", response.status());
        Ok(HeldStream { sending, body: response.into_body() })
    }

    async fn ask(
        &mut self,
        method: http::Method,
        path: &str,
        sent: Option<Bytes>,
    ) -> Result<Option<(u16, String)>> {
        let request =
            http::Request::builder().method(method).uri(format!("https://localhost{path}")).body(())?;
        if self.is_over().await {
            return Ok(None);
        }
        let Ok((response, mut stream)) = self.sender.send_request(request, sent.is_none()) else {
            return Ok(None);
        };
        if let Some(sent) = sent {
            stream.send_data(sent, true)?;
        }
        let (head, mut body) = response.await?.into_parts();
        let mut text = Vec::new();
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
            text.extend_from_slice(&data);
        }
        Ok(Some((head.status.as_u16(), String::from_utf8_lossy(&text).into_owned())))
    }
}

/// A request of HTTP/2 that is in flight until it is released.
pub struct HeldStream {
    sending: SendStream<Bytes>,
    body: RecvStream,
}

impl HeldStream {
    /// Sends the second half of the body; gives that of the answer, whole.
    pub async fn release(mut self) -> Result<Vec<u8>> {
        self.sending.send_data(Bytes::from_static(b"56789"), true)?;
        let mut all = Vec::new();
        while let Some(data) = self.body.data().await {
            let data = data?;
            self.body.flow_control().release_capacity(data.len())?;
            all.extend_from_slice(&data);
        }
        Ok(all)
    }
}
