//! Frames as bytes. Everything is big-endian; a frame has a head of eight bytes.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// Length of a frame's head.
pub(super) const HEAD: usize = 8;

/// The longest control frame that is accepted.
pub(super) const MAX_CONTROL: u32 = 64 * 1024;

const VERSION: u16 = 3;
const CONTROL: u16 = 0x8000;
const ID_MASK: u32 = 0x7fff_ffff;
const LENGTH_MASK: u32 = 0x00ff_ffff;
const FIN: u8 = 1;
const UNIDIRECTIONAL: u8 = 2;

/// `SETTINGS_INITIAL_WINDOW_SIZE`.
pub(super) const INITIAL_WINDOW_SIZE: u32 = 7;

/// Status codes of `RST_STREAM`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Reset {
    Protocol = 1,
    InvalidStream = 2,
    Refused = 3,
    Cancel = 5,
}

/// What makes a connection unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    #[error("the peer speaks SPDY version {0}, not 3")]
    Version(u16),
    #[error("a control frame of type {kind} has the wrong length {length}")]
    Length { kind: u16, length: usize },
    #[error("a control frame of {0} bytes is too long")]
    TooLong(u32),
    #[error("a data frame names no stream")]
    NoStream,
}

/// A frame's first eight bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    Control { kind: u16, flags: u8, length: u32 },
    Data { stream: u32, fin: bool, length: u32 },
}

impl Head {
    pub(super) fn parse(bytes: [u8; HEAD]) -> Result<Self, FrameError> {
        let mut bytes = &bytes[..];
        let first = bytes.get_u32();
        let second = bytes.get_u32();
        let [flags, ..] = second.to_be_bytes();
        let length = second & LENGTH_MASK;
        if first >> 31 == 0 {
            return match first {
                0 => Err(FrameError::NoStream),
                stream => Ok(Self::Data { stream, fin: flags & FIN != 0, length }),
            };
        }
        let [high, low, kind_high, kind_low] = first.to_be_bytes();
        let version = u16::from_be_bytes([high, low]) & !CONTROL;
        let kind = u16::from_be_bytes([kind_high, kind_low]);
        match (version, length) {
            (VERSION, ..=MAX_CONTROL) => Ok(Self::Control { kind, flags, length }),
            (VERSION, _) => Err(FrameError::TooLong(length)),
            _ => Err(FrameError::Version(version)),
        }
    }
}

/// A control frame. Header blocks are still compressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Control {
    SynStream {
        stream: u32,
        associated: u32,
        priority: u8,
        fin: bool,
        unidirectional: bool,
        block: Bytes,
    },
    SynReply {
        stream: u32,
        fin: bool,
        block: Bytes,
    },
    RstStream {
        stream: u32,
        status: u32,
    },
    Settings(Vec<(u32, u32)>),
    Ping(u32),
    GoAway {
        last: u32,
        status: u32,
    },
    Headers {
        stream: u32,
        fin: bool,
        block: Bytes,
    },
    WindowUpdate {
        stream: u32,
        delta: u32,
    },
    /// A type that this implementation doesn't know; to be ignored.
    Unknown(u16),
}

impl Control {
    pub(super) fn parse(kind: u16, flags: u8, mut body: Bytes) -> Result<Self, FrameError> {
        let length = body.len();
        let fixed = match kind {
            1 => 10,
            2 | 6 | 8 | 4 => 4,
            3 | 7 | 9 => 8,
            _ => return Ok(Self::Unknown(kind)),
        };
        let wrong = FrameError::Length { kind, length };
        if length < fixed || (matches!(kind, 3 | 6 | 7 | 9) && length != fixed) {
            return Err(wrong);
        }
        let first = body.get_u32();
        let stream = first & ID_MASK;
        let fin = flags & FIN != 0;
        Ok(match kind {
            1 => {
                let associated = body.get_u32() & ID_MASK;
                let priority = body.get_u8() >> 5;
                body.advance(1);
                let unidirectional = flags & UNIDIRECTIONAL != 0;
                Self::SynStream { stream, associated, priority, fin, unidirectional, block: body }
            }
            2 => Self::SynReply { stream, fin, block: body },
            3 => Self::RstStream { stream, status: body.get_u32() },
            4 => {
                if body.len() as u64 != u64::from(first) * 8 {
                    return Err(wrong);
                }
                let mut settings = Vec::with_capacity(body.len() / 8);
                while body.has_remaining() {
                    settings.push((body.get_u32() & LENGTH_MASK, body.get_u32()));
                }
                Self::Settings(settings)
            }
            6 => Self::Ping(first),
            7 => Self::GoAway { last: stream, status: body.get_u32() },
            8 => Self::Headers { stream, fin, block: body },
            _ => Self::WindowUpdate { stream, delta: body.get_u32() & ID_MASK },
        })
    }

    pub(super) fn encode(&self) -> Bytes {
        let mut body = BytesMut::new();
        let mut flags = 0;
        let kind = match self {
            Self::SynStream { stream, associated, priority, fin, unidirectional, block } => {
                flags = u8::from(*fin) * FIN + u8::from(*unidirectional) * UNIDIRECTIONAL;
                body.put_u32(*stream);
                body.put_u32(*associated);
                body.put_u8(*priority << 5);
                body.put_u8(0);
                body.put_slice(block);
                1
            }
            Self::SynReply { stream, fin, block } => {
                flags = u8::from(*fin) * FIN;
                body.put_u32(*stream);
                body.put_slice(block);
                2
            }
            Self::RstStream { stream, status } => {
                body.put_u32(*stream);
                body.put_u32(*status);
                3
            }
            Self::Settings(settings) => {
                body.put_u32(u32::try_from(settings.len()).unwrap_or(0));
                for (id, value) in settings {
                    body.put_u32(*id);
                    body.put_u32(*value);
                }
                4
            }
            Self::Ping(id) => {
                body.put_u32(*id);
                6
            }
            Self::GoAway { last, status } => {
                body.put_u32(*last);
                body.put_u32(*status);
                7
            }
            Self::Headers { stream, fin, block } => {
                flags = u8::from(*fin) * FIN;
                body.put_u32(*stream);
                body.put_slice(block);
                8
            }
            Self::WindowUpdate { stream, delta } => {
                body.put_u32(*stream);
                body.put_u32(*delta);
                9
            }
            Self::Unknown(kind) => *kind,
        };
        let mut frame = BytesMut::with_capacity(HEAD + body.len());
        frame.put_u16(CONTROL | VERSION);
        frame.put_u16(kind);
        frame.put_u32(u32::from(flags) << 24 | u32::try_from(body.len()).unwrap_or(0) & LENGTH_MASK);
        frame.put_slice(&body);
        frame.freeze()
    }
}

/// A data frame. `data` is at most 2^24 − 1 bytes.
pub(super) fn data(stream: u32, fin: bool, data: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEAD + data.len());
    frame.put_u32(stream & ID_MASK);
    frame.put_u32(u32::from(fin) << 24 | u32::try_from(data.len()).unwrap_or(0) & LENGTH_MASK);
    frame.put_slice(data);
    frame.freeze()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id() -> impl Strategy<Value = u32> {
        0..=ID_MASK
    }

    fn block() -> impl Strategy<Value = Bytes> {
        proptest::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from)
    }

    fn control() -> impl Strategy<Value = Control> {
        prop_oneof![
            (id(), id(), 0..8u8, any::<(bool, bool)>(), block()).prop_map(
                |(stream, associated, priority, (fin, unidirectional), block)| Control::SynStream {
                    stream,
                    associated,
                    priority,
                    fin,
                    unidirectional,
                    block
                }
            ),
            (id(), any::<bool>(), block()).prop_map(|(stream, fin, block)| Control::SynReply { stream, fin, block }),
            (id(), any::<u32>()).prop_map(|(stream, status)| Control::RstStream { stream, status }),
            proptest::collection::vec((0..=LENGTH_MASK, any::<u32>()), 0..5).prop_map(Control::Settings),
            any::<u32>().prop_map(Control::Ping),
            (id(), any::<u32>()).prop_map(|(last, status)| Control::GoAway { last, status }),
            (id(), any::<bool>(), block()).prop_map(|(stream, fin, block)| Control::Headers { stream, fin, block }),
            (id(), id()).prop_map(|(stream, delta)| Control::WindowUpdate { stream, delta }),
        ]
    }

    fn split(frame: &Bytes) -> ([u8; HEAD], Bytes) {
        (frame[..HEAD].try_into().unwrap(), frame.slice(HEAD..))
    }

    proptest! {
        #[test]
        fn control_frames_come_back(frame in control()) {
            let (head, body) = split(&frame.encode());
            let Head::Control { kind, flags, length } = Head::parse(head).unwrap() else {
                return Err(TestCaseError::fail("a data frame"));
            };
            prop_assert_eq!(length as usize, body.len());
            prop_assert_eq!(Control::parse(kind, flags, body).unwrap(), frame);
        }

        #[test]
        fn data_frames_come_back(stream in 1..=ID_MASK, fin in any::<bool>(), bytes in block()) {
            let (head, body) = split(&data(stream, fin, &bytes));
            let length = u32::try_from(bytes.len()).unwrap();
            prop_assert_eq!(Head::parse(head).unwrap(), Head::Data { stream, fin, length });
            prop_assert_eq!(body, bytes);
        }

        #[test]
        fn any_bytes_parse_or_are_refused(head in any::<[u8; HEAD]>(), kind in 0..12u16, flags in any::<u8>(), body in block()) {
            let _parsed = Head::parse(head);
            let _parsed = Control::parse(kind, flags, body);
        }
    }

    #[test]
    fn heads_are_those_of_the_draft() {
        // SYN_STREAM, version 3, flag FIN, ten bytes.
        let head = [0x80, 3, 0, 1, 1, 0, 0, 10];
        assert_eq!(Head::parse(head), Ok(Head::Control { kind: 1, flags: 1, length: 10 }));
        assert_eq!(Head::parse([0x80, 2, 0, 1, 0, 0, 0, 0]), Err(FrameError::Version(2)));
        assert_eq!(Head::parse([0x80, 3, 0, 4, 0, 2, 0, 0]), Err(FrameError::TooLong(131_072)));
        assert_eq!(Head::parse([0; 8]), Err(FrameError::NoStream));
        assert_eq!(Control::Ping(7).encode()[..], [0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 7]);
        let lying = Bytes::from_static(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 0, 0, 0, 1]);
        assert_eq!(Control::parse(4, 0, lying), Err(FrameError::Length { kind: 4, length: 12 }));
    }
}
