//! What a pull has finished, so that another one can go on after a crash.
//!
//! The first line names the plan and the boot of the host; each further line is a stream whose bytes were verified and written. After a
//! kill the page cache still has them all. After a power failure it may not: then each is read and verified again
//! before it counts.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use super::unpack::Sink;
use super::{Raw, TransferError, clear};
use crate::digest::{Digest, Hasher};
use crate::format::{Plan, Target};
use crate::store::StoreError;
use crate::store::files::{self, io};
use crate::store::work::JOURNAL;

/// The open journal of a pull.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
    path: std::path::PathBuf,
}

/// Identifies the boot of this host; none if there is no telling.
fn boot_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

impl Journal {
    /// Opens the journal of the pull in `dir`. Returns what is finished; the ranges of all else are holes.
    pub(crate) fn open(
        dir: &Path,
        plan: &Plan,
        targets: &HashMap<String, Arc<File>>,
    ) -> Result<(Self, HashMap<usize, Raw>), TransferError> {
        let path = dir.join(JOURNAL);
        let boot = boot_id().unwrap_or_default();
        let plan_digest = Digest::of(format!("{:?}", plan.layers).as_bytes());
        let text = files::read_if_there(&path)?.unwrap_or_default();
        let mut finished = HashMap::new();
        if let Some((found, same_boot)) = parse(&text, plan_digest, &boot) {
            for (index, raw) in found {
                let Some(layer) = plan.layers.get(index) else { continue };
                let (name, offset) = layer.target.place();
                let Some(file) = targets.get(&name) else { continue };
                let whole = matches!(layer.target, Target::File { .. });
                if same_boot || (whole && is_there(file, offset, raw)) {
                    finished.insert(index, raw);
                }
            }
        }
        // Whatever isn't finished may have been begun.
        for (index, layer) in plan.layers.iter().enumerate() {
            let (name, offset) = layer.target.place();
            if let Some(file) = targets.get(&name)
                && !finished.contains_key(&index)
                && !text.is_empty()
            {
                clear(layer, &[Sink { file: Arc::clone(file), offset, found: None }])?;
            }
        }
        let mut lines = format!("vmpod-journal 1 {plan_digest} {boot}\n");
        for (index, raw) in &finished {
            lines.push_str(&line(*index, *raw));
        }
        files::write_whole(&path, lines.as_bytes())?;
        let file = File::options().append(true).mode(0o600).open(&path).map_err(io("open", &path))?;
        Ok((Self { file, path }, finished))
    }

    /// Notes that a stream is verified and written.
    pub(crate) fn finished(&mut self, index: usize, raw: Raw) -> Result<(), StoreError> {
        self.file.write_all(line(index, raw).as_bytes()).map_err(io("write", &self.path))
    }
}

fn line(index: usize, raw: Raw) -> String {
    format!("{index} {} {}\n", raw.size, raw.digest.hex())
}

/// The finished streams, and whether the host has been up since.
fn parse(text: &[u8], plan: Digest, boot: &str) -> Option<(Vec<(usize, Raw)>, bool)> {
    let text = String::from_utf8_lossy(text);
    // The last line may have been cut.
    let whole = &text[..=text.rfind('\n')?];
    let mut lines = whole.lines();
    let mut header = lines.next()?.splitn(4, ' ');
    if header.next()? != "vmpod-journal" || header.next()? != "1" || header.next()? != plan.to_string() {
        return None;
    }
    let same_boot = !boot.is_empty() && header.next()? == boot;
    let finished = lines.filter_map(|line| {
        let mut fields = line.split(' ');
        let index = fields.next()?.parse().ok()?;
        let size = fields.next()?.parse().ok()?;
        let digest = Digest::from_hex(fields.next()?).ok()?;
        Some((index, Raw { size, digest }))
    });
    Some((finished.collect(), same_boot))
}

fn is_there(file: &File, offset: u64, raw: Raw) -> bool {
    struct At<'a>(&'a File, u64);
    impl std::io::Read for At<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let read = self.0.read_at(buffer, self.1)?;
            self.1 += read as u64;
            Ok(read)
        }
    }
    let mut reader = At(file, offset).take(raw.size);
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return hasher.finish() == raw.digest,
            Ok(read) => hasher.update(&buffer[..read]),
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Architecture, Boot, Config, DiskConfig, Firmware, GuestConfig, Hardware, Os};
    use crate::format::{Blob, Encoding, Layer};
    use crate::store::record::Part;

    fn plan() -> Plan {
        let layer = |offset: u64, raw: &[u8]| Layer {
            blobs: vec![Blob { digest: Digest::of(raw), size: raw.len() as u64 }],
            encoding: Encoding::Plain,
            raw_size: Some(raw.len() as u64),
            raw_digest: Some(Digest::of(raw)),
            target: Target::File { part: Part::Disk(0), offset },
        };
        let config = Config {
            os: Os::Linux,
            architecture: Architecture::Amd64,
            boot: Boot::Firmware(Firmware::Uefi),
            disks: vec![DiskConfig { size: 8192 }],
            min_cpus: None,
            min_memory: None,
            macos: None,
            hardware: Hardware::default(),
            guest: GuestConfig::default(),
            labels: std::collections::BTreeMap::new(),
        };
        Plan {
            format: "test",
            config,
            files: vec![(Part::Disk(0), Some(8192))],
            layers: vec![layer(0, &[1; 4096]), layer(4096, &[2; 4096])],
        }
    }

    #[test]
    fn a_cut_line_does_not_count_and_what_was_begun_is_a_hole_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = Arc::new(super::super::open_target(&dir.path().join("disk-0.raw"), Some(8192)).unwrap());
        let targets = HashMap::from([("disk-0.raw".to_owned(), Arc::clone(&file))]);
        let plan = plan();
        let raw = |index: usize| Raw { size: 4096, digest: plan.layers[index].raw_digest.unwrap() };
        let (mut journal, finished) = Journal::open(dir.path(), &plan, &targets).unwrap();
        assert!(finished.is_empty());
        file.write_all_at(&[1; 4096], 0).unwrap();
        journal.finished(0, raw(0)).unwrap();
        file.write_all_at(&[2; 100], 4096).unwrap();
        let cut = line(1, raw(1));
        journal.file.write_all(&cut.as_bytes()[..cut.len() - 1]).unwrap();

        let (_, finished) = Journal::open(dir.path(), &plan, &targets).unwrap();
        assert_eq!(finished, HashMap::from([(0, raw(0))]));
        let mut half = [9; 4096];
        file.read_exact_at(&mut half, 4096).unwrap();
        assert_eq!(half, [0; 4096]);
    }

    #[test]
    fn after_a_reboot_only_what_is_really_there_counts() {
        let dir = tempfile::tempdir().unwrap();
        let file = Arc::new(super::super::open_target(&dir.path().join("disk-0.raw"), Some(8192)).unwrap());
        let targets = HashMap::from([("disk-0.raw".to_owned(), Arc::clone(&file))]);
        let plan = plan();
        let (mut journal, _) = Journal::open(dir.path(), &plan, &targets).unwrap();
        for index in 0..2 {
            journal.finished(index, Raw { size: 4096, digest: plan.layers[index].raw_digest.unwrap() }).unwrap();
        }
        file.write_all_at(&[1; 4096], 0).unwrap();
        let path = dir.path().join(JOURNAL);
        let text = std::fs::read_to_string(&path).unwrap().replace(&boot_id().unwrap(), "another-boot");
        std::fs::write(&path, text).unwrap();
        let (_, finished) = Journal::open(dir.path(), &plan, &targets).unwrap();
        assert_eq!(finished.keys().collect::<Vec<_>>(), [&0]);
    }

    #[test]
    fn the_journal_of_another_plan_does_not_count() {
        let text = format!("vmpod-journal 1 {} boot\n0 1 {}\n", Digest::of(b"plan"), Digest::of(b"").hex());
        assert!(parse(text.as_bytes(), Digest::of(b"other"), "boot").is_none());
        assert_eq!(parse(text.as_bytes(), Digest::of(b"plan"), "boot").unwrap().0.len(), 1);
        assert!(parse(b"", Digest::of(b"plan"), "boot").is_none());
        assert!(parse(b"\xff\xfe garbage", Digest::of(b"plan"), "boot").is_none());
    }
}
