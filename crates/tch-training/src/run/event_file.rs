//! Event files, which TensorBoard reads: numbers, pictures and texts over the steps of a run.
//!
//! A file is a row of records, each a message `tensorflow.Event` of protocol buffers in the framing of
//! TFRecord: length, masked CRC-32C of the length, message, masked CRC-32C of the message. The few fields that are
//! needed are written by hand, as `event.proto`, `summary.proto` and `tensor.proto` of TensorFlow number them.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use tch_training::run::{EventFile, Shown};
//!
//! # let folder = tempfile::tempdir()?;
//! let mut events = EventFile::create(&folder.path().join("tensorboard"), 0)?;
//! events.write(1, &[("loss/student", Shown::Number(0.5)), ("notes", Shown::Text("**begins**"))])?;
//!
//! // The run goes on from a state that was saved after step 1: what it wrote behind it is not shown twice.
//! let mut events = EventFile::create(&folder.path().join("tensorboard"), 2)?;
//! events.write(2, &[("loss/student", Shown::Number(0.4))])?;
//! # Ok(())
//! # }
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::files::create_folder;

/// What TensorBoard knows an event file by.
const PREFIX: &str = "events.out.tfevents.";

/// Something that is shown at a step.
#[derive(Clone, Copy, Debug)]
pub enum Shown<'a> {
    /// A point of a curve, kept in float32.
    Number(f64),
    /// The bytes of a PNG file.
    Picture(&'a [u8]),
    /// A text in Markdown.
    Text(&'a str),
}

/// The event file of one session of a run.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins a file in `folder`, behind those of earlier sessions. TensorBoard forgets what those say of the step
    /// `first` and of later ones, since this session writes them again.
    ///
    /// # Errors
    /// [`Error::File`] if the folder cannot be read or the file cannot be written.
    pub fn create(folder: &Path, first: u64) -> Result<Self> {
        create_folder(folder)?;
        // TensorBoard reads files by their names in order.
        let path = folder.join(format!("{PREFIX}{:06}", last(folder)? + 1));
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.map_err(Error::file("creating", &path))?;
        let mut events = Self { path, file };
        let version = Message::default().bytes(3, b"brain.Event:2");
        let begins =
            Message::default().number(2, first).message(7, Message::default().number(1, 1));
        events.add(version)?;
        events.add(begins)?;
        Ok(events)
    }

    /// Adds what is shown at a step, each under its tag. Tags with the same beginning before a `/` are shown
    /// together.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written; [`Error::NotSupported`] for a picture that is no PNG.
    pub fn write(&mut self, step: u64, shown: &[(&str, Shown<'_>)]) -> Result<()> {
        let mut summary = Message::default();
        for (tag, shown) in shown {
            summary = summary.message(1, value(tag, *shown)?);
        }
        self.add(Message::default().number(2, step).message(5, summary))
    }

    fn add(&mut self, event: Message) -> Result<()> {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let Message(event) = Message::default().double(1, clock).and(event);
        // In one piece, without a buffer: the file can be watched.
        self.file.write_all(&record(&event)).map_err(Error::file("writing", &self.path))
    }
}

/// The highest number of an event file in a folder, 0 if there is none. What no number could follow is not ours.
fn last(folder: &Path) -> Result<u64> {
    let numbers = fs::read_dir(folder).and_then(|entries| {
        let number = |entry: fs::DirEntry| {
            let number = entry.file_name().to_str()?.strip_prefix(PREFIX)?.parse().ok();
            number.filter(|number| *number < u64::MAX)
        };
        entries.filter_map(|entry| entry.map(number).transpose()).collect::<Result<Vec<u64>, _>>()
    });
    Ok(numbers.map_err(Error::file("reading", folder))?.into_iter().max().unwrap_or(0))
}

/// `Summary.Value`.
fn value(tag: &str, shown: Shown<'_>) -> Result<Message> {
    let value = Message::default().bytes(1, tag.as_bytes());
    Ok(match shown {
        Shown::Number(number) => value.float(2, number as f32),
        Shown::Picture(png) => value.message(4, picture(png)?),
        Shown::Text(text) => {
            const STRING: u64 = 7;
            let one = Message::default().message(2, Message::default().number(1, 1));
            let tensor = Message::default().number(1, STRING).message(2, one);
            let plugin = Message::default().bytes(1, b"text");
            value
                .message(8, tensor.bytes(8, text.as_bytes()))
                .message(9, Message::default().message(1, plugin))
        }
    })
}

/// `Summary.Image`.
fn picture(png: &[u8]) -> Result<Message> {
    const RGB: u64 = 3;
    // Signature, then the header's length and name, then width and height.
    let number = |at: usize| -> Option<u64> {
        let bytes = png.get(at..at + 4)?;
        Some(u64::from(u32::from_be_bytes(bytes.try_into().ok()?)))
    };
    let is_png = png.starts_with(b"\x89PNG\r\n\x1a\n") && png.get(12..16) == Some(b"IHDR");
    match (number(16), number(20)) {
        (Some(width), Some(height)) if is_png => {
            Ok(Message::default().number(1, height).number(2, width).number(3, RGB).bytes(4, png))
        }
        _ => Err(Error::NotSupported {
            what: "a picture that is no PNG in an event file".to_owned(),
            found: format!("{} bytes", png.len()),
        }),
    }
}

/// A message of protocol buffers, written field by field.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(mut self, mut value: u64) -> Self {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
        self
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn number(self, field: u64, value: u64) -> Self {
        self.varint(field << 3).varint(value)
    }

    fn double(self, field: u64, value: f64) -> Self {
        self.varint(field << 3 | 1).raw(&value.to_le_bytes())
    }

    fn bytes(self, field: u64, bytes: &[u8]) -> Self {
        self.varint(field << 3 | 2).varint(bytes.len() as u64).raw(bytes)
    }

    fn message(self, field: u64, message: Self) -> Self {
        self.bytes(field, &message.0)
    }

    fn float(self, field: u64, value: f32) -> Self {
        self.varint(field << 3 | 5).raw(&value.to_le_bytes())
    }

    fn and(self, other: Self) -> Self {
        self.raw(&other.0)
    }
}

/// The framing of TFRecord.
fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let parts = [&length[..], &masked(&length), message, &masked(message)];
    parts.concat()
}

/// The CRC-32C of some bytes as TFRecord masks it, for a sum over bytes that hold sums.
fn masked(bytes: &[u8]) -> [u8; 4] {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// CRC-32C (Castagnoli), reflected, as of RFC 3720, appendix B.4.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = table();
    !bytes.iter().fold(!0, |crc, byte| TABLE[usize::from(crc as u8 ^ byte)] ^ (crc >> 8))
}

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_the_standard() {
        // RFC 3720, B.4, and the sum of the digits, which catalogues of sums give.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let rising: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&rising), 0x46dd_794e);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    /// The messages in a file, but for the clock that each begins with.
    fn messages(mut file: &[u8]) -> Vec<String> {
        let mut messages = Vec::new();
        while let Some((length, rest)) = file.split_at_checked(8) {
            let size = u64::from_le_bytes(length.try_into().expect("8 bytes")) as usize;
            let (sum, rest) = rest.split_at(4);
            assert_eq!(sum, masked(length));
            let (message, rest) = rest.split_at(size);
            let (sum, rest) = rest.split_at(4);
            assert_eq!(sum, masked(message));
            assert_eq!(message[0], 1 << 3 | 1);
            messages.push(message[9..].iter().map(|byte| format!("{byte:02x}")).collect());
            file = rest;
        }
        messages
    }

    #[test]
    fn bytes_are_those_of_the_protocol() -> Result<(), Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x01\x02\0\0\0\x03";
        let mut events = EventFile::create(folder.path(), 300)?;
        let shown =
            [("loss/ca", Shown::Number(0.5)), ("p", Shown::Picture(png)), ("t", Shown::Text("hi"))];
        events.write(300, &shown)?;
        let bytes = fs::read(folder.path().join("events.out.tfevents.000001"))?;
        // Serialised by the messages that come with TensorBoard 2.21.
        let expected = [
            "1a0d627261696e2e4576656e743a32",
            "10ac023a020801",
            "10ac022a550a0e0a076c6f73732f6361150000003f0a260a0170222108031082021803221889504e470d0a1a0a\
             0000000d4948445200000102000000030a1b0a0174420c0807120412020801420268694a080a060a0474657874",
        ];
        assert_eq!(messages(&bytes), expected);
        // And a whole record of its writer: the first, without the clock.
        let version = record(&Message::default().bytes(3, b"brain.Event:2").0);
        assert_eq!(version[..12], [15, 0, 0, 0, 0, 0, 0, 0, 0x6d, 0x53, 0x2b, 0x09]);
        assert_eq!(version[27..], [0xfc, 0x98, 0x51, 0x29]);
        Ok(())
    }

    #[test]
    fn sessions_have_files_of_their_own_in_order() -> Result<(), Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let folder = folder.path().join("tensorboard");
        fs::create_dir(&folder)?;
        fs::write(folder.join("events.out.tfevents.000009"), "")?;
        fs::write(folder.join("notes.txt"), "")?;
        let events = EventFile::create(&folder, 0)?;
        assert_eq!(events.path, folder.join("events.out.tfevents.000010"));
        let events = EventFile::create(&folder, 7)?;
        assert_eq!(events.path, folder.join("events.out.tfevents.000011"));
        Ok(())
    }

    #[test]
    fn what_is_no_png_is_refused() -> Result<(), Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let mut events = EventFile::create(folder.path(), 0)?;
        for bytes in [&b""[..], b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", &[0; 64]] {
            let refused = events.write(1, &[("picture", Shown::Picture(bytes))]);
            assert!(matches!(refused, Err(Error::NotSupported { .. })), "{refused:?}");
        }
        Ok(())
    }
}
