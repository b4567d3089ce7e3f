//! A volume's files on this host, for the containers beside the machine: laid out as in the guest.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use super::{Files, archive::version};

/// Makes `dir` hold these files, all at once for whoever reads it.
pub(crate) fn write(dir: &Path, files: &Files) -> io::Result<()> {
    let name = version(files);
    let whole = dir.join(&name);
    make(dir)?;
    if fs::read_link(dir.join("..data")).is_ok_and(|shown| shown == Path::new(&name)) {
        return Ok(());
    }
    if whole.exists() {
        // Half of it, from an agent that died: nothing points to it.
        fs::remove_dir_all(&whole)?;
    }
    make(&whole)?;
    for (path, file) in files {
        let path = whole.join(path);
        if let Some(parent) = path.parent() {
            make(parent)?;
        }
        let mut out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        out.write_all(&file.bytes)?;
        // The process's own mask must not decide.
        out.set_permissions(fs::Permissions::from_mode(file.mode))?;
    }
    let link = dir.join("..data_tmp");
    match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(&name, &link)?;
    fs::rename(&link, dir.join("..data"))?;
    let tops: std::collections::BTreeSet<_> = files.keys().filter_map(|path| path.split('/').next()).collect();
    for top in &tops {
        let link = dir.join(top);
        if link.symlink_metadata().is_err() {
            symlink(Path::new("..data").join(top), &link)?;
        }
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let known = entry.file_name();
        let known = known.to_string_lossy();
        if known.starts_with("..v") && known != name {
            fs::remove_dir_all(entry.path())?;
        } else if !known.starts_with("..") && !tops.contains(&*known) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Makes the empty directories below `dir` that the machine and the containers beside it share. Everybody may write into each, as
/// into the kubelet's.
pub(crate) fn share(dir: &Path, names: impl IntoIterator<Item = impl AsRef<str>>) -> io::Result<()> {
    for name in names {
        let place = dir.join(name.as_ref());
        make(&place)?;
        // An agent that died in between left it as it is made first.
        if place.metadata()?.permissions().mode() & 0o7777 == 0o755 && place.read_dir()?.next().is_none() {
            fs::set_permissions(&place, fs::Permissions::from_mode(0o777))?;
        }
    }
    Ok(())
}

/// Makes an empty file that everybody may write to who may reach it.
pub(crate) fn writable_file(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        make(parent)?;
    }
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    file.set_permissions(fs::Permissions::from_mode(0o666))
}

/// Directories that everybody may look into: who may reach them at all, the agent's own directory says.
fn make(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))
}

/// Where a part of a volume is: all of it, or what `sub_path` names as it is now; none if there is no such thing.
pub(crate) fn file_of(dir: &Path, files: &Files, sub_path: &str) -> Option<PathBuf> {
    let sub: Vec<_> = sub_path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    let sub = sub.join("/");
    if sub.is_empty() {
        return Some(dir.to_owned());
    }
    let below = format!("{sub}/");
    let known = files.keys().any(|path| *path == sub || path.starts_with(&below));
    known.then(|| dir.join(version(files)).join(sub))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::File;

    fn files(list: &[(&str, &str, u32)]) -> Files {
        let file = |text: &str, mode| File { bytes: text.as_bytes().to_vec(), mode };
        list.iter().map(|(path, text, mode)| ((*path).to_owned(), file(text, *mode))).collect()
    }

    #[test]
    fn an_update_shows_all_of_the_new_and_leaves_none_of_the_old() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("v");
        let first = files(&[("a", "1", 0o644), ("deep/b", "2", 0o400)]);
        write(&dir, &first).unwrap();
        write(&dir, &first).unwrap();
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(dir.join("deep/b")).unwrap(), "2");
        assert_eq!(fs::metadata(dir.join("deep/b")).unwrap().permissions().mode() & 0o777, 0o400);
        let second = files(&[("a", "3", 0o644), ("c", "4", 0o644)]);
        // What an agent that died had begun of it.
        fs::create_dir(dir.join(version(&second))).unwrap();
        fs::write(dir.join(version(&second)).join("a"), "torn").unwrap();
        write(&dir, &second).unwrap();
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "3");
        let mut left: Vec<_> =
            fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["..data".to_owned(), version(&second), "a".to_owned(), "c".to_owned()]);
        assert_eq!(fs::read_to_string(file_of(&dir, &second, "c").unwrap()).unwrap(), "4");
        assert_eq!(file_of(&dir, &second, "d"), None);
        assert_eq!(file_of(&dir, &second, "./"), Some(dir.clone()));
    }
}
