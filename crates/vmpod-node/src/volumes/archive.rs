//! A layout as one tar archive: the files, and a script that puts them in their places. Pure.

use std::{collections::BTreeSet, fmt::Write as _};

use sha2::{Digest as _, Sha256};

use super::{Content, Files, Layout};
use crate::tar::Tar;

/// Unpacks an archive on standard input and runs its script, as root.
pub(super) const UNPACK: &str = r#"
set -e
become=
[ "$(id -u)" = 0 ] || become='sudo -n'
exec $become sh -ec 'umask 022; mkdir -p -m 700 /run/vmpod-volumes; rm -rf /run/vmpod-volumes/new; mkdir /run/vmpod-volumes/new
tar -xf - -C /run/vmpod-volumes/new; exec sh -e /run/vmpod-volumes/new/apply'
"#;

/// What the script begins with. A mount is made once; its marker is gone after a reboot, as the mount is.
const BEGIN: &str = r#"umask 022
new=/run/vmpod-volumes/new/files all=/run/vmpod-volumes/all disk=/var/lib/vmpod/volumes share=/run/vmpod-volumes/shared
mkdir -p $all /run/vmpod-volumes/mounted
files() { # volume, version
    d=$all/$1
    mkdir -p "$d"
    [ "$(readlink "$d/..data" || :)" != "$2" ] || return 0
    rm -rf "$d/$2"
    mv "$new/$1" "$d/$2"
    rm -f "$d/..data_tmp"
    ln -s "$2" "$d/..data_tmp"
    mv -T -f "$d/..data_tmp" "$d/..data"
    for f in "$d/$2"/* "$d/$2"/.[!.]*; do
        [ -e "$f" ] || continue
        n=${f##*/}
        [ -L "$d/$n" ] || ln -s "..data/$n" "$d/$n"
    done
    for f in "$d"/* "$d"/.[!.]*; do
        [ ! -L "$f" ] || [ -e "$f" ] || rm -f "$f"
    done
    for f in "$d"/..v*; do
        [ "$f" = "$d/$2" ] || rm -rf "$f"
    done
}
shared() { # volume, the name by which the host shares it
    [ ! -e "/run/vmpod-volumes/mounted/$2" ] || return 0
    modprobe virtiofs 2>/dev/null || :
    mkdir -p "$share/$1"
    mount -t virtiofs "$2" "$share/$1" || {
        echo "the guest can't mount the directories that it shares with the pod's other containers: that needs virtiofs (Linux 5.4 or later)" >&2
        exit 1
    }
    : >"/run/vmpod-volumes/mounted/$2"
}
bind() { # number, source, target, ro or rw, whether a missing source is made
    [ ! -e "/run/vmpod-volumes/mounted/$1" ] || return 0
    [ -e "$2" ] || [ "$5" = 0 ] || mkdir -p "$2"
    [ -e "$2" ] || { echo "subPath of the volume for $3 does not exist" >&2; exit 1; }
    if [ -d "$2" ]; then mkdir -p "$3"; else mkdir -p "${3%/*}/"; [ -e "$3" ] || : >"$3"; fi
    # A mount is known by its true path: /var/run is a link in most guests.
    t=$(readlink -f "$3")
    mount -o bind "$2" "$t"
    [ "$4" = rw ] || mount -o remount,bind,ro "$t" || { umount "$t"; exit 1; }
    : >"/run/vmpod-volumes/mounted/$1"
}
"#;

/// The archive.
pub(super) fn archive(layout: &Layout) -> Vec<u8> {
    let mut tar = Tar::default();
    let mut script = BEGIN.to_owned();
    tar.directory("files");
    for (name, content) in &layout.volumes {
        // Writing to a string can't fail.
        let written = match content {
            Content::Files(files) => {
                add(&mut tar, name, files);
                writeln!(script, "files {name} {}", version(files))
            }
            Content::Shared(tag) => writeln!(script, "shared {name} {tag}"),
            Content::Disk => writeln!(script, "mkdir -p $disk/{name}; chmod 777 $disk/{name}"),
            Content::Memory(limit) => {
                let size = limit.map_or_else(String::new, |limit| format!(",size={limit}"));
                writeln!(
                    script,
                    "[ -d $all/{name} ] || {{ mkdir -p $all/{name}.new; mount -t tmpfs -o mode=777{size} tmpfs $all/{name}.new; \
                     mkdir $all/{name}; mount -o bind $all/{name}.new $all/{name}; }}"
                )
            }
        };
        written.ok();
    }
    for (number, mount) in layout.mounts.iter().enumerate() {
        let content = layout.volumes.get(&mount.volume);
        let base = match content {
            Some(Content::Disk) => "$disk",
            Some(Content::Shared(_)) => "$share",
            _ => "$all",
        };
        let made = u8::from(!matches!(content, Some(Content::Files(_))));
        let source = if mount.sub_path.is_empty() { String::new() } else { format!("/{}", mount.sub_path) };
        let access = if mount.read_only { "ro" } else { "rw" };
        writeln!(
            script,
            "bind {number} {base}/{}{} {} {access} {made}",
            mount.volume,
            quoted(&source),
            quoted(&mount.target)
        )
        .ok();
    }
    script.push_str("rm -rf /run/vmpod-volumes/new\n");
    tar.file("apply", 0o700, script.as_bytes());
    tar.finish()
}

fn add(tar: &mut Tar, name: &str, files: &Files) {
    let root = format!("files/{name}");
    tar.directory(&root);
    let mut known = BTreeSet::new();
    for (path, file) in files {
        for (at, _) in path.match_indices('/') {
            if known.insert(&path[..at]) {
                tar.directory(&format!("{root}/{}", &path[..at]));
            }
        }
        tar.file(&format!("{root}/{path}"), file.mode, &file.bytes);
    }
}

/// The name of the directory that holds these files.
pub(super) fn version(files: &Files) -> String {
    let mut hash = Sha256::new();
    for (path, file) in files {
        hash.update(format!("{}:{path}:{:o}:{}:", path.len(), file.mode, file.bytes.len()));
        hash.update(&file.bytes);
    }
    let digest = hash.finalize();
    digest[..8].iter().fold("..v".to_owned(), |mut text, byte| {
        write!(text, "{byte:02x}").ok();
        text
    })
}

/// One word of a shell, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
