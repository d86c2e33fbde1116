//! Clients that never retry: [`Connection`] for HTTP/1.1, which exposes each byte, and [`Http2`].

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::sleep;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::ClientConfig;

/// A listener to connect to.
#[derive(Clone, Debug)]
pub enum Target {
    Tcp(SocketAddr),
    Unix(PathBuf),
    /// TLS, with the trusted roots and the ALPN protocols of the client.
    Tls(SocketAddr, Arc<ClientConfig>),
    /// As `Tls`, for a client that asks for this server name.
    Named(String, SocketAddr, Arc<ClientConfig>),
    /// One of the others, to which a proxy passes the connection on after it has sent a PROXY header.
    Behind(Vec<u8>, Box<Target>),
}

impl Target {
    /// Opens a connection, with its TLS handshake.
    pub async fn connect(&self) -> io::Result<Stream> {
        match self {
            Self::Behind(header, target) => target.connect_after(header).await,
            target => target.connect_after(b"").await,
        }
    }

    /// As `connect`, after `first` is sent.
    async fn connect_after(&self, first: &[u8]) -> io::Result<Stream> {
        Ok(match self {
            Self::Tcp(address) => Box::pin(connect(*address, first).await?),
            Self::Unix(path) => {
                let mut stream = UnixStream::connect(path).await?;
                stream.write_all(first).await?;
                Box::pin(stream)
            }
            Self::Tls(address, client) => {
                let stream = connect(*address, first).await?;
                Box::pin(TlsConnector::from(client.clone()).connect(address.ip().into(), stream).await?)
            }
            Self::Named(name, address, client) => {
                let name = name.clone().try_into().map_err(io::Error::other)?;
                let stream = connect(*address, first).await?;
                Box::pin(TlsConnector::from(client.clone()).connect(name, stream).await?)
            }
            Self::Behind(..) => return Err(io::ErrorKind::Unsupported.into()),
        })
    }
}

async fn connect(address: SocketAddr, first: &[u8]) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    stream.write_all(first).await?;
    Ok(stream)
}

/// The byte stream below HTTP.
pub trait Duplex: AsyncRead + AsyncWrite + Send {
    /// Updates the keys of both directions: the next write is preceded by a KeyUpdate that requests one from the
    /// server.
    fn update_keys(self: Pin<&mut Self>) -> Result<()> {
        bail!("this connection does not use TLS")
    }
}

impl Duplex for TcpStream {}
impl Duplex for UnixStream {}
impl Duplex for TlsStream<TcpStream> {
    fn update_keys(self: Pin<&mut Self>) -> Result<()> {
        Ok(self.get_mut().get_mut().1.refresh_traffic_keys()?)
    }
}
pub type Stream = Pin<Box<dyn Duplex>>;

/// A response; [`Connection::head`] leaves the body empty.
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

    /// Whether the server closes the connection after this response.
    pub fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// One HTTP/1.1 connection.
pub struct Connection {
    stream: Stream,
    /// Bytes that were read and belong to later responses.
    buffer: Vec<u8>,
}

/// A WebSocket handshake for /socket.
pub const WEBSOCKET: &[u8] =
    b"GET /socket HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
    sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

/// A request whose handler echoes half of the body, and waits for `REST_OF_HELD`.
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
        // A TLS stream may buffer records until it is flushed.
        self.stream.flush().await
    }

    /// TLS 1.3: sends a KeyUpdate before the next bytes, and requests one from the server.
    pub fn update_keys(&mut self) -> Result<()> {
        self.stream.as_mut().update_keys()
    }

    /// Closes the sending direction; responses can still be read.
    pub async fn finish_sending(&mut self) -> io::Result<()> {
        self.stream.shutdown().await
    }

    /// Sends a request and reads the response.
    pub async fn ask(&mut self, request: &[u8]) -> Result<Answer> {
        self.send(request).await.context("could not send")?;
        self.answer().await
    }

    /// Reads the next final response with its complete body.
    pub async fn answer(&mut self) -> Result<Answer> {
        let mut answer = loop {
            let mut answer = self.head().await?;
            // Informational responses such as 100 Continue precede the final one.
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

    /// Reads the head of the next response, which may be an informational one.
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

    /// Reads more bytes into the buffer; returns their number, 0 at the end of the stream.
    pub async fn read_more(&mut self) -> Result<usize> {
        self.stream.read_buf(&mut self.buffer).await.context("reset before the answer")
    }

    /// The bytes that were read and not consumed.
    pub fn unread(&self) -> &[u8] {
        &self.buffer
    }

    /// Consumes `length` bytes.
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
        while let Some(mut chunk) = self.chunk().await? {
            body.append(&mut chunk);
        }
        Ok(body)
    }

    /// Reads the next chunk of a chunked body; `None` at its end.
    pub async fn chunk(&mut self) -> Result<Option<Vec<u8>>> {
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
        Ok((length > 0).then_some(chunk))
    }

    /// Begins a request that is in flight until [`release`](Self::release): a POST without the second half of its body.
    /// Returns the head of the response, which shows that the handler has begun.
    pub async fn hold(&mut self) -> Result<Answer> {
        self.send(HELD).await.context("could not send")?;
        let head = self.head().await?;
        ensure!(head.status == 200, "status {}", head.status);
        Ok(head)
    }

    /// Sends the second half of the body that [`hold`](Self::hold) left out, and reads the response to its end.
    pub async fn release(&mut self) -> Result<()> {
        self.send(REST_OF_HELD).await.context("could not send")?;
        let body = self.chunks().await?;
        ensure!(body == b"0123456789", "a wrong answer: {body:?}");
        Ok(())
    }

    /// Whether the server has closed this connection; does not wait.
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

/// One HTTP/2 connection; clones share it.
#[derive(Clone)]
pub struct Http2 {
    sender: SendRequest<Bytes>,
}

impl Http2 {
    pub async fn open(target: &Target) -> Result<Self> {
        let (sender, connection) = h2::client::handshake(target.connect().await?).await?;
        // The sender reports errors of the connection, so the result of the driver is not needed.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Self { sender })
    }

    /// Whether the server has sent GOAWAY, or the connection is closed.
    pub async fn is_over(&mut self) -> bool {
        poll_fn(|cx| self.sender.poll_ready(cx)).await.is_err()
    }

    /// Waits until the server has sent GOAWAY, or the connection is closed.
    pub async fn ended(&mut self) {
        while !self.is_over().await {
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// The status and body of a GET; `None` if nothing was sent because the server had sent GOAWAY.
    pub async fn get(&mut self, path: &str) -> Result<Option<(u16, String)>> {
        self.ask(http::Method::GET, path, None).await
    }

    /// As `get`, for a POST.
    pub async fn post(&mut self, path: &str, body: &'static [u8]) -> Result<Option<(u16, String)>> {
        self.ask(http::Method::POST, path, Some(Bytes::from_static(body))).await
    }

    /// Begins a request that is in flight until it is released: a POST without the second half of its body. Returns
    /// when the response has begun.
    pub async fn hold(&mut self) -> Result<HeldStream> {
        let request = http::Request::post("https://localhost/echo").body(())?;
        poll_fn(|cx| self.sender.poll_ready(cx)).await?;
        let (response, mut sending) = self.sender.send_request(request, false)?;
        sending.send_data(Bytes::from_static(b"01234"), false)?;
        let response = response.await?;
        ensure!(response.status() == 200, "status {}", response.status());
        Ok(HeldStream { sending, body: response.into_body() })
    }

    /// Requests /events; returns the body when the response has begun.
    pub async fn events(&mut self) -> Result<RecvStream> {
        let request = http::Request::get("https://localhost/events").header("accept", "text/event-stream");
        poll_fn(|cx| self.sender.poll_ready(cx)).await?;
        let (response, _) = self.sender.send_request(request.body(())?, true)?;
        let response = response.await?;
        ensure!(response.status() == 200, "status {}", response.status());
        Ok(response.into_body())
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

/// An HTTP/2 request that is in flight until it is released.
pub struct HeldStream {
    sending: SendStream<Bytes>,
    body: RecvStream,
}

impl HeldStream {
    /// Sends the second half of the body; returns the complete body of the response.
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
