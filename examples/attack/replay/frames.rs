//! HTTP/2 by hand (RFC 9113): libraries are too well behaved to attack with.

use std::time::Duration;

use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    time::timeout,
};

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// The setting of how many bytes of a body may be sent before more are asked for.
pub(crate) const INITIAL_WINDOW_SIZE: u16 = 4;

pub(crate) const CANCEL: u32 = 8;

/// The longest frame that everybody takes.
pub(crate) const LONGEST: usize = 16_384;

/// A client's first bytes.
pub(crate) fn opening(settings: &[(u16, u32)]) -> Vec<u8> {
    let settings = settings.iter().flat_map(|(name, value)| [&name.to_be_bytes()[..], &value.to_be_bytes()].concat());
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    [&preface[..], &frame(SETTINGS, 0, 0, &settings.collect::<Vec<_>>())].concat()
}

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

pub(crate) fn reset(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes())
}

pub(crate) fn ping() -> Vec<u8> {
    frame(PING, 0, 0, b"attacker")
}

/// The number of a connection's stream, counted from 0.
pub(crate) fn stream(number: usize) -> u32 {
    u32::try_from(2 * number + 1).unwrap()
}

/// A request's head as one frame.
pub(crate) fn request(stream: u32, flags: u8, method: &str, path: &str, headers: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | flags, stream, &block(method, path, headers))
}

/// A request's head: every field a literal that no table keeps (RFC 7541, 6.2.2).
pub(crate) fn block(method: &str, path: &str, headers: &[(&str, &str)]) -> Vec<u8> {
    let of_request = [(":method", method), (":scheme", "http"), (":authority", "localhost"), (":path", path)];
    let mut block = Vec::new();
    for (name, value) in of_request.iter().chain(headers) {
        block.push(0);
        for text in [name, value] {
            length(&mut block, text.len());
            block.extend(text.as_bytes());
        }
    }
    block
}

/// An integer with a prefix of seven bits (RFC 7541, 5.1).
fn length(block: &mut Vec<u8>, length: usize) {
    let Some(mut rest) = length.checked_sub(127) else {
        block.push(length as u8);
        return;
    };
    block.push(127);
    while rest >= 128 {
        block.push((rest % 128 + 128) as u8);
        rest /= 128;
    }
    block.push(rest as u8);
}

/// Frames that came, by what they mean to the attacker.
#[derive(Default, Clone, Copy)]
pub(crate) struct Came {
    /// Answers' heads.
    pub(crate) heads: usize,
    pub(crate) resets: usize,
    /// Whether the other side has said goodbye or closed.
    pub(crate) is_gone: bool,
    /// How many bytes may be sent on a stream, and on the connection, as the other side said at first.
    pub(crate) windows: [usize; 2],
}

/// Reads until so many streams are answered or reset, the other side is gone, or the time is over.
pub(crate) async fn read(stream: &mut (impl AsyncRead + Unpin), streams: usize, bound: Duration) -> Came {
    let mut came = Came { windows: [65_535; 2], ..Came::default() };
    let mut bytes = Vec::new();
    let reading = async {
        while came.heads + came.resets < streams && !came.is_gone {
            if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
                came.is_gone = true;
            }
            let mut rest = bytes.as_slice();
            while let Some((kind, payload, behind)) = split(rest) {
                came.note(kind, payload);
                rest = behind;
            }
            bytes.drain(..bytes.len() - rest.len());
        }
    };
    let _ = timeout(bound, reading).await;
    came
}

/// The first frame, where it is there as a whole.
fn split(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (head, rest) = bytes.split_at_checked(9)?;
    let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
    let (payload, behind) = rest.split_at_checked(length)?;
    Some((head[3], payload, behind))
}

impl Came {
    fn note(&mut self, kind: u8, payload: &[u8]) {
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, |bytes| u32::from_be_bytes(bytes) as usize);
        match kind {
            HEADERS => self.heads += 1,
            RST_STREAM => self.resets += 1,
            GOAWAY => self.is_gone = true,
            WINDOW_UPDATE => self.windows[1] += number(payload),
            SETTINGS => {
                for setting in payload.chunks_exact(6).filter(|it| it[..2] == INITIAL_WINDOW_SIZE.to_be_bytes()) {
                    self.windows[0] = number(&setting[2..]);
                }
            }
            _ => {}
        }
    }
}
