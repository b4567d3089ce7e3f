use proptest::prelude::*;

use super::*;

fn now() -> Timestamp {
    "2026-11-22T10:11:12.000000345Z".parse().unwrap()
}

fn text(path: &Path) -> String {
    String::from_utf8(fs::read(path).unwrap()).unwrap()
}

/// The log's files, oldest first.
fn all(path: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = files::rotated(path).unwrap().into_iter().map(|(_, path)| path).collect();
    files.push(path.to_owned());
    files
}

/// What the log says each output was.
fn contents(path: &Path) -> (Vec<u8>, Vec<u8>) {
    let mut both = (Vec::new(), Vec::new());
    for file in all(path) {
        let bytes = fs::read(file).unwrap();
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            let record = Record::parse(line.strip_suffix(b"\n").unwrap()).unwrap();
            let out = match record.stream {
                Stream::Stdout => &mut both.0,
                Stream::Stderr => &mut both.1,
            };
            out.extend_from_slice(record.content);
            if !record.partial {
                out.push(b'\n');
            }
        }
    }
    both
}

#[test]
fn records_are_cri_lines_with_the_source_position() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a/b/0.log");
    let mut writer = Writer::open(&path, Limits::default()).unwrap();
    writer.append(0, Stream::Stdout, b"one\ntw", now()).unwrap();
    writer.append(0, Stream::Stderr, b"oops\n", now()).unwrap();
    writer.append(6, Stream::Stdout, b"o\nend", now()).unwrap();
    writer.finish(now()).unwrap();
    assert_eq!(
        text(&path),
        "2026-11-22T10:11:12.000000345Z stdout F:@4+0 one\n\
         2026-11-22T10:11:12.000000345Z stderr F:@4+5 oops\n\
         2026-11-22T10:11:12.000000345Z stdout F:@8+5 two\n\
         2026-11-22T10:11:12.000000345Z stdout P:@11+5 end\n"
    );
    assert!(writer.progress().borrow().ended);
}

#[test]
fn long_lines_are_split_and_add_up() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    let mut writer = Writer::open(&path, Limits::default()).unwrap();
    for extra in [0, 1] {
        let mut line = vec![b'x'; MAX_CONTENT + extra];
        line.push(b'\n');
        writer.append(writer.position().stdout, Stream::Stdout, &line, now()).unwrap();
    }
    let tags: Vec<_> = text(&path)
        .lines()
        .map(|line| (line.split(' ').nth(2).unwrap().as_bytes()[0], line.split(' ').nth(3).unwrap().len()))
        .collect();
    assert_eq!(tags, [(b'F', MAX_CONTENT), (b'P', MAX_CONTENT), (b'F', 1)]);
}

#[test]
fn rotation_keeps_the_newest_files_and_the_position() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    let limits = Limits { file_bytes: 100, files: 3 };
    let mut writer = Writer::open(&path, limits).unwrap();
    for number in 0..20_u64 {
        writer.append(number * 5, Stream::Stdout, format!("{number:04}\n").as_bytes(), now()).unwrap();
    }
    let files = all(&path);
    assert_eq!(files.len(), 3);
    assert!(text(&path).ends_with(" 0019\n"));
    assert_eq!(contents(&path).0.len() % 5, 0);
    // Killed between the two renames of a rotation.
    fs::rename(&path, files::rotated_path(&path, 999)).unwrap();
    fs::write(files::beside(&path, NEW), b"").unwrap();
    let writer = Writer::open(&path, limits).unwrap();
    assert_eq!(writer.position(), Position { stdout: 100, stderr: 0 });
    assert!(!files::beside(&path, NEW).exists());
}

#[test]
fn a_failed_append_takes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    let mut writer = Writer::open(&path, Limits::default()).unwrap();
    writer.append(0, Stream::Stdout, b"a", now()).unwrap();
    let good = std::mem::replace(&mut writer.file, File::open("/dev/null").unwrap());
    writer.append(1, Stream::Stdout, b"b\nc", now()).unwrap_err();
    writer.file = good;
    writer.append(1, Stream::Stdout, b"b\nc", now()).unwrap();
    writer.finish(now()).unwrap();
    assert_eq!(contents(&path).0, b"ab\nc");
}

#[derive(Clone, Debug)]
struct Chunk {
    stream: Stream,
    bytes: Vec<u8>,
}

fn chunk() -> impl Strategy<Value = Chunk> {
    let byte = prop_oneof![3 => Just(b'\n'), 5 => Just(b'a'), 1 => any::<u8>()];
    let bytes = prop_oneof![
        9 => proptest::collection::vec(byte, 1..40),
        1 => (MAX_CONTENT - 2..MAX_CONTENT * 2 + 3).prop_map(|len| vec![b'y'; len]),
    ];
    (any::<bool>(), bytes)
        .prop_map(|(err, bytes)| Chunk { stream: if err { Stream::Stderr } else { Stream::Stdout }, bytes })
}

fn expected(chunks: &[Chunk]) -> (Vec<u8>, Vec<u8>) {
    let of =
        |stream| chunks.iter().filter(|chunk| chunk.stream == stream).flat_map(|chunk| chunk.bytes.clone()).collect();
    (of(Stream::Stdout), of(Stream::Stderr))
}

/// Feeds both outputs from the writer's position on, in pieces of `piece` bytes.
fn feed(writer: &mut Writer, chunks: &[Chunk], piece: usize, stop_after: usize) {
    let resume = writer.position();
    let mut at = Position::default();
    let mut calls = 0;
    for chunk in chunks {
        let start = at.of(chunk.stream);
        let end = start + chunk.bytes.len() as u64;
        at.set(chunk.stream, end);
        let from = resume.of(chunk.stream).clamp(start, end);
        let rest = &chunk.bytes[usize::try_from(from - start).unwrap()..];
        for (index, part) in rest.chunks(piece).enumerate() {
            if calls == stop_after {
                return;
            }
            calls += 1;
            writer.append(from + (index * piece) as u64, chunk.stream, part, now()).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Promise 2: kill -9 at any moment neither loses nor doubles a byte of the log.
    #[test]
    fn any_number_of_crashes_loses_and_doubles_nothing(
        chunks in proptest::collection::vec(chunk(), 0..20),
        crashes in proptest::collection::vec((1usize..30, 0usize..12, 0usize..200), 0..5),
        file_bytes in prop_oneof![Just(u64::MAX), 1u64..400],
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        let limits = Limits { file_bytes, files: usize::MAX };
        for (piece, calls, tear) in crashes {
            let mut writer = Writer::open(&path, limits).unwrap();
            feed(&mut writer, &chunks, piece * 700, calls);
            // The end of the current file may not have reached the disk.
            let len = writer.len.saturating_sub(tear as u64);
            writer.file.set_len(len).unwrap();
        }
        let mut writer = Writer::open(&path, limits).unwrap();
        feed(&mut writer, &chunks, usize::MAX, usize::MAX);
        writer.finish(now()).unwrap();
        let (stdout, stderr) = contents(&path);
        let (out, err) = expected(&chunks);
        prop_assert_eq!(stdout, out);
        prop_assert_eq!(stderr, err);
    }
}

#[test]
fn a_tail_torn_at_any_byte_is_cut_and_written_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    let chunks = [
        Chunk { stream: Stream::Stdout, bytes: b"first\nsec".to_vec() },
        Chunk { stream: Stream::Stderr, bytes: b"warn\nmore\n".to_vec() },
        Chunk { stream: Stream::Stdout, bytes: b"ond\n\n".to_vec() },
    ];
    let mut writer = Writer::open(&path, Limits::default()).unwrap();
    feed(&mut writer, &chunks, usize::MAX, usize::MAX);
    let whole = fs::read(&path).unwrap();
    for cut in 0..=whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        let mut writer = Writer::open(&path, Limits::default()).unwrap();
        feed(&mut writer, &chunks, usize::MAX, usize::MAX);
        assert_eq!(String::from_utf8_lossy(&fs::read(&path).unwrap()), String::from_utf8_lossy(&whole), "cut at {cut}");
    }
}
