//! An HTTP/1.1 client that never retries, and sees each byte.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

#[derive(Clone, Debug)]
pub enum Target {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

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

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

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
        let stream = match target {
            Target::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
            Target::Unix(path) => Stream::Unix(UnixStream::connect(path).await?),
        };
        Ok(Self { stream, buffer: Vec::new() })
    }

    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
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

    /// Whether the server has closed this connection, as far as can be seen now.
    pub fn is_closed_by_server(&mut self) -> bool {
        let mut byte = [0];
        let read = match &self.stream {
            Stream::Tcp(stream) => stream.try_read(&mut byte),
            Stream::Unix(stream) => stream.try_read(&mut byte),
        };
        match read {
            Ok(0) => true,
            Ok(_) => {
                self.buffer.push(byte[0]);
                false
            }
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({} bytes unread)", self.buffer.len())
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, into),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, into),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
