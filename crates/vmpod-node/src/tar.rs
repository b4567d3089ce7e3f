//! Writing tar archives in memory. Pure.

/// A tar archive (POSIX ustar, with GNU's long names).
#[derive(Default)]
pub(crate) struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    pub(crate) fn directory(&mut self, path: &str) {
        self.entry(&format!("{path}/"), b'5', 0o755, &[]);
    }

    /// A directory that everybody may write into.
    pub(crate) fn open_directory(&mut self, path: &str) {
        self.entry(&format!("{path}/"), b'5', 0o777, &[]);
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) {
        self.entry(path, b'0', mode, bytes);
    }

    fn entry(&mut self, path: &str, kind: u8, mode: u32, bytes: &[u8]) {
        if path.len() > 100 {
            let name = [path.as_bytes(), b"\0"].concat();
            self.block("././@LongLink", b'L', 0o644, &name);
        }
        self.block(path, kind, mode, bytes);
    }

    fn block(&mut self, path: &str, kind: u8, mode: u32, bytes: &[u8]) {
        let mut header = [0_u8; 512];
        let mut put = |at: usize, field: &[u8]| header[at..at + field.len()].copy_from_slice(field);
        put(0, &path.as_bytes()[..path.len().min(100)]);
        put(100, format!("{mode:07o}\0").as_bytes());
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{:011o}\0", bytes.len()).as_bytes());
        put(136, b"00000000000\0");
        put(148, b"        ");
        put(156, &[kind]);
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        self.bytes
    }
}
