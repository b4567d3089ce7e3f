//! Finding the disk in a container image's layer: a tar archive that comes in pieces.
//!
//! No path of the archive is ever used as a path here: the one file under `/disk` goes to a file that was named beforehand.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};

use crate::store::files;

const BLOCK: usize = 512;
/// A long name or a set of extended attributes beyond this is a trap.
const LONGEST_EXTRA: u64 = 1 << 20;

/// What a layer holds under `/disk`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Found {
    /// The file, and its size in bytes. Its bytes are at the start of the layer's scratch file.
    pub(crate) file: Option<(String, u64)>,
    /// More files under `/disk`, which there mustn't be.
    pub(crate) others: Vec<String>,
    /// Names that this layer takes away from those before it; empty for all of them.
    pub(crate) removed: Vec<String>,
}

/// Reads an archive as it comes.
pub(crate) struct TarReader<'a> {
    file: &'a File,
    state: State,
    /// The header that is being read.
    block: [u8; BLOCK],
    found: Found,
    /// From extended headers, for the next file.
    name: Option<String>,
    size: Option<u64>,
}

enum State {
    Header { have: usize },
    Body { left: u64, padding: u64, action: Action },
    Ended,
}

enum Action {
    Skip,
    /// Write to the scratch file at this offset.
    Keep(u64),
    Extra {
        kind: u8,
        bytes: Vec<u8>,
    },
}

impl<'a> TarReader<'a> {
    /// Writes the disk to `file`, which must be empty.
    pub(crate) fn new(file: &'a File) -> Self {
        Self { file, state: header(), block: [0; BLOCK], found: Found::default(), name: None, size: None }
    }

    pub(crate) fn push(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match &mut self.state {
                State::Ended => return Ok(()),
                State::Header { have } => {
                    let step = (BLOCK - *have).min(bytes.len());
                    self.block[*have..*have + step].copy_from_slice(&bytes[..step]);
                    *have += step;
                    bytes = &bytes[step..];
                    if *have == BLOCK {
                        let block = self.block;
                        self.state = self.header(&block)?;
                    }
                }
                State::Body { left, padding, action } => {
                    let step = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                    let (part, rest) = bytes.split_at(step);
                    match action {
                        Action::Skip => {}
                        Action::Keep(offset) => {
                            files::write_sparse(self.file, *offset, part)?;
                            *offset += step as u64;
                        }
                        Action::Extra { bytes, .. } => bytes.extend_from_slice(part),
                    }
                    *left -= step as u64;
                    bytes = rest;
                    if *left == 0 {
                        let skip = usize::try_from(*padding).unwrap_or(0).min(bytes.len());
                        *padding -= skip as u64;
                        bytes = &bytes[skip..];
                        if *padding == 0 {
                            self.end_of_body();
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// What was found, once all is read.
    pub(crate) fn finish(self) -> io::Result<Found> {
        match self.state {
            State::Ended | State::Header { have: 0 } => {}
            _ => return Err(invalid("the archive is cut off")),
        }
        if let Some((_, size)) = &self.found.file {
            self.file.set_len(*size)?;
        }
        Ok(self.found)
    }

    fn end_of_body(&mut self) {
        if let State::Body { action: Action::Extra { kind, bytes }, .. } = std::mem::replace(&mut self.state, header())
        {
            match kind {
                b'L' => self.name = Some(text(&bytes)),
                b'x' => {
                    let mut attributes = pax(&bytes);
                    self.name = attributes.remove("path").or(self.name.take());
                    self.size = attributes.remove("size").and_then(|size| size.parse().ok()).or(self.size);
                }
                _ => {}
            }
        }
    }

    fn header(&mut self, block: &[u8; BLOCK]) -> io::Result<State> {
        if files::is_zero(block) {
            return Ok(State::Ended);
        }
        let sum: u64 = block
            .iter()
            .enumerate()
            .map(|(at, &byte)| if (148..156).contains(&at) { 32 } else { u64::from(byte) })
            .sum();
        if number(&block[148..156]) != Some(sum) {
            return Err(invalid("a header of the archive is damaged"));
        }
        let said = number(&block[124..136]).ok_or_else(|| invalid("a size in the archive can't be read"))?;
        let kind = block[156];
        if matches!(kind, b'L' | b'K' | b'x' | b'g') {
            if said > LONGEST_EXTRA {
                return Err(invalid("a header of the archive is too long"));
            }
            return Ok(body(said, Action::Extra { kind, bytes: Vec::new() }));
        }
        let name = self.name.take().unwrap_or_else(|| {
            let (name, prefix) = (text(&block[..100]), text(&block[345..500]));
            if block[257..262] == *b"ustar" && !prefix.is_empty() { format!("{prefix}/{name}") } else { name }
        });
        let size = self.size.take().unwrap_or(said);
        let is_file = matches!(kind, b'0' | 0 | b'7');
        // Links and the like have no body, whatever they say.
        let size = if is_file || !matches!(kind, b'1'..=b'6') { size } else { 0 };
        Ok(body(size, self.decide(&name, is_file, size)))
    }

    /// What to do with an entry.
    fn decide(&mut self, path: &str, is_file: bool, size: u64) -> Action {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        match parts.as_slice() {
            [".wh.disk" | ".wh..wh..opq"] | ["disk", ".wh..wh..opq"] => self.found.removed.push(String::new()),
            ["disk", name] if name.starts_with(".wh.") => {
                self.found.removed.push(name.strip_prefix(".wh.").unwrap_or_default().to_owned());
            }
            ["disk", rest @ ..] if is_file && !rest.is_empty() => {
                let name = rest.join("/");
                if self.found.file.is_none() {
                    self.found.file = Some((name, size));
                    return Action::Keep(0);
                }
                self.found.others.push(name);
            }
            _ => {}
        }
        Action::Skip
    }
}

fn header() -> State {
    State::Header { have: 0 }
}

fn body(size: u64, action: Action) -> State {
    if size == 0 && !matches!(action, Action::Extra { .. }) {
        return header();
    }
    State::Body { left: size, padding: size.next_multiple_of(BLOCK as u64) - size, action }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// A number in octal digits, or, with the first bit set, in binary.
fn number(field: &[u8]) -> Option<u64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let high = field.len().saturating_sub(8);
        if field.get(1..high).unwrap_or_default().iter().any(|&byte| byte != 0) {
            return None;
        }
        let value = field[high..].iter().fold(0u64, |value, &byte| value << 8 | u64::from(byte));
        return (value <= 64 << 40).then_some(value);
    }
    let digits = String::from_utf8_lossy(field);
    let digits = digits.trim_matches(['\0', ' ']);
    if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
}

/// The records `LENGTH KEY=VALUE` of an extended header.
fn pax(mut bytes: &[u8]) -> BTreeMap<String, String> {
    let mut attributes = BTreeMap::new();
    while let Some(space) = bytes.iter().position(|&byte| byte == b' ') {
        let Some(length) = std::str::from_utf8(&bytes[..space]).ok().and_then(|text| text.parse::<usize>().ok()) else {
            break;
        };
        if length <= space + 1 || length > bytes.len() {
            break;
        }
        let record = String::from_utf8_lossy(&bytes[space + 1..length - 1]).into_owned();
        if let Some((key, value)) = record.split_once('=') {
            attributes.insert(key.to_owned(), value.to_owned());
        }
        bytes = &bytes[length..];
    }
    attributes
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    fn read(archive: &[u8], step: usize) -> io::Result<(Found, Vec<u8>)> {
        let file = tempfile::tempfile()?;
        let mut reader = TarReader::new(&file);
        for part in archive.chunks(step) {
            reader.push(part)?;
        }
        let found = reader.finish()?;
        let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).unwrap()];
        file.read_exact_at(&mut bytes, 0)?;
        Ok((found, bytes))
    }

    fn tar(format: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        let output =
            Command::new("tar").args(["-c", "--format", format, "-C"]).arg(dir.path()).arg(".").output().unwrap();
        assert!(output.status.success());
        output.stdout
    }

    #[test]
    fn the_disk_is_found_in_every_kind_of_archive() {
        let disk = [vec![1; 700], vec![0; 9000], vec![2; 33]].concat();
        let long = format!("disk/{}.qcow2", "x".repeat(180));
        for format in ["ustar", "gnu", "pax"] {
            let name = if format == "ustar" { "disk/a.img" } else { &long };
            let archive = tar(format, &[("etc/passwd", b"root"), (name, &disk), ("zz", b"")]);
            for step in [1, 511, 512, 4000, 1 << 20] {
                let (found, bytes) = read(&archive, step).unwrap();
                assert_eq!(
                    found.file,
                    Some((name.strip_prefix("disk/").unwrap().to_owned(), disk.len() as u64)),
                    "{format}"
                );
                assert!(bytes == disk && found.others.is_empty() && found.removed.is_empty());
            }
            assert!(read(&archive[..1500], 100).is_err() || read(&archive[..1500], 100).unwrap().0.file.is_none());
        }
    }

    #[test]
    fn whiteouts_and_second_files_are_told() {
        let archive = tar(
            "gnu",
            &[("disk/.wh.old.img", b""), ("disk/a.img", b"a"), ("disk/b.img", b"b"), ("other/disk/c", b"c")],
        );
        let (found, _) = read(&archive, 300).unwrap();
        let mut both = vec![found.file.unwrap().0, found.others[0].clone()];
        both.sort();
        assert_eq!((both, found.removed), (vec!["a.img".to_owned(), "b.img".to_owned()], vec!["old.img".to_owned()]));
        let (found, _) = read(&tar("gnu", &[(".wh.disk", b"")]), 512).unwrap();
        assert_eq!(found.removed, [""]);
    }

    #[test]
    fn no_name_leads_out_of_the_archive() {
        let mut archive = tar("ustar", &[("disk/abcdefgh.img", b"bytes")]);
        let at = archive.windows(17).position(|window| window == b"disk/abcdefgh.img").unwrap();
        archive[at..at + 17].copy_from_slice(b"disk/../../../etc");
        let start = at / BLOCK * BLOCK;
        archive[start + 148..start + 156].fill(b' ');
        let sum: u64 = archive[start..start + BLOCK].iter().map(|&byte| u64::from(byte)).sum();
        archive[start + 148..start + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        // It is only a name: nothing is opened by it.
        let (found, bytes) = read(&archive, 512).unwrap();
        assert_eq!((found.file.unwrap().0.as_str(), bytes.as_slice()), ("../../../etc", &b"bytes"[..]));
    }

    proptest! {
        #[test]
        fn damage_never_panics(noise in proptest::collection::vec((0usize..2048, any::<u8>()), 1..8), step in 1usize..900) {
            let mut archive = vec![0; 2048];
            archive[..6].copy_from_slice(b"disk/a");
            archive[124..136].copy_from_slice(b"00000001000\0");
            archive[156] = b'0';
            archive[257..262].copy_from_slice(b"ustar");
            for (at, value) in noise {
                archive[at] = value;
            }
            archive[148..156].fill(b' ');
            let sum: u64 = archive[..BLOCK].iter().map(|&byte| u64::from(byte)).sum();
            archive[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            drop(read(&archive, step));
        }
    }
}
